//! From scores of windows to the numbers of a record.

use gptq_types::{Accuracy, PairedDifference, kl};

use crate::confidence::{mean_and_error, paired_difference};
use crate::perplexity::{Divergence, WindowScore};

/// Parts of the window that the divergence is shown for, at most.
const POSITION_PARTS: usize = 32;

/// The percentile that marks the tail, per mille of all positions.
const TAIL_PER_MILLE: usize = 999;

/// Scores of one model on one text.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean over windows of the mean negative log-likelihood over `seq_len - 1` predictions, nats.
    pub nll: f64,
    /// Standard error of that mean over windows.
    pub nll_stderr: f64,
    /// Against the reference, where windows were compared with one.
    pub comparison: Option<Comparison>,
    /// Windows scored.
    pub windows: usize,
}

/// A model compared with the reference.
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Mean KL divergence from the reference, nats.
    pub kl: f64,
    /// The value that 99.9 % of all positions stay below: the percentile with linear interpolation
    /// between order statistics (type 7 of Hyndman and Fan 1996, as numpy and llama.cpp have it),
    /// over all positions of all windows. Below 1001 positions it lies between the two largest.
    pub kl_p999: f64,
    /// Mean KL divergence in up to 32 equal parts of the window, first to last.
    pub kl_by_position: Vec<f64>,
    /// Share of positions whose likeliest token is the reference's.
    pub top1_agreement: f64,
    /// Likelihood against the reference's; absent below three windows.
    pub nll_difference: Option<PairedDifference>,
}

/// Above it perplexities overflow, or their ratios do.
const LARGEST: f64 = 1e300;

/// A mean negative log-likelihood, in nats, whose exponential is no number to work with.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the mean negative log-likelihood is {0:.4e} nats, too much for a perplexity")]
pub struct NoPerplexity(pub f64);

impl Evaluation {
    /// `exp(nll)`, the papers' perplexity: windows count alike, whatever text follows them.
    ///
    /// # Errors
    /// A likelihood so small that this is no finite number.
    pub fn perplexity(&self) -> Result<f64, NoPerplexity> {
        match self.nll.exp() {
            perplexity if perplexity < LARGEST => Ok(perplexity),
            _ => Err(NoPerplexity(self.nll)),
        }
    }
}

/// Sums up the windows of one model; `first` holds the reference's scores of the same windows.
pub fn summarize(own: &[WindowScore], first: &[WindowScore]) -> Evaluation {
    let likelihoods =
        |scores: &[WindowScore]| -> Vec<f64> { scores.iter().map(|score| score.nll).collect() };
    let (nll, nll_stderr) = mean_and_error(&likelihoods(own));
    let divergences: Option<Vec<&Divergence>> =
        own.iter().map(|score| score.divergence.as_ref()).collect();
    let comparison = divergences.filter(|found| !found.is_empty());
    Evaluation {
        nll,
        nll_stderr,
        comparison: comparison.map(|windows| {
            let mean = |of: fn(&Divergence) -> f64| {
                windows.iter().map(|window| of(window)).sum::<f64>() / windows.len() as f64
            };
            Comparison {
                kl: kl(mean(|window| window.kl)),
                kl_p999: kl(tail(&windows)),
                kl_by_position: by_position(&windows).into_iter().map(kl).collect(),
                top1_agreement: mean(|window| window.top1),
                nll_difference: paired_difference(&likelihoods(own), &likelihoods(first)),
            }
        }),
        windows: own.len(),
    }
}

/// See [`Comparison::kl_p999`].
fn tail(windows: &[&Divergence]) -> f64 {
    let mut values: Vec<f32> = (windows.iter())
        .flat_map(|window| window.by_position.iter().copied())
        .collect();
    if values.is_empty() {
        return 0.0;
    }
    // Whole numbers, so that a rank that falls on a position is that position.
    let place = TAIL_PER_MILLE * (values.len() - 1);
    let (rank, between) = (place / 1000, (place % 1000) as f64 / 1000.0);
    let (_, below, above) = values.select_nth_unstable_by(rank, f32::total_cmp);
    let below = f64::from(*below);
    let above = (above.iter().copied().min_by(f32::total_cmp)).map_or(below, f64::from);
    below + between * (above - below)
}

/// Means over windows; a window's position counts where it lies in that window.
fn by_position(windows: &[&Divergence]) -> Vec<f64> {
    let shortest = windows.iter().map(|window| window.by_position.len()).min();
    let parts = POSITION_PARTS.min(shortest.unwrap_or(0));
    if parts == 0 {
        return Vec::new();
    }
    let mut sums = vec![(0.0, 0usize); parts];
    for window in windows {
        let positions = window.by_position.len();
        for (at, &kl) in window.by_position.iter().enumerate() {
            let (sum, count) = &mut sums[at * parts / positions];
            *sum += f64::from(kl);
            *count += 1;
        }
    }
    sums.into_iter()
        .map(|(sum, count)| sum / count as f64)
        .collect()
}

/// Share of right answers with its standard error, `sqrt(p (1 - p) / (n - 1))`, as
/// lm-evaluation-harness has it; 0 for one answer, which has none.
pub fn accuracy(task: &str, answers: &[bool]) -> Accuracy {
    let right: Vec<f64> = answers.iter().map(|&right| f64::from(right)).collect();
    let (share, stderr) = mean_and_error(&right);
    Accuracy {
        task: task.to_string(),
        examples: answers.len(),
        share,
        stderr,
        acc_norm: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(nll: f64, kl: &[f32]) -> WindowScore {
        WindowScore {
            nll,
            divergence: Some(Divergence {
                kl: kl.iter().copied().map(f64::from).sum::<f64>() / kl.len() as f64,
                top1: 0.5,
                by_position: kl.to_vec(),
            }),
        }
    }

    fn plain(nll: f64) -> WindowScore {
        WindowScore {
            nll,
            divergence: None,
        }
    }

    fn compared(own: &[WindowScore]) -> Comparison {
        let first: Vec<WindowScore> = own.iter().map(|_| plain(1.0)).collect();
        summarize(own, &first).comparison.unwrap()
    }

    /// A window without positions divided by none of them: `0 * 0 / 0` panicked.
    #[test]
    fn a_window_without_positions_has_no_parts() {
        let parts = compared(&[window(1.0, &[]), window(1.0, &[0.5])]).kl_by_position;
        assert_eq!(parts, [0.0; 0]);
        assert!(summarize(&[], &[]).comparison.is_none());
    }

    /// By hand: the percentile of 0, 1, ..., 2000, shuffled over windows, is 99.9 % of 2000 steps, 1998; of
    /// 0 ... 499 it is 498.501; of 3 and 7 it is 6.996. `numpy.percentile(x, 99.9)` agrees.
    #[test]
    fn the_tail_is_interpolated_between_positions() {
        let shuffled = |n: usize| -> Vec<f32> { (0..n).map(|i| (i * 7 % n) as f32).collect() };
        let all = shuffled(2001);
        let (one, two) = all.split_at(667);
        assert_eq!(
            compared(&[window(1.0, one), window(1.0, two)]).kl_p999,
            1998.0
        );
        let found = compared(&[window(1.0, &shuffled(500))]).kl_p999;
        assert!((found - 498.501).abs() < 1e-9, "{found}");
        let found = compared(&[window(1.0, &[7.0, 3.0])]).kl_p999;
        assert!((found - 6.996).abs() < 1e-9, "{found}");
        assert_eq!(compared(&[window(1.0, &[0.25])]).kl_p999, 0.25);
    }

    #[test]
    fn positions_fall_into_equal_parts() {
        let two = compared(&[window(1.0, &[1.0, 2.0, 3.0]), window(1.0, &[3.0, 2.0, 7.0])]);
        assert_eq!(two.kl_by_position, [2.0, 2.0, 5.0]);
        assert_eq!((two.kl, two.top1_agreement), (3.0, 0.5));
        assert_eq!(two.nll_difference, None);
        // 64 positions: two to each of 32 parts
        let ramp: Vec<f32> = (0..64).map(|at| at as f32).collect();
        let parts = compared(&[window(1.0, &ramp)]).kl_by_position;
        let want: Vec<f64> = (0..32).map(|part| 2.0 * part as f64 + 0.5).collect();
        assert_eq!(parts, want);
        // 2047, the papers' window: 63 or 64 to each, every position once
        let parts = compared(&[window(1.0, &vec![1.5; 2047])]).kl_by_position;
        assert_eq!(parts, vec![1.5; 32]);
    }

    #[test]
    fn the_first_has_nothing_to_compare() {
        let found = summarize(&[plain(2.0), plain(4.0)], &[]);
        assert_eq!((found.nll, found.windows), (3.0, 2));
        assert_eq!(found.nll_stderr, 1.0);
        assert_eq!(found.perplexity(), Ok(3.0f64.exp()));
        assert_eq!(found.comparison, None);
    }

    /// Such a perplexity was once `inf`, and `null` in JSON, at exit 0.
    #[test]
    fn a_likelihood_too_small_for_a_perplexity_is_told() {
        let found = summarize(&[plain(700.0), plain(720.0)], &[]);
        assert_eq!(found.perplexity(), Err(NoPerplexity(710.0)));
        let text = found.perplexity().unwrap_err().to_string();
        assert!(text.contains("is 7.1000e2 nats"), "{text}");
        let nan = summarize(&[plain(f64::NAN)], &[]);
        assert!(nan.perplexity().is_err());
    }

    /// The divergence was once printed as -0.0000, or below 0.
    #[test]
    fn the_divergence_of_equal_models_is_not_negative() {
        let found = compared(&[window(1.0, &[-1e-7, -3e-7]), window(1.0, &[0.0, 1e-7])]);
        for kl in found
            .kl_by_position
            .into_iter()
            .chain([found.kl, found.kl_p999])
        {
            assert!(kl.is_sign_positive(), "{kl}");
        }
    }

    #[test]
    fn a_share_has_the_error_of_the_harness() {
        let found = accuracy("lambada", &[true, false, true, true, false]);
        assert_eq!((found.examples, found.share), (5, 0.6));
        assert!((found.stderr - (0.6f64 * 0.4 / 4.0).sqrt()).abs() < 1e-12);
        assert_eq!(accuracy("lambada", &[true]).stderr, 0.0);
    }
}
