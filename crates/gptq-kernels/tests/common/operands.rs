//! Sixteen-bit operands of tests: numbers that the type holds, buffers of them, matrices over these.

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, DeviceMatrix, Gpu};
use gptq_types::Dtype;
use half::{bf16, f16};

use super::common::Random;

pub const BOTH: [Dtype; 2] = [Dtype::F16, Dtype::BF16];

/// To the nearest number of sixteen bits.
pub fn rounded(dtype: Dtype, x: f64) -> f64 {
    match dtype {
        Dtype::BF16 => bf16::from_f64(x).to_f64(),
        _ => f16::from_f64(x).to_f64(),
    }
}

pub fn bits(dtype: Dtype, x: f64) -> u16 {
    match dtype {
        Dtype::BF16 => bf16::from_f64(x).to_bits(),
        _ => f16::from_f64(x).to_bits(),
    }
}

/// From -1 to 1, numbers of sixteen bits.
pub fn values(random: &mut Random, dtype: Dtype, count: usize) -> Vec<f64> {
    (0..count)
        .map(|_| rounded(dtype, f64::from(random.uniform())))
        .collect()
}

pub fn upload(gpu: &Arc<Gpu>, dtype: Dtype, values: &[f64]) -> Buffer {
    let values: Vec<u16> = values.iter().map(|x| bits(dtype, *x)).collect();
    Buffer::from_host(gpu, &values).unwrap()
}

/// `count` sixteen-bit elements, none of them a number.
pub fn poisoned(gpu: &Arc<Gpu>, count: usize) -> Buffer {
    Buffer::from_host(gpu, &vec![u16::MAX; count]).unwrap()
}

pub fn matrix(buffer: &Buffer, dtype: Dtype, rows: usize, columns: usize) -> DeviceMatrix<'_> {
    buffer.matrix([rows, columns], dtype)
}
