//! How windows are cut into batches and steps.

/// Most windows of a step of training.
pub const STEP_WINDOWS: usize = 4;
/// Most tokens of a step of training, unless one window has more.
pub const STEP_TOKENS: usize = 8192;

/// Consecutive windows of one length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowRun {
    /// How many.
    pub windows: usize,
    /// Tokens of each.
    pub tokens: usize,
}

impl WindowRun {
    /// The runs of a list of windows; empty windows are left out.
    pub fn of(windows: &[Vec<u32>]) -> Vec<WindowRun> {
        (windows.chunk_by(|a, b| a.len() == b.len()))
            .map(|same| WindowRun {
                windows: same.len(),
                tokens: same[0].len(),
            })
            .filter(|run| run.tokens > 0)
            .collect()
    }

    /// Tokens in all.
    pub fn all_tokens(self) -> usize {
        self.windows.saturating_mul(self.tokens)
    }

    /// Steps of training that it is cut into.
    pub fn steps(self) -> usize {
        self.windows.div_ceil(windows_of_step(self.tokens))
    }

    /// Windows of each batch of at most `batch_tokens`, or one window; in training no more than a step takes.
    pub(crate) fn batches(
        self,
        batch_tokens: usize,
        trains: bool,
    ) -> impl Iterator<Item = usize> + use<> {
        let WindowRun { windows, tokens } = self;
        let most = (batch_tokens / tokens.max(1)).max(1);
        let step = match trains {
            true => windows_of_step(tokens),
            false => windows.max(1),
        };
        (0..windows).step_by(step).flat_map(move |first| {
            let last = (first + step).min(windows);
            (first..last)
                .step_by(most)
                .map(move |first| most.min(last - first))
        })
    }
}

/// Windows of a step of training.
pub(crate) fn windows_of_step(tokens: usize) -> usize {
    (STEP_TOKENS / tokens.max(1)).clamp(1, STEP_WINDOWS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_ends_with_its_step() {
        let cut = |windows, tokens, trains| -> Vec<usize> {
            WindowRun { windows, tokens }
                .batches(8192, trains)
                .collect()
        };
        assert_eq!(cut(10, 2048, false), [4, 4, 2]);
        assert_eq!(cut(10, 1024, false), [8, 2]);
        assert_eq!(cut(10, 1024, true), [4, 4, 2]);
        assert_eq!(cut(3, 10_000, true), [1, 1, 1]);
        let on_a_processor = WindowRun {
            windows: 6,
            tokens: 1024,
        };
        let batches: Vec<usize> = on_a_processor.batches(2048, true).collect();
        assert_eq!(batches, [2, 2, 2]);
        assert_eq!(on_a_processor.steps(), 2);
        assert_eq!(WindowRun::of(&[vec![], vec![1; 3], vec![2; 3]]).len(), 1);
    }
}
