//! Confidence intervals of means over windows.

use std::f64::consts::{FRAC_PI_2, PI};

use gptq_types::PairedDifference;

/// Share of intervals that hold the true mean.
const CONFIDENCE: f64 = 0.95;

/// Fewest windows for an interval: one from two windows is twelve standard errors wide, and useless.
const LEAST_WINDOWS: usize = 3;

/// Mean of `own - first` over windows with its 95 % confidence interval, paired by window: both
/// models saw the same text, so most of what makes windows differ cancels.
///
/// `None` below three windows. Windows of one text are taken as independent; neighbours are not
/// quite, so the interval is a little too narrow.
pub fn paired_difference(own: &[f64], first: &[f64]) -> Option<PairedDifference> {
    if own.len() != first.len() || own.len() < LEAST_WINDOWS {
        return None;
    }
    let differences: Vec<f64> = own
        .iter()
        .zip(first)
        .map(|(own, first)| own - first)
        .collect();
    let (mean, error) = mean_and_error(&differences);
    let reach = student_t(differences.len() - 1, CONFIDENCE) * error;
    Some(PairedDifference {
        mean,
        low: mean - reach,
        high: mean + reach,
    })
}

/// Mean and its standard error; the error of fewer than two values is 0.
pub(crate) fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (squares / (n - 1.0).max(1.0) / n).sqrt())
}

/// The `t` within which Student's variable of `freedom` degrees lies with probability `within`.
fn student_t(freedom: usize, within: f64) -> f64 {
    let scale = (freedom as f64).sqrt();
    // The probability rises with the angle, so halving it finds the last bit in 53 steps.
    let (mut low, mut high) = (0.0, FRAC_PI_2);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match probability_within(freedom, middle) < within {
            true => low = middle,
            false => high = middle,
        }
    }
    scale * ((low + high) / 2.0).tan()
}

/// Probability of `|T| < t` at `angle = atan(t / sqrt(freedom))`: the finite sums of Abramowitz and
/// Stegun, 26.7.3 (odd) and 26.7.4 (even).
fn probability_within(freedom: usize, angle: f64) -> f64 {
    let (sine, cosine) = angle.sin_cos();
    let odd = freedom % 2 == 1;
    // 1, 1/2, 1/2 3/4 ... with powers of cos² for even degrees; cos, 2/3 cos³ ... for odd ones.
    let mut term = if odd { cosine } else { 1.0 };
    let mut sum = 0.0;
    for step in (if odd { 3 } else { 2 }..=freedom).step_by(2) {
        sum += term;
        let step = step as f64;
        term *= cosine * cosine * (step - 1.0) / step;
    }
    match odd {
        true => 2.0 / PI * (angle + sine * sum),
        false => sine * sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The two-sided 95 % column of printed tables (e.g. NIST/SEMATECH handbook 1.3.6.7.2), with
    /// more digits by closed forms: `tan(0.475 π)` for 1, `0.95 / sqrt(0.04875)` for 2.
    #[test]
    fn quantiles_are_those_of_the_tables() {
        let close = |freedom, want: f64, digits: f64| {
            let found = student_t(freedom, CONFIDENCE);
            assert!((found - want).abs() < digits, "{freedom}: {found}, {want}");
        };
        close(1, (0.475 * PI).tan(), 1e-9);
        close(2, 0.95 / 0.04875f64.sqrt(), 1e-9);
        for (freedom, want) in [
            (3, 3.182),
            (4, 2.776),
            (5, 2.571),
            (9, 2.262),
            (10, 2.228),
            (30, 2.042),
            (60, 2.000),
            (100, 1.984),
        ] {
            close(freedom, want, 5.1e-4);
        }
        close(100_001, 1.959_988, 1e-5);
    }

    /// By hand: differences 0.1, 0.2, 0.3, 0.6 have the mean 0.3 and the squares 0.04, 0.01, 0,
    /// 0.09, so the variance 0.14 / 3, the error sqrt(0.14 / 12) = 0.108012 and, with 3.182446 for
    /// three degrees of freedom, the reach 0.343743.
    #[test]
    fn the_interval_is_the_one_worked_out_by_hand() {
        let first = [2.0, 3.0, 1.0, 4.0];
        let own = [2.1, 3.2, 1.3, 4.6];
        let found = paired_difference(&own, &first).unwrap();
        assert!((found.mean - 0.3).abs() < 1e-12, "{found:?}");
        assert!((found.low - (0.3 - 0.343_743)).abs() < 1e-6, "{found:?}");
        assert!((found.high - (0.3 + 0.343_743)).abs() < 1e-6, "{found:?}");
        assert!((found.noise_floor() - 0.343_743).abs() < 1e-6);
    }

    /// Windows differ by far more than the models, so an unpaired test would show nothing.
    #[test]
    fn what_windows_have_in_common_cancels() {
        let first = [1.0, 9.0, 4.0, 2.0, 7.0];
        let own: Vec<f64> = first.iter().map(|nll| nll + 0.01).collect();
        let found = paired_difference(&own, &first).unwrap();
        assert!((found.mean - 0.01).abs() < 1e-12);
        assert!(found.noise_floor() < 1e-12, "{found:?}");
        assert!(mean_and_error(&first).1 > 1.0);
    }

    #[test]
    fn two_windows_give_no_interval() {
        assert_eq!(paired_difference(&[1.0, 2.0], &[1.0, 1.5]), None);
        assert!(paired_difference(&[1.0, 2.0, 3.0], &[1.0, 1.5, 2.0]).is_some());
        assert_eq!(paired_difference(&[1.0, 2.0, 3.0], &[1.0, 1.5]), None);
    }
}
