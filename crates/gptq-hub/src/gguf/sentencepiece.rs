//! SentencePiece vocabularies as BPE: merges out of scores, spaces as `▁`, unknown bytes as
//! `<0x00>` to `<0xFF>`, in the way the Llama 2 `tokenizer.json` has it.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

/// Most bytes of all merges together; a vocabulary of 256,000 pieces implies 5 MB.
const MAX_MERGE_BYTES: usize = 64 << 20;

/// The merges that a scored vocabulary implies, first to apply first.
///
/// Every way to cut a piece into two pieces is a merge, ranked by the score of the whole. Cuts of
/// one piece are ordered by the ids of their parts; pieces of equal score by their ids. Only pieces
/// that `is_normal` take part, as wholes and as parts: control and byte tokens never arise by
/// merging.
///
/// `None` where they have more than [`MAX_MERGE_BYTES`], as those of `a`, `aa`, `aaa` and so on may.
pub(crate) fn merges_from_scores(
    pieces: &[&str],
    scores: &[f64],
    is_normal: impl Fn(usize) -> bool,
) -> Option<Vec<(String, String)>> {
    let normal: Vec<usize> = (0..pieces.len()).filter(|&id| is_normal(id)).collect();
    let starts = parents(&normal, pieces, |piece| piece.bytes().collect());
    let ends = parents(&normal, pieces, |piece| piece.bytes().rev().collect());
    let mut merges: Vec<(usize, usize, usize)> = Vec::new();
    let mut bytes = 0;
    for &whole in &normal {
        let mut cuts = cuts(whole, pieces, &starts, &ends);
        bytes += cuts.len() * pieces[whole].len();
        if bytes > MAX_MERGE_BYTES {
            return None;
        }
        cuts.sort_unstable();
        merges.extend(cuts.into_iter().map(|(left, right)| (whole, left, right)));
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]));
    let text = |id: usize| pieces[id].to_string();
    let texts = merges.into_iter();
    Some(
        texts
            .map(|(_, left, right)| (text(left), text(right)))
            .collect(),
    )
}

/// For each piece the longest other piece that it begins with, when read as `spell` has it.
///
/// In the order of their spellings, the pieces that a piece begins with lie before it and one begins
/// with the next: a stack holds them. Looking up every beginning of every piece took the square of a
/// piece's length, 31 s for one of 400 kB.
fn parents(
    normal: &[usize],
    pieces: &[&str],
    spell: impl Fn(&str) -> Vec<u8>,
) -> HashMap<usize, usize> {
    let mut spelled: Vec<(Vec<u8>, usize)> =
        normal.iter().map(|&id| (spell(pieces[id]), id)).collect();
    spelled.sort_unstable();
    let mut parents = HashMap::new();
    let mut stack: Vec<usize> = Vec::new();
    for (at, (spelling, id)) in spelled.iter().enumerate() {
        while let Some(&top) = stack.last() {
            if spelling.starts_with(&spelled[top].0) {
                parents.insert(*id, spelled[top].1);
                break;
            }
            stack.pop();
        }
        stack.push(at);
    }
    parents
}

/// The pairs of pieces that make up a piece.
fn cuts(
    whole: usize,
    pieces: &[&str],
    starts: &HashMap<usize, usize>,
    ends: &HashMap<usize, usize>,
) -> Vec<(usize, usize)> {
    let chain = |parents: &HashMap<usize, usize>| -> Vec<usize> {
        std::iter::successors(parents.get(&whole).copied(), |id| parents.get(id).copied()).collect()
    };
    // both from long to short, so the fitting end of each start is found in one pass from the short
    let (lefts, mut rights) = (chain(starts), chain(ends));
    let length = pieces[whole].len();
    let mut cuts = Vec::new();
    for left in lefts {
        let wanted = length - pieces[left].len();
        while rights
            .last()
            .is_some_and(|&right| pieces[right].len() < wanted)
        {
            rights.pop();
        }
        match rights.last() {
            Some(&right) if pieces[right].len() == wanted => cuts.push((left, right)),
            _ => {}
        }
    }
    cuts
}

/// Spaces become `▁`, one of them before the text if asked for.
pub(crate) fn normalizer(add_prefix_space: bool) -> Json {
    let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
    match add_prefix_space {
        true => json!({
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace],
        }),
        false => replace,
    }
}

/// The way back; strips the space that [`normalizer`] put before the text.
pub(crate) fn decoder(add_prefix_space: bool) -> Json {
    let mut steps = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if add_prefix_space {
        steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    json!({"type": "Sequence", "decoders": steps})
}

/// The first byte that has no token of its own.
pub(crate) fn missing_byte(ids: &HashMap<&str, usize>) -> Option<String> {
    (0..=255u8)
        .map(|byte| format!("<0x{byte:02X}>"))
        .find(|token| !ids.contains_key(token.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_follow_scores_then_ids() {
        let pieces = ["<s>", "a", "b", "ab", "ba", "aba", "s>", "<"];
        let scores = [0.0, -1.0, -2.0, -3.0, -4.0, -3.5, 0.0, 0.0];
        let merges = merges_from_scores(&pieces, &scores, |id| id != 0).unwrap();
        let merges: Vec<String> = merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
        // `aba` is a+ba and ab+a: by id of the left part; `<s>` is a control token
        assert_eq!(merges, ["a b", "a ba", "ab a", "b a"]);
    }

    #[test]
    fn a_long_piece_takes_no_square_of_its_length() {
        // one of 400 kB once took 31 s
        let long = "ab".repeat(400_000);
        let half = "ab".repeat(200_000);
        let pieces = ["a", "b", &half, &long];
        let begun = std::time::Instant::now();
        let merges = merges_from_scores(&pieces, &[0.0; 4], |_| true).unwrap();
        assert_eq!(merges, [(half.clone(), half.clone())]);
        assert!(begun.elapsed().as_secs() < 5);
        // a, aa, aaa: the pairs alone would be gigabytes
        let all = "a".repeat(2000);
        let pieces: Vec<&str> = (1..=2000).map(|length| &all[..length]).collect();
        assert!(merges_from_scores(&pieces, &[0.0; 2000], |_| true).is_none());
    }

    #[test]
    fn the_llama_tokenizer_gets_its_own_merges_back() {
        let Some(path) = crate::data::shared("data/llama-tokenizer/tokenizer.json") else {
            return;
        };
        let text = std::fs::read_to_string(path).unwrap();
        let json: Json = serde_json::from_str(&text).unwrap();
        let vocabulary = json["model"]["vocab"].as_object().unwrap();
        let mut pieces = vec![""; vocabulary.len()];
        for (piece, id) in vocabulary {
            pieces[id.as_u64().unwrap() as usize] = piece;
        }
        // the model file scores the piece of id i with 259 - i, and runs of spaces below all others
        let scores: Vec<f64> = pieces
            .iter()
            .enumerate()
            .map(
                |(id, piece)| match piece.len() > 3 && piece.chars().all(|c| c == '▁') {
                    true => -1e9,
                    false => 259.0 - id as f64,
                },
            )
            .collect();
        let merges = merges_from_scores(&pieces, &scores, |id| id >= 259).unwrap();
        let expected: Vec<(String, String)> = json["model"]["merges"]
            .as_array()
            .unwrap()
            .iter()
            .map(|merge| {
                let (left, right) = merge.as_str().unwrap().split_once(' ').unwrap();
                (left.to_string(), right.to_string())
            })
            .collect();
        assert_eq!(merges.len(), expected.len());
        let differs = merges.iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(differs, None);
    }
}
