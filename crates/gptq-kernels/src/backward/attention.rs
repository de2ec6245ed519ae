//! The gradient of causal attention, tile by tile of queries.

use std::ops::Range;

use faer::{Accum, MatMut, MatRef, Par};
use pulp::Simd;
use rayon::prelude::*;

use crate::attention::{AttentionShape, QUERY_ROWS};
use crate::real::Real;
use crate::vector::{Kernel, dot, run_widest, softmax};

/// Gradients of the inputs of attention.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionGradients<R> {
    /// `[windows * tokens, heads * head_dim]`.
    pub q: Vec<R>,
    /// `[windows * tokens, kv_heads * head_dim]`.
    pub k: Vec<R>,
    /// `[windows * tokens, kv_heads * head_dim]`.
    pub v: Vec<R>,
}

/// The gradients of [`causal_attention`](crate::causal_attention) from `dy`, in the shape of `q`, and its
/// inputs.
///
/// With `P = softmax(t)`, `t = cap tanh(s / cap)` (or `s`) and `s = scale Q K^T`:
/// `dV = P^T dY`, `dP = dY V^T`, `dT = P (dP - rowsum(P dP))`, `dS = dT (1 - (t / cap)^2)`,
/// `dQ = scale dS K`, `dK = scale dS^T Q` (FlashAttention-2: Dao 2023, algorithm 2, which computes `P` again
/// as well). Where several heads read the same keys their `dK` and `dV` are summed in the order of the
/// heads.
///
/// A head of a window is one task. Beside its gradients it has the weights of 64 queries and their
/// gradients, so memory is linear in the window.
///
/// # Panics
/// If lengths do not agree.
pub fn causal_attention_backward<R: Real>(
    dy: &[R],
    q: &[R],
    k: &[R],
    v: &[R],
    tokens: usize,
    shape: AttentionShape,
) -> AttentionGradients<R> {
    let (width, kv_width) = (shape.query_width(), shape.kv_width());
    let windows = q.len() / (tokens * width);
    assert_eq!(q.len(), windows * tokens * width, "whole windows");
    assert_eq!(dy.len(), q.len(), "an element of dy for each of q");
    let keys = windows * tokens * kv_width;
    assert_eq!((k.len(), v.len()), (keys, keys), "keys and values");
    let heads: Vec<Head<R>> = (0..windows * shape.heads)
        .into_par_iter()
        .map(|task| {
            let (window, head) = (task / shape.heads, task % shape.heads);
            let rows = window * tokens;
            let of_head = |x, width: usize, head: usize| {
                MatRef::from_row_major_slice(x, windows * tokens, width).submatrix(
                    rows,
                    head * shape.head_dim,
                    tokens,
                    shape.head_dim,
                )
            };
            let kv_head = shape.kv_head_of(head);
            let inputs = Inputs {
                dy: of_head(dy, width, head),
                q: of_head(q, width, head),
                k: of_head(k, kv_width, kv_head),
                v: of_head(v, kv_width, kv_head),
            };
            Head::of(&inputs, shape)
        })
        .collect();
    let of_window = |row: usize| &heads[row / tokens * shape.heads..][..shape.heads];
    let gathered = |width: usize, part: fn(&Head<R>) -> &[R]| {
        let mut out = vec![R::ZERO; windows * tokens * width];
        let count = width / shape.head_dim;
        let sharing = shape.heads / count;
        out.par_chunks_mut(width)
            .enumerate()
            .for_each(|(row, out)| {
                let token = row % tokens * shape.head_dim;
                let targets = out.chunks_exact_mut(shape.head_dim);
                for (out, heads) in targets.zip(of_window(row).chunks_exact(sharing)) {
                    for head in heads {
                        let values = &part(head)[token..][..shape.head_dim];
                        out.iter_mut().zip(values).for_each(|(out, &x)| *out += x);
                    }
                }
            });
        out
    };
    AttentionGradients {
        q: gathered(width, |head| &head.dq),
        k: gathered(kv_width, |head| &head.dk),
        v: gathered(kv_width, |head| &head.dv),
    }
}

/// Of one head in one window, `[tokens, head_dim]` each.
struct Inputs<'a, R> {
    dy: MatRef<'a, R>,
    q: MatRef<'a, R>,
    k: MatRef<'a, R>,
    v: MatRef<'a, R>,
}

/// Gradients of one query head in one window, `[tokens, head_dim]` each.
struct Head<R> {
    dq: Vec<R>,
    dk: Vec<R>,
    dv: Vec<R>,
}

impl<R: Real> Head<R> {
    fn of(inputs: &Inputs<'_, R>, shape: AttentionShape) -> Self {
        let (tokens, d) = (inputs.q.nrows(), shape.head_dim);
        let scale = R::from(shape.scale);
        let zeros = || vec![R::ZERO; tokens * d];
        let (mut dq, mut dk, mut dv) = (zeros(), zeros(), zeros());
        let widest = QUERY_ROWS.min(tokens) * tokens;
        let (mut scores, mut d_scores) = (vec![R::ZERO; widest], vec![R::ZERO; widest]);
        for first in (0..tokens).step_by(QUERY_ROWS) {
            let rows = QUERY_ROWS.min(tokens - first);
            // What not even the first row sees is not multiplied.
            let seen = shape.first_seen(first)..first + rows;
            let (q, dy) = (
                inputs.q.subrows(first, rows),
                inputs.dy.subrows(first, rows),
            );
            let (k, v) = (
                inputs.k.subrows(seen.start, seen.len()),
                inputs.v.subrows(seen.start, seen.len()),
            );
            let scores = &mut scores[..rows * seen.len()];
            let d_scores = &mut d_scores[..rows * seen.len()];
            let one = R::ONE;
            multiply(
                as_rows(scores, rows),
                Accum::Replace,
                scale,
                q,
                k.transpose(),
            );
            multiply(
                as_rows(d_scores, rows),
                Accum::Replace,
                one,
                dy,
                v.transpose(),
            );
            run_widest(SoftmaxBackward {
                scores,
                d_scores,
                first,
                keys: seen.clone(),
                shape,
            });
            let scores = MatRef::from_row_major_slice(scores, rows, seen.len());
            let d_scores = MatRef::from_row_major_slice(d_scores, rows, seen.len());
            let keys = seen.start * d..seen.end * d;
            let dq = as_rows(&mut dq[first * d..][..rows * d], rows);
            multiply(dq, Accum::Replace, scale, d_scores, k);
            let dk = as_rows(&mut dk[keys.clone()], seen.len());
            multiply(dk, Accum::Add, scale, d_scores.transpose(), q);
            let dv = as_rows(&mut dv[keys], seen.len());
            multiply(dv, Accum::Add, one, scores.transpose(), dy);
        }
        Head { dq, dk, dv }
    }
}

/// On the thread that has the head.
fn multiply<R: Real>(
    out: MatMut<'_, R>,
    accum: Accum,
    alpha: R,
    a: MatRef<'_, R>,
    b: MatRef<'_, R>,
) {
    R::multiply_into(out, accum, alpha, a, b, Par::Seq);
}

fn as_rows<R>(x: &mut [R], rows: usize) -> MatMut<'_, R> {
    let columns = x.len() / rows;
    MatMut::from_row_major_slice_mut(x, rows, columns)
}

/// Makes scaled scores weights, and the gradients of weights those of scaled scores; both are 0 for the
/// keys that a query does not see.
struct SoftmaxBackward<'a, R> {
    scores: &'a mut [R],   // [rows, keys]
    d_scores: &'a mut [R], // [rows, keys]
    first: usize,          // position of the first row
    keys: Range<usize>,    // positions
    shape: AttentionShape,
}

impl<R: Real> Kernel for SoftmaxBackward<'_, R> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let keys = self.keys.len();
        let cap = self.shape.soft_cap.map(R::from);
        let mut slopes = vec![R::ZERO; if cap.is_some() { keys } else { 0 }];
        let rows = self.scores.chunks_exact_mut(keys);
        let rows = rows.zip(self.d_scores.chunks_exact_mut(keys));
        for (position, (scores, d_scores)) in (self.first..).zip(rows) {
            let seen =
                self.shape.first_seen(position) - self.keys.start..position + 1 - self.keys.start;
            for row in [&mut *scores, &mut *d_scores] {
                row[..seen.start].fill(R::ZERO);
                row[seen.end..].fill(R::ZERO);
            }
            let (scores, d_scores) = (&mut scores[seen.clone()], &mut d_scores[seen]);
            if let Some(cap) = cap {
                for (score, slope) in scores.iter_mut().zip(&mut slopes) {
                    let tanh = (*score / cap).tanh();
                    *score = cap * tanh;
                    *slope = R::ONE - tanh * tanh;
                }
            }
            softmax(scores);
            let mean = dot(scores, d_scores);
            for (d_score, &weight) in d_scores.iter_mut().zip(&*scores) {
                *d_score = weight * (*d_score - mean);
            }
            // Empty without a cap.
            for (d_score, &slope) in d_scores.iter_mut().zip(&slopes) {
                *d_score *= slope;
            }
        }
    }
}

#[cfg(test)]
mod tests;
