//! Weight matrices in the types that files have them in, and their products with few or many rows.
//!
//! With few rows the weights are read once, from memory, and widened in registers: the time is that
//! of reading them. With many rows a band of outputs is widened into a buffer and multiplied by the
//! dense product. Each output is one sum with one order, whatever the number of threads.

mod float;
mod packed;

use std::borrow::Cow;

use gptq_types::{Dtype, SolvedLayer};
use rayon::prelude::*;

use crate::product::transpose;

pub use float::FloatMatrix;
pub use packed::PackedMatrix;

/// From so many rows on, widening a band and multiplying it by the dense product is faster.
const MANY_ROWS: usize = 16;
/// Outputs of a band: its buffer of `[BAND, K]` floats stays near the core.
const BAND: usize = 128;

/// A weight of `K` input and `N` output features.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Codes of 2, 3, 4 or 8 bits with a grid for each group.
    Packed(PackedMatrix),
    /// f16, bf16 or f32.
    Float(FloatMatrix),
}

/// The rows of a product, as a matrix wants them.
pub(crate) struct Input<'a> {
    x: Cow<'a, [f32]>, // [rows, width]
    width: usize,
    sums: Vec<f32>, // [rows, groups], where there are groups
    groups: usize,
}

impl Input<'_> {
    fn row(&self, row: usize) -> &[f32] {
        &self.x[row * self.width..][..self.width]
    }

    fn sums(&self, row: usize) -> &[f32] {
        &self.sums[row * self.groups..][..self.groups]
    }
}

impl Matrix {
    /// Lays the codes of a layer out anew.
    pub fn packed(layer: &SolvedLayer) -> Self {
        Matrix::Packed(PackedMatrix::new(layer))
    }

    /// From `[out_features, in_features]` row-major, little-endian; nothing for a type that holds
    /// no weights or a wrong number of bytes.
    pub fn float(
        dtype: Dtype,
        bytes: &[u8],
        in_features: usize,
        out_features: usize,
    ) -> Option<Self> {
        FloatMatrix::new(dtype, bytes, in_features, out_features).map(Matrix::Float)
    }

    /// `K`.
    pub fn in_features(&self) -> usize {
        match self {
            Matrix::Packed(matrix) => matrix.in_features(),
            Matrix::Float(matrix) => matrix.in_features(),
        }
    }

    /// `N`.
    pub fn out_features(&self) -> usize {
        match self {
            Matrix::Packed(matrix) => matrix.out_features(),
            Matrix::Float(matrix) => matrix.out_features(),
        }
    }

    /// Bytes that a product reads.
    pub fn bytes(&self) -> usize {
        match self {
            Matrix::Packed(matrix) => matrix.bytes(),
            Matrix::Float(matrix) => matrix.bytes(),
        }
    }

    /// `x [rows, K]` times the weight, `[rows, N]` row-major.
    pub fn multiply(&self, x: &[f32], rows: usize) -> Vec<f32> {
        self.view().multiply(x, rows)
    }

    fn view(&self) -> View<'_> {
        match self {
            Matrix::Packed(matrix) => View::Packed(matrix),
            Matrix::Float(matrix) => View::Float(matrix),
        }
    }
}

/// A matrix of either kind that someone else holds.
#[derive(Clone, Copy)]
enum View<'a> {
    Packed(&'a PackedMatrix),
    Float(&'a FloatMatrix),
}

impl View<'_> {
    fn multiply(self, x: &[f32], rows: usize) -> Vec<f32> {
        let mut all = multiply_views(&[self], x, rows);
        all.pop().expect("one matrix gives one product")
    }

    /// `(K, N)`.
    fn shape(self) -> (usize, usize) {
        match self {
            View::Packed(matrix) => (matrix.in_features(), matrix.out_features()),
            View::Float(matrix) => (matrix.in_features(), matrix.out_features()),
        }
    }

    /// Outputs of one task.
    fn task(self, rows: usize) -> usize {
        match (self, rows >= MANY_ROWS) {
            (_, true) => BAND,
            (View::Packed(_), false) => packed::TILE,
            (View::Float(_), false) => float::TILE,
        }
    }

    fn prepare<'x>(self, x: &'x [f32], rows: usize) -> Input<'x> {
        let many = rows >= MANY_ROWS;
        match self {
            View::Packed(matrix) => matrix.prepare(x, rows, many),
            View::Float(matrix) => matrix.prepare(x, many),
        }
    }

    /// Outputs `first..` into `out [outputs, rows]`.
    fn outputs(self, first: usize, out: &mut [f32], rows: usize, input: &Input<'_>) {
        match (self, rows >= MANY_ROWS) {
            (View::Packed(matrix), false) => matrix.few(first, out, rows, input),
            (View::Packed(matrix), true) => matrix.many(first, out, rows, input),
            (View::Float(matrix), false) => matrix.few(first, out, rows, input),
            (View::Float(matrix), true) => matrix.many(first, out, rows, input),
        }
    }
}

/// `x [rows, K]` times each of `matrices`, which have the same `K`: `[rows, N]` row-major each.
///
/// One parallel region for all of them: of a small model a region costs as much as its work.
pub fn multiply_each(matrices: &[&Matrix], x: &[f32], rows: usize) -> Vec<Vec<f32>> {
    let views: Vec<View<'_>> = matrices.iter().map(|matrix| matrix.view()).collect();
    multiply_views(&views, x, rows)
}

fn multiply_views(matrices: &[View<'_>], x: &[f32], rows: usize) -> Vec<Vec<f32>> {
    let inputs: Vec<Input<'_>> = (matrices.iter())
        .map(|matrix| {
            assert_eq!(x.len(), rows * matrix.shape().0, "elements of x");
            matrix.prepare(x, rows)
        })
        .collect();
    // Output by output, so that tasks write to disjoint slices.
    let mut columns: Vec<Vec<f32>> = (matrices.iter())
        .map(|matrix| vec![0.0; matrix.shape().1 * rows])
        .collect();
    let mut tasks = Vec::new();
    for ((matrix, input), out) in matrices.iter().zip(&inputs).zip(&mut columns) {
        let step = matrix.task(rows);
        let parts = out.chunks_mut((step * rows).max(1)).enumerate();
        tasks.extend(parts.map(|(task, out)| (*matrix, input, task * step, out)));
    }
    (tasks.into_par_iter())
        .for_each(|(matrix, input, first, out)| matrix.outputs(first, out, rows, input));
    match rows {
        1 => columns,
        _ => (columns.iter().zip(matrices))
            .map(|(out, matrix)| row_major(out, matrix.shape().1, rows))
            .collect(),
    }
}

/// `[outputs, rows]` to `[rows, outputs]`.
fn row_major(out: &[f32], outputs: usize, rows: usize) -> Vec<f32> {
    if rows >= MANY_ROWS {
        return transpose(out, outputs, rows);
    }
    let mut transposed = Vec::with_capacity(out.len());
    for row in 0..rows {
        transposed.extend(out.iter().skip(row).step_by(rows));
    }
    transposed
}

/// Calls `run` with 2 rows or 1 at a time until all are done; with more there are not enough
/// registers for their sums.
#[inline(always)]
fn by_rows(rows: usize, mut run: impl FnMut(usize, usize)) {
    let mut row = 0;
    while row < rows {
        let count = (rows - row).min(2);
        run(row, count);
        row += count;
    }
}

#[cfg(test)]
mod tests;
