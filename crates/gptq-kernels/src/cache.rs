//! Keys and values of sequences that grow each at its own pace, and attention to them.

use std::ops::Range;

use faer::MatRef;
use pulp::Simd;
use rayon::prelude::*;

use crate::AttentionShape;
use crate::attention::attend_rows;
use crate::vector::{Kernel, axpy, cap_each, dot, run_widest, softmax};

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

    /// Keys and values of a head at some positions, `[positions, head_dim]` each.
    fn head(&self, sequence: usize, kv_head: usize, positions: Range<usize>) -> [&[f32]; 2] {
        let (start, d) = (self.start(sequence, kv_head), self.shape.head_dim);
        let range = start + positions.start * d..start + positions.end * d;
        [&self.keys[range.clone()], &self.values[range]]
    }

    /// Causal attention of a prompt, `q [tokens, heads * head_dim]` from position `first` on, to
    /// itself and to what came before; its keys and values are stored. The shape of `q`.
    pub fn attend_prompt(&self, sequence: usize, first: usize, q: &[f32]) -> Vec<f32> {
        let (width, d) = (self.shape.query_width(), self.shape.head_dim);
        let of_head = |kv_head: usize, seen: Range<usize>| {
            self.head(sequence, kv_head, seen.clone())
                .map(|x| MatRef::from_row_major_slice(x, seen.len(), d))
        };
        let mut out = vec![0.0f32; q.len()];
        (out.par_chunks_mut(QUERY_ROWS * width))
            .zip(q.par_chunks(QUERY_ROWS * width))
            .enumerate()
            .for_each(|(block, (out, q))| {
                attend_rows(out, q, first + block * QUERY_ROWS, self.shape, of_head);
            });
        out
    }

    /// Attention of the newest token of each sequence, `q [sequences, heads * head_dim]`, to those of
    /// the `held` tokens of each that it sees, itself the last of them. The shape of `q`.
    pub fn attend_newest(&self, q: &[f32], held: &[usize]) -> Vec<f32> {
        let kv_heads = self.shape.kv_heads;
        // The queries of a key head follow each other, so its task has one slice.
        let width = self.shape.query_width() / kv_heads;
        let seen = |held: usize| self.shape.first_seen(held - 1)..held;
        let mut out = vec![0.0f32; q.len()];
        let attend = |(task, (out, q)): (usize, (&mut [f32], &[f32]))| {
            let (sequence, kv_head) = (task / kv_heads, task % kv_heads);
            let [keys, values] = self.head(sequence, kv_head, seen(held[sequence]));
            run_widest(NewestToken {
                out,
                q,
                keys,
                values,
                shape: self.shape,
            });
        };
        let tokens: usize = held.iter().map(|&held| seen(held).len()).sum();
        match 2 * tokens * self.shape.query_width() < WORTH_SHARING {
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

/// The queries of one key head.
struct NewestToken<'a> {
    out: &'a mut [f32],
    q: &'a [f32],
    keys: &'a [f32],
    values: &'a [f32],
    shape: AttentionShape,
}

impl Kernel for NewestToken<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let d = self.shape.head_dim;
        let mut scores = vec![0.0f32; self.keys.len() / d];
        for (out, q) in self.out.chunks_exact_mut(d).zip(self.q.chunks_exact(d)) {
            for (score, key) in scores.iter_mut().zip(self.keys.chunks_exact(d)) {
                *score = dot(q, key) * self.shape.scale;
            }
            if let Some(cap) = self.shape.soft_cap {
                cap_each(&mut scores, cap);
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
mod tests;
