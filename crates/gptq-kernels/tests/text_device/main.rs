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
mod rows;
mod views;

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, DeviceMatrix, Gpu};
use gptq_types::Dtype;
use half::{bf16, f16};

use common::Random;

const BOTH: [Dtype; 2] = [Dtype::F16, Dtype::BF16];

/// To the nearest number of sixteen bits.
fn rounded(dtype: Dtype, x: f64) -> f64 {
    match dtype {
        Dtype::BF16 => bf16::from_f64(x).to_f64(),
        _ => f16::from_f64(x).to_f64(),
    }
}

fn bits(dtype: Dtype, x: f64) -> u16 {
    match dtype {
        Dtype::BF16 => bf16::from_f64(x).to_bits(),
        _ => f16::from_f64(x).to_bits(),
    }
}

/// From -1 to 1, numbers of sixteen bits.
fn values(random: &mut Random, dtype: Dtype, count: usize) -> Vec<f64> {
    (0..count)
        .map(|_| rounded(dtype, f64::from(random.uniform())))
        .collect()
}

/// Weights of a norm.
fn weights(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.uniform()).collect()
}

fn upload(gpu: &Arc<Gpu>, dtype: Dtype, values: &[f64]) -> Buffer {
    let values: Vec<u16> = values.iter().map(|x| bits(dtype, *x)).collect();
    Buffer::from_host(gpu, &values).unwrap()
}

/// Of `count` sixteen-bit elements, none of them a number.
fn poisoned(gpu: &Arc<Gpu>, count: usize) -> Buffer {
    Buffer::from_host(gpu, &vec![u16::MAX; count]).unwrap()
}

fn matrix(buffer: &Buffer, dtype: Dtype, rows: usize, columns: usize) -> DeviceMatrix<'_> {
    buffer.matrix([rows, columns], dtype)
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
