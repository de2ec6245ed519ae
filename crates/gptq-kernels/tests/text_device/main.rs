//! What is between the packed products, on the GPU: cached attention over widths of heads, groups of heads
//! and lengths; norms, gates and dequantised weights. Skipped by name where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

mod attention;
#[path = "../common/mod.rs"]
mod common;
mod rows;

use gptq_kernels::cuda::Buffer;
use gptq_types::{DeviceMatrix, Dtype};
use half::f16;

use common::Random;

/// Of values of order one: what goes in and out is rounded to f16, weights as well.
const TOLERANCE: f64 = 3e-3;

fn values(random: &mut Random, count: usize) -> Vec<f16> {
    (0..count)
        .map(|_| f16::from_f32(random.uniform()))
        .collect()
}

fn matrix(buffer: &Buffer, rows: usize, columns: usize) -> DeviceMatrix {
    DeviceMatrix {
        address: buffer.address(),
        rows,
        columns,
        dtype: Dtype::F16,
    }
}

#[track_caller]
fn close(got: &[f32], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (f64::from(*got) - want).abs() < TOLERANCE,
            "{what}: {got} for {want} at {at}"
        );
    }
}
