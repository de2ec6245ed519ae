//! Cached attention on the GPU against sums in f64, over widths of heads, groups of heads and
//! lengths; and dequantised weights, to the bit. Skipped by name where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

use std::sync::Arc;

use gptq_kernels::cuda::{
    Buffer, DeviceKeyValues, Gpu, Output, PackedLinear, RowOrder, TextRows, Turn,
};
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

/// Heads of queries and keys normed with weights of their own, as some models have it.
fn normed(rows: &[f16], shape: AttentionShape, norms: &[Vec<f32>; 2]) -> Vec<f16> {
    let d = shape.head_dim;
    let heads = rows.chunks(d).enumerate().map(|(at, head)| {
        let weight = match at % (shape.heads + 2 * shape.kv_heads) {
            q if q < shape.heads => &norms[0],
            k if k < shape.heads + shape.kv_heads => &norms[1],
            _ => return head.to_vec(),
        };
        let squares: f64 = head.iter().map(|x| x.to_f64().powi(2)).sum();
        let scale = 1.0 / (squares / d as f64 + 1e-5).sqrt();
        let rounded = |x: &f16| f16::from_f64(x.to_f64() * scale).to_f64();
        (head.iter().zip(weight))
            .map(|(x, w)| f16::from_f64(rounded(x) * f64::from(*w)))
            .collect()
    });
    heads.flatten().collect()
}

/// Rows `[tokens, (heads + 2 kv_heads) * d]` of one sequence, as a fused linear leaves them, or with
/// heads normed.
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
    attend(&gpu);
    // Shared memory of GPUs of compute capability 8.0, with the kernels of those before Hopper.
    attend(&Gpu::open_portable(0, 163 << 10).unwrap());
}

fn attend(gpu: &Arc<Gpu>) {
    for (heads, kv_heads, head_dim, with_norms) in [
        (4, 4, 128, false),
        (9, 3, 64, true),
        (8, 2, 128, false),
        (20, 2, 64, false),
        (4, 2, 8, true),
        (2, 1, 80, true),
        (2, 2, 256, false),
        (1, 1, 160, false),
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
        let turn = Turn::new(gpu, &rotation).unwrap();
        let cache = DeviceKeyValues::new(gpu, 2, CAPACITY, shape, Dtype::F16).unwrap();
        let width = (heads + 2 * kv_heads) * head_dim;
        // Lengths of two prompts each: shares and tiles that are full, cut and empty.
        let lengths = [[70, 590], [1, 64]];
        let mut random = Random(head_dim as u64);
        let raw = lengths.map(|[first, second]| random.values((first + second + 1) * width));
        let norms: Option<[Vec<f32>; 2]> = with_norms.then(|| {
            [(); 2].map(|()| random.values(head_dim).iter().map(|w| w.to_f32()).collect())
        });
        let sequences = raw.clone().map(|rows| match &norms {
            Some(norms) => Sequence {
                rows: normed(&rows, shape, norms),
            },
            None => Sequence { rows },
        });
        let norms = norms.map(|both| both.map(|weight| Buffer::from_host(gpu, &weight).unwrap()));
        let norms = norms.as_ref();
        let outputs = |buffer: &Buffer| {
            [0, heads, heads + kv_heads].map(|before| Output {
                address: buffer.address() + 2 * (before * head_dim) as u64,
                pitch: width,
            })
        };
        for (sequence, own) in sequences.iter().enumerate() {
            let mut first = 0;
            for count in lengths[sequence] {
                let rows = &raw[sequence][first * width..][..count * width];
                let there = Buffer::from_host(gpu, rows).unwrap();
                let q = Buffer::new(gpu, count * heads * head_dim * 2).unwrap();
                let out = Buffer::new(gpu, count * heads * head_dim * 2).unwrap();
                let of = TextRows::Prompt { sequence, first };
                cache
                    .store(q.address(), outputs(&there), count, of, norms, 1e-5, &turn)
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
        let rows: Vec<f16> = (raw.iter().zip(held))
            .flat_map(|(own, held)| own[(held as usize - 1) * width..].to_vec())
            .collect();
        let there = Buffer::from_host(gpu, &rows).unwrap();
        let held_there = Buffer::from_host(gpu, &held).unwrap();
        let q = Buffer::new(gpu, 2 * heads * head_dim * 2).unwrap();
        let out = Buffer::new(gpu, 2 * heads * head_dim * 2).unwrap();
        let of = TextRows::Newest(&held_there);
        cache
            .store(q.address(), outputs(&there), 2, of, norms, 1e-5, &turn)
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

/// A linear with sorted channels, some places empty where K is no multiple of 128.
fn act_order(gpu: &Arc<Gpu>, k: usize) -> PackedLinear {
    let n = 32;
    let mut random = Random(k as u64);
    let layer = SolvedLayer {
        bits: Bits::Four,
        in_features: k,
        out_features: n,
        codes: (random.values(k * n).iter())
            .map(|value| ((value.to_f32() + 1.0) * 7.5) as u8)
            .collect(),
        scales: vec![f16::from_f32(0.01); k.div_ceil(64) * n],
        zeros: vec![8; k.div_ceil(64) * n],
        g_idx: (0..k)
            .map(|channel| (channel * 7 % k / 64) as u32)
            .collect(),
    };
    PackedLinear::new(gpu, &layer, None, Dtype::F16).unwrap()
}

/// Rows in their natural order are `want`, and a linear makes the same of them as of rows in its own.
fn check_rows(
    gpu: &Arc<Gpu>,
    want: &[f64],
    rows: usize,
    what: &str,
    write: impl Fn(u64, RowOrder),
) {
    let k = want.len() / rows;
    let linear = act_order(gpu, k);
    let natural = Buffer::new(gpu, rows * k * 2).unwrap();
    write(natural.address(), RowOrder::natural(k));
    let natural = matrix(&natural, rows, k);
    close(&gpu.download(natural).unwrap(), want, what);
    let width = linear.order().width;
    let ordered = Buffer::from_host(gpu, &vec![f16::NAN; rows * width]).unwrap();
    write(ordered.address(), linear.order());
    let products = [(); 2].map(|()| Buffer::new(gpu, rows * 32 * 2).unwrap());
    linear
        .multiply(products[0].address(), natural, false)
        .unwrap();
    linear
        .multiply_ordered(products[1].address(), matrix(&ordered, rows, width), false)
        .unwrap();
    let [natural, ordered] = products.map(|out| out.to_host::<u16>(rows * 32).unwrap());
    assert!(natural == ordered, "{what}, in order");
}

#[test]
fn norms_and_gates_are_written_in_the_order_of_the_next_linear() {
    let Some(gpu) = gpu() else { return };
    // By ones and by eights; what a thread takes at a time is all, or not all of a row.
    for k in [100, 172, 4096, 11008] {
        for rows in [1, 3, 40] {
            let what = format!("{rows} rows of {k}");
            let mut random = Random((k + rows) as u64);
            let x = random.values(rows * k);
            let weight: Vec<f32> = random.values(k).iter().map(|w| w.to_f32()).collect();
            let normed: Vec<f64> = (x.chunks(k))
                .flat_map(|row| {
                    let squares: f64 = row.iter().map(|x| x.to_f64().powi(2)).sum();
                    let scale = 1.0 / (squares / k as f64 + 1e-5).sqrt();
                    let rounded = |x: &f16| f16::from_f64(x.to_f64() * scale).to_f64();
                    let scaled = |(x, w): (&f16, &f32)| rounded(x) * f64::from(*w);
                    row.iter().zip(&weight).map(scaled).collect::<Vec<f64>>()
                })
                .collect();
            let there = Buffer::from_host(&gpu, &x).unwrap();
            let weight = Buffer::from_host(&gpu, &weight).unwrap();
            check_rows(&gpu, &normed, rows, &what, |out, order| {
                (gpu.norm_rows(out, order, matrix(&there, rows, k), &weight, 1e-5)).unwrap();
            });

            let both = random.values(rows * 2 * k);
            let gated: Vec<f64> = (both.chunks(2 * k))
                .flat_map(|row| {
                    (0..k).map(|i| {
                        let g = row[i].to_f64();
                        f16::from_f64(g / (1.0 + (-g).exp())).to_f64() * row[k + i].to_f64()
                    })
                })
                .collect();
            let there = Buffer::from_host(&gpu, &both).unwrap();
            check_rows(&gpu, &gated, rows, &what, |out, order| {
                let outputs = [0, 2 * k as u64].map(|before| Output {
                    address: there.address() + before,
                    pitch: 2 * k,
                });
                (gpu.gate_rows(out, order, outputs, [rows, k], Dtype::F16)).unwrap();
            });
        }
    }
}

/// As many as a window of a long context has, and more than a grid's second dimension.
#[test]
fn rows_of_long_windows_are_gated() {
    let Some(gpu) = gpu() else { return };
    let (rows, k) = (65_537, 8);
    let mut random = Random(5);
    let both = [(); 2].map(|()| random.values(rows * k));
    let there = [0, 1].map(|at| Buffer::from_host(&gpu, &both[at]).unwrap());
    let [gate, up] = [0, 1].map(|at| matrix(&there[at], rows, k));
    gpu.swiglu(gate, up).unwrap();
    let want: Vec<f64> = (both[0].iter().zip(&both[1]))
        .map(|(g, u)| {
            let g = g.to_f64();
            f16::from_f64(g / (1.0 + (-g).exp())).to_f64() * u.to_f64()
        })
        .collect();
    close(&gpu.download(gate).unwrap(), &want, "rows of a long window");
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
