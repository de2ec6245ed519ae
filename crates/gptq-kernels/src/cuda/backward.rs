//! Gradients of a block's operations on the GPU, and the error of its output: `crate::backward`, on sixteen-bit
//! matrices. Kernels compute in f32 and round once; they are described in `kernels/backward.cu`.
//!
//! `d` before a name is the gradient of what it names. RoPE needs no kernel of its own: its gradient is
//! [`Gpu::rotate`] with the table of [`Rotation::transposed`](crate::Rotation::transposed).

use std::sync::Arc;

use cudarc::cublas::sys::{cublasComputeType_t as Compute, cublasOperation_t as Op};
use gptq_types::Dtype;

use super::Gpu;
use super::decoder::LINE;
use super::error::CudaError;
use super::launch::Arg;
use super::memory::Buffer;
use super::norm::DeviceNorm;
use super::product::{Product, Side, half_type};
use super::program::Program;
use super::text::by_eights;
use super::view::DeviceMatrix;
use crate::{Activation, RowScale};

/// Threads of a block that takes columns of rows.
const COLUMNS: usize = 128;
/// Rows of a launch grid, its second dimension; a thread takes several where there are more.
const MOST_ROWS: usize = 65_535;

pub(super) fn program(dtype: Dtype) -> Program {
    Program::Backward {
        bf16: dtype == Dtype::BF16,
    }
}

impl Gpu {
    /// `dx`, the gradient of [`Gpu::norm`] with respect to `x`, from `dy`; all have the same shape, and runs of
    /// `norm.width()` columns are rows or heads. The gradients of weights and bias are not computed. `dx` may be
    /// `dy` or `x`.
    ///
    /// With `r = 1 / sqrt(mean(x^2) + eps)`, `n = x r` and `g = dy weight`: `dx = r (g - n mean(g n))`; of a
    /// layer norm, with `n = (x - mean) r`: `dx = r (g - mean(g) - n mean(g n))`.
    ///
    /// # Panics
    /// If shapes or types differ, there are gaps, or the columns are not whole runs.
    pub fn norm_backward(
        &self,
        dx: DeviceMatrix,
        dy: DeviceMatrix,
        x: DeviceMatrix,
        norm: &DeviceNorm,
    ) -> Result<(), CudaError> {
        let shape = [x.contiguous().half().rows, x.columns];
        for of in [dx, dy] {
            (of.contiguous().like(x)).expect(shape, "rows of gradients and inputs");
        }
        let width = norm.width();
        assert_eq!(x.columns % width, 0, "whole runs");
        let eights = by_eights(&[width], &[dx.address, dy.address, x.address]);
        let args = [
            dx.address.into(),
            dy.address.into(),
            x.address.into(),
            (&norm.weight).into(),
            (width as i32).into(),
            norm.eps.into(),
        ];
        let names = [
            ["rms_norm_backward_1", "rms_norm_backward_8"],
            ["layer_norm_backward_1", "layer_norm_backward_8"],
        ];
        let (name, grid) = (norm.pick(names, eights), [x.elements() / width, 1, 1]);
        // SAFETY: all three have so many runs of the norm's width.
        unsafe { self.launch(program(x.dtype), name, grid, norm.block(eights), 0, &args) }
    }

    /// The gradients of [`Gpu::gate`], `y = activation(gate) up`, in the place of its inputs: `gate` and `up`,
    /// as they were before it, become `dy up f'(gate)` and `dy f(gate)`. All may be columns of wider matrices.
    ///
    /// # Panics
    /// If shapes or types differ.
    pub fn gate_backward(
        &self,
        dy: DeviceMatrix,
        gate: DeviceMatrix,
        up: DeviceMatrix,
        activation: Activation,
    ) -> Result<(), CudaError> {
        let shape = [dy.half().rows, dy.columns];
        for of in [gate, up] {
            of.like(dy).expect(shape, "rows of gradients and inputs");
        }
        let names = match activation {
            Activation::Silu => ["silu_gate_backward_1", "silu_gate_backward_8"],
            Activation::GeluTanh => ["gelu_gate_backward_1", "gelu_gate_backward_8"],
        };
        self.rows_backward(names, &[gate, up, dy])
    }

    /// The gradient of `y = activation(x)` in the place of its input: `x`, as it was before it, becomes
    /// `dy f'(x)`. Both may be columns of wider matrices.
    ///
    /// # Panics
    /// If shapes or types differ.
    pub fn activate_backward(
        &self,
        dy: DeviceMatrix,
        x: DeviceMatrix,
        activation: Activation,
    ) -> Result<(), CudaError> {
        x.like(dy)
            .expect([dy.rows, dy.columns], "rows of gradients and inputs");
        let names = match activation {
            Activation::Silu => ["silu_backward_1", "silu_backward_8"],
            Activation::GeluTanh => ["gelu_backward_1", "gelu_backward_8"],
        };
        self.rows_backward(names, &[x, dy])
    }

    /// A kernel by ones and by eights over matrices of one shape: their addresses, pitches, rows and columns.
    fn rows_backward(
        &self,
        names: [&'static str; 2],
        matrices: &[DeviceMatrix],
    ) -> Result<(), CudaError> {
        let (rows, columns) = (matrices[0].rows, matrices[0].columns);
        let addresses: Vec<u64> = matrices.iter().map(|x| x.address).collect();
        let mut widths: Vec<usize> = matrices.iter().map(|x| x.pitch).collect();
        let mut args: Vec<Arg> = addresses.iter().map(|&address| address.into()).collect();
        args.extend(widths.iter().map(|&pitch| Arg::from(pitch as i32)));
        args.extend([rows, columns].map(|count| Arg::from(count as i32)));
        widths.push(columns);
        let eights = by_eights(&widths, &addresses);
        let values = if eights { 8 } else { 1 };
        let grid = [columns.div_ceil(COLUMNS * values), rows.min(MOST_ROWS), 1];
        let (name, block) = (names[usize::from(eights)], [COLUMNS, 1, 1]);
        // SAFETY: all have so many rows and columns, their pitches apart.
        unsafe { self.launch(program(matrices[0].dtype), name, grid, block, 0, &args) }
    }

    /// `dx [T, K] = dy W`, the gradient of the input of [`Gpu::project`], from `dy [T, N]` and `weight [N, K]`;
    /// with `add` onto what is in `dx`, so that linears that read the same input add to the same `dx`. Summed
    /// in f32, rounded once. `dx` and `dy` may be columns of wider matrices.
    ///
    /// # Panics
    /// If shapes or types do not agree, or the weight has gaps.
    pub fn project_backward(
        &self,
        dx: DeviceMatrix,
        dy: DeviceMatrix,
        weight: DeviceMatrix,
        add: bool,
    ) -> Result<(), CudaError> {
        let (t, n, k) = (dy.rows, dy.like(weight).columns, weight.columns);
        weight.contiguous().expect([n, k], "outputs of the weight");
        dx.like(weight).expect([t, k], "rows of the product");
        let side = |address, ld| Side {
            address,
            op: Op::CUBLAS_OP_N,
            kind: half_type(weight.dtype),
            ld,
            stride: 0,
        };
        // SAFETY: the matrices say their own sizes, which fit.
        unsafe {
            self.product(&Product {
                size: [k, t, n],
                alpha: 1.0,
                a: side(weight.address, k),
                b: side(dy.address, dy.pitch),
                beta: if add { 1.0 } else { 0.0 },
                c: side(dx.address, dx.pitch),
                batch: 1,
                compute: Compute::CUBLAS_COMPUTE_32F,
            })
        }
    }

    /// `out = x`, where `out` may be columns of a wider matrix: the gradient of [`Gpu::copy_columns`], for
    /// gradients of outputs that a fused linear has side by side.
    ///
    /// # Panics
    /// If shapes or types differ, or `x` has gaps.
    pub fn place_columns(&self, out: DeviceMatrix, x: DeviceMatrix) -> Result<(), CudaError> {
        (out.like(x.contiguous())).expect([x.rows, x.columns], "rows of both");
        let name = match by_eights(&[out.pitch, x.columns], &[out.address, x.address]) {
            true => "place_columns_8",
            false => "place_columns_1",
        };
        let args = [
            out.address.into(),
            x.address.into(),
            (out.pitch as i32).into(),
            (x.columns as i32).into(),
        ];
        let (grid, block) = ([x.rows, 1, 1], [LINE, 1, 1]);
        // SAFETY: both have so many rows of so many columns.
        unsafe { self.launch(program(x.dtype), name, grid, block, 0, &args) }
    }

    /// The mean square of each row. Waits for all work queued so far.
    ///
    /// # Panics
    /// If there are gaps.
    pub fn row_squares(self: &Arc<Self>, x: DeviceMatrix) -> Result<Vec<f64>, CudaError> {
        let (rows, columns) = (x.contiguous().half().rows, x.columns);
        let squares = Buffer::new(self, 8 * rows)?;
        let args = [(&squares).into(), x.address.into(), (columns as i32).into()];
        let (grid, block) = ([rows, 1, 1], [LINE, 1, 1]);
        // SAFETY: a square for each row.
        unsafe { self.launch(program(x.dtype), "row_squares", grid, block, 0, &args)? };
        squares.to_host(rows)
    }

    /// The error of outputs against their target, summed over rows: [`output_error`](crate::output_error), with
    /// differences in f32 and sums in f64, in one order. Waits for all work queued so far.
    ///
    /// # Panics
    /// If shapes or types differ, or there are gaps.
    pub fn output_error(
        self: &Arc<Self>,
        y: DeviceMatrix,
        target: DeviceMatrix,
        scale: RowScale,
    ) -> Result<f64, CudaError> {
        let [rows, columns] = expect_pair(y, target);
        let errors = Buffer::new(self, 8 * rows)?;
        let args = [
            (&errors).into(),
            y.address.into(),
            target.address.into(),
            (columns as i32).into(),
            scale.into(),
        ];
        // SAFETY: an error for each row; all rows have as many columns.
        unsafe {
            let (grid, block) = ([rows, 1, 1], [LINE, 1, 1]);
            self.launch(program(y.dtype), "row_error", grid, block, 0, &args)?;
        }
        let errors: Vec<f64> = errors.to_host(rows)?;
        Ok(errors.iter().sum())
    }

    /// The gradient of `factor / 2` times [`Gpu::output_error`] with respect to `y`, rounded once: the factor
    /// keeps it inside the range of f16. `out` may be `y` or `target`.
    ///
    /// # Panics
    /// If shapes or types differ, or there are gaps.
    pub fn error_gradient(
        &self,
        out: DeviceMatrix,
        y: DeviceMatrix,
        target: DeviceMatrix,
        scale: RowScale,
        factor: f32,
    ) -> Result<(), CudaError> {
        let [rows, columns] = expect_pair(y, target);
        (out.contiguous().like(y)).expect([rows, columns], "rows of the gradient");
        let args = [
            out.address.into(),
            y.address.into(),
            target.address.into(),
            factor.into(),
            (columns as i32).into(),
            scale.into(),
        ];
        let (grid, block) = ([rows, 1, 1], [LINE, 1, 1]);
        // SAFETY: a block for each row, which all three have.
        unsafe {
            self.launch(
                program(y.dtype),
                "row_error_gradient",
                grid,
                block,
                0,
                &args,
            )
        }
    }
}

/// The shape of outputs and of their target.
fn expect_pair(y: DeviceMatrix, target: DeviceMatrix) -> [usize; 2] {
    let shape = [y.contiguous().rows, y.columns];
    (target.contiguous().like(y)).expect(shape, "rows of the target");
    shape
}
