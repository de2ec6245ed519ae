//! Tolerances of figures, derived from how far they move by noise.

use gptq_types::{EvalRecord, Tolerance, Tolerances};

use super::{LayerOutcome, Outcome};

/// A code that lies on a rounding boundary takes a few later ones with it; one such code changed the
/// error of a 64 x 64 linear by 0.13 %.
const LEAST_LAYER_ERROR: f64 = 0.01;
/// For stories260k under SSE4.2 and AVX2 the two errors differed by at most 5e-8.
const FILE_ERROR: f64 = 1e-4;
/// f32 against f64 over five blocks was within it.
const REFERENCE_NLL: f64 = 1e-4;
const LEAST_KL: f64 = 0.02;
/// One pair of runs shows one draw of the noise; a draw beyond four times another is rare.
const MARGIN: f64 = 4.0;

/// From a run, from another that added up the calibration windows in opposite order, and from the
/// scores of the first against the float model.
pub fn tolerances(first: &Outcome, reversed: &Outcome, scored: &EvalRecord) -> Tolerances {
    Tolerances {
        layer_error: layer_error(&first.layers, &reversed.layers),
        file_error: Tolerance {
            value: FILE_ERROR,
            reason:
                "the same codes on the same tokens, measured twice: only the order of f32 sums \
                     can differ"
                    .to_string(),
        },
        reference_nll: Tolerance {
            value: REFERENCE_NLL,
            reason: "f32 rounding through the forward pass; the weights are the same".to_string(),
        },
        nll: nll(scored),
        kl: kl(first, reversed),
        top1_agreement: top1_agreement(first, reversed, scored),
    }
}

fn layer_error(first: &[LayerOutcome], reversed: &[LayerOutcome]) -> Tolerance {
    let moved = |(a, b): (&LayerOutcome, &LayerOutcome)| relative(a.file_error, b.file_error);
    let largest = first.iter().zip(reversed).map(moved).fold(0.0, f64::max);
    Tolerance {
        value: upwards(LEAST_LAYER_ERROR.max(MARGIN * largest)),
        reason: format!(
            "{MARGIN} times the largest change of a layer when calibration windows are added up in \
             opposite order ({} %), at least {} %: codes on a rounding boundary fall either way on \
             another kind of processor",
            percent(largest),
            percent(LEAST_LAYER_ERROR)
        ),
    }
}

/// Windows differ more from each other than models do: where the record has the difference window by
/// window, that is the one to use.
fn nll(scored: &EvalRecord) -> Tolerance {
    match &scored.nll_difference {
        Some(difference) => Tolerance {
            value: upwards(difference.noise_floor()),
            reason: format!(
                "half of the 95 % confidence interval of the difference from the float model, paired \
                 by window over {} windows: less cannot be told from none on other text",
                scored.windows
            ),
        },
        None => Tolerance {
            value: upwards(scored.nll_stderr),
            reason: format!(
                "standard error over {} windows, which are not paired with the float model's",
                scored.windows
            ),
        },
    }
}

fn kl(first: &Outcome, reversed: &Outcome) -> Tolerance {
    let moved = match (&first.overall, &reversed.overall) {
        (Some(a), Some(b)) => relative(a.kl, b.kl),
        _ => 0.0,
    };
    Tolerance {
        value: upwards(LEAST_KL.max(MARGIN * moved)),
        reason: format!(
            "{MARGIN} times the change when calibration windows are added up in opposite order ({} \
             %), at least {} %",
            percent(moved),
            percent(LEAST_KL)
        ),
    }
}

fn top1_agreement(first: &Outcome, reversed: &Outcome, scored: &EvalRecord) -> Tolerance {
    let moved = match (&first.overall, &reversed.overall) {
        (Some(a), Some(b)) => (a.top1_agreement - b.top1_agreement).abs(),
        _ => 0.0,
    };
    let share = scored.top1_agreement.unwrap_or(0.0);
    let positions = (scored.windows * scored.seq_len.saturating_sub(1)).max(1);
    let standard_error = (share * (1.0 - share) / positions as f64).sqrt();
    Tolerance {
        value: upwards(standard_error.max(MARGIN * moved)),
        reason: format!(
            "the larger of one standard error of the share over {positions} positions and {MARGIN} \
             times the change when calibration windows are added up in opposite order ({} %)",
            percent(moved)
        ),
    }
}

fn relative(a: f64, b: f64) -> f64 {
    match a == b {
        true => 0.0,
        false => (b / a - 1.0).abs(),
    }
}

fn percent(share: f64) -> f64 {
    upwards(100.0 * share)
}

/// Two significant digits, never less than `value`.
fn upwards(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return value;
    }
    let unit = 10f64.powf(value.log10().floor() - 1.0);
    // Through text, so that 0.012 is not 0.012000000000000002.
    let rounded = (value / unit - 1e-9).ceil() * unit;
    format!("{rounded:.1e}").parse().unwrap_or(rounded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_rounded_up_to_two_digits() {
        assert_eq!(upwards(0.01), 0.01);
        assert_eq!(upwards(0.012_01), 0.013);
        assert_eq!(upwards(3.4e-8), 3.4e-8);
        assert_eq!(upwards(0.0), 0.0);
        assert_eq!(upwards(9.91), 10.0);
    }
}
