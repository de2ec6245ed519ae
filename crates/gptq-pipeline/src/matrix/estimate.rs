//! What a branch will cost, about.

use gptq_model::DecoderConfig;
use gptq_types::{Method, Permutation, Stage};

/// Bytes that a process holds whatever it works on.
const FIXED: usize = 150 << 20;

/// Floating-point operations: one forward pass, the Hessians, the factors, the sweeps.
pub(super) fn flop(config: &DecoderConfig, permutation: &Permutation) -> f64 {
    let blocks = config.num_hidden_layers as f64;
    if permutation.spec.method == Method::Rtn {
        return 0.0;
    }
    let calibration = &permutation.calibration;
    let tokens = (calibration.samples * calibration.seq_len) as f64;
    let mut block = config.block_flop(calibration.samples, calibration.seq_len);
    for stage in Stage::ALL {
        let linears = config.linears(0, stage);
        let k = linears[0].1 as f64;
        let n: usize = linears.iter().map(|(_, _, n)| n).sum();
        // X^T X is symmetric; K^3 for factor and inverse; K^2 for each output, and as much again
        // for measuring its error against rounding to nearest.
        block += tokens * k * k + k * k * k + 2.0 * k * k * n as f64;
    }
    blocks * block
}

/// Bytes resident on the processor, as docs/ARCHITECTURE.md counts them.
pub(super) fn memory(config: &DecoderConfig, permutation: &Permutation) -> u64 {
    let linears = config.block_linears(0);
    let block: usize = linears.iter().map(|(_, k, n)| k * n).sum();
    let widest = linears.iter().map(|&(_, k, _)| k).max().unwrap_or(0);
    let largest = linears.iter().map(|(_, k, n)| k * n).max().unwrap_or(0);
    let calibration = &permutation.calibration;
    let tokens = match permutation.spec.method {
        Method::Gptq => calibration.samples * calibration.seq_len,
        Method::Rtn => 0,
    };
    let activations = tokens * (config.hidden_size + widest) * 4;
    let solver = widest * widest * (2 * 4 + 2 * 8) + 3 * largest * 4;
    (FIXED + block * 4 + activations + solver) as u64
}
