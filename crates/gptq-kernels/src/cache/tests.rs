use super::*;
use crate::attention::tests::{close, wave, with_windows_and_caps};
use crate::definition::attend_window;

const TOKENS: usize = 75;
const WIDTH: usize = 60;
const KV_WIDTH: usize = 20;

fn shape() -> AttentionShape {
    AttentionShape::new(6, 2, 10)
}

/// Queries, keys and values of a text.
fn text() -> [Vec<f32>; 3] {
    [(WIDTH, 0.37), (KV_WIDTH, 0.11), (KV_WIDTH, 0.23)]
        .map(|(width, step)| wave(TOKENS * width, step))
}

/// In one piece, in uneven pieces, and token by token beside a sequence of another length.
#[test]
fn pieces_and_tokens_agree_with_the_definition() {
    let [q, k, v] = text();
    let kv = |tokens: Range<usize>| {
        let range = tokens.start * KV_WIDTH..tokens.end * KV_WIDTH;
        (&k[range.clone()], &v[range])
    };
    let queries = |tokens: Range<usize>| tokens.start * WIDTH..tokens.end * WIDTH;
    for shape in with_windows_and_caps(shape()) {
        let want = attend_window(&q, &k, &v, shape);
        let mut cache = KeyValueCache::new(2, TOKENS, shape);
        for piece in [0..TOKENS, 0..1, 1..40, 40..75] {
            let (k, v) = kv(piece.clone());
            cache.store(1, piece.start, k, v);
            let rows = queries(piece.clone());
            let got = cache.attend_prompt(1, piece.start, &q[rows.clone()]);
            close(&got, &want[rows], shape);
        }
        // Sequence 0 is 30 tokens behind.
        for t in 30..TOKENS {
            let (k, v) = kv(t - 30..t - 29);
            cache.store(0, t - 30, k, v);
            let rows = [t - 30, t].map(|t| queries(t..t + 1));
            let both = rows.each_ref().map(|rows| &q[rows.clone()]).concat();
            let got = cache.attend_newest(&both, &[t - 29, t + 1]);
            let want = rows.map(|rows| &want[rows]).concat();
            close(&got, &want, shape);
        }
    }
}

/// A key that is not a number spoils every product that it is part of, even with a weight of 0.
#[test]
fn keys_that_nothing_sees_are_not_multiplied() {
    let [q, k, v] = text();
    let shape = AttentionShape {
        window: Some(10),
        ..shape()
    };
    let mut cache = KeyValueCache::new(1, TOKENS, shape);
    cache.store(0, 0, &k, &v);
    let spoil = vec![f32::NAN; TOKENS * KV_WIDTH];
    let rows = 40 * WIDTH..;
    let want = cache.attend_prompt(0, 40, &q[rows.clone()]);
    cache.store(0, 0, &spoil[..31 * KV_WIDTH], &spoil[..31 * KV_WIDTH]);
    assert_eq!(cache.attend_prompt(0, 40, &q[rows]), want);

    let last = (TOKENS - 1) * WIDTH..;
    let want = cache.attend_newest(&q[last.clone()], &[TOKENS]);
    cache.store(0, 0, &spoil[..65 * KV_WIDTH], &spoil[..65 * KV_WIDTH]);
    assert_eq!(cache.attend_newest(&q[last], &[TOKENS]), want);
    assert!(want.iter().all(|x| x.is_finite()));
}
