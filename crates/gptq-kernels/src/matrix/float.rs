//! Float weights in the type of the file, widened piece by piece.

use std::borrow::Cow;

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use gptq_types::Dtype;
use pulp::Simd;
use rayon::prelude::*;

use super::Input;
use crate::vector::{Kernel, run_widest};

/// Outputs of a task.
pub(super) const TILE: usize = 16;
/// Vectors of partial sums of an inner product, which do not wait for each other.
const SUMS: usize = 4;
/// Weights that are widened at a time: a buffer that stays in the first cache.
const PIECE: usize = 1024;

/// [`f16_in_place`] is too small by `2^112`. This part of the factor is applied to `x`, the rest to the sum, so
/// that neither overflows or underflows.
const F16_IN_X: f32 = f32::from_bits((127 + 64) << 23);
const F16_IN_SUM: f32 = f32::from_bits((127 + 48) << 23);

/// `[out_features, in_features]` row-major, as checkpoints have it.
#[derive(Clone, Debug)]
pub struct FloatMatrix {
    in_features: usize,
    out_features: usize,
    values: Values,
}

#[derive(Clone, Debug)]
enum Values {
    F32(Vec<f32>),
    F16(Vec<u16>),
    Bf16(Vec<u16>),
}

/// A finite half as a float `2^112` times too small, in integer operations alone: the bits of its
/// exponent and mantissa are moved to their places in the wider type, and the biases of the two
/// exponents differ by 112. Halves below the normal range come out right too.
#[inline(always)]
fn f16_in_place(bits: u16) -> f32 {
    f32::from_bits(((i32::from(bits as i16) << 13) as u32) & 0x8fff_e000)
}

#[inline(always)]
pub(super) fn f16_bits_to_f32(bits: u16) -> f32 {
    f16_in_place(bits) * F16_IN_X * F16_IN_SUM
}

#[inline(always)]
fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Inner products of some weights with the same channels of `R` rows.
#[inline(always)]
fn dots<S: Simd, const R: usize>(simd: S, weight: &[f32], x: [&[f32]; R]) -> [f32; R] {
    let (weights, tail) = S::as_simd_f32s(weight);
    let mut sums = [[simd.splat_f32s(0.0); SUMS]; R];
    let (mut quads, mut last) = ([&[] as &[[S::f32s; SUMS]]; R], [&[] as &[S::f32s]; R]);
    let (weight_quads, weight_last) = weights.as_chunks::<SUMS>();
    for r in 0..R {
        (quads[r], last[r]) = S::as_simd_f32s(&x[r][..weight.len()]).0.as_chunks::<SUMS>();
    }
    for (at, weight) in weight_quads.iter().enumerate() {
        for r in 0..R {
            for which in 0..SUMS {
                let sum = &mut sums[r][which];
                *sum = simd.mul_add_e_f32s(weight[which], quads[r][at][which], *sum);
            }
        }
    }
    let mut out = [0.0f32; R];
    for r in 0..R {
        let mut sum = sums[r];
        for (at, &weight) in weight_last.iter().enumerate() {
            sum[0] = simd.mul_add_e_f32s(weight, last[r][at], sum[0]);
        }
        let both = [simd.add_f32s(sum[0], sum[1]), simd.add_f32s(sum[2], sum[3])];
        out[r] = simd.reduce_sum_f32s(simd.add_f32s(both[0], both[1]));
        let rest = &x[r][weight.len() - tail.len()..weight.len()];
        for (weight, x) in tail.iter().zip(rest) {
            out[r] += weight * x;
        }
    }
    out
}

/// `out [outputs, rows]` for the rows of `weight [outputs, width]`.
fn few_of<T: Copy>(
    weight: &[T],
    out: &mut [f32],
    rows: usize,
    input: &Input<'_>,
    widen: impl Fn(T) -> f32 + Copy,
) {
    run_widest(Outputs {
        weight,
        out,
        rows,
        input,
        widen,
    });
}

struct Outputs<'a, T, F> {
    weight: &'a [T],
    out: &'a mut [f32],
    rows: usize,
    input: &'a Input<'a>,
    widen: F,
}

impl<T: Copy, F: Fn(T) -> f32 + Copy> Kernel for Outputs<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut wide = [0.0f32; PIECE];
        let outputs = self.weight.chunks_exact(self.input.width);
        for (weight, out) in outputs.zip(self.out.chunks_exact_mut(self.rows)) {
            out.fill(0.0);
            for (at, weight) in weight.chunks(PIECE).enumerate() {
                let wide = &mut wide[..weight.len()];
                for (wide, &weight) in wide.iter_mut().zip(weight) {
                    *wide = (self.widen)(weight);
                }
                let mut row = 0;
                while row + 2 <= self.rows {
                    let x = [0, 1].map(|r| &self.input.row(row + r)[at * PIECE..]);
                    let found = dots(simd, wide, x);
                    out[row] += found[0];
                    out[row + 1] += found[1];
                    row += 2;
                }
                if row < self.rows {
                    let x = &self.input.row(row)[at * PIECE..];
                    out[row] += dots(simd, wide, [x])[0];
                }
            }
        }
    }
}

fn read_u16(bytes: &[u8]) -> Vec<u16> {
    let (pairs, _) = bytes.as_chunks::<2>();
    pairs.par_iter().map(|&b| u16::from_le_bytes(b)).collect()
}

fn read_f32(bytes: &[u8]) -> Vec<f32> {
    let (fours, _) = bytes.as_chunks::<4>();
    fours.par_iter().map(|&b| f32::from_le_bytes(b)).collect()
}

impl FloatMatrix {
    /// Nothing for a type that holds no weights, no channels, or a wrong number of bytes.
    pub fn new(
        dtype: Dtype,
        bytes: &[u8],
        in_features: usize,
        out_features: usize,
    ) -> Option<Self> {
        let expected = in_features
            .checked_mul(out_features)?
            .checked_mul(dtype.size())?;
        if in_features == 0 || bytes.len() != expected {
            return None;
        }
        let values = match dtype {
            Dtype::F32 => Values::F32(read_f32(bytes)),
            Dtype::F16 => Values::F16(read_u16(bytes)),
            Dtype::BF16 => Values::Bf16(read_u16(bytes)),
            _ => return None,
        };
        Some(FloatMatrix {
            in_features,
            out_features,
            values,
        })
    }

    /// `K`.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Bytes of all values.
    pub fn bytes(&self) -> usize {
        match &self.values {
            Values::F32(values) => values.len() * 4,
            Values::F16(values) | Values::Bf16(values) => values.len() * 2,
        }
    }

    /// `x [rows, K]` times the weight, `[rows, N]` row-major.
    pub fn multiply(&self, x: &[f32], rows: usize) -> Vec<f32> {
        super::View::Float(self).multiply(x, rows)
    }

    /// Adds row `index` to `out`: a token of an embedding.
    pub fn copy_row(&self, index: usize, out: &mut Vec<f32>) {
        self.widen(index, 1, out);
    }

    /// Rows `first..first + count`, in f32.
    fn widen(&self, first: usize, count: usize, out: &mut Vec<f32>) {
        let range = first * self.in_features..(first + count) * self.in_features;
        match &self.values {
            Values::F32(values) => out.extend_from_slice(&values[range]),
            Values::F16(values) => widen_into(&values[range], out, f16_bits_to_f32),
            Values::Bf16(values) => widen_into(&values[range], out, bf16_to_f32),
        }
    }

    pub(super) fn prepare<'a>(&self, x: &'a [f32], many: bool) -> Input<'a> {
        let x = match (&self.values, many) {
            (Values::F16(_), false) => x.iter().map(|x| x * F16_IN_X).collect(),
            _ => Cow::Borrowed(x),
        };
        Input {
            x,
            width: self.in_features,
            sums: Vec::new(),
            groups: 0,
        }
    }

    pub(super) fn few(&self, first: usize, out: &mut [f32], rows: usize, input: &Input<'_>) {
        let outputs = out.len() / rows;
        let range = first * self.in_features..(first + outputs) * self.in_features;
        match &self.values {
            Values::F32(values) => few_of(&values[range], out, rows, input, |w| w),
            Values::Bf16(values) => few_of(&values[range], out, rows, input, bf16_to_f32),
            Values::F16(values) => {
                few_of(&values[range], out, rows, input, f16_in_place);
                out.iter_mut().for_each(|out| *out *= F16_IN_SUM);
            }
        }
    }

    pub(super) fn many(&self, first: usize, out: &mut [f32], rows: usize, input: &Input<'_>) {
        let (outputs, width) = (out.len() / rows, self.in_features);
        let mut weight = Vec::with_capacity(outputs * width);
        self.widen(first, outputs, &mut weight);
        matmul(
            MatMut::from_row_major_slice_mut(out, outputs, rows),
            Accum::Replace,
            MatRef::from_row_major_slice(&weight, outputs, width),
            MatRef::from_row_major_slice(&input.x, rows, width).transpose(),
            1.0,
            Par::Seq,
        );
    }
}

fn widen_into(values: &[u16], out: &mut Vec<f32>, widen: impl Fn(u16) -> f32) {
    let first = out.len();
    out.resize(first + values.len(), 0.0);
    let out = &mut out[first..];
    run_widest(Widen { values, out, widen });
}

struct Widen<'a, F> {
    values: &'a [u16],
    out: &'a mut [f32],
    widen: F,
}

impl<F: Fn(u16) -> f32> Kernel for Widen<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (out, &value) in self.out.iter_mut().zip(self.values) {
            *out = (self.widen)(value);
        }
    }
}
