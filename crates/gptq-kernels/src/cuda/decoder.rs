//! The operations of a decoder block on the GPU. Addresses are of sixteen-bit row-major matrices
//! that the caller keeps alive until the stream has passed them.

use std::sync::Arc;

use gptq_types::{DeviceMatrix, Dtype, SolvedLayer};

use super::Gpu;
use super::error::CudaError;
use super::launch::Arg;
use super::memory::Buffer;
use super::program::Program;
use super::text::by_eights;
use crate::{Pairing, Rotation};

/// Cosines and sines on the GPU, f32 `[positions, rotary_dim / 2]`, and which components of a head of
/// `head_dim` they turn.
pub struct Turn {
    cosine: Buffer,
    sine: Buffer,
    pub(super) head_dim: usize,
    pub(super) rotary_dim: usize,
    pub(super) pairing: Pairing,
}

impl Turn {
    /// A copy of a table.
    pub fn new(gpu: &Arc<Gpu>, rotation: &Rotation) -> Result<Turn, CudaError> {
        let (cosine, sine) = rotation.tables();
        Ok(Turn {
            cosine: Buffer::from_host(gpu, cosine)?,
            sine: Buffer::from_host(gpu, sine)?,
            head_dim: rotation.head_dim(),
            rotary_dim: rotation.rotary_dim(),
            pairing: rotation.pairing(),
        })
    }

    /// Of the cosines and of the sines.
    pub(super) fn addresses(&self) -> (u64, u64) {
        (self.cosine.address(), self.sine.address())
    }
}

pub(super) fn program(dtype: Dtype) -> Program {
    Program::Decoder {
        bf16: dtype == Dtype::BF16,
    }
}

pub(super) const LINE: usize = 256;

impl Gpu {
    /// `out[i] = factor * table[ids[i]]`, rows of `table.columns`, rounded once.
    pub fn embed(
        self: &Arc<Self>,
        out: u64,
        table: DeviceMatrix,
        ids: &[u32],
        factor: f32,
    ) -> Result<(), CudaError> {
        let there = Buffer::from_host(self, ids)?;
        self.look_up(out, table, &there, ids.len(), factor)
    }

    /// The same with `count` ids (u32) on the GPU, each of them inside the table.
    pub fn look_up(
        &self,
        out: u64,
        table: DeviceMatrix,
        ids: &Buffer,
        count: usize,
        factor: f32,
    ) -> Result<(), CudaError> {
        let mut args = vec![
            out.into(),
            table.address.into(),
            ids.into(),
            (table.columns as i32).into(),
        ];
        let name = match factor == 1.0 {
            true => "embed",
            false => {
                args.push(factor.into());
                "embed_scaled"
            }
        };
        let (grid, block) = ([count, 1, 1], [LINE, 1, 1]);
        // SAFETY: ids were checked against the table by the caller; out has a row for each.
        unsafe { self.launch(program(table.dtype), name, grid, block, 0, &args) }
    }

    /// Rotary embedding in place; row `r` stands at position `r % tokens` of the table.
    pub fn rotate(&self, x: DeviceMatrix, turn: &Turn, tokens: usize) -> Result<(), CudaError> {
        let heads = x.columns / turn.head_dim;
        let args = [
            x.address.into(),
            (&turn.cosine).into(),
            (&turn.sine).into(),
            (heads as i32).into(),
            (turn.head_dim as i32).into(),
            ((turn.rotary_dim / 2) as i32).into(),
            (tokens as i32).into(),
        ];
        let name = match turn.pairing {
            Pairing::Halves => "rope",
            Pairing::Interleaved => "rope_interleaved",
        };
        let (grid, block) = ([x.rows, 1, 1], [LINE, 1, 1]);
        // SAFETY: the table has `tokens` positions, the caller made it for this window length.
        unsafe { self.launch(program(x.dtype), name, grid, block, 0, &args) }
    }

    /// `out [x.rows, columns] = x[:, first..first + columns]`.
    pub fn copy_columns(
        &self,
        out: u64,
        x: DeviceMatrix,
        first: usize,
        columns: usize,
    ) -> Result<(), CudaError> {
        assert!(first + columns <= x.columns, "columns of the matrix");
        let from = x.address + 2 * first as u64;
        let name = match by_eights(&[x.columns, columns], &[out, from]) {
            true => "copy_columns_8",
            false => "copy_columns_1",
        };
        let args = [
            out.into(),
            from.into(),
            (x.columns as i32).into(),
            (columns as i32).into(),
        ];
        let (grid, block) = ([x.rows, 1, 1], [LINE, 1, 1]);
        // SAFETY: the columns lie inside x, asserted above; out has rows of `columns`.
        unsafe { self.launch(program(x.dtype), name, grid, block, 0, &args) }
    }

    fn flat(
        &self,
        name: &'static str,
        dtype: Dtype,
        threads: usize,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        // SAFETY: every flat kernel stops at its count, the last argument; matrices have that size.
        unsafe {
            self.launch(
                program(dtype),
                name,
                [threads.div_ceil(LINE), 1, 1],
                [LINE, 1, 1],
                0,
                args,
            )
        }
    }

    /// The same for a kernel that waits itself for the one before.
    fn flat_behind(
        &self,
        program: Program,
        name: &'static str,
        threads: usize,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let (grid, block) = ([threads.div_ceil(LINE), 1, 1], [LINE, 1, 1]);
        // SAFETY: as for `flat`.
        unsafe { self.launch_behind(program, name, grid, block, 0, args) }
    }

    /// A decoder's program for what knows no sixteen-bit floats: the one that is loaded.
    fn any_decoder(&self) -> Program {
        let bf16 = self.has(program(Dtype::BF16));
        Program::Decoder { bf16 }
    }

    /// `x += y`.
    pub fn add(&self, x: DeviceMatrix, y: DeviceMatrix) -> Result<(), CudaError> {
        let count = x.rows * x.columns;
        let args = [x.address.into(), y.address.into(), (count as i64).into()];
        self.flat("add", x.dtype, count.div_ceil(8), &args)
    }

    /// `x += factor * y`, the product rounded before it is added.
    pub fn add_scaled(
        &self,
        x: DeviceMatrix,
        y: DeviceMatrix,
        factor: f32,
    ) -> Result<(), CudaError> {
        let count = x.rows * x.columns;
        let args = [
            x.address.into(),
            y.address.into(),
            factor.into(),
            (count as i64).into(),
        ];
        self.flat_behind(program(x.dtype), "add_scaled", count.div_ceil(8), &args)
    }

    /// `x *= factor`.
    pub fn scale(&self, x: DeviceMatrix, factor: f32) -> Result<(), CudaError> {
        let count = x.rows * x.columns;
        let args = [x.address.into(), factor.into(), (count as i64).into()];
        self.flat_behind(program(x.dtype), "scale", count.div_ceil(8), &args)
    }

    /// `x = cap * tanh(x / cap)` of `count` f32 values (Gemma 2).
    pub fn soft_cap(&self, address: u64, count: usize, cap: f32) -> Result<(), CudaError> {
        let args = [address.into(), cap.into(), (count as i64).into()];
        self.flat_behind(self.any_decoder(), "soft_cap", count, &args)
    }

    /// Where the first element of `x` is that is infinite or no number; waits for all work queued so far.
    pub fn first_not_finite(self: &Arc<Self>, x: DeviceMatrix) -> Result<Option<usize>, CudaError> {
        let count = x.rows * x.columns;
        let found = Buffer::from_host(self, &[u64::MAX])?;
        let args = [(&found).into(), x.address.into(), (count as i64).into()];
        let blocks = (count.div_ceil(8 * LINE)).min(8 * self.multiprocessors());
        let (grid, block) = ([blocks, 1, 1], [LINE, 1, 1]);
        // SAFETY: the kernel stops at its count, which the matrix has.
        unsafe { self.launch(program(x.dtype), "first_not_finite", grid, block, 0, &args)? };
        let found: Vec<u64> = found.to_host(1)?;
        Ok((found[0] != u64::MAX).then_some(found[0] as usize))
    }

    /// `x [rows, n] += bias [n]`, the bias in f32.
    pub fn add_bias(&self, x: DeviceMatrix, bias: &Buffer) -> Result<(), CudaError> {
        let count = x.rows * x.columns;
        let args = [
            x.address.into(),
            bias.into(),
            (x.columns as i32).into(),
            (count as i64).into(),
        ];
        self.flat("add_bias", x.dtype, count, &args)
    }

    /// `out [N, K] = scale * (code - zero)` of a packed layer, computed in f32 and rounded once.
    pub fn dequantise(
        self: &Arc<Self>,
        out: DeviceMatrix,
        layer: &SolvedLayer,
    ) -> Result<(), CudaError> {
        let (k, n) = (layer.in_features, layer.out_features);
        assert_eq!((out.rows, out.columns), (n, k), "rows are outputs");
        let codes = Buffer::from_host(self, &layer.codes)?;
        let scales = Buffer::from_host(self, &layer.scales)?;
        let zeros = Buffer::from_host(self, &layer.zeros)?;
        let g_idx = Buffer::from_host(self, &layer.g_idx)?;
        let args = [
            out.address.into(),
            (&codes).into(),
            (&scales).into(),
            (&zeros).into(),
            (&g_idx).into(),
            (k as i32).into(),
            (n as i32).into(),
        ];
        let grid = [n.div_ceil(64), k.div_ceil(64), 1];
        // SAFETY: the buffers have what a solved layer of K x N has; out was checked above.
        unsafe {
            self.launch(
                program(out.dtype),
                "dequantize",
                grid,
                [256, 1, 1],
                0,
                &args,
            )
        }
    }

    /// f32 values of a sixteen-bit matrix, on the host.
    pub fn download(self: &Arc<Self>, x: DeviceMatrix) -> Result<Vec<f32>, CudaError> {
        let count = x.rows * x.columns;
        let wide = Buffer::new(self, count * 4)?;
        let args = [(&wide).into(), x.address.into(), (count as i64).into()];
        self.flat("widen_all", x.dtype, count, &args)?;
        wide.to_host(count)
    }

    /// Rounds host values into a sixteen-bit matrix.
    pub fn upload(self: &Arc<Self>, out: DeviceMatrix, values: &[f32]) -> Result<(), CudaError> {
        assert_eq!(
            values.len(),
            out.rows * out.columns,
            "elements of the matrix"
        );
        let wide = Buffer::from_host(self, values)?;
        let args = [
            out.address.into(),
            (&wide).into(),
            (values.len() as i64).into(),
        ];
        self.flat("narrow_all", out.dtype, values.len(), &args)
    }
}
