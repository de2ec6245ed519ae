//! Attention inside windows, by tiles where there is a kernel for the width of heads, else as two batched
//! products and a softmax over runs of query rows. Matrices are sixteen-bit.

use std::sync::Arc;

use cudarc::cublas::sys::{
    cublasComputeType_t as Compute, cublasOperation_t as Op, cudaDataType_t as Type,
};

use super::Gpu;
use super::decoder::{LINE, program};
use super::error::CudaError;
use super::key_values::{among, scored};
use super::product::{Product, Side, half_type};
use super::view::DeviceMatrix;
use crate::AttentionShape;
use crate::device_sizes::rows_at_a_time;

impl Gpu {
    /// Causal attention inside windows of `tokens` rows, as [`crate::causal_attention`].
    pub fn attend(
        self: &Arc<Self>,
        out: DeviceMatrix,
        q: DeviceMatrix,
        k: DeviceMatrix,
        v: DeviceMatrix,
        tokens: usize,
        shape: AttentionShape,
    ) -> Result<(), CudaError> {
        expect_heads(out, q, [k, v], q.rows, shape);
        assert!(q.rows.is_multiple_of(tokens), "whole windows");
        for window in 0..q.rows / tokens {
            let rows = window * tokens..(window + 1) * tokens;
            let [there, q_rows, k_rows, v_rows] = [out, q, k, v].map(|x| x.row_range(rows.clone()));
            if self.attend_tiled(there.address, q_rows, k_rows, v_rows, 0, shape)? {
                continue;
            }
            let from = [window * tokens; 2];
            self.attend_window(out.address, q, k, v, from, 0, tokens, shape)?;
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
        let shape = among(shape, keys);
        let rows = rows_at_a_time(count, keys, shape);
        let scores = self.scratch("scores", shape.heads * rows * keys * 4)?;
        let p = self.scratch("probabilities", shape.heads * rows * keys * 2)?;
        for done in (0..count).step_by(rows) {
            let part = Part {
                base: from[1],
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
            base,
            query,
            first,
            rows,
            shape,
        } = *part;
        let (d, kv_heads) = (shape.head_dim, shape.kv_heads);
        let repeat = shape.heads / kv_heads;
        // Keys before the first query's window are left out, by eights: runs of scores stay aligned.
        let hidden = shape.first_seen(first) & !7;
        let (base, first) = (base + hidden, first - hidden);
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
                        at(k.address, base, k.columns, 0),
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
        let [scale, cap, window] = scored(shape);
        let mut args = vec![
            p.into(),
            scores.into(),
            (keys as i32).into(),
            (first as i32).into(),
            scale,
        ];
        let name = match shape.soft_cap.is_some() || shape.window.is_some() {
            true => {
                args.extend([cap, window]);
                "windowed_softmax"
            }
            false => "causal_softmax",
        };
        let (grid, block) = ([rows, shape.heads, 1], [LINE, 1, 1]);
        // SAFETY: one block a row of each of the `heads` matrices.
        unsafe { self.launch(program(q.dtype), name, grid, block, 0, &args)? };
        for r in 0..repeat {
            // SAFETY: as above, for v and out.
            unsafe {
                self.product(&Product {
                    size: [d, rows, keys],
                    alpha: 1.0,
                    a: half(
                        at(v.address, base, v.columns, 0),
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

/// Checks that queries and what attention makes of them, and keys and values of `keys` tokens, are as
/// `shape` says.
pub(super) fn expect_heads(
    out: DeviceMatrix,
    q: DeviceMatrix,
    kv: [DeviceMatrix; 2],
    keys: usize,
    shape: AttentionShape,
) {
    let heads = [q.rows, shape.heads * shape.head_dim];
    q.contiguous().half().expect(heads, "heads of queries");
    out.contiguous().like(q).expect(heads, "heads of attention");
    for x in kv {
        let heads = [keys, shape.kv_heads * shape.head_dim];
        x.contiguous()
            .like(q)
            .expect(heads, "heads of keys and values");
    }
}

/// `rows` queries from row `query` on, at positions from `first` on of the sequence whose keys begin
/// at row `base`.
#[derive(Clone, Copy)]
struct Part {
    base: usize,
    query: usize,
    first: usize,
    rows: usize,
    shape: AttentionShape,
}
