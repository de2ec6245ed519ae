//! The error of a rounding at the layer's output, measured with the Hessian.

use gptq_kernels::multiply;
use gptq_types::SolvedLayer;
use rayon::prelude::*;

use crate::Hessian;
use crate::mismatch::OutputMismatch;

/// A weight and the outputs that a rounded one is compared with: its own on the quantized inputs, or on
/// those of the float model where the Hessian knows of them.
pub struct Outputs<'a> {
    hessian: &'a Hessian,
    weight: &'a [f32],
    n: usize,
    output_mismatch: Option<OutputMismatch>,
}

impl<'a> Outputs<'a> {
    /// The outputs of `weight [K, N]`.
    pub fn new(hessian: &'a Hessian, weight: &'a [f32], n: usize) -> Self {
        let mismatch = hessian.mismatch();
        Outputs {
            hessian,
            weight,
            n,
            output_mismatch: mismatch.map(|mismatch| mismatch.output_mismatch(weight, n)),
        }
    }

    /// The effect of the input mismatch on them, if a float stream was seen.
    pub fn output_mismatch(&self) -> Option<&OutputMismatch> {
        self.output_mismatch.as_ref()
    }

    /// `tr(E H E^T)` for `E` the difference of the weight and the dequantized layer, and the terms of the
    /// mismatch: twice the squared output error per token, summed over outputs.
    pub fn error(&self, layer: &SolvedLayer) -> f64 {
        let mut error = layer.dequantize();
        for (q, w) in error.iter_mut().zip(self.weight) {
            *q = w - *q;
        }
        let own = weighted_square(self.hessian, &error, self.n);
        let beside = self
            .output_mismatch
            .as_ref()
            .map_or(0.0, |output_mismatch| {
                2.0 * inner_product(&output_mismatch.cross, &error, self.n) + output_mismatch.square
            });
        (own + beside).max(0.0)
    }

    /// The norm of the whole output of the weight, in the same measure.
    pub fn signal(&self) -> f64 {
        let own = weighted_square(self.hessian, self.weight, self.n);
        let beside = self
            .output_mismatch
            .as_ref()
            .map_or(0.0, |output_mismatch| {
                2.0 * inner_product(&output_mismatch.cross, self.weight, self.n)
                    + output_mismatch.square
            });
        (own + beside).max(0.0)
    }
}

/// [`Outputs::error`] of one layer.
pub fn output_error(hessian: &Hessian, weight: &[f32], layer: &SolvedLayer) -> f64 {
    Outputs::new(hessian, weight, layer.out_features).error(layer)
}

/// [`Outputs::signal`].
pub fn signal(hessian: &Hessian, weight: &[f32], out_features: usize) -> f64 {
    Outputs::new(hessian, weight, out_features).signal()
}

fn weighted_square(hessian: &Hessian, x: &[f32], n: usize) -> f64 {
    let k = hessian.features();
    let mut product = vec![0.0f32; k * n];
    multiply(&mut product, hessian.values(), x, k, k, n);
    inner_product(&product, x, n).max(0.0)
}

/// Inner product of two matrices `[K, n]`. Rows are summed apart and in order: the same bits for any number of
/// threads.
pub(crate) fn inner_product(a: &[f32], b: &[f32], n: usize) -> f64 {
    let rows: Vec<f64> = a
        .par_chunks(n)
        .zip(b.par_chunks(n))
        .map(|(a, b)| {
            a.iter()
                .zip(b)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum()
        })
        .collect();
    rows.iter().sum()
}
