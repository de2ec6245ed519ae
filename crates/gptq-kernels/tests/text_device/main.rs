//! What is between the packed products, on the GPU: cached attention over widths of heads, groups of heads
//! and lengths; norms, gates and dequantised weights. Skipped by name where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

mod attention;
mod rows;

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, Gpu};
use gptq_types::{DeviceMatrix, Dtype};
use half::f16;

/// Of values of order one: what goes in and out is rounded to f16, weights as well.
const TOLERANCE: f64 = 3e-3;

fn gpu() -> Option<Arc<Gpu>> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

struct Random(u64);

impl Random {
    fn values(&mut self, count: usize) -> Vec<f16> {
        let mut one = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
            self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
            f16::from_f32((self.0 >> 33) as f32 / (1u64 << 30) as f32 - 1.0)
        };
        (0..count).map(|_| one()).collect()
    }
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
