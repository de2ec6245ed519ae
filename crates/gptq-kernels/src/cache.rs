//! Keys and values of sequences that grow each at its own pace, and attention to them.

use faer::{Accum, MatMut, MatRef, Par, linalg::matmul::matmul};
use pulp::Simd;
use rayon::prelude::*;

use crate::AttentionShape;
use crate::vector::{Kernel, axpy, dot, run_widest, softmax};

/// Query rows of one task of a prompt; its scores are `[QUERY_ROWS, tokens]`.
const QUERY_ROWS: usize = 32;
/// Multiplications below which a step's attention is quicker on one thread than shared out.
const WORTH_SHARING: usize = 1 << 16;

/// Keys and values of one layer, `[sequences, kv_heads, capacity, head_dim]` each: a head's tokens
/// lie together.
#[derive(Clone, Debug)]
pub struct KeyValueCache {
    shape: AttentionShape,
    capacity: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl KeyValueCache {
    /// Room for `capacity` tokens of each of `sequences`.
    pub fn new(sequences: usize, capacity: usize, shape: AttentionShape) -> Self {
        let len = sequences * capacity * shape.kv_heads * shape.head_dim;
        KeyValueCache {
            shape,
            capacity,
            keys: vec![0.0; len],
            values: vec![0.0; len],
        }
    }

    /// Bytes of keys and values.
    pub fn bytes(&self) -> usize {
        (self.keys.len() + self.values.len()) * 4
    }

    /// Where the tokens of a head begin.
    fn start(&self, sequence: usize, kv_head: usize) -> usize {
        (sequence * self.shape.kv_heads + kv_head) * self.capacity * self.shape.head_dim
    }

    /// Stores `k` and `v [tokens, kv_heads * head_dim]`, rotated already, from position `first` on.
    pub fn store(&mut self, sequence: usize, first: usize, k: &[f32], v: &[f32]) {
        let (d, kv_heads) = (self.shape.head_dim, self.shape.kv_heads);
        for head in 0..kv_heads {
            let start = self.start(sequence, head) + first * d;
            for (own, rows) in [(&mut self.keys, k), (&mut self.values, v)] {
                let places = own[start..].chunks_exact_mut(d);
                for (place, row) in places.zip(rows.chunks_exact(kv_heads * d)) {
                    place.copy_from_slice(&row[head * d..][..d]);
                }
            }
        }
    }

    /// The first `tokens` keys and values of a head, `[tokens, head_dim]` each.
    fn head(&self, sequence: usize, kv_head: usize, tokens: usize) -> (&[f32], &[f32]) {
        let start = self.start(sequence, kv_head);
        let range = start..start + tokens * self.shape.head_dim;
        (&self.keys[range.clone()], &self.values[range])
    }

    /// Causal attention of a prompt, `q [tokens, heads * head_dim]` from position `first` on, to
    /// itself and to what came before; its keys and values are stored. The shape of `q`.
    pub fn attend_prompt(&self, sequence: usize, first: usize, q: &[f32]) -> Vec<f32> {
        let width = self.shape.heads * self.shape.head_dim;
        let mut out = vec![0.0f32; q.len()];
        (out.par_chunks_mut(QUERY_ROWS * width))
            .zip(q.par_chunks(QUERY_ROWS * width))
            .enumerate()
            .for_each(|(block, (out, q))| {
                self.attend_rows(sequence, first + block * QUERY_ROWS, q, out);
            });
        out
    }

    /// Rows from position `first` on, all heads.
    fn attend_rows(&self, sequence: usize, first: usize, q: &[f32], out: &mut [f32]) {
        let AttentionShape {
            heads,
            kv_heads,
            head_dim: d,
        } = self.shape;
        let width = heads * d;
        let rows = q.len() / width;
        let seen = first + rows;
        let mut scores = vec![0.0f32; rows * seen];
        for head in 0..heads {
            let (k, v) = self.head(sequence, head / (heads / kv_heads), seen);
            matmul(
                MatMut::from_row_major_slice_mut(&mut scores, rows, seen),
                Accum::Replace,
                MatRef::from_row_major_slice(q, rows, width).subcols(head * d, d),
                MatRef::from_row_major_slice(k, seen, d).transpose(),
                self.scale(),
                Par::Seq,
            );
            run_widest(CausalSoftmax {
                scores: &mut scores,
                first,
                seen,
            });
            matmul(
                MatMut::from_row_major_slice_mut(out, rows, width).subcols_mut(head * d, d),
                Accum::Replace,
                MatRef::from_row_major_slice(&scores, rows, seen),
                MatRef::from_row_major_slice(v, seen, d),
                1.0,
                Par::Seq,
            );
        }
    }

    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    /// Attention of the newest token of each sequence, `q [sequences, heads * head_dim]`, to the
    /// `held` tokens of each, itself the last of them. The shape of `q`.
    pub fn attend_newest(&self, q: &[f32], held: &[usize]) -> Vec<f32> {
        let kv_heads = self.shape.kv_heads;
        // The queries of a key head follow each other, so its task has one slice.
        let width = self.shape.heads / kv_heads * self.shape.head_dim;
        let mut out = vec![0.0f32; q.len()];
        let attend = |(task, (out, q)): (usize, (&mut [f32], &[f32]))| {
            let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
            let (keys, values) = self.head(sequence, kv_head, held[sequence]);
            run_widest(NewestToken {
                out,
                q,
                keys,
                values,
                head_dim: self.shape.head_dim,
                scale: self.scale(),
            });
        };
        let work = 2 * held.iter().sum::<usize>() * self.shape.heads * self.shape.head_dim;
        match work < WORTH_SHARING {
            true => (out.chunks_exact_mut(width).zip(q.chunks_exact(width)))
                .enumerate()
                .for_each(attend),
            false => (out
                .par_chunks_exact_mut(width)
                .zip(q.par_chunks_exact(width)))
            .enumerate()
            .for_each(attend),
        }
        out
    }
}

struct CausalSoftmax<'a> {
    scores: &'a mut [f32], // [rows, seen]
    first: usize,
    seen: usize,
}

impl Kernel for CausalSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (row, scores) in self.scores.chunks_exact_mut(self.seen).enumerate() {
            let (past, future) = scores.split_at_mut(self.first + row + 1);
            softmax(past);
            future.fill(0.0);
        }
    }
}

/// The queries of one key head.
struct NewestToken<'a> {
    out: &'a mut [f32],
    q: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    head_dim: usize,
    scale: f32,
}

impl Kernel for NewestToken<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let d = self.head_dim;
        let mut scores = vec![0.0f32; self.keys.len() / d];
        for (out, q) in self.out.chunks_exact_mut(d).zip(self.q.chunks_exact(d)) {
            for (score, key) in scores.iter_mut().zip(self.keys.chunks_exact(d)) {
                *score = dot(q, key) * self.scale;
            }
            softmax(&mut scores);
            out.fill(0.0);
            for (&weight, value) in scores.iter().zip(self.values.chunks_exact(d)) {
                axpy(out, weight, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::causal_attention;

    const SHAPE: AttentionShape = AttentionShape {
        heads: 6,
        kv_heads: 2,
        head_dim: 10,
    };

    fn wave(len: usize, step: f32) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * step).sin()).collect()
    }

    /// Against attention inside a window, which is tested against the definition: in one piece, in
    /// uneven pieces, and token by token beside a sequence of another length.
    #[test]
    fn pieces_and_tokens_are_the_whole_window() {
        let tokens = 75;
        let (w, kw) = (60, 20);
        let q = wave(tokens * w, 0.37);
        let (k, v) = (wave(tokens * kw, 0.11), wave(tokens * kw, 0.23));
        let want = causal_attention(&q, &k, &v, tokens, SHAPE);
        let close = |got: &[f32], want: &[f32]| {
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-5, "{got} against {want}");
            }
        };

        let mut cache = KeyValueCache::new(2, tokens, SHAPE);
        let pieces = [(0, 1), (1, 40), (40, 75)];
        for (from, to) in pieces {
            cache.store(1, from, &k[from * kw..to * kw], &v[from * kw..to * kw]);
            let got = cache.attend_prompt(1, from, &q[from * w..to * w]);
            close(&got, &want[from * w..to * w]);
        }
        // Sequence 0 is 30 tokens behind.
        for t in 30..tokens {
            let behind = t - 30;
            cache.store(0, behind, &k[behind * kw..][..kw], &v[behind * kw..][..kw]);
            cache.store(1, t, &k[t * kw..][..kw], &v[t * kw..][..kw]);
            let rows = [&q[behind * w..][..w], &q[t * w..][..w]].concat();
            let got = cache.attend_newest(&rows, &[behind + 1, t + 1]);
            close(&got[..w], &want[behind * w..][..w]);
            close(&got[w..], &want[t * w..][..w]);
        }
    }
}
