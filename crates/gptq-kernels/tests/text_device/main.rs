//! What is between the packed products, on the GPU, against sums in f64: cached attention over widths of heads,
//! groups of heads, lengths, caps and windows; heads that are normed and rotated; norms, gates and what else
//! blocks do to rows; dequantized weights. Skipped by name where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

mod attention;
mod blocks;
#[path = "../common/mod.rs"]
mod common;
mod heads;
#[path = "../common/operands.rs"]
mod operands;
mod refusals;
mod rows;
mod views;

use gptq_types::Dtype;

use common::Random;
use operands::{BOTH, bits, matrix, poisoned, rounded, upload, values};

/// Weights of a norm.
fn weights(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.uniform()).collect()
}

/// The distance of numbers of sixteen bits around one.
fn unit(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::BF16 => 1.0 / 128.0,
        _ => 1.0 / 1024.0,
    }
}

/// Wrong by no more than two roundings, of the result and of terms as large as `size`.
#[track_caller]
fn near(got: &[f32], want: &[f64], dtype: Dtype, size: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (f64::from(*got) - want).abs() <= 2.0 * unit(dtype) * (want.abs() + size),
            "{what}, {dtype}: {got} for {want} at {at}"
        );
    }
}

/// A row normed by its root mean square, as [`gptq_kernels::cuda::DeviceNorm`] rounds.
fn rms(dtype: Dtype, row: &[f64], weight: &[f32], eps: f64) -> Vec<f64> {
    let squares: f64 = row.iter().map(|x| x * x).sum();
    let scale = 1.0 / (squares / row.len() as f64 + eps).sqrt();
    (row.iter().zip(weight))
        .map(|(x, w)| rounded(dtype, rounded(dtype, x * scale) * f64::from(*w)))
        .collect()
}

/// A row normed by its mean and variance.
fn layer(dtype: Dtype, row: &[f64], weight: &[f32], bias: Option<&[f32]>, eps: f64) -> Vec<f64> {
    let count = row.len() as f64;
    let mean = row.iter().sum::<f64>() / count;
    let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
    let scale = 1.0 / (variance + eps).sqrt();
    (row.iter().zip(weight).enumerate())
        .map(|(i, (x, w))| {
            let bias = bias.map_or(0.0, |bias| f64::from(bias[i]));
            rounded(dtype, (x - mean) * scale * f64::from(*w) + bias)
        })
        .collect()
}
