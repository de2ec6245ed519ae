//! Estimates of the time and memory that a branch takes.

use gptq_model::spec::KeySource;
use gptq_model::{CaptureGroup, LinearSpec, ModelSpec};
use gptq_types::{ColumnOrder, LossMeasure, Method, Permutation, QuantSpec};

/// Bytes that a process holds whatever it works on.
const FIXED: u128 = 150 << 20;

/// Share of the tokens whose differences from the float stream are squared.
pub(crate) const SQUARED: f64 = 1.0 / 8.0;

/// Share of the tokens that a float stream follows.
pub(crate) fn followed(spec: &QuantSpec) -> f64 {
    match spec.trains() {
        true => 1.0,
        false => 6.0 / 8.0,
    }
}

/// Orders that `auto` tries on an input, about.
const ORDERS_TRIED: f64 = 3.5;

/// Floating-point operations: one forward pass, the Hessians, the factors, the sweeps.
pub(super) fn flop(model: &ModelSpec, permutation: &Permutation) -> f64 {
    if permutation.spec.method == Method::Rtn {
        return 0.0;
    }
    let calibration = &permutation.calibration;
    let aims = permutation.spec.measure() == LossMeasure::FloatOutputs;
    let passes = if aims {
        1.0 + followed(&permutation.spec)
    } else {
        1.0
    };
    let block = |index: usize| {
        let forward = model.block_flop(index, calibration.samples, calibration.seq_len);
        let groups = model.blocks[index].groups();
        let solving = groups.iter().map(|group| group_flop(group, permutation));
        passes * forward + solving.sum::<f64>()
    };
    (0..model.blocks.len()).map(block).sum()
}

/// Floating-point operations of a capture group's Hessian, factor and sweeps.
fn group_flop(group: &CaptureGroup, permutation: &Permutation) -> f64 {
    let calibration = &permutation.calibration;
    let tokens = calibration.samples as f64 * calibration.seq_len as f64;
    let k = group.in_features() as f64;
    let n: f64 = group
        .linears
        .iter()
        .map(|linear| linear.out_features as f64)
        .sum();
    // X^T X is symmetric; K^3 for factor and inverse; K^2 for each output, and as much again
    // for measuring its error against rounding to nearest; twice that for a pass of descent.
    let passes = f64::from(permutation.spec.descent_passes);
    let solve = (1.0 + 2.0 * passes) * k * k * n;
    let mut flop = tokens * k * k + k * k * k + solve + k * k * n;
    if permutation.spec.order == ColumnOrder::Auto {
        // A factor for each order, and a share of the outputs.
        flop += ORDERS_TRIED * (k * k * k + solve / 8.0);
    }
    if permutation.spec.measure() == LossMeasure::FloatOutputs {
        // A full product and a symmetric one; four products with each weight.
        flop += tokens * k * k * (2.0 * followed(&permutation.spec) + SQUARED) + 8.0 * k * k * n;
    }
    flop
}

/// Bytes resident on the processor, as docs/ARCHITECTURE.md counts them. Shapes and windows may be
/// of any size here, so that a plan is refused for what it would take and not for an overflow.
pub(super) fn memory(model: &ModelSpec, permutation: &Permutation) -> u64 {
    let linears = || model.blocks.iter().flat_map(|block| block.linears());
    let block = model.block_elements() as u128;
    let largest = linears().map(LinearSpec::elements).max().unwrap_or(0) as u128;
    let widest = model.widest_input() as u128;
    let calibration = &permutation.calibration;
    let tokens = match permutation.spec.method {
        Method::Gptq => (calibration.samples as u128).saturating_mul(calibration.seq_len as u128),
        Method::Rtn => 0,
    };
    let width = (model.hidden_size as u128).saturating_add(widest);
    let activations = tokens.saturating_mul(width).saturating_mul(4);
    let solver = (widest.saturating_mul(widest).saturating_mul(2 * 4 + 2 * 8))
        .saturating_add(largest.saturating_mul(3 * 4));
    let activations = activations.saturating_add(kept_for_blocks(model, tokens));
    // Hidden states, a block, two sums and what is carried of a weight.
    let beside = match permutation.spec.measure() {
        LossMeasure::QuantizedInputs => 0,
        LossMeasure::FloatOutputs => (tokens.saturating_mul(model.hidden_size as u128))
            .saturating_add(block)
            .saturating_add(widest.saturating_mul(widest).saturating_mul(2))
            .saturating_add(largest.saturating_mul(3))
            .saturating_mul(4),
    };
    // The Hessian of held-out tokens, with its mismatch sums if there is a float stream.
    let held_out = match (permutation.spec.order, permutation.spec.measure()) {
        (ColumnOrder::Auto, LossMeasure::QuantizedInputs) => widest.saturating_mul(widest * 4),
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

/// Keys and values that later blocks read, and inputs that blocks look up by token id, in f32.
fn kept_for_blocks(model: &ModelSpec, tokens: u128) -> u128 {
    let lent = (model.blocks.iter())
        .flat_map(|block| block.attention())
        .filter(|attention| attention.keys == KeySource::Donor)
        .map(|attention| 2 * attention.shape.kv_heads * attention.shape.head_dim);
    let by_token = model.embedding.per_block.as_ref();
    let by_token = by_token.map_or(0, |inputs| inputs.width * model.blocks.len());
    let columns = lent.sum::<usize>() + by_token;
    tokens.saturating_mul(columns as u128).saturating_mul(4)
}
