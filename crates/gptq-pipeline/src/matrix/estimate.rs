//! What a branch will cost, about.

use gptq_model::DecoderConfig;
use gptq_types::{ColumnOrder, LossMeasure, Method, Permutation, Stage};

/// Bytes that a process holds whatever it works on.
const FIXED: u128 = 150 << 20;

/// Shares of the tokens that a float stream follows, and whose differences are squared.
pub(crate) const FOLLOWED: f64 = 6.0 / 8.0;
pub(crate) const SQUARED: f64 = 1.0 / 8.0;

/// Orders that `auto` tries on an input, about.
const ORDERS_TRIED: f64 = 3.5;

/// Floating-point operations: one forward pass, the Hessians, the factors, the sweeps.
pub(super) fn flop(config: &DecoderConfig, permutation: &Permutation) -> f64 {
    let blocks = config.num_hidden_layers as f64;
    if permutation.spec.method == Method::Rtn {
        return 0.0;
    }
    let calibration = &permutation.calibration;
    let tokens = calibration.samples as f64 * calibration.seq_len as f64;
    let aims = permutation.spec.measure() == LossMeasure::FloatOutputs;
    let passes = if aims { 1.0 + FOLLOWED } else { 1.0 };
    let mut block = passes * config.block_flop(calibration.samples, calibration.seq_len);
    for stage in Stage::ALL {
        let linears = config.linears(0, stage);
        let k = linears[0].1 as f64;
        let n: usize = linears.iter().map(|(_, _, n)| n).sum();
        // X^T X is symmetric; K^3 for factor and inverse; K^2 for each output, and as much again
        // for measuring its error against rounding to nearest; twice that for a pass of descent.
        let passes = f64::from(permutation.spec.descent_passes);
        let solve = (1.0 + 2.0 * passes) * k * k * n as f64;
        block += tokens * k * k + k * k * k + solve + k * k * n as f64;
        if permutation.spec.order == ColumnOrder::Auto {
            // A factor for each order, and a share of the outputs.
            block += ORDERS_TRIED * (k * k * k + solve / 8.0);
        }
        if aims {
            // A full product and a symmetric one; four products with each weight.
            block += tokens * k * k * (2.0 * FOLLOWED + SQUARED) + 8.0 * k * k * n as f64;
        }
    }
    blocks * block
}

/// Bytes resident on the processor, as docs/ARCHITECTURE.md counts them. Shapes and windows may be
/// of any size here, so that a plan is refused for what it would take and not for an overflow.
pub(super) fn memory(config: &DecoderConfig, permutation: &Permutation) -> u64 {
    let linears = config.block_linears(0);
    let product = |(_, k, n): &(_, usize, usize)| (*k as u128).saturating_mul(*n as u128);
    let block = linears.iter().map(product).fold(0, u128::saturating_add);
    let largest = linears.iter().map(product).max().unwrap_or(0);
    let widest = linears
        .iter()
        .map(|&(_, k, _)| k as u128)
        .max()
        .unwrap_or(0);
    let calibration = &permutation.calibration;
    let tokens = match permutation.spec.method {
        Method::Gptq => (calibration.samples as u128).saturating_mul(calibration.seq_len as u128),
        Method::Rtn => 0,
    };
    let width = (config.hidden_size as u128).saturating_add(widest);
    let activations = tokens.saturating_mul(width).saturating_mul(4);
    let solver = (widest.saturating_mul(widest).saturating_mul(2 * 4 + 2 * 8))
        .saturating_add(largest.saturating_mul(3 * 4));
    // Hidden states, a block, two sums and what is carried of a weight.
    let beside = match permutation.spec.measure() {
        LossMeasure::QuantisedInputs => 0,
        LossMeasure::FloatOutputs => (tokens.saturating_mul(config.hidden_size as u128))
            .saturating_add(block)
            .saturating_add(widest.saturating_mul(widest).saturating_mul(2))
            .saturating_add(largest.saturating_mul(3))
            .saturating_mul(4),
    };
    // The Hessian of what is held out, with its sums beside a float stream.
    let held_out = match (permutation.spec.order, permutation.spec.measure()) {
        (ColumnOrder::Auto, LossMeasure::QuantisedInputs) => widest.saturating_mul(widest * 4),
        (ColumnOrder::Auto, LossMeasure::FloatOutputs) => widest.saturating_mul(widest * 12),
        _ => 0,
    };
    let all = (block.saturating_mul(4).saturating_add(activations))
        .saturating_add(solver)
        .saturating_add(beside)
        .saturating_add(held_out)
        .saturating_add(FIXED);
    u64::try_from(all).unwrap_or(u64::MAX)
}
