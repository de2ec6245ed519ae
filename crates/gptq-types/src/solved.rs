//! The result of the solver for the packer: integers, never re-derived from rounded floats.

use half::f16;
use serde::{Deserialize, Serialize};

use crate::Bits;

/// One quantized linear. `K` = in_features, `N` = out_features, `G` = groups.
///
/// `W[k, n] = scales[g_idx[k], n] * (codes[k, n] - zeros[g_idx[k], n])`, evaluated in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct SolvedLayer {
    /// Width of a code.
    pub bits: Bits,
    /// `K`.
    pub in_features: usize,
    /// `N`.
    pub out_features: usize,
    /// `[K, N]` row-major, input channel first: the order in which words are packed.
    pub codes: Vec<u8>,
    /// `[G, N]` row-major; the solver rounded to f16 before it chose the first code.
    pub scales: Vec<f16>,
    /// `[G, N]` row-major; the true zero, without any format's offset.
    pub zeros: Vec<u16>,
    /// `[K]`: the group of each input channel.
    pub g_idx: Vec<u32>,
}

impl SolvedLayer {
    /// `G`.
    pub fn groups(&self) -> usize {
        self.scales.len() / self.out_features.max(1)
    }

    /// The dequantized weight, `[K, N]` row-major.
    pub fn dequantize(&self) -> Vec<f32> {
        let n = self.out_features;
        let all_scales: Vec<f32> = self.scales.iter().map(|scale| scale.to_f32()).collect();
        let mut weight = vec![0.0f32; self.in_features * n];
        for (k, row) in weight.chunks_exact_mut(n).enumerate() {
            let group = self.g_idx[k] as usize * n;
            let scales = &all_scales[group..group + n];
            let zeros = &self.zeros[group..group + n];
            let codes = &self.codes[k * n..(k + 1) * n];
            for (((w, &code), &scale), &zero) in row.iter_mut().zip(codes).zip(scales).zip(zeros) {
                *w = scale * (f32::from(code) - f32::from(zero));
            }
        }
        weight
    }

    /// Input channel `k` becomes what was `channels[k]`.
    pub fn permute_inputs(&mut self, channels: &[u32]) {
        let n = self.out_features;
        let rows = |&channel: &u32| &self.codes[channel as usize * n..][..n];
        self.codes = channels.iter().map(rows).collect::<Vec<_>>().concat();
        self.g_idx = (channels.iter())
            .map(|&channel| self.g_idx[channel as usize])
            .collect();
    }

    /// Output `n` becomes what was `outputs[n]`.
    pub fn permute_outputs(&mut self, outputs: &[u32]) {
        self.codes = permuted_columns(&self.codes, outputs);
        self.scales = permuted_columns(&self.scales, outputs);
        self.zeros = permuted_columns(&self.zeros, outputs);
    }

    /// Whether `g_idx[k] = k / group_size` for some group size.
    pub fn has_trivial_g_idx(&self, group_size: usize) -> bool {
        self.g_idx
            .iter()
            .enumerate()
            .all(|(k, &g)| g as usize == k / group_size.max(1))
    }
}

fn permuted_columns<T: Copy>(rows: &[T], order: &[u32]) -> Vec<T> {
    rows.chunks_exact(order.len())
        .flat_map(|row| order.iter().map(|&at| row[at as usize]))
        .collect()
}

/// The reference that an error is measured against.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossMeasure {
    /// The float weight on the quantized inputs, `|W X~ - Q X~|^2`.
    #[default]
    #[serde(rename = "quantised_inputs")] // as records have it
    QuantizedInputs,
    /// The float weight on the float inputs, `|W X - Q X~|^2`: what rounding the linears before cost
    /// is counted too.
    FloatOutputs,
}

impl LossMeasure {
    fn is_default(&self) -> bool {
        *self == LossMeasure::default()
    }
}

/// Output error of a rounded layer. Losses are twice the mean squared output error per token, summed over
/// outputs: on quantized inputs the trace `tr(E H E^T)` with the undamped Hessian
/// `H = 2/tokens * X^T X`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LayerLoss {
    /// The reference of the three errors that follow. Absent in records from before there was a choice.
    #[serde(default, skip_serializing_if = "LossMeasure::is_default")]
    pub measure: LossMeasure,
    /// Error of the chosen codes.
    pub error: f64,
    /// Error of rounding the same weights to nearest on the same kind of grid.
    pub rtn_error: f64,
    /// The whole output of the float weight, on the same inputs as it has in `measure`, so that `error /
    /// signal` is the squared relative output error.
    pub signal: f64,
    /// Diagonal share that was added in the end, at least the requested `damp_percent`.
    pub damp_used: f64,
    /// Number of times damping was raised before the factorization succeeded.
    pub damp_escalations: u32,
    /// Input channels that were zero on every calibration token.
    pub dead_channels: usize,
}
