//! What a rounding costs at the layer's output, in the Hessian's own measure.

use gptq_kernels::multiply;
use gptq_types::SolvedLayer;
use rayon::prelude::*;

use crate::Hessian;

/// `tr(E H E^T)` for `E` the difference of `weight [K, N]` and the dequantised layer: twice the
/// squared output error per token, summed over outputs.
pub fn output_error(hessian: &Hessian, weight: &[f32], layer: &SolvedLayer) -> f64 {
    let mut error = layer.dequantise();
    for (q, w) in error.iter_mut().zip(weight) {
        *q -= w;
    }
    weighted_square(hessian, &error, layer.out_features)
}

/// `tr(W H W^T)`, the same for the layer's whole output.
pub fn signal(hessian: &Hessian, weight: &[f32], out_features: usize) -> f64 {
    weighted_square(hessian, weight, out_features)
}

fn weighted_square(hessian: &Hessian, x: &[f32], n: usize) -> f64 {
    let k = hessian.features();
    let mut product = vec![0.0f32; k * n];
    multiply(&mut product, hessian.values(), x, k, k, n);
    // Rows summed apart and in order: the same bits for any number of threads.
    let rows: Vec<f64> = product
        .par_chunks(n)
        .zip(x.par_chunks(n))
        .map(|(hx, x)| {
            hx.iter()
                .zip(x)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum()
        })
        .collect();
    rows.iter().sum::<f64>().max(0.0)
}
