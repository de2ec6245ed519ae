//! Cached attention on the GPU against sums in f64, over widths of heads, groups of heads and
//! lengths; and dequantised weights, to the bit. Skipped by name where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, DeviceKeyValues, Gpu, Output, RowOrder, TextRows, Turn};
use gptq_kernels::{AttentionShape, Rotation};
use gptq_types::{Bits, DeviceMatrix, Dtype, SolvedLayer};
use half::f16;

/// Of values of order one: what goes in and out is rounded to f16, weights as well.
const TOLERANCE: f64 = 3e-3;
const CAPACITY: usize = 700;

fn gpu() -> Option<Arc<Gpu>> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            eprintln!("skipped: {error}");
            None
        }
    }
}

struct Random(u64);

impl Random {
    fn values(&mut self, count: usize) -> Vec<f16> {
        let mut one = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
            self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
            f16::from_f32((self.0 >> 33) as f32 / (1u64 << 30) as f32 - 1.0)
        };
        (0..count).map(|_| one()).collect()
    }
}

fn matrix(buffer: &Buffer, rows: usize, columns: usize) -> DeviceMatrix {
    DeviceMatrix {
        address: buffer.address(),
        rows,
        columns,
        dtype: Dtype::F16,
    }
}

/// Rows `[tokens, (heads + 2 kv_heads) * d]` of one sequence, as a fused linear leaves them.
struct Sequence {
    rows: Vec<f16>,
}

fn turned(x: &[f16], position: usize, rotation: &Rotation) -> Vec<f64> {
    let (cosine, sine) = rotation.tables();
    let half = x.len() / 2;
    let at = |i: usize| {
        (
            f64::from(cosine[position * half + i]),
            f64::from(sine[position * half + i]),
        )
    };
    let value = |i: usize| x[i].to_f64();
    (0..x.len())
        .map(|i| match i < half {
            true => value(i) * at(i).0 - value(i + half) * at(i).1,
            false => value(i) * at(i - half).0 + value(i - half) * at(i - half).1,
        })
        .collect()
}

impl Sequence {
    fn head(&self, shape: AttentionShape, token: usize, head: usize) -> &[f16] {
        let width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim;
        &self.rows[token * width + head * shape.head_dim..][..shape.head_dim]
    }

    /// What `token` attends to in f64, `[heads * d]`.
    fn attended(&self, shape: AttentionShape, token: usize, rotation: &Rotation) -> Vec<f64> {
        let mut out = Vec::new();
        for head in 0..shape.heads {
            let q = turned(self.head(shape, token, head), token, rotation);
            let kv = head / (shape.heads / shape.kv_heads);
            let scores: Vec<f64> = (0..=token)
                .map(|key| {
                    let k = turned(self.head(shape, key, shape.heads + kv), key, rotation);
                    q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>()
                        / (shape.head_dim as f64).sqrt()
                })
                .collect();
            let top = scores.iter().copied().fold(f64::MIN, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - top).exp()).collect();
            let all: f64 = weights.iter().sum();
            out.extend((0..shape.head_dim).map(|i| {
                let value = |key: usize| {
                    self.head(shape, key, shape.heads + shape.kv_heads + kv)[i].to_f64()
                };
                (weights.iter().enumerate())
                    .map(|(key, weight)| weight * value(key))
                    .sum::<f64>()
                    / all
            }));
        }
        out
    }
}

#[track_caller]
fn close(got: &[f32], want: &[f64], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    for (at, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (f64::from(*got) - want).abs() < TOLERANCE,
            "{what}: {got} for {want} at {at}"
        );
    }
}

#[test]
fn prompts_and_newest_tokens_attend_to_the_cache() {
    let Some(gpu) = gpu() else { return };
    for (heads, kv_heads, head_dim) in [
        (4, 4, 128),
        (9, 3, 64),
        (4, 2, 8),
        (2, 1, 80),
        (2, 2, 256),
        (1, 1, 160),
    ] {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
        };
        let what = format!("{heads} heads of {head_dim}, {kv_heads} of keys");
        let frequencies: Vec<f32> = (0..head_dim / 2)
            .map(|i| 1.0 / (1.0 + i as f32 * 0.7))
            .collect();
        let rotation = Rotation::new(&frequencies, 0..CAPACITY, 1.0);
        let turn = Turn::new(&gpu, &rotation).unwrap();
        let cache = DeviceKeyValues::new(&gpu, 2, CAPACITY, shape, Dtype::F16).unwrap();
        let width = (heads + 2 * kv_heads) * head_dim;
        // Lengths of two prompts each: shares and tiles that are full, cut and empty.
        let lengths = [[70, 590], [1, 64]];
        let mut random = Random(head_dim as u64);
        let sequences = lengths.map(|[first, second]| Sequence {
            rows: random.values((first + second + 1) * width),
        });
        let outputs = |buffer: &Buffer| {
            [0, heads, heads + kv_heads].map(|before| Output {
                address: buffer.address() + 2 * (before * head_dim) as u64,
                pitch: width,
            })
        };
        for (sequence, own) in sequences.iter().enumerate() {
            let mut first = 0;
            for count in lengths[sequence] {
                let rows = &own.rows[first * width..][..count * width];
                let there = Buffer::from_host(&gpu, rows).unwrap();
                let q = Buffer::new(&gpu, count * heads * head_dim * 2).unwrap();
                let out = Buffer::new(&gpu, count * heads * head_dim * 2).unwrap();
                let of = TextRows::Prompt { sequence, first };
                cache
                    .store(q.address(), outputs(&there), count, of, None, 1e-5, &turn)
                    .unwrap();
                let q = matrix(&q, count, heads * head_dim);
                cache
                    .attend_prompt(out.address(), q, sequence, first)
                    .unwrap();
                let got = gpu.download(matrix(&out, count, heads * head_dim)).unwrap();
                for row in [0, 1, 15, 16, 63, 64, count / 2, count - 1] {
                    if row < count {
                        let want = own.attended(shape, first + row, &rotation);
                        let got = &got[row * want.len()..][..want.len()];
                        close(
                            got,
                            &want,
                            &format!("{what}, prompt row {row} after {first}"),
                        );
                    }
                }
                first += count;
            }
        }
        // The newest token of both.
        let held = lengths.map(|[first, second]| (first + second + 1) as i32);
        let rows: Vec<f16> = (sequences.iter().zip(held))
            .flat_map(|(own, held)| own.rows[(held as usize - 1) * width..].to_vec())
            .collect();
        let there = Buffer::from_host(&gpu, &rows).unwrap();
        let held_there = Buffer::from_host(&gpu, &held).unwrap();
        let q = Buffer::new(&gpu, 2 * heads * head_dim * 2).unwrap();
        let out = Buffer::new(&gpu, 2 * heads * head_dim * 2).unwrap();
        let of = TextRows::Newest(&held_there);
        cache
            .store(q.address(), outputs(&there), 2, of, None, 1e-5, &turn)
            .unwrap();
        let order = RowOrder::natural(heads * head_dim);
        cache
            .attend_newest(out.address(), order, q.address(), &held_there)
            .unwrap();
        let got = gpu.download(matrix(&out, 2, heads * head_dim)).unwrap();
        for (row, own) in sequences.iter().enumerate() {
            let want = own.attended(shape, held[row] as usize - 1, &rotation);
            let got = &got[row * want.len()..][..want.len()];
            close(got, &want, &format!("{what}, newest of sequence {row}"));
        }
    }
}

#[test]
fn dequantised_weights_are_those_of_the_processor() {
    let Some(gpu) = gpu() else { return };
    for (bits, k, n) in [
        (Bits::Two, 64usize, 40usize),
        (Bits::Four, 200, 136),
        (Bits::Eight, 129, 65),
    ] {
        let groups = k.div_ceil(32);
        let mut random = Random(k as u64);
        let mut whole = |count: usize, below: usize| -> Vec<usize> {
            (random.values(count).iter())
                .map(|value| ((value.to_f32() + 1.0) * 500.0) as usize % below)
                .collect()
        };
        let max = bits.max_code() as usize + 1;
        let layer = SolvedLayer {
            bits,
            in_features: k,
            out_features: n,
            codes: whole(k * n, max).iter().map(|&code| code as u8).collect(),
            zeros: whole(groups * n, max)
                .iter()
                .map(|&zero| zero as u16)
                .collect(),
            scales: (whole(groups * n, 900).iter())
                .map(|&scale| f16::from_f32(scale as f32 * 1e-4))
                .collect(),
            g_idx: whole(k, groups).iter().map(|&group| group as u32).collect(),
        };
        let out = Buffer::new(&gpu, k * n * 2).unwrap();
        gpu.dequantise(matrix(&out, n, k), &layer).unwrap();
        let got = gpu.download(matrix(&out, n, k)).unwrap();
        let want = layer.dequantise();
        for output in 0..n {
            for channel in 0..k {
                let want = f16::from_f32(want[channel * n + output]).to_f32();
                assert_eq!(got[output * k + channel], want, "{bits} bits");
            }
        }
    }
}
