//! SentencePiece vocabularies as BPE: merges out of scores, spaces as `▁`, unknown bytes as
//! `<0x00>` to `<0xFF>`, in the way the Llama 2 `tokenizer.json` has it.

use std::collections::HashMap;

use serde_json::{Value as Json, json};

/// The merges that a scored vocabulary implies, first to apply first.
///
/// Every way to cut a piece into two pieces is a merge, ranked by the score of the whole. Cuts of
/// one piece are ordered by the ids of their parts; pieces of equal score by their ids. Only pieces
/// that `is_normal` take part, as wholes and as parts: control and byte tokens never arise by
/// merging.
pub(crate) fn merges_from_scores(
    pieces: &[&str],
    scores: &[f64],
    is_normal: impl Fn(usize) -> bool,
) -> Vec<(String, String)> {
    let ids: HashMap<&str, usize> = pieces
        .iter()
        .enumerate()
        .filter(|(id, _)| is_normal(*id))
        .map(|(id, piece)| (*piece, id))
        .collect();
    let mut merges: Vec<(usize, &str, &str)> = Vec::new();
    for (id, piece) in pieces.iter().enumerate().filter(|(id, _)| is_normal(*id)) {
        let mut cuts: Vec<(usize, usize, &str, &str)> = piece
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = piece.split_at(at);
                Some((*ids.get(left)?, *ids.get(right)?, left, right))
            })
            .collect();
        cuts.sort_unstable();
        merges.extend(
            cuts.into_iter()
                .map(|(_, _, left, right)| (id, left, right)),
        );
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]));
    merges
        .into_iter()
        .map(|(_, left, right)| (left.to_string(), right.to_string()))
        .collect()
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
        let merges = merges_from_scores(&pieces, &scores, |id| id != 0);
        let merges: Vec<String> = merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
        // `aba` is a+ba and ab+a: by id of the left part; `<s>` is a control token
        assert_eq!(merges, ["a b", "a ba", "ab a", "b a"]);
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
        let merges = merges_from_scores(&pieces, &scores, |id| id >= 259);
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
