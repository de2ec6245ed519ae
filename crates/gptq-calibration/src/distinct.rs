//! Counts of distinct material in windows.
//!
//! The Hessian of a layer is a sum of one outer product a token, so its rank is at most the number
//! of tokens that differ. Two counts, since a text can fail in two ways:
//!
//! - [`positions`]: places of the source that some window covers. Windows overlap, so a text of 62
//!   tokens gives 62 of them, however many windows are drawn.
//! - [`contexts`]: a token with the [`CONTEXT`] - 1 before it. A sentence that is repeated has as
//!   many of them as tokens, however long the text is. Attention looks further back, so repeated
//!   tokens are not quite equal to a layer; they are close enough to say nothing new.

use std::collections::HashSet;

use gptq_types::CalibrationRecord;
use rayon::slice::ParallelSliceMut;

/// Tokens of a context: long enough that honest prose seldom repeats one, short enough that a
/// repeated sentence does.
pub(crate) const CONTEXT: usize = 8;

/// The place of a drawn window: the document (0 for a single text) and the offset in it.
pub(crate) type Place = (usize, usize);

/// Positions that windows of `seq_len` tokens at `places` cover together.
pub(crate) fn positions(places: &[Place], seq_len: usize) -> usize {
    let mut sorted = places.to_vec();
    sorted.sort_unstable();
    let (mut covered, mut document, mut end) = (0, usize::MAX, 0);
    for (at, start) in sorted {
        let from = if at == document {
            start.max(end)
        } else {
            start
        };
        document = at;
        end = start + seq_len;
        covered += end - from;
    }
    covered
}

/// Tokens of the windows that differ: of stored and generated windows no more is known.
pub(crate) fn positions_of_windows(ids: &[Vec<u32>]) -> usize {
    let different: HashSet<&[u32]> = ids.iter().map(Vec::as_slice).collect();
    different.iter().map(|window| window.len()).sum()
}

/// Contexts that differ. A window's first tokens have fewer before them; such a short context
/// counts unless it ends another one.
///
/// Contexts are sorted with the newest token first, so one that ends another stands before it.
pub(crate) fn contexts(ids: &[Vec<u32>]) -> usize {
    let mut all: Vec<[u32; CONTEXT]> = (ids.iter())
        .flat_map(|window| (1..=window.len()).map(|end| context(&window[..end])))
        .take(CalibrationRecord::COUNTED_TOKENS) // 128 MB while they are sorted
        .collect();
    all.par_sort_unstable();
    let repeated = |pair: &&[[u32; CONTEXT]]| {
        let length = pair[0].iter().take_while(|&&token| token != 0).count();
        pair[0][..length] == pair[1][..length]
    };
    all.len() - all.windows(2).filter(repeated).count()
}

/// The last tokens of `text`, newest first, each above 0; 0 where there are none.
fn context(text: &[u32]) -> [u32; CONTEXT] {
    let mut context = [0; CONTEXT];
    for (place, token) in context.iter_mut().zip(text.iter().rev()) {
        *place = token.saturating_add(1);
    }
    context
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overlap_counts_once_and_documents_count_apart() {
        assert_eq!(positions(&[(0, 0), (0, 1), (0, 0)], 60), 61);
        assert_eq!(positions(&[(0, 100), (0, 0)], 60), 120);
        assert_eq!(positions(&[(1, 0), (0, 0), (1, 30)], 60), 150);
        assert_eq!(positions(&[], 60), 0);
        let stored = [vec![1, 2], vec![1, 2], vec![1, 2, 3]];
        assert_eq!(positions_of_windows(&stored), 5);
    }

    #[test]
    fn a_repeated_sentence_has_as_many_contexts_as_tokens() {
        let text: Vec<u32> = (0..10).cycle().take(1000).collect();
        let windows: Vec<Vec<u32>> = (0..100).map(|at| text[at..at + 64].to_vec()).collect();
        assert_eq!(contexts(&windows), 10);
        assert_eq!(contexts(&[vec![5; 1000], vec![5; 3]]), 1);
        let counting: Vec<u32> = (0..1000).collect();
        assert_eq!(contexts(&[counting]), 1000);
        assert_eq!(contexts(&[vec![1], vec![2], vec![1]]), 2);
        assert_eq!(contexts(&[]), 0);
    }

    /// Against the definition, token by token.
    #[test]
    fn the_count_is_that_of_the_definition() {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) % 3
        };
        let windows: Vec<Vec<u32>> = [3, 40, 9, 1, 60, 25]
            .map(|length| (0..length).map(|_| next()).collect())
            .to_vec();
        let all: HashSet<Vec<u32>> = (windows.iter())
            .flat_map(|window| {
                (1..=window.len()).map(|end| window[end.saturating_sub(CONTEXT)..end].to_vec())
            })
            .collect();
        let ends_another = |short: &&Vec<u32>| {
            all.iter()
                .any(|other| other != *short && other.ends_with(short))
        };
        let expected = all.len() - all.iter().filter(ends_another).count();
        assert_eq!(contexts(&windows), expected);
    }
}
