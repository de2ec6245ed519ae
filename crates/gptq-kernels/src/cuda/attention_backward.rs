//! The gradient of attention inside windows of tokens, as batched products and a kernel over runs of query rows
//! ([`Gpu::attend`] without the tiled kernels). Matrices are sixteen-bit.

use std::sync::Arc;

use cudarc::cublas::sys::{
    cublasComputeType_t as Compute, cublasOperation_t as Op, cudaDataType_t as Type,
};

use super::Gpu;
use super::backward::program;
use super::decoder::LINE;
use super::error::CudaError;
use super::key_values::{among, scored};
use super::memory::Buffer;
use super::product::{Product, Side, half_type};
use super::view::DeviceMatrix;
use crate::AttentionShape;
use crate::device_sizes::rows_at_a_time;

/// What attention reads, and the gradient of what it gave: `d_out`, `q`, `k`, `v`.
#[derive(Clone, Copy)]
struct Inputs<'a> {
    d_out: DeviceMatrix<'a>,
    q: DeviceMatrix<'a>,
    k: DeviceMatrix<'a>,
    v: DeviceMatrix<'a>,
}

impl Inputs<'_> {
    fn row_range(self, rows: std::ops::Range<usize>) -> Self {
        Inputs {
            d_out: self.d_out.row_range(rows.clone()),
            q: self.q.row_range(rows.clone()),
            k: self.k.row_range(rows.clone()),
            v: self.v.row_range(rows),
        }
    }
}

/// Matrices `[heads, rows, keys]` of a run of query rows. That of query head `r` among those that share key head
/// `h` is number `r kv_heads + h`.
struct Working {
    scores: Arc<Buffer>,   // f32
    d_p: Arc<Buffer>,      // f32, gradients of the weights
    p: Arc<Buffer>,        // the weights
    d_scores: Arc<Buffer>, // gradients of scaled scores
    /// Sums over query rows and heads, f32 `[tokens, kv_heads * head_dim]`.
    d_k: Arc<Buffer>,
    d_v: Arc<Buffer>,
}

impl Gpu {
    /// `[dq, dk, dv]`, the gradients of the inputs `[q, k, v]` of [`Gpu::attend`], from `d_out`, that of its
    /// output: causal attention inside windows of `tokens` rows. Every one of them may be columns of a wider
    /// matrix; `dq` may be `q` or `d_out`, `dk` may be `k` and `dv` may be `v`. It works in
    /// [`attention_backward_bytes`](crate::attention_backward_bytes).
    ///
    /// With `P = softmax(t)`, `t = cap tanh(s / cap)` (or `s`) and `s = scale Q K^T`, which are computed again:
    /// `dV = P^T dO`, `dP = dO V^T`, `dT = P (dP - rowsum(P dP))`, `dS = dT (1 - (t / cap)^2)`,
    /// `dQ = scale dS K`, `dK = scale dS^T Q` (FlashAttention-2: Dao 2023, algorithm 2). `P` and `dS` are
    /// rounded to sixteen bits before the products; `dk` and `dv` are summed in f32 over runs of queries and
    /// then over the heads that share keys, in one order, and rounded once.
    ///
    /// # Panics
    /// If shapes or types do not agree, or rows are not whole windows.
    pub fn attend_backward(
        self: &Arc<Self>,
        [dq, dk, dv]: [DeviceMatrix; 3],
        d_out: DeviceMatrix,
        [q, k, v]: [DeviceMatrix; 3],
        tokens: usize,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        let rows = q.half().rows;
        for of in [q, d_out, dq] {
            (of.like(q)).expect([rows, shape.query_width()], "heads of queries");
        }
        for of in [k, v, dk, dv] {
            (of.like(q)).expect([rows, shape.kv_width()], "heads of keys and values");
        }
        assert!(rows.is_multiple_of(tokens), "whole windows");
        let inputs = Inputs { d_out, q, k, v };
        for first in (0..rows).step_by(tokens) {
            let window = first..first + tokens;
            let [dq, dk, dv] = [dq, dk, dv].map(|x| x.row_range(window.clone()));
            self.attend_window_backward([dq, dk, dv], inputs.row_range(window), shape)?;
        }
        Ok(())
    }

    fn attend_window_backward(
        self: &Arc<Self>,
        [dq, dk, dv]: [DeviceMatrix; 3],
        inputs: Inputs,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        let tokens = dq.rows;
        let shape = among(shape, tokens);
        let rows = rows_at_a_time(tokens, tokens, shape);
        let scores = shape.heads * rows * tokens;
        let sums = tokens * shape.kv_width() * 4;
        let working = Working {
            scores: self.scratch("scores", scores * 4)?,
            d_p: self.scratch("gradients of probabilities", scores * 4)?,
            p: self.scratch("probabilities", scores * 2)?,
            d_scores: self.scratch("gradients of scores", scores * 2)?,
            d_k: self.scratch("gradients of keys", sums)?,
            d_v: self.scratch("gradients of values", sums)?,
        };
        working.d_k.clear()?;
        working.d_v.clear()?;
        for first in (0..tokens).step_by(rows) {
            let count = rows.min(tokens - first);
            self.attend_part_backward(dq, inputs, first, count, &working, shape)?;
        }
        for (to, sum) in [(dk, &working.d_k), (dv, &working.d_v)] {
            let args = [
                to.address.into(),
                sum.address().into(),
                (to.pitch as i32).into(),
                (to.columns as i32).into(),
            ];
            let (grid, block) = ([tokens, 1, 1], [LINE, 1, 1]);
            // SAFETY: both have `tokens` rows of as many columns.
            unsafe { self.launch(program(to.dtype), "narrow_rows", grid, block, 0, &args)? };
        }
        Ok(())
    }

    /// `rows` queries from position `first` of a window on.
    fn attend_part_backward(
        &self,
        dq: DeviceMatrix,
        inputs: Inputs,
        first: usize,
        rows: usize,
        working: &Working,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        let Inputs { d_out, q, k, v } = inputs;
        let (d, kv_heads, kv_width) = (shape.head_dim, shape.kv_heads, shape.kv_width());
        let repeat = shape.heads / kv_heads;
        // Keys before the first query's window are left out, by eights: runs of scores stay aligned.
        let hidden = shape.first_seen(first) & !7;
        let keys = first + rows - hidden;
        let kind = half_type(q.dtype);
        let (n, t) = (Op::CUBLAS_OP_N, Op::CUBLAS_OP_T);
        let side = |address, op, kind, ld, stride| Side {
            address,
            op,
            kind,
            ld,
            stride,
        };
        // A head of the keys' side for each of a batch, and query head `r` of those that share it.
        let of_keys = |x: DeviceMatrix, op| {
            let at = x.row_range(hidden..hidden + keys).address;
            side(at, op, kind, x.pitch, d)
        };
        let of_queries = |x: DeviceMatrix, r: usize| {
            let at = x.row_range(first..first + rows).address + 2 * (r * d) as u64;
            side(at, n, kind, x.pitch, repeat * d)
        };
        let matrices = |buffer: &Buffer, r: usize, op, kind| {
            let size = if kind == Type::CUDA_R_32F { 4 } else { 2 };
            let at = buffer.address() + (size * r * kv_heads * rows * keys) as u64;
            side(at, op, kind, keys, rows * keys)
        };
        let sum = |buffer: &Buffer| {
            let at = buffer.address() + (4 * hidden * kv_width) as u64;
            side(at, n, Type::CUDA_R_32F, kv_width, d)
        };
        let multiply = |size, alpha, a, b, beta, c| {
            // SAFETY: heads, rows and keys lie inside the windows of all matrices, their products inside the
            // working space.
            unsafe {
                self.product(&Product {
                    size,
                    alpha,
                    a,
                    b,
                    beta,
                    c,
                    batch: kv_heads,
                    compute: Compute::CUBLAS_COMPUTE_32F,
                })
            }
        };
        let Working {
            scores,
            d_p,
            p,
            d_scores,
            d_k,
            d_v,
        } = working;
        for r in 0..repeat {
            for (x, y, to) in [(k, q, scores), (v, d_out, d_p)] {
                let to = matrices(to, r, n, Type::CUDA_R_32F);
                multiply(
                    [keys, rows, d],
                    1.0,
                    of_keys(x, t),
                    of_queries(y, r),
                    0.0,
                    to,
                )?;
            }
        }
        let [scale, cap, window] = scored(shape);
        let args = [
            p.address().into(),
            d_scores.address().into(),
            scores.address().into(),
            d_p.address().into(),
            (keys as i32).into(),
            ((first - hidden) as i32).into(),
            scale,
            cap,
            window,
        ];
        let (grid, block) = ([rows, shape.heads, 1], [LINE, 1, 1]);
        // SAFETY: one block a row of each of the `heads` matrices.
        unsafe { self.launch(program(q.dtype), "softmax_backward", grid, block, 0, &args)? };
        for r in 0..repeat {
            for (alpha, y, x, to) in [(1.0, d_out, p, d_v), (shape.scale, q, d_scores, d_k)] {
                let weights = matrices(x, r, t, kind);
                multiply(
                    [d, keys, rows],
                    alpha,
                    of_queries(y, r),
                    weights,
                    1.0,
                    sum(to),
                )?;
            }
        }
        // Last, so that it may take the place of what these products read.
        for r in 0..repeat {
            let weights = matrices(d_scores, r, n, kind);
            let to = of_queries(dq, r);
            multiply(
                [d, rows, keys],
                shape.scale,
                of_keys(k, n),
                weights,
                0.0,
                to,
            )?;
        }
        Ok(())
    }
}
