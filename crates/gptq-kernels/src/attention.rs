//! Grouped-query attention: its shape, whole windows of tokens, and the rows of any tile of queries.

use std::ops::Range;

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use pulp::Simd;
use rayon::prelude::*;

use crate::vector::{Kernel, cap_each, run_widest, softmax};

/// Query rows of one task: its scores (`QUERY_ROWS * tokens` floats) are the only scratch, so
/// memory is linear in the window.
pub(crate) const QUERY_ROWS: usize = 64;

/// Heads of an attention layer, and how its scores become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies scores; `1 / sqrt(head_dim)` in most models.
    pub scale: f32,
    /// Scaled scores `s` become `cap * tanh(s / cap)` (Gemma 2).
    pub soft_cap: Option<f32>,
    /// Keys that a query sees, its own included: those at positions above `p - window`. At least 1.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Scores divided by `sqrt(head_dim)`, without cap or window (Vaswani et al. 2017).
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        AttentionShape {
            heads,
            kv_heads,
            head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            soft_cap: None,
            window: None,
        }
    }

    /// The first position that the query at `position` sees.
    pub fn first_seen(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    pub(crate) fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    pub(crate) fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    pub(crate) fn kv_head_of(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }
}

/// Causal attention inside each window of tokens: `softmax(cap(scale * Q K^T)) V` over the keys that
/// `shape` lets a query see (Vaswani et al. 2017).
///
/// `q [windows * tokens, heads * head_dim]`, `k` and `v [windows * tokens, kv_heads * head_dim]`,
/// rotated already; returns the shape of `q`.
pub fn causal_attention(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    tokens: usize,
    shape: AttentionShape,
) -> Vec<f32> {
    let (width, kv_width) = (shape.query_width(), shape.kv_width());
    let mut out = vec![0.0f32; q.len()];
    for (window, out) in out.chunks_exact_mut(tokens * width).enumerate() {
        let q = &q[window * tokens * width..][..tokens * width];
        let kv = window * tokens * kv_width..(window + 1) * tokens * kv_width;
        let (k, v) = (&k[kv.clone()], &v[kv]);
        let of_head = |kv_head: usize, seen: Range<usize>| {
            [k, v].map(|x| {
                let x = &x[seen.start * kv_width..seen.end * kv_width];
                MatRef::from_row_major_slice(x, seen.len(), kv_width)
                    .subcols(kv_head * shape.head_dim, shape.head_dim)
            })
        };
        // The last rows look back furthest: handing them out first evens the load.
        out.par_chunks_mut(QUERY_ROWS * width)
            .enumerate()
            .rev()
            .for_each(|(block, out)| {
                let first = block * QUERY_ROWS;
                let q = &q[first * width..][..out.len()];
                attend_rows(out, q, first, shape, of_head);
            });
    }
    out
}

/// Attention of `q [rows, heads * head_dim]`, the first at position `first`, into `out`; `of_head` gives
/// keys and values of a key head at a range of positions, `[positions, head_dim]` each.
pub(crate) fn attend_rows<'a>(
    out: &mut [f32],
    q: &[f32],
    first: usize,
    shape: AttentionShape,
    of_head: impl Fn(usize, Range<usize>) -> [MatRef<'a, f32>; 2],
) {
    let (width, d) = (shape.query_width(), shape.head_dim);
    let rows = out.len() / width;
    // What not even the first row sees is not multiplied.
    let seen = shape.first_seen(first)..first + rows;
    let mut scores = vec![0.0f32; rows * seen.len()];
    for head in 0..shape.heads {
        let [k, v] = of_head(shape.kv_head_of(head), seen.clone());
        matmul(
            MatMut::from_row_major_slice_mut(&mut scores, rows, seen.len()),
            Accum::Replace,
            MatRef::from_row_major_slice(q, rows, width).subcols(head * d, d),
            k.transpose(),
            shape.scale,
            Par::Seq,
        );
        run_widest(CausalSoftmax {
            scores: &mut scores,
            first,
            keys: seen.clone(),
            shape,
        });
        matmul(
            MatMut::from_row_major_slice_mut(out, rows, width).subcols_mut(head * d, d),
            Accum::Replace,
            MatRef::from_row_major_slice(&scores, rows, seen.len()),
            v,
            1.0,
            Par::Seq,
        );
    }
}

/// Makes scaled scores weights, 0 for the keys that a query does not see.
struct CausalSoftmax<'a> {
    scores: &'a mut [f32], // [rows, keys]
    first: usize,          // position of the first row
    keys: Range<usize>,    // positions
    shape: AttentionShape,
}

impl Kernel for CausalSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let rows = self.scores.chunks_exact_mut(self.keys.len());
        for (position, scores) in (self.first..).zip(rows) {
            let (past, future) = scores.split_at_mut(position + 1 - self.keys.start);
            let unseen = self.shape.first_seen(position) - self.keys.start;
            let (unseen, seen) = past.split_at_mut(unseen);
            unseen.fill(0.0);
            if let Some(cap) = self.shape.soft_cap {
                cap_each(seen, cap);
            }
            softmax(seen);
            future.fill(0.0);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
