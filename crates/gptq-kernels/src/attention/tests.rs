use super::*;
use crate::KeyValueCache;
use crate::definition::attend_window;

pub(crate) fn wave(len: usize, step: f32) -> Vec<f32> {
    (0..len).map(|i| (i as f32 * step).sin()).collect()
}

/// Windows of 1, about a tile of either kind, over several tiles, and longer than the tests' texts; no cap
/// and one that bends most scores.
pub(crate) fn with_windows_and_caps(shape: AttentionShape) -> Vec<AttentionShape> {
    let windows = [1, 2, 5, 31, 32, 33, 63, 64, 65, 100, 1000].map(Some);
    (windows.into_iter().chain([None]))
        .flat_map(|window| [None, Some(0.5)].map(|soft_cap| (window, soft_cap)))
        .map(|(window, soft_cap)| AttentionShape {
            window,
            soft_cap,
            ..shape
        })
        .collect()
}

pub(crate) fn close(got: &[f32], want: &[f64], shape: AttentionShape) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        let error = (f64::from(*got) - want).abs();
        assert!(error < 1e-5, "{got} against {want} with {shape:?}");
    }
}

fn shape() -> AttentionShape {
    AttentionShape {
        scale: 0.5,
        ..AttentionShape::new(4, 2, 8)
    }
}

#[test]
fn windows_and_cache_agree_with_the_definition() {
    let tokens = 150; // more than two query blocks, the last one short
    let (w, kw) = (shape().query_width(), shape().kv_width());
    let q = wave(tokens * w, 0.37);
    let (k, v) = (wave(tokens * kw, 0.11), wave(tokens * kw, 0.23));
    for shape in with_windows_and_caps(shape()) {
        let want = attend_window(&q, &k, &v, shape);
        close(&causal_attention(&q, &k, &v, tokens, shape), &want, shape);
        let mut cache = KeyValueCache::new(1, tokens, shape);
        for t in 0..tokens {
            let (k, v) = (&k[t * kw..][..kw], &v[t * kw..][..kw]);
            cache.store(0, t, k, v);
            let row = cache.attend_newest(&q[t * w..][..w], &[t + 1]);
            close(&row, &want[t * w..][..w], shape);
        }
    }
}

/// A key that is not a number spoils every product that it is part of, even with a weight of 0.
#[test]
fn keys_before_the_first_that_a_tile_sees_are_not_multiplied() {
    let tokens = QUERY_ROWS + 30;
    let shape = AttentionShape {
        window: Some(10),
        ..shape()
    };
    let (w, kw) = (shape.query_width(), shape.kv_width());
    let q = wave(tokens * w, 0.37);
    let (mut k, mut v) = (wave(tokens * kw, 0.11), wave(tokens * kw, 0.23));
    let want = causal_attention(&q, &k, &v, tokens, shape);
    let unseen = (QUERY_ROWS + 1 - 10) * kw;
    k[..unseen].fill(f32::NAN);
    v[..unseen].fill(f32::NAN);
    let got = causal_attention(&q, &k, &v, tokens, shape);
    assert_eq!(got[QUERY_ROWS * w..], want[QUERY_ROWS * w..]);
}

#[test]
fn windows_do_not_see_each_other() {
    let tokens = 5;
    let (w, kw) = (shape().query_width(), shape().kv_width());
    let q = wave(2 * tokens * w, 0.37);
    let (k, v) = (wave(2 * tokens * kw, 0.11), wave(2 * tokens * kw, 0.23));
    let both = causal_attention(&q, &k, &v, tokens, shape());
    let (q, k, v) = (&q[tokens * w..], &k[tokens * kw..], &v[tokens * kw..]);
    let second = causal_attention(q, k, v, tokens, shape());
    assert_eq!(&both[tokens * w..], &second[..]);
}
