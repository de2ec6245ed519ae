//! The operations of a decoder block on the GPU. Addresses are of sixteen-bit row-major matrices
//! that the caller keeps alive until the stream has passed them.

use std::sync::Arc;

use gptq_types::{DeviceMatrix, Dtype, SolvedLayer};

use super::Gpu;
use super::error::CudaError;
use super::memory::Buffer;
use super::program::Program;
use super::text::{Output, RowOrder};
use crate::Rotation;

/// Cosines and sines on the GPU, f32 `[positions, head_dim / 2]`.
pub struct Turn {
    cosine: Buffer,
    sine: Buffer,
    head_dim: usize,
}

impl Turn {
    /// A copy of a table.
    pub fn new(gpu: &Arc<Gpu>, rotation: &Rotation) -> Result<Turn, CudaError> {
        let (cosine, sine) = rotation.tables();
        Ok(Turn {
            cosine: Buffer::from_host(gpu, cosine)?,
            sine: Buffer::from_host(gpu, sine)?,
            head_dim: rotation.head_dim(),
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
    /// `out[i] = table[ids[i]]`, rows of `table.columns`.
    pub fn embed(
        self: &Arc<Self>,
        out: u64,
        table: DeviceMatrix,
        ids: &[u32],
    ) -> Result<(), CudaError> {
        let there = Buffer::from_host(self, ids)?;
        self.look_up(out, table, &there, ids.len())
    }

    /// The same with `count` ids (u32) on the GPU, each of them inside the table.
    pub fn look_up(
        &self,
        out: u64,
        table: DeviceMatrix,
        ids: &Buffer,
        count: usize,
    ) -> Result<(), CudaError> {
        let args = [
            out.into(),
            table.address.into(),
            ids.into(),
            (table.columns as i32).into(),
        ];
        // SAFETY: ids were checked against the table by the caller; out has a row for each.
        unsafe {
            self.launch(
                program(table.dtype),
                "embed",
                [count, 1, 1],
                [LINE, 1, 1],
                0,
                &args,
            )
        }
    }

    /// Root-mean-square norm over runs of as many columns as `weight` has f32 values.
    pub fn rms_norm(
        &self,
        out: u64,
        x: DeviceMatrix,
        weight: &Buffer,
        eps: f32,
    ) -> Result<(), CudaError> {
        let width = weight.bytes() / 4;
        let runs = DeviceMatrix {
            rows: x.rows * x.columns / width,
            columns: width,
            ..x
        };
        self.norm_rows(out, RowOrder::natural(width), runs, weight, eps)
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
            (tokens as i32).into(),
        ];
        // SAFETY: the table has `tokens` positions, the caller made it for this window length.
        unsafe {
            self.launch(
                program(x.dtype),
                "rotate",
                [x.rows, 1, 1],
                [LINE, 1, 1],
                0,
                &args,
            )
        }
    }

    fn flat(
        &self,
        name: &'static str,
        dtype: Dtype,
        threads: usize,
        args: &[super::launch::Arg],
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

    /// `gate = silu(gate) * up`.
    pub fn swiglu(&self, gate: DeviceMatrix, up: DeviceMatrix) -> Result<(), CudaError> {
        let (rows, columns) = (gate.rows, gate.columns);
        let outputs = [gate, up].map(|matrix| Output {
            address: matrix.address,
            pitch: columns,
        });
        let order = RowOrder::natural(columns);
        self.gate_rows(gate.address, order, outputs, [rows, columns], gate.dtype)
    }

    /// `x += y`.
    pub fn add(&self, x: DeviceMatrix, y: DeviceMatrix) -> Result<(), CudaError> {
        let count = x.rows * x.columns;
        let args = [x.address.into(), y.address.into(), (count as i64).into()];
        self.flat("add", x.dtype, count.div_ceil(8), &args)
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
                "dequantise",
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
