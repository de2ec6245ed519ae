//! Inputs that linears before have changed: what the sweep should aim at, and what it is measured by.
//!
//! A linear is rounded on the inputs `X~` of the quantized model, while the float model's are `X`. With
//! `D = X - X~`, `G = D X~^T` and `F = D D^T` (means over tokens times 2, as `H = X~ X~^T`; those of `G`
//! over the tokens that a float stream follows, those of `F` over an eighth):
//!
//! - The weight that comes nearest to `W X` on `X~` is `W + W G H^-1` (the normal equations of
//!   `min |W X - V X~|^2`; GPTAQ, Li et al. 2025, and Qronos, Zhang et al. 2025, aim there too). With the
//!   damped `H`, and only a share `alpha` of the way, since `G` is an estimate:
//!   `W_a = W + alpha W G (H + lambda I)^-1`.
//! - The error is `|W X - Q X~|^2 = tr(E H E^T) + 2 tr(W G E^T) + tr(W F W^T)` with `E = W - Q`: three
//!   terms of the size of the error, where `|W X|^2 - 2 tr(W C Q^T) + tr(Q H Q^T)` would take two outputs
//!   from each other.
//!
//! Weights are stored input channel first, so that everything here is the transpose.

use gptq_kernels::stretch_of;
use gptq_kernels::{Cross, Gram, multiply, multiply_left_transposed};

use crate::Factor;
use crate::measure::inner_product;

/// Whether the batch that begins at token `start` contributes to `F`. A part of the tokens suffices: `F` only
/// adds a constant to a layer's error, the same for every rounding, and its product would take half as long
/// as that of `G`.
pub(crate) fn is_squared(start: usize) -> bool {
    stretch_of(start) == 0
}

/// `G` and `F` while tokens arrive.
pub struct MismatchSum {
    cross: Cross,
    square: Gram,
    crossed: usize, // tokens in G
    squared: usize, // tokens in F
}

impl MismatchSum {
    /// For a layer of `features` input channels.
    pub fn new(features: usize) -> Self {
        MismatchSum {
            cross: Cross::new(features),
            square: Gram::new(features),
            crossed: 0,
            squared: 0,
        }
    }

    /// Adds rows, of which the first is token `start`, and their float partners.
    pub fn add(&mut self, x: &[f32], float: &[f32], start: usize, rows: usize) {
        let difference: Vec<f32> = float.iter().zip(x).map(|(f, x)| f - x).collect();
        self.cross.add(&difference, x, rows);
        self.crossed += rows;
        if is_squared(start) {
            self.square.add(&difference, rows);
            self.squared += rows;
        }
    }

    /// The means, times 2.
    pub fn finish(self) -> Mismatch {
        let mean = |tokens: usize| 2.0 / tokens.max(1) as f32;
        Mismatch {
            cross: self.cross.finish(mean(self.crossed)),
            square: self.square.finish(mean(self.squared)),
            crossed: self.crossed,
            squared: self.squared,
        }
    }
}

/// `G` and `F`, `[K, K]` row-major; rows of `G` are channels of the difference.
pub struct Mismatch {
    cross: Vec<f32>,
    square: Vec<f32>,
    crossed: usize,
    squared: usize,
}

/// The effect of the input mismatch on the outputs of one weight.
pub struct OutputMismatch {
    /// `G^T w`, `[K, N]`.
    pub cross: Vec<f32>,
    /// `tr(w^T F w)`: the error of the weight itself, were it not rounded.
    pub square: f64,
}

impl Mismatch {
    /// Adds the tokens of `other`.
    pub(crate) fn merge(&mut self, other: &Mismatch) {
        merge(&mut self.cross, self.crossed, &other.cross, other.crossed);
        merge(&mut self.square, self.squared, &other.square, other.squared);
        self.crossed += other.crossed;
        self.squared += other.squared;
    }

    /// The output mismatch of `weight [K, N]`.
    pub fn output_mismatch(&self, weight: &[f32], n: usize) -> OutputMismatch {
        let k = weight.len() / n;
        let mut product = vec![0.0; k * n];
        multiply(&mut product, &self.square, weight, k, k, n);
        let square = inner_product(&product, weight, n);
        multiply_left_transposed(&mut product, &self.cross, weight, k, k, n);
        OutputMismatch {
            cross: product,
            square,
        }
    }
}

/// Merges a mean over `count` tokens with one over `more` other tokens.
pub(crate) fn merge(mean: &mut [f32], count: usize, other: &[f32], more: usize) {
    let share = more as f32 / (count + more).max(1) as f32;
    (mean.iter_mut().zip(other)).for_each(|(mean, other)| *mean += share * (other - *mean));
}

impl Factor {
    /// `w + alpha (H + lambda I)^-1 G^T w`, `[K, N]`: the weight that the sweep rounds instead of `weight`.
    pub fn aimed(
        &self,
        weight: &[f32],
        output_mismatch: &OutputMismatch,
        alpha: f32,
        n: usize,
    ) -> Vec<f32> {
        let channels = &self.order.channels;
        let k = channels.len();
        // (H + lambda I)^-1 = U^T U in processing order.
        let ordered: Vec<f32> = (channels.iter())
            .flat_map(|&channel| &output_mismatch.cross[channel * n..][..n])
            .copied()
            .collect();
        let mut half = vec![0.0; k * n];
        multiply(&mut half, &self.u, &ordered, k, k, n);
        let mut correction = ordered;
        multiply_left_transposed(&mut correction, &self.u, &half, k, k, n);
        let mut aimed = weight.to_vec();
        for (row, &channel) in correction.chunks_exact(n).zip(channels) {
            let out = &mut aimed[channel * n..][..n];
            out.iter_mut().zip(row).for_each(|(w, c)| *w += alpha * c);
        }
        aimed
    }
}
