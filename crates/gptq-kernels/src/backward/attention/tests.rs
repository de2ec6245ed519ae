use super::*;
use crate::attention::tests::with_windows_and_caps;
use crate::backward::definition::{
    SINGLE, assert_derivative, assert_near, attend, on_threads, random, single,
};

/// Two tiles and a short one.
const TOKENS: usize = 2 * QUERY_ROWS + 22;
const WINDOWS: usize = 2;

fn check(shape: AttentionShape) {
    let rows = WINDOWS * TOKENS;
    let random = |len, seed| random(len, seed).iter().map(|x| 2.0 * x).collect();
    let (q, dy): (Vec<f64>, Vec<f64>) = (
        random(rows * shape.query_width(), 1),
        random(rows * shape.query_width(), 2),
    );
    let (k, v): (Vec<f64>, Vec<f64>) = (
        random(rows * shape.kv_width(), 3),
        random(rows * shape.kv_width(), 4),
    );
    let name = format!("{shape:?}");
    let [q32, k32, v32, dy32] = [&q, &k, &v, &dy].map(|x| single(x));
    let y = crate::causal_attention(&q32, &k32, &v32, TOKENS, shape);
    let want = attend(&q, &k, &v, TOKENS, shape);
    assert_near(&y, &want, 1e-5, "the forward pass");

    let got = causal_attention_backward(&dy, &q, &k, &v, TOKENS, shape);
    // A query that sees itself alone has one weight, which is 1 whatever its score.
    if shape.window == Some(1) {
        assert_eq!(got.q, vec![0.0; q.len()]);
        assert_eq!(got.k, vec![0.0; k.len()]);
    } else {
        let of_q = |q: &[f64]| attend(q, &k, &v, TOKENS, shape);
        assert_derivative(of_q, &q, &dy, &got.q, &format!("q, {name}"));
        let of_k = |k: &[f64]| attend(&q, k, &v, TOKENS, shape);
        assert_derivative(of_k, &k, &dy, &got.k, &format!("k, {name}"));
    }
    let of_v = |v: &[f64]| attend(&q, &k, v, TOKENS, shape);
    assert_derivative(of_v, &v, &dy, &got.v, &format!("v, {name}"));

    let run = |threads| {
        on_threads(threads, || {
            causal_attention_backward(&dy32, &q32, &k32, &v32, TOKENS, shape)
        })
    };
    let one = run(1);
    assert_near(&one.q, &got.q, SINGLE, &format!("q in f32, {name}"));
    assert_near(&one.k, &got.k, SINGLE, &format!("k in f32, {name}"));
    assert_near(&one.v, &got.v, SINGLE, &format!("v in f32, {name}"));
    assert_eq!(one, run(2));
}

#[test]
fn gradients_are_derivatives_for_every_window_and_cap() {
    let grouped = AttentionShape {
        scale: 0.3,
        ..AttentionShape::new(4, 2, 8)
    };
    with_windows_and_caps(grouped).into_iter().for_each(check);
}

#[test]
fn gradients_are_derivatives_for_every_grouping_of_heads() {
    for (heads, kv_heads, head_dim) in [(3, 3, 20), (6, 2, 16), (4, 1, 7), (1, 1, 64)] {
        check(AttentionShape::new(heads, kv_heads, head_dim));
    }
}

/// A key that is not a number spoils every product that it is part of, even with a weight of 0.
#[test]
fn keys_before_the_first_that_a_tile_sees_are_not_multiplied() {
    let shape = AttentionShape {
        window: Some(10),
        ..AttentionShape::new(1, 1, 8)
    };
    let len = TOKENS * 8;
    let [q, mut k, mut v, dy] = [1, 2, 3, 4].map(|seed| random(len, seed));
    let want = causal_attention_backward(&dy, &q, &k, &v, TOKENS, shape);
    let unseen = (QUERY_ROWS + 1 - 10) * 8;
    k[..unseen].fill(f64::NAN);
    v[..unseen].fill(f64::NAN);
    let got = causal_attention_backward(&dy, &q, &k, &v, TOKENS, shape);
    assert_eq!(got.q[QUERY_ROWS * 8..], want.q[QUERY_ROWS * 8..]);
}
