//! Grouped-query attention: whole windows, and one new token against a cache.

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use rayon::prelude::*;

use crate::vector::{axpy, dot, softmax, vectorised};

/// Query rows of one task: its scores (`QUERY_ROWS * tokens` floats) are the only scratch, so
/// memory is linear in the window.
const QUERY_ROWS: usize = 64;

/// Head counts and widths of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl AttentionShape {
    fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    fn kv_head_of(&self, head: usize) -> usize {
        head / (self.heads / self.kv_heads)
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// Causal attention inside each window: `softmax(Q K^T / sqrt(head_dim)) V` (Vaswani et al. 2017).
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
    let width = shape.query_width();
    let mut out = vec![0.0f32; q.len()];
    for (window, out) in out.chunks_exact_mut(tokens * width).enumerate() {
        let q = &q[window * tokens * width..][..tokens * width];
        let kv = window * tokens * shape.kv_width()..(window + 1) * tokens * shape.kv_width();
        let (k, v) = (&k[kv.clone()], &v[kv]);
        // The last rows look back furthest: handing them out first evens the load.
        out.par_chunks_mut(QUERY_ROWS * width)
            .enumerate()
            .rev()
            .for_each(|(block, out)| {
                let first = block * QUERY_ROWS;
                let q = &q[first * width..][..out.len()];
                attend_rows(out, q, k, v, first, shape);
            });
    }
    out
}

/// Rows `first..` of one window, all heads.
fn attend_rows(
    out: &mut [f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    first: usize,
    shape: AttentionShape,
) {
    let (width, kv_width, d) = (shape.query_width(), shape.kv_width(), shape.head_dim);
    let rows = out.len() / width;
    let seen = first + rows;
    let mut scores = vec![0.0f32; rows * seen];
    for head in 0..shape.heads {
        let kv = shape.kv_head_of(head) * d;
        let q = MatRef::from_row_major_slice(q, rows, width).subcols(head * d, d);
        let k = MatRef::from_row_major_slice(&k[..seen * kv_width], seen, kv_width).subcols(kv, d);
        let v = MatRef::from_row_major_slice(&v[..seen * kv_width], seen, kv_width).subcols(kv, d);
        matmul(
            MatMut::from_row_major_slice_mut(&mut scores, rows, seen),
            Accum::Replace,
            q,
            k.transpose(),
            shape.scale(),
            Par::Seq,
        );
        vectorised(|| {
            for (row, scores) in scores.chunks_exact_mut(seen).enumerate() {
                let (past, future) = scores.split_at_mut(first + row + 1);
                softmax(past);
                future.fill(0.0);
            }
        });
        matmul(
            MatMut::from_row_major_slice_mut(out, rows, width).subcols_mut(head * d, d),
            Accum::Replace,
            MatRef::from_row_major_slice(&scores, rows, seen),
            v,
            1.0,
            Par::Seq,
        );
    }
}

/// Keys and values of several sequences that grow in step.
#[derive(Clone, Debug)]
pub struct CachedRows {
    capacity: usize,
    length: usize,
    keys: Vec<f32>,   // [sequences, capacity, kv_heads * head_dim]
    values: Vec<f32>, // [sequences, capacity, kv_heads * head_dim]
}

impl CachedRows {
    /// Room for `capacity` tokens of each of `sequences`.
    pub fn new(sequences: usize, capacity: usize, shape: AttentionShape) -> Self {
        let len = sequences * capacity * shape.kv_width();
        CachedRows {
            capacity,
            length: 0,
            keys: vec![0.0; len],
            values: vec![0.0; len],
        }
    }

    /// Tokens held for each sequence.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether no token has been appended.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }
}

/// Appends one token a sequence to the cache and attends from it to all that the cache holds.
///
/// `q [sequences, heads * head_dim]`, `k` and `v [sequences, kv_heads * head_dim]`, rotated
/// already; returns the shape of `q`.
pub fn attend_cached(
    cache: &mut CachedRows,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    shape: AttentionShape,
) -> Vec<f32> {
    let (width, kv_width, d) = (shape.query_width(), shape.kv_width(), shape.head_dim);
    let row_len = cache.capacity * kv_width;
    for (sequence, (k, v)) in k
        .chunks_exact(kv_width)
        .zip(v.chunks_exact(kv_width))
        .enumerate()
    {
        let at = sequence * row_len + cache.length * kv_width;
        cache.keys[at..at + kv_width].copy_from_slice(k);
        cache.values[at..at + kv_width].copy_from_slice(v);
    }
    cache.length += 1;
    let seen = cache.length;
    let mut out = vec![0.0f32; q.len()];
    out.par_chunks_mut(d).enumerate().for_each(|(task, out)| {
        let (sequence, head) = (task / shape.heads, task % shape.heads);
        let kv = shape.kv_head_of(head) * d;
        let row = |token: usize| {
            let at = sequence * row_len + token * kv_width + kv;
            at..at + d
        };
        let q = &q[sequence * width + head * d..][..d];
        vectorised(|| {
            let mut scores: Vec<f32> = (0..seen)
                .map(|token| dot(q, &cache.keys[row(token)]) * shape.scale())
                .collect();
            softmax(&mut scores);
            for (token, &weight) in scores.iter().enumerate() {
                axpy(out, weight, &cache.values[row(token)]);
            }
        });
    });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: AttentionShape = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
    };

    fn wave(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin()).collect()
    }

    /// The definition in f64, one query at a time.
    fn reference(q: &[f32], k: &[f32], v: &[f32], tokens: usize) -> Vec<f64> {
        let d = SHAPE.head_dim;
        let (w, kw) = (SHAPE.query_width(), SHAPE.kv_width());
        let mut out = vec![0.0; q.len()];
        for t in 0..tokens {
            for h in 0..SHAPE.heads {
                let g = h / 2 * d;
                let scores: Vec<f64> = (0..=t)
                    .map(|s| {
                        let dot: f64 = (0..d)
                            .map(|i| f64::from(q[t * w + h * d + i]) * f64::from(k[s * kw + g + i]))
                            .sum();
                        (dot / (d as f64).sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                for i in 0..d {
                    out[t * w + h * d + i] = (0..=t)
                        .map(|s| scores[s] / sum * f64::from(v[s * kw + g + i]))
                        .sum();
                }
            }
        }
        out
    }

    #[test]
    fn windows_and_cache_agree_with_the_definition() {
        let tokens = 150; // more than two query blocks, the last one short
        let q = wave(tokens * SHAPE.query_width(), 0.37);
        let k = wave(tokens * SHAPE.kv_width(), 0.11);
        let v = wave(tokens * SHAPE.kv_width(), 0.23);
        let want = reference(&q, &k, &v, tokens);
        let whole = causal_attention(&q, &k, &v, tokens, SHAPE);
        let mut cache = CachedRows::new(1, tokens, SHAPE);
        let (w, kw) = (SHAPE.query_width(), SHAPE.kv_width());
        for t in 0..tokens {
            let row = attend_cached(
                &mut cache,
                &q[t * w..][..w],
                &k[t * kw..][..kw],
                &v[t * kw..][..kw],
                SHAPE,
            );
            for (i, got) in row.iter().enumerate() {
                assert!((f64::from(*got) - want[t * w + i]).abs() < 1e-5);
            }
        }
        for (got, want) in whole.iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 1e-5);
        }
    }

    #[test]
    fn windows_do_not_see_each_other() {
        let tokens = 5;
        let q = wave(2 * tokens * SHAPE.query_width(), 0.37);
        let k = wave(2 * tokens * SHAPE.kv_width(), 0.11);
        let v = wave(2 * tokens * SHAPE.kv_width(), 0.23);
        let both = causal_attention(&q, &k, &v, tokens, SHAPE);
        let second = causal_attention(
            &q[tokens * SHAPE.query_width()..],
            &k[tokens * SHAPE.kv_width()..],
            &v[tokens * SHAPE.kv_width()..],
            tokens,
            SHAPE,
        );
        assert_eq!(&both[tokens * SHAPE.query_width()..], &second[..]);
    }
}
