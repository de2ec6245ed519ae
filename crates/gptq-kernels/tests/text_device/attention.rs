//! Attention to a cache and inside windows: scales, caps and windows of keys.

use std::ops::Range;
use std::sync::Arc;

use gptq_kernels::AttentionShape;
use gptq_kernels::cuda::{
    Buffer, DeviceKeyValues, DeviceMatrix, Gpu, HeadNorms, RowOrder, TextRows,
};
use gptq_types::Dtype;
use rayon::prelude::*;

use super::common::{Random, gpu};
use super::{BOTH, matrix, near, poisoned, upload, values};

pub const CAPACITY: usize = 700;

/// Queries, keys and values of a sequence as attention reads them, `[tokens, heads * head_dim]` each.
pub struct Sequence {
    pub q: Vec<f64>,
    pub k: Vec<f64>,
    pub v: Vec<f64>,
}

impl Sequence {
    fn new(random: &mut Random, dtype: Dtype, shape: AttentionShape, tokens: usize) -> Self {
        let mut of = |heads: usize| values(random, dtype, tokens * heads * shape.head_dim);
        Sequence {
            q: of(shape.heads),
            k: of(shape.kv_heads),
            v: of(shape.kv_heads),
        }
    }

    /// Rows as a fused linear leaves them.
    fn fused(&self, shape: AttentionShape, tokens: Range<usize>) -> Vec<f64> {
        let row = |x: &[f64], heads: usize, token: usize| {
            let width = heads * shape.head_dim;
            x[token * width..(token + 1) * width].to_vec()
        };
        tokens
            .flat_map(|token| {
                let kv = shape.kv_heads;
                [
                    row(&self.q, shape.heads, token),
                    row(&self.k, kv, token),
                    row(&self.v, kv, token),
                ]
                .concat()
            })
            .collect()
    }

    /// What the query of `token` makes of the keys up to it, `[heads * head_dim]`.
    pub fn attended(&self, shape: AttentionShape, token: usize) -> Vec<f64> {
        let d = shape.head_dim;
        let seen = shape.first_seen(token)..token + 1;
        let mut out = vec![0.0; shape.heads * d];
        for (head, out) in out.chunks_mut(d).enumerate() {
            let q = &self.q[(token * shape.heads + head) * d..][..d];
            let kv = head / (shape.heads / shape.kv_heads);
            let row = |x: &[f64], key: usize, i: usize| x[(key * shape.kv_heads + kv) * d + i];
            let scores: Vec<f64> = (seen.clone())
                .map(|key| {
                    let dot: f64 = (0..d).map(|i| q[i] * row(&self.k, key, i)).sum();
                    let score = dot * f64::from(shape.scale);
                    match shape.soft_cap.map(f64::from) {
                        Some(cap) => cap * (score / cap).tanh(),
                        None => score,
                    }
                })
                .collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
            let all: f64 = weights.iter().sum();
            for (key, weight) in seen.clone().zip(weights) {
                for (i, out) in out.iter_mut().enumerate() {
                    *out += weight / all * row(&self.v, key, i);
                }
            }
        }
        out
    }
}

/// Caps and windows: of less than a tile or a share, at its borders, of several.
const VARIANTS: [(Option<f32>, Option<usize>); 11] = [
    (None, None),
    (Some(1.5), None),
    (None, Some(1)),
    (None, Some(5)),
    (Some(1.5), Some(33)),
    (None, Some(64)),
    (None, Some(65)),
    (Some(1.5), Some(128)),
    (None, Some(256)),
    (None, Some(300)),
    (Some(1.5), Some(10_000)),
];

/// Scores large enough for the cap to be felt, and for single keys.
fn variant(
    shape: AttentionShape,
    (soft_cap, window): (Option<f32>, Option<usize>),
) -> AttentionShape {
    let scale = match (soft_cap, window) {
        (None, None) => shape.scale,
        _ => 4.0 * shape.scale,
    };
    AttentionShape {
        scale,
        soft_cap,
        window,
        ..shape
    }
}

/// Rows of a prompt at the borders of tiles and of blocks of queries.
fn rows_of(count: usize) -> Vec<usize> {
    let mut rows = vec![
        0, 1, 15, 16, 17, 62, 63, 64, 65, 127, 128, 129, 191, 192, 300, 511, 512,
    ];
    rows.extend([513, count / 2, count - 1]);
    rows.retain(|row| *row < count);
    rows
}

/// What those rows attend to, the first one at position `first`.
fn wanted(
    own: &Sequence,
    shape: AttentionShape,
    first: usize,
    count: usize,
) -> Vec<(usize, Vec<f64>)> {
    (rows_of(count).into_par_iter())
        .map(|row| (row, own.attended(shape, first + row)))
        .collect()
}

/// Columns of a fused row.
fn width(shape: AttentionShape) -> usize {
    (shape.heads + 2 * shape.kv_heads) * shape.head_dim
}

/// Where queries, keys and values stand in `count` fused rows.
fn outputs(
    buffer: &Buffer,
    shape: AttentionShape,
    dtype: Dtype,
    count: usize,
) -> (DeviceMatrix<'_>, [DeviceMatrix<'_>; 2]) {
    let (heads, kv_heads, d) = (shape.heads, shape.kv_heads, shape.head_dim);
    let rows = matrix(buffer, dtype, count, width(shape));
    let [q, k, v] = [(0, heads), (heads, kv_heads), (heads + kv_heads, kv_heads)]
        .map(|(before, heads)| rows.column_range(before * d..(before + heads) * d));
    (q, [k, v])
}

/// Stores fused rows as they are; returns the queries.
fn store(
    gpu: &Arc<Gpu>,
    cache: &DeviceKeyValues,
    shape: AttentionShape,
    dtype: Dtype,
    fused: &[f64],
    rows: TextRows,
) -> Buffer {
    let count = fused.len() / width(shape);
    let queries = shape.heads * shape.head_dim;
    let there = upload(gpu, dtype, fused);
    let out = poisoned(gpu, count * queries);
    let (q, kv) = outputs(&there, shape, dtype, count);
    let norms = HeadNorms::default();
    let to = matrix(&out, dtype, count, queries);
    cache.store(to, q, Some(kv), rows, &norms, None).unwrap();
    out
}

#[test]
fn prompts_and_newest_tokens_attend_to_the_cache() {
    let Some(gpu) = gpu() else { return };
    // Shared memory of GPUs of compute capability 8.0, with the kernels of those before Hopper.
    let portable = Gpu::open_portable(0, 163 << 10).unwrap();
    for (heads, kv_heads, head_dim) in [(4, 4, 128), (9, 3, 64), (8, 2, 128), (20, 2, 64)] {
        let shape = AttentionShape::new(heads, kv_heads, head_dim);
        for dtype in BOTH {
            attend(&gpu, shape, dtype);
            attend(&portable, shape, dtype);
        }
    }
    for (at, (heads, kv_heads, head_dim)) in [
        (4, 2, 8),
        (4, 2, 16),
        (3, 1, 32),
        (2, 2, 40),
        (2, 1, 80),
        (3, 3, 96),
        (1, 1, 160),
        (2, 1, 256),
        (2, 2, 256),
        (2, 1, 512),
        (2, 2, 512),
        (1, 1, 320),
    ]
    .into_iter()
    .enumerate()
    {
        let shape = AttentionShape::new(heads, kv_heads, head_dim);
        attend(&gpu, shape, BOTH[at % 2]);
    }
}

fn attend(gpu: &Arc<Gpu>, shape: AttentionShape, dtype: Dtype) {
    let AttentionShape {
        heads,
        kv_heads,
        head_dim,
        ..
    } = shape;
    let queries = heads * head_dim;
    let cache = DeviceKeyValues::new(gpu, 2, CAPACITY, shape, dtype).unwrap();
    // Lengths of two prompts each: shares and tiles that are full, cut and empty.
    let lengths = [[70, 590], [1, 64]];
    let mut random = Random(head_dim as u64);
    let sequences =
        lengths.map(|[first, second]| Sequence::new(&mut random, dtype, shape, first + second + 1));
    let mut prompts = Vec::new();
    for (sequence, own) in sequences.iter().enumerate() {
        let mut first = 0;
        for count in lengths[sequence] {
            let rows = own.fused(shape, first..first + count);
            let of = TextRows::Prompt { sequence, first };
            let q = store(gpu, &cache, shape, dtype, &rows, of);
            prompts.push((sequence, first, count, q));
            first += count;
        }
        // Nothing that is there already may be read: it is no number.
        let none = vec![f64::NAN; (CAPACITY - first) * width(shape)];
        let of = TextRows::Prompt { sequence, first };
        store(gpu, &cache, shape, dtype, &none, of);
    }
    let held = lengths.map(|[first, second]| (first + second + 1) as i32);
    let held_there = Buffer::from_host(gpu, &held).unwrap();
    let held_there = held_there.slice(2);
    let newest: Vec<f64> = (sequences.iter().zip(held))
        .flat_map(|(own, held)| own.fused(shape, held as usize - 1..held as usize))
        .collect();
    let of = TextRows::Newest(held_there);
    let newest = store(gpu, &cache, shape, dtype, &newest, of);

    for of in VARIANTS {
        let shape = variant(shape, of);
        let what = format!("{heads} heads of {head_dim}, {kv_heads} of keys, {of:?}");
        for (sequence, first, count, q) in &prompts {
            let (own, count) = (&sequences[*sequence], *count);
            let out = poisoned(gpu, count * queries);
            let [out, q] = [&out, q].map(|rows| matrix(rows, dtype, count, queries));
            cache
                .attend_prompt(out, q, *sequence, *first, shape)
                .unwrap();
            let got = gpu.download(out).unwrap();
            assert!(got.iter().all(|x| x.is_finite()), "{what}");
            for (row, want) in wanted(own, shape, *first, count) {
                let got = &got[row * queries..][..queries];
                near(
                    got,
                    &want,
                    dtype,
                    0.5,
                    &format!("{what}, row {row} after {first}"),
                );
            }
        }
        let out = poisoned(gpu, 2 * queries);
        let order = RowOrder::natural(queries);
        let [out, q] = [&out, &newest].map(|rows| matrix(rows, dtype, 2, queries));
        cache
            .attend_newest(out, order, q, held_there, shape)
            .unwrap();
        let got = gpu.download(out).unwrap();
        for (row, own) in sequences.iter().enumerate() {
            let want = own.attended(shape, held[row] as usize - 1);
            let got = &got[row * queries..][..queries];
            near(
                got,
                &want,
                dtype,
                0.5,
                &format!("{what}, newest of sequence {row}"),
            );
        }
    }
}

/// So many sequences that a warp goes through several tiles of keys, with more heads to a head of keys
/// than one block takes, and with as many; and where each head has keys of its own.
#[test]
fn new_tokens_of_many_sequences_attend_to_shared_keys() {
    let Some(gpu) = gpu() else { return };
    for dtype in BOTH {
        for (heads, kv_heads, head_dim) in [(24, 2, 128), (16, 4, 64), (16, 2, 128), (2, 2, 96)] {
            let shape = AttentionShape::new(heads, kv_heads, head_dim);
            attend_newest(&gpu, shape, dtype);
        }
    }
}

fn attend_newest(gpu: &Arc<Gpu>, shape: AttentionShape, dtype: Dtype) {
    const SEQUENCES: usize = 80;
    let queries = shape.heads * shape.head_dim;
    let cache = DeviceKeyValues::new(gpu, SEQUENCES, CAPACITY, shape, dtype).unwrap();
    // Four contents for all sequences.
    let held = [CAPACITY - 37, 1, 257, 512];
    let mut random = Random(shape.heads as u64);
    let contents = held.map(|held| Sequence::new(&mut random, dtype, shape, held));
    for sequence in 0..SEQUENCES {
        let (own, held) = (&contents[sequence % 4], held[sequence % 4]);
        let of = TextRows::Prompt { sequence, first: 0 };
        store(gpu, &cache, shape, dtype, &own.fused(shape, 0..held), of);
    }
    let newest: Vec<f64> = (0..SEQUENCES)
        .flat_map(|at| contents[at % 4].fused(shape, held[at % 4] - 1..held[at % 4]))
        .collect();
    let all: Vec<i32> = (0..SEQUENCES).map(|at| held[at % 4] as i32).collect();
    let all = Buffer::from_host(gpu, &all).unwrap();
    let all = all.slice(SEQUENCES);
    let of = TextRows::Newest(all);
    let q = store(gpu, &cache, shape, dtype, &newest, of);
    for of in VARIANTS {
        let shape = variant(shape, of);
        let out = poisoned(gpu, SEQUENCES * queries);
        let order = RowOrder::natural(queries);
        let [out, q] = [&out, &q].map(|rows| matrix(rows, dtype, SEQUENCES, queries));
        cache.attend_newest(out, order, q, all, shape).unwrap();
        let got = gpu.download(out).unwrap();
        let want = [0, 1, 2, 3].map(|at| contents[at].attended(shape, held[at] - 1));
        for (at, got) in got.chunks(queries).enumerate() {
            let (heads, d, kv_heads) = (shape.heads, shape.head_dim, shape.kv_heads);
            let what = format!("{heads} heads of {d}, {kv_heads} of keys, {of:?}, sequence {at}");
            near(got, &want[at % 4], dtype, 0.5, &what);
        }
    }
}

/// A block attends to what another one stored, with more heads, a scale and a window of its own.
#[test]
fn a_block_attends_to_the_cache_of_another() {
    let Some(gpu) = gpu() else { return };
    let (tokens, dtype) = (200, Dtype::F16);
    for head_dim in [64, 96, 128] {
        let stored = AttentionShape::new(2, 1, head_dim);
        let shape = AttentionShape {
            heads: 6,
            scale: 0.3,
            window: Some(70),
            ..stored
        };
        let mut random = Random(1);
        let cache = DeviceKeyValues::new(&gpu, 1, CAPACITY, stored, dtype).unwrap();
        let own = Sequence::new(&mut random, dtype, shape, tokens);
        let rows = own.fused(shape, 0..tokens);
        let there = upload(&gpu, dtype, &rows);
        let (q, kv) = outputs(&there, shape, dtype, tokens);
        // Of the block whose cache it is.
        let few = stored.heads * head_dim;
        let unused = poisoned(&gpu, tokens * few);
        let of = TextRows::Prompt {
            sequence: 0,
            first: 0,
        };
        let norms = HeadNorms::default();
        let to = matrix(&unused, dtype, tokens, few);
        cache
            .store(to, q.column_range(0..few), Some(kv), of, &norms, None)
            .unwrap();
        let queries = shape.heads * head_dim;
        let q = upload(&gpu, dtype, &own.q);
        let out = poisoned(&gpu, tokens * queries);
        let [out, q] = [&out, &q].map(|rows| matrix(rows, dtype, tokens, queries));
        cache.attend_prompt(out, q, 0, 0, shape).unwrap();
        let got = gpu.download(out).unwrap();
        let last = q.row_range(tokens - 1..tokens);
        let first = out.row_range(0..1);
        let held = Buffer::from_host(&gpu, &[tokens as i32]).unwrap();
        let order = RowOrder::natural(queries);
        cache
            .attend_newest(first, order, last, held.slice(1), shape)
            .unwrap();
        let newest = gpu.download(first).unwrap();
        for (row, got) in [(tokens / 2, &got), (tokens - 1, &got)] {
            let got = &got[row * queries..][..queries];
            near(
                got,
                &own.attended(shape, row),
                dtype,
                0.5,
                "another block's prompt",
            );
        }
        let want = own.attended(shape, tokens - 1);
        near(&newest, &want, dtype, 0.5, "another block's newest token");
    }
}

/// As a pass over calibration windows has it.
#[test]
fn windows_attend_inside_themselves() {
    let Some(gpu) = gpu() else { return };
    let portable = Gpu::open_portable(0, 163 << 10).unwrap();
    let tokens = 600;
    for (gpu, heads, kv_heads, head_dim, dtype) in [
        (&gpu, 4, 2, 64, Dtype::F16),
        (&gpu, 2, 2, 128, Dtype::BF16),
        (&portable, 2, 2, 64, Dtype::BF16),
        (&portable, 2, 1, 128, Dtype::F16),
        (&gpu, 2, 1, 32, Dtype::F16),
        (&gpu, 2, 1, 80, Dtype::BF16),
        (&gpu, 2, 1, 256, Dtype::F16),
    ] {
        let shape = AttentionShape::new(heads, kv_heads, head_dim);
        let mut random = Random(head_dim as u64);
        let own = [(); 2].map(|()| Sequence::new(&mut random, dtype, shape, tokens));
        let both = |of: fn(&Sequence) -> &Vec<f64>| {
            let rows = [of(&own[0]).as_slice(), of(&own[1])].concat();
            upload(gpu, dtype, &rows)
        };
        let [q, k, v] = [both(|own| &own.q), both(|own| &own.k), both(|own| &own.v)];
        let (queries, keys) = (heads * head_dim, kv_heads * head_dim);
        let q = matrix(&q, dtype, 2 * tokens, queries);
        let [k, v] = [&k, &v].map(|rows| matrix(rows, dtype, 2 * tokens, keys));
        for of in VARIANTS {
            let shape = variant(shape, of);
            let out = poisoned(gpu, 2 * tokens * queries);
            let out = matrix(&out, dtype, 2 * tokens, queries);
            gpu.attend(out, q, k, v, tokens, shape).unwrap();
            let got = gpu.download(out).unwrap();
            assert!(got.iter().all(|x| x.is_finite()), "{of:?}");
            for (window, got) in got.chunks(tokens * queries).enumerate() {
                for (row, want) in wanted(&own[window], shape, 0, tokens) {
                    let got = &got[row * queries..][..queries];
                    let what = format!("{head_dim}, {of:?}, row {row} of window {window}");
                    near(got, &want, dtype, 0.5, &what);
                }
            }
        }
    }
}
