//! Windows that calibration did not see, of the same source: what a result is checked on.

use std::collections::HashSet;

use crate::CalibrationError;
use crate::evaluation::{EvaluationWindows, MIN_SEQ_LEN};
use crate::material::Material;
use crate::sample::{Drawn, Search, WindowSpec};

/// Refuses windows that predict nothing, and more tokens than can be meant.
pub(crate) fn check(count: usize, spec: &WindowSpec) -> Result<(), CalibrationError> {
    if count == 0 {
        return Ok(());
    }
    if spec.seq_len < MIN_SEQ_LEN {
        return Err(CalibrationError::Spec {
            field: "seq_len",
            value: spec.seq_len,
            expected: format!("at least {MIN_SEQ_LEN}, since windows are held out"),
        });
    }
    let samples = count;
    WindowSpec { samples, ..*spec }.check()
}

/// Held-out windows of a joined text `tokens`, spread evenly over all windows that fit between the drawn
/// ones. `spec` is that of the text, without a BOS in front of its windows.
pub(crate) fn joined(
    tokens: &[u32],
    drawn: &Drawn,
    count: usize,
    spec: &WindowSpec,
    material: &Material,
) -> Result<Option<EvaluationWindows>, CalibrationError> {
    let seq_len = spec.seq_len;
    let starts = drawn.places.iter().map(|&(_, start)| start);
    let free = free_starts(tokens.len(), starts, seq_len);
    let chosen = spread(&free, count).ok_or_else(|| lack(free.len(), count, seq_len, material))?;
    let ids = (chosen.iter())
        .map(|&start| tokens[start..start + seq_len].to_vec())
        .collect();
    let rule = format!(
        "spread evenly over the {} that fit between the windows of calibration",
        free.len()
    );
    Ok(named(ids, seq_len, &rule, material))
}

/// Held-out windows of documents, each from a document that no other window is from.
pub(crate) fn documents(
    mut search: Search<'_>,
    drawn: &Drawn,
    count: usize,
    spec: &WindowSpec,
    material: &Material,
    encode: &(impl Fn(&str) -> Result<Vec<u32>, CalibrationError> + Sync),
) -> Result<Option<EvaluationWindows>, CalibrationError> {
    for &(document, _) in &drawn.places {
        search.pass_over(document);
    }
    let mut ids = Vec::new();
    while ids.len() < count {
        match search.next_window(&material.place(), encode) {
            Ok(((document, _), window)) => {
                search.pass_over(document);
                ids.push(window);
            }
            Err(CalibrationError::NoLongDocument { .. }) => {
                return Err(lack(ids.len(), count, spec.seq_len, material));
            }
            Err(error) => return Err(error),
        }
    }
    let rule = "each at random in a document that no other window is from, by the draws after those \
                of calibration";
    Ok(named(ids, spec.seq_len, rule, material))
}

/// Stored windows after the first `samples`. Their places in a text are unknown, so only duplicates of
/// earlier windows are skipped.
pub(crate) fn stored(
    ids: &[Vec<u32>],
    samples: usize,
    count: usize,
    material: &Material,
) -> Result<Option<EvaluationWindows>, CalibrationError> {
    let (seen, rest) = ids.split_at(samples.min(ids.len()));
    let mut known: HashSet<&[u32]> = seen.iter().map(Vec::as_slice).collect();
    let found: Vec<Vec<u32>> = (rest.iter())
        .filter(|window| window.len() >= MIN_SEQ_LEN && known.insert(window))
        .take(count)
        .cloned()
        .collect();
    let longest = ids.iter().map(Vec::len).max().unwrap_or(0);
    if found.len() < count {
        return Err(lack(found.len(), count, longest, material));
    }
    let rule = format!("stored after the first {samples}");
    Ok(named(found, longest, &rule, material))
}

fn named(
    ids: Vec<Vec<u32>>,
    seq_len: usize,
    rule: &str,
    material: &Material,
) -> Option<EvaluationWindows> {
    let (title, rows) = (&material.title, material.rows_words());
    let count = ids.len();
    let words = format!("{title}, {rows}{count} windows of {seq_len} tokens held out: {rule}");
    (count > 0).then(|| EvaluationWindows::new(ids, &words, material.bos))
}

fn lack(found: usize, wanted: usize, seq_len: usize, material: &Material) -> CalibrationError {
    CalibrationError::HeldOut {
        path: material.place(),
        found,
        wanted,
        seq_len,
    }
}

/// Starts of windows of `seq_len` tokens, one after the other, in the parts of a text of `tokens` that
/// no window at `taken` covers.
fn free_starts(
    tokens: usize,
    taken: impl IntoIterator<Item = usize>,
    seq_len: usize,
) -> Vec<usize> {
    let mut taken: Vec<usize> = taken.into_iter().collect();
    taken.sort_unstable();
    let (mut free, mut from) = (Vec::new(), 0);
    for start in taken.into_iter().chain([tokens]) {
        while from + seq_len <= start {
            free.push(from);
            from += seq_len;
        }
        from = from.max(start.saturating_add(seq_len));
    }
    free
}

/// `count` of `all`, at equal distances; nothing where there are fewer.
fn spread(all: &[usize], count: usize) -> Option<Vec<usize>> {
    let at = |index: usize| all[index * all.len() / count];
    (count <= all.len()).then(|| (0..count).map(at).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_windows_touch_no_taken_one_and_fill_the_gaps() {
        assert_eq!(free_starts(20, [8], 4), [0, 4, 12, 16]);
        assert_eq!(free_starts(20, [9, 7], 4), [0, 13]);
        assert_eq!(free_starts(20, [0, 16, 0], 4), [4, 8, 12]);
        assert_eq!(free_starts(11, [3], 4), [7]);
        assert!(free_starts(8, [2], 4).is_empty());
        assert_eq!(free_starts(9, [], 4), [0, 4]);
    }

    #[test]
    fn chosen_windows_are_spread() {
        assert_eq!(spread(&[0, 4, 12, 16], 2), Some(vec![0, 12]));
        assert_eq!(spread(&[0, 4, 12], 3), Some(vec![0, 4, 12]));
        assert_eq!(spread(&[0, 4], 3), None);
        assert_eq!(spread(&[], 0), Some(Vec::new()));
    }
}
