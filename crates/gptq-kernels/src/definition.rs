//! The forward operations of a block in f64, as plain loops: what tests hold kernels and gradients against.
//!
//! The tests of gptq-model include this file too: it says `gptq_kernels` where it means this crate.

use gptq_kernels::{Activation, AttentionShape, Pairing, Rotation};

fn inner(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn norm_runs(
    x: &[f64],
    width: usize,
    place: impl Fn(&[f64]) -> (f64, f64),
    output: impl Fn(usize, f64) -> f64,
) -> Vec<f64> {
    let run = |run: &[f64]| {
        let (mean, scale) = place(run);
        let normed = run.iter().map(|x| (x - mean) * scale).enumerate();
        normed.map(|(at, n)| output(at, n)).collect::<Vec<_>>()
    };
    x.chunks_exact(width).flat_map(run).collect()
}

pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let width = weight.len();
    let place = |run: &[f64]| (0.0, 1.0 / (inner(run, run) / width as f64 + eps).sqrt());
    norm_runs(x, width, place, |at, n| n * weight[at])
}

pub fn layer_norm(x: &[f64], weight: &[f64], bias: &[f64], eps: f64) -> Vec<f64> {
    let width = weight.len();
    let place = |run: &[f64]| {
        let mean = run.iter().sum::<f64>() / width as f64;
        let variance = run.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
        (mean, 1.0 / (variance + eps).sqrt())
    };
    norm_runs(x, width, place, |at, n| n * weight[at] + bias[at])
}

pub fn rotate(x: &[f64], rotation: &Rotation, width: usize, tokens: usize) -> Vec<f64> {
    let half = rotation.rotary_dim() / 2;
    let (cos, sin) = rotation.tables();
    let mut y = x.to_vec();
    for (row, y) in y.chunks_exact_mut(width).enumerate() {
        for head in y.chunks_exact_mut(rotation.head_dim()) {
            for pair in 0..half {
                let (i, j) = match rotation.pairing() {
                    Pairing::Halves => (pair, pair + half),
                    Pairing::Interleaved => (2 * pair, 2 * pair + 1),
                };
                let at = row % tokens * half + pair;
                let (c, s) = (f64::from(cos[at]), f64::from(sin[at]));
                (head[i], head[j]) = (head[i] * c - head[j] * s, head[j] * c + head[i] * s);
            }
        }
    }
    y
}

/// Causal attention inside one window, one query at a time.
pub fn attend_window<R: Copy + Into<f64>>(
    q: &[R],
    k: &[R],
    v: &[R],
    shape: AttentionShape,
) -> Vec<f64> {
    let (d, w) = (shape.head_dim, shape.heads * shape.head_dim);
    let kw = shape.kv_heads * d;
    let mut out = vec![0.0; q.len()];
    for (task, out) in out.chunks_exact_mut(d).enumerate() {
        let (t, h) = (task / shape.heads, task % shape.heads);
        let g = h / (shape.heads / shape.kv_heads) * d;
        let weight = |s: usize| {
            let dot: f64 = (0..d)
                .map(|i| q[t * w + h * d + i].into() * k[s * kw + g + i].into())
                .sum();
            let score = dot * f64::from(shape.scale);
            let cap = shape.soft_cap.map(f64::from);
            cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
        };
        let seen = |s: &usize| shape.window.is_none_or(|window| s + window > t);
        let weights: Vec<(usize, f64)> = (0..=t).filter(seen).map(|s| (s, weight(s))).collect();
        let sum: f64 = weights.iter().map(|(_, weight)| weight).sum();
        for (i, out) in out.iter_mut().enumerate() {
            *out = (weights.iter())
                .map(|(s, weight)| weight / sum * v[s * kw + g + i].into())
                .sum();
        }
    }
    out
}

/// Windows of `tokens`, one after the other.
pub fn attend(q: &[f64], k: &[f64], v: &[f64], tokens: usize, shape: AttentionShape) -> Vec<f64> {
    let [width, kv_width] = [shape.heads, shape.kv_heads].map(|n| tokens * n * shape.head_dim);
    let kv = k.chunks_exact(kv_width).zip(v.chunks_exact(kv_width));
    (q.chunks_exact(width).zip(kv))
        .flat_map(|(q, (k, v))| attend_window(q, k, v, shape))
        .collect()
}

pub fn activate(x: &[f64], activation: Activation) -> Vec<f64> {
    let each = |&x: &f64| {
        let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::GeluTanh => 0.5 * x * (1.0 + inner.tanh()),
        }
    };
    x.iter().map(each).collect()
}

pub fn gated(gate: &[f64], up: &[f64], activation: Activation) -> Vec<f64> {
    let gate = activate(gate, activation);
    gate.iter().zip(up).map(|(gate, up)| gate * up).collect()
}

/// `x [rows, k] * weight [k, n] + bias [n]`.
pub fn project(x: &[f64], weight: &[f64], bias: &[f64], k: usize) -> Vec<f64> {
    let n = bias.len();
    let mut y = bias.repeat(x.len() / k);
    for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(k)) {
        for (x, weight) in x.iter().zip(weight.chunks_exact(n)) {
            y.iter_mut().zip(weight).for_each(|(y, w)| *y += x * w);
        }
    }
    y
}
