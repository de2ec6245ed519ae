//! The operations of a decoder block on the GPU. Addresses are of sixteen-bit row-major matrices
//! that the caller keeps alive until the stream has passed them.

use std::sync::Arc;

use cudarc::cublas::sys::{
    cublasComputeType_t as Compute, cublasOperation_t as Op, cudaDataType_t as Type,
};
use gptq_types::{DeviceMatrix, Dtype, SolvedLayer};

use super::Gpu;
use super::error::CudaError;
use super::memory::Buffer;
use super::product::{Product, Side, half_type};
use super::program::Program;
use crate::{AttentionShape, Rotation};

/// Scores that exist at a time: long windows are cut into query rows that keep to it, so that
/// memory is linear in the window.
const SCORE_BYTES: usize = 256 << 20;
/// Most query rows at a time; shorter runs leave more of the unneeded upper triangle out.
const QUERY_ROWS: usize = 512;

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

fn program(dtype: Dtype) -> Program {
    Program::Decoder {
        bf16: dtype == Dtype::BF16,
    }
}

const LINE: usize = 256;

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
        let runs = x.rows * x.columns / width;
        let threads = width.div_ceil(32).min(8) * 32;
        let args = [
            out.into(),
            x.address.into(),
            weight.into(),
            (width as i32).into(),
            eps.into(),
        ];
        // SAFETY: out is as long as x.
        unsafe {
            self.launch(
                program(x.dtype),
                "rms_norm",
                [runs, 1, 1],
                [threads, 1, 1],
                0,
                &args,
            )
        }
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
        count: usize,
        args: &[super::device::Arg],
    ) -> Result<(), CudaError> {
        // SAFETY: every flat kernel stops at its count; the callers pass matrices of that size.
        unsafe {
            self.launch(
                program(dtype),
                name,
                [count.div_ceil(LINE), 1, 1],
                [LINE, 1, 1],
                0,
                args,
            )
        }
    }

    /// `gate = silu(gate) * up`.
    pub fn swiglu(&self, gate: DeviceMatrix, up: DeviceMatrix) -> Result<(), CudaError> {
        let count = gate.rows * gate.columns;
        let args = [
            gate.address.into(),
            up.address.into(),
            (count as i64).into(),
        ];
        self.flat("swiglu", gate.dtype, count, &args)
    }

    /// `x += y`.
    pub fn add(&self, x: DeviceMatrix, y: DeviceMatrix) -> Result<(), CudaError> {
        let count = x.rows * x.columns;
        let args = [x.address.into(), y.address.into(), (count as i64).into()];
        self.flat("add", x.dtype, count, &args)
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

    /// Causal attention inside windows of `tokens` rows, as [`crate::causal_attention`].
    pub fn attend(
        self: &Arc<Self>,
        out: u64,
        q: DeviceMatrix,
        k: DeviceMatrix,
        v: DeviceMatrix,
        tokens: usize,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        for window in 0..q.rows / tokens {
            self.attend_window(out, q, k, v, [window * tokens; 2], 0, tokens, shape)?;
        }
        Ok(())
    }

    /// The same from rows `q` that stand at positions from `first` on of the one sequence whose
    /// keys and values are `k` and `v`.
    pub(super) fn attend_behind(
        self: &Arc<Self>,
        out: u64,
        q: DeviceMatrix,
        k: DeviceMatrix,
        v: DeviceMatrix,
        first: usize,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        self.attend_window(out, q, k, v, [0, 0], first, q.rows, shape)
    }

    /// `count` queries from row `from[0]` on, at positions from `first` on, against keys from row
    /// `from[1]` on.
    #[allow(clippy::too_many_arguments)]
    fn attend_window(
        self: &Arc<Self>,
        out: u64,
        q: DeviceMatrix,
        k: DeviceMatrix,
        v: DeviceMatrix,
        from: [usize; 2],
        first: usize,
        count: usize,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        let keys = first + count;
        let rows = (SCORE_BYTES / (4 * shape.heads * keys))
            .clamp(16, QUERY_ROWS)
            .min(count);
        let scores = self.scratch("scores", shape.heads * rows * keys * 4)?;
        let p = self.scratch("probabilities", shape.heads * rows * keys * 2)?;
        for done in (0..count).step_by(rows) {
            let part = Part {
                window: from[1],
                query: from[0] + done,
                first: first + done,
                rows: rows.min(count - done),
                shape,
            };
            self.attend_part(out, q, k, v, &part, scores.address(), p.address())?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn attend_part(
        &self,
        out: u64,
        q: DeviceMatrix,
        k: DeviceMatrix,
        v: DeviceMatrix,
        part: &Part,
        scores: u64,
        p: u64,
    ) -> Result<(), CudaError> {
        let Part {
            window,
            query,
            first,
            rows,
            shape,
        } = *part;
        let (d, kv_heads) = (shape.head_dim, shape.kv_heads);
        let repeat = shape.heads / kv_heads;
        let keys = first + rows;
        let kind = half_type(q.dtype);
        let at = |base: u64, row: usize, width: usize, head: usize| {
            base + 2 * (row * width + head * d) as u64
        };
        let half = |address, op, ld, stride| Side {
            address,
            op,
            kind,
            ld,
            stride,
        };
        let matrix = kv_heads * rows * keys;
        for r in 0..repeat {
            let to = Side {
                kind: Type::CUDA_R_32F,
                ..half(
                    scores + 4 * (r * matrix) as u64,
                    Op::CUBLAS_OP_N,
                    keys,
                    rows * keys,
                )
            };
            // SAFETY: heads, rows and keys stay inside the windows of q and k, and inside scores.
            unsafe {
                self.product(&Product {
                    size: [keys, rows, d],
                    alpha: 1.0,
                    a: half(
                        at(k.address, window, k.columns, 0),
                        Op::CUBLAS_OP_T,
                        k.columns,
                        d,
                    ),
                    b: half(
                        at(q.address, query, q.columns, r),
                        Op::CUBLAS_OP_N,
                        q.columns,
                        repeat * d,
                    ),
                    beta: 0.0,
                    c: to,
                    batch: kv_heads,
                    compute: Compute::CUBLAS_COMPUTE_32F,
                })?;
            }
        }
        let scale = 1.0 / (d as f32).sqrt();
        let args = [
            p.into(),
            scores.into(),
            (keys as i32).into(),
            (first as i32).into(),
            scale.into(),
        ];
        // SAFETY: one block a row of each of the `heads` matrices.
        unsafe {
            self.launch(
                program(q.dtype),
                "causal_softmax",
                [rows, shape.heads, 1],
                [LINE, 1, 1],
                0,
                &args,
            )?
        };
        for r in 0..repeat {
            // SAFETY: as above, for v and out.
            unsafe {
                self.product(&Product {
                    size: [d, rows, keys],
                    alpha: 1.0,
                    a: half(
                        at(v.address, window, v.columns, 0),
                        Op::CUBLAS_OP_N,
                        v.columns,
                        d,
                    ),
                    b: half(
                        p + 2 * (r * matrix) as u64,
                        Op::CUBLAS_OP_N,
                        keys,
                        rows * keys,
                    ),
                    beta: 0.0,
                    c: half(
                        at(out, query, q.columns, r),
                        Op::CUBLAS_OP_N,
                        q.columns,
                        repeat * d,
                    ),
                    batch: kv_heads,
                    compute: Compute::CUBLAS_COMPUTE_32F,
                })?;
            }
        }
        Ok(())
    }
}

/// `rows` queries from row `query` on, at positions from `first` on of the sequence whose keys begin
/// at row `window`.
#[derive(Clone, Copy)]
struct Part {
    window: usize,
    query: usize,
    first: usize,
    rows: usize,
    shape: AttentionShape,
}

/// Keys and values of earlier tokens, `[sequences, capacity, kv_heads * head_dim]` each.
pub struct DeviceCache {
    gpu: Arc<Gpu>,
    keys: Buffer,
    values: Buffer,
    sequences: usize,
    capacity: usize,
    seen: usize,
}

impl DeviceCache {
    /// Empty, for `capacity` tokens of each sequence.
    pub fn new(
        gpu: &Arc<Gpu>,
        sequences: usize,
        capacity: usize,
        shape: AttentionShape,
    ) -> Result<Self, CudaError> {
        let bytes = sequences * capacity * shape.kv_heads * shape.head_dim * 2;
        Ok(DeviceCache {
            gpu: gpu.clone(),
            keys: Buffer::new(gpu, bytes)?,
            values: Buffer::new(gpu, bytes)?,
            sequences,
            capacity,
            seen: 0,
        })
    }

    /// Appends a row of `k` and `v` a sequence and attends from `q`, as [`crate::attend_cached`].
    pub fn attend(
        &mut self,
        out: u64,
        q: DeviceMatrix,
        k: DeviceMatrix,
        v: DeviceMatrix,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        assert!(self.seen < self.capacity, "tokens in the cache");
        let row = (shape.kv_heads * shape.head_dim * 2) as u64;
        for sequence in 0..self.sequences as u64 {
            let at = (sequence * self.capacity as u64 + self.seen as u64) * row;
            self.gpu.copy(
                self.keys.address() + at,
                k.address + sequence * row,
                row as usize,
            )?;
            self.gpu.copy(
                self.values.address() + at,
                v.address + sequence * row,
                row as usize,
            )?;
        }
        self.seen += 1;
        let args = [
            out.into(),
            q.address.into(),
            (&self.keys).into(),
            (&self.values).into(),
            (self.capacity as i32).into(),
            (self.seen as i32).into(),
            (shape.kv_heads as i32).into(),
            (shape.head_dim as i32).into(),
            (1.0 / (shape.head_dim as f32).sqrt()).into(),
        ];
        let grid = [shape.heads, self.sequences, 1];
        // SAFETY: the caches hold `seen` rows a sequence; q and out a row.
        unsafe {
            self.gpu.launch(
                program(q.dtype),
                "attend_cached",
                grid,
                [128, 1, 1],
                self.seen * 4,
                &args,
            )
        }
    }
}
