//! How fast this processor computes the gradients of a block: `backward_speed [tokens]`.
#![allow(clippy::print_stdout)]

use std::time::Instant;

use gptq_kernels::{
    Activation, Adam, AttentionShape, TrainedGrids, causal_attention, causal_attention_backward,
    gated, gated_backward, multiply, product_input_backward, product_weight_backward,
    rms_norm_backward,
};
use gptq_types::Bits;

/// SmolLM2-135M: hidden states, the feed-forward, heads of queries and keys, their width.
const HIDDEN: usize = 576;
const INNER: usize = 1536;
const HEADS: [usize; 3] = [9, 3, 64];
const GROUP: usize = 64;

fn main() {
    let tokens = std::env::args()
        .nth(1)
        .map_or(2048, |arg| arg.parse().expect("a number"));
    println!("{tokens} tokens, {} threads", rayon::current_num_threads());
    let [x, dy] = [0.37, 0.11].map(|step| wave(tokens * HIDDEN, step));
    let [gate, up] = [0.37, 0.11].map(|step| wave(tokens * INNER, step));
    let weight = wave(HIDDEN * INNER, 0.23);

    let product = 2.0 * (tokens * HIDDEN * INNER) as f64;
    let mut out = vec![0.0; tokens * INNER];
    rate("product", product, || {
        multiply(&mut out, &x, &weight, tokens, HIDDEN, INNER);
    });
    let mut dx = vec![0.0; tokens * HIDDEN];
    rate("product, gradient of its input", product, || {
        product_input_backward(&mut dx, &gate, &weight, tokens, HIDDEN, INNER);
    });
    let mut d_weight = vec![0.0; HIDDEN * INNER];
    rate("product, gradient of its weight", product, || {
        product_weight_backward(&mut d_weight, &gate, &x, tokens, HIDDEN, INNER);
    });

    let [heads, kv_heads, head_dim] = HEADS;
    let shape = AttentionShape::new(heads, kv_heads, head_dim);
    let capped = AttentionShape {
        soft_cap: Some(30.0),
        ..shape
    };
    let [k, v] = [0.29, 0.17].map(|step| wave(tokens * kv_heads * head_dim, step));
    // Of each score that is seen: two products forward, five backward.
    let scores = (tokens * (tokens + 1) / 2 * heads) as f64;
    let one = 2.0 * scores * head_dim as f64;
    rate("attention", 2.0 * one, || {
        causal_attention(&x, &k, &v, tokens, shape);
    });
    for (name, shape) in [("", shape), (", with a cap", capped)] {
        rate(&format!("attention{name}, gradients"), 5.0 * one, || {
            causal_attention_backward(&dy, &x, &k, &v, tokens, shape);
        });
    }

    let norm = vec![1.0; HIDDEN];
    let mut d_norm = vec![0.0; HIDDEN];
    elements("rms norm, gradients", x.len(), || {
        rms_norm_backward(&dy, &x, &norm, 1e-5, Some(&mut d_norm));
    });
    let (mut d_gate, mut d_up) = (gate.clone(), up.clone());
    elements("gate", gate.len(), || {
        d_gate.copy_from_slice(&gate);
        gated(&mut d_gate, &up, Activation::Silu);
    });
    elements("gate, gradients", gate.len(), || {
        d_gate.copy_from_slice(&gate);
        d_up.copy_from_slice(&up);
        gated_backward(&gate, &mut d_gate, &mut d_up, Activation::Silu);
    });
    let grids = HIDDEN / GROUP * INNER;
    let g_idx: Vec<u32> = (0..HIDDEN).map(|k| (k / GROUP) as u32).collect();
    let grids = TrainedGrids {
        bits: Bits::Four,
        out_features: INNER,
        scales: &vec![0.125; grids],
        zeros: &vec![8.0; grids],
        g_idx: &g_idx,
    };
    let mut rounded = vec![0.0; weight.len()];
    elements("rounding", weight.len(), || {
        grids.round(&mut rounded, &weight);
    });
    let mut d_scales = vec![0.0; grids.scales.len()];
    elements("rounding, gradients", weight.len(), || {
        grids.backward(&mut rounded, &weight, &mut d_scales);
    });
    let mut adam = Adam::new(weight.len());
    elements("adam", weight.len(), || {
        adam.step(&mut rounded, &weight, 1e-4);
    });
}

fn wave(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin()).collect()
}

/// Seconds of the best of some runs.
fn best(mut run: impl FnMut()) -> f64 {
    (0..10)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

fn rate(name: &str, operations: f64, run: impl FnMut()) {
    let seconds = best(run);
    println!(
        "{name}: {:.1} ms, {:.1} GFLOP/s",
        seconds * 1e3,
        operations / seconds / 1e9
    );
}

fn elements(name: &str, count: usize, run: impl FnMut()) {
    let seconds = best(run);
    println!(
        "{name}: {:.2} ms, {:.2} G/s",
        seconds * 1e3,
        count as f64 / seconds / 1e9
    );
}
