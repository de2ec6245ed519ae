//! The operations of a decoder block on the GPU, on sixteen-bit matrices.

use std::sync::Arc;

use gptq_types::{Dtype, SolvedLayer};

use super::Gpu;
use super::error::CudaError;
use super::launch::Arg;
use super::memory::Buffer;
use super::program::Program;
use super::text::by_eights;
use super::view::{DeviceMatrix, DeviceSlice};
use crate::{Pairing, Rotation};

/// Cosines and sines on the GPU, f32 `[positions, rotary_dim / 2]`, and which components of a head of
/// `head_dim` they rotate.
pub struct RotaryTable {
    cosine: Buffer,
    sine: Buffer,
    pub(super) head_dim: usize,
    pub(super) rotary_dim: usize,
    pub(super) pairing: Pairing,
}

impl RotaryTable {
    /// A copy of a table.
    pub fn new(gpu: &Arc<Gpu>, rotation: &Rotation) -> Result<RotaryTable, CudaError> {
        let (cosine, sine) = rotation.tables();
        Ok(RotaryTable {
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

    /// Positions of the table; all there are where nothing is turned.
    pub(super) fn positions(&self) -> usize {
        match self.rotary_dim / 2 {
            0 => usize::MAX,
            pairs => self.cosine.bytes() / 4 / pairs,
        }
    }
}

pub(super) fn program(dtype: Dtype) -> Program {
    Program::Decoder {
        bf16: dtype == Dtype::BF16,
    }
}

pub(super) const LINE: usize = 256;

/// Checks that a layer has the codes, grids and groups that its sizes say.
///
/// # Panics
/// If it has not.
pub(super) fn expect_consistent(layer: &SolvedLayer) {
    let (k, n, groups) = (layer.in_features, layer.out_features, layer.groups());
    assert_eq!(layer.codes.len(), k * n, "codes of the layer");
    assert_eq!(layer.scales.len(), groups * n, "scales of the layer");
    assert_eq!(layer.zeros.len(), groups * n, "zeros of the layer");
    assert_eq!(layer.g_idx.len(), k, "groups of the channels");
    let inside = layer.g_idx.iter().all(|&group| (group as usize) < groups);
    assert!(inside, "groups of the channels");
}

/// Elements of two matrices that have as many.
fn same_elements(x: DeviceMatrix, y: DeviceMatrix) -> usize {
    let count = x.contiguous().like(y).elements();
    assert_eq!(count, y.contiguous().elements(), "elements of both");
    count
}

impl Gpu {
    /// `out[i] = factor * table[ids[i]]`, rounded once.
    ///
    /// # Panics
    /// If an id is outside the table, or `out` has not a row of the table's width for each.
    pub fn embed(
        self: &Arc<Self>,
        out: DeviceMatrix,
        table: DeviceMatrix,
        ids: &[u32],
        factor: f32,
    ) -> Result<(), CudaError> {
        let inside = ids.iter().all(|&id| (id as usize) < table.rows);
        assert!(inside, "ids inside the table");
        let there = Buffer::from_host(self, ids)?;
        self.look_up(out, table, there.slice(ids.len()), factor)
    }

    /// The same with ids on the GPU. Nobody looks at them there: one outside the table reads what lies
    /// beyond it.
    ///
    /// # Panics
    /// If `out` has not a row of the table's width for each.
    pub fn look_up(
        &self,
        out: DeviceMatrix,
        table: DeviceMatrix,
        ids: DeviceSlice<'_, u32>,
        factor: f32,
    ) -> Result<(), CudaError> {
        let (out, table) = (out.contiguous().like(table), table.contiguous());
        out.expect([ids.len(), table.columns], "a row for each id");
        let count = ids.len();
        let mut args = vec![
            out.address.into(),
            table.address.into(),
            ids.address().into(),
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
    pub fn rotate(
        &self,
        x: DeviceMatrix,
        rotary: &RotaryTable,
        tokens: usize,
    ) -> Result<(), CudaError> {
        let heads = x.contiguous().half().columns / rotary.head_dim;
        assert_eq!(heads * rotary.head_dim, x.columns, "whole heads");
        assert!(tokens <= rotary.positions(), "positions of the table");
        let args = [
            x.address.into(),
            (&rotary.cosine).into(),
            (&rotary.sine).into(),
            (heads as i32).into(),
            (rotary.head_dim as i32).into(),
            ((rotary.rotary_dim / 2) as i32).into(),
            (tokens as i32).into(),
        ];
        let name = match rotary.pairing {
            Pairing::Halves => "rope",
            Pairing::Interleaved => "rope_interleaved",
        };
        let (grid, block) = ([x.rows, 1, 1], [LINE, 1, 1]);
        // SAFETY: the table has `tokens` positions, and rows whole heads, asserted above.
        unsafe { self.launch(program(x.dtype), name, grid, block, 0, &args) }
    }

    /// `out = x`, columns of a wider matrix.
    pub fn copy_columns(&self, out: DeviceMatrix, x: DeviceMatrix) -> Result<(), CudaError> {
        out.contiguous()
            .like(x)
            .expect([x.rows, x.columns], "rows of both");
        let name = match by_eights(&[x.pitch, x.columns], &[out.address, x.address]) {
            true => "copy_columns_8",
            false => "copy_columns_1",
        };
        let args = [
            out.address.into(),
            x.address.into(),
            (x.pitch as i32).into(),
            (x.columns as i32).into(),
        ];
        let (grid, block) = ([x.rows, 1, 1], [LINE, 1, 1]);
        // SAFETY: both have so many rows of so many columns.
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
    fn flat_pdl(
        &self,
        program: Program,
        name: &'static str,
        threads: usize,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        let (grid, block) = ([threads.div_ceil(LINE), 1, 1], [LINE, 1, 1]);
        // SAFETY: as for `flat`.
        unsafe { self.launch_pdl(program, name, grid, block, 0, args) }
    }

    /// A decoder's program for what knows no sixteen-bit floats: the one that is loaded.
    fn any_decoder(&self) -> Program {
        let bf16 = self.has(program(Dtype::BF16));
        Program::Decoder { bf16 }
    }

    /// `x += y`.
    pub fn add(&self, x: DeviceMatrix, y: DeviceMatrix) -> Result<(), CudaError> {
        let count = same_elements(x, y);
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
        let count = same_elements(x, y);
        let args = [
            x.address.into(),
            y.address.into(),
            factor.into(),
            (count as i64).into(),
        ];
        self.flat_pdl(program(x.dtype), "add_scaled", count.div_ceil(8), &args)
    }

    /// `x *= factor`.
    pub fn scale(&self, x: DeviceMatrix, factor: f32) -> Result<(), CudaError> {
        let count = x.contiguous().half().elements();
        let args = [x.address.into(), factor.into(), (count as i64).into()];
        self.flat_pdl(program(x.dtype), "scale", count.div_ceil(8), &args)
    }

    /// `x = cap * tanh(x / cap)` in f32 (Gemma 2).
    pub fn soft_cap(&self, x: DeviceMatrix, cap: f32) -> Result<(), CudaError> {
        assert_eq!(x.dtype, Dtype::F32, "type of logits");
        let count = x.contiguous().elements();
        let args = [x.address.into(), cap.into(), (count as i64).into()];
        self.flat_pdl(self.any_decoder(), "soft_cap", count, &args)
    }

    /// Where the first element of `x` is that is infinite or no number; waits for all work queued so far.
    pub fn first_not_finite(self: &Arc<Self>, x: DeviceMatrix) -> Result<Option<usize>, CudaError> {
        let count = x.contiguous().half().elements();
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
        let count = x.contiguous().half().elements();
        assert_eq!(bias.bytes(), 4 * x.columns, "a bias for each column");
        let args = [
            x.address.into(),
            bias.into(),
            (x.columns as i32).into(),
            (count as i64).into(),
        ];
        self.flat("add_bias", x.dtype, count, &args)
    }

    /// `out [N, K] = scale * (code - zero)` of a packed layer, computed in f32 and rounded once.
    pub fn dequantize(
        self: &Arc<Self>,
        out: DeviceMatrix,
        layer: &SolvedLayer,
    ) -> Result<(), CudaError> {
        let (k, n) = (layer.in_features, layer.out_features);
        out.contiguous().half().expect([n, k], "rows are outputs");
        expect_consistent(layer);
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
        let count = x.contiguous().half().elements();
        let wide = Buffer::new(self, count * 4)?;
        let args = [(&wide).into(), x.address.into(), (count as i64).into()];
        self.flat("widen_all", x.dtype, count, &args)?;
        wide.to_host(count)
    }

    /// Rounds host values into a sixteen-bit matrix.
    pub fn upload(self: &Arc<Self>, out: DeviceMatrix, values: &[f32]) -> Result<(), CudaError> {
        let elements = out.contiguous().half().elements();
        assert_eq!(values.len(), elements, "elements of the matrix");
        let wide = Buffer::from_host(self, values)?;
        let args = [
            out.address.into(),
            (&wide).into(),
            (values.len() as i64).into(),
        ];
        self.flat("narrow_all", out.dtype, values.len(), &args)
    }
}
