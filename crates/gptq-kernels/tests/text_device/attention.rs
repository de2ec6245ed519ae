//! Cached attention against sums in f64.

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, DeviceKeyValues, Gpu, Output, RowOrder, TextRows, Turn};
use gptq_kernels::{AttentionShape, Rotation};
use gptq_types::{DeviceMatrix, Dtype};
use half::{bf16, f16};

use super::common::{Random, gpu};
use super::{TOLERANCE, close, matrix, values};

const CAPACITY: usize = 700;

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
        let raw = lengths.map(|[first, second]| values(&mut random, (first + second + 1) * width));
        let norms: Option<[Vec<f32>; 2]> = with_norms.then(|| {
            [(); 2].map(|()| {
                values(&mut random, head_dim)
                    .iter()
                    .map(|w| w.to_f32())
                    .collect()
            })
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

/// So many sequences that a warp goes through several tiles of keys, with more heads to a head of keys
/// than one block takes, and with as many.
#[test]
fn new_tokens_of_many_sequences_attend_to_shared_keys() {
    let Some(gpu) = gpu() else { return };
    for dtype in [Dtype::F16, Dtype::BF16] {
        for (heads, kv_heads, head_dim) in [(24, 2, 128), (16, 4, 64), (16, 2, 128)] {
            let shape = AttentionShape {
                heads,
                kv_heads,
                head_dim,
            };
            attend_newest(&gpu, shape, dtype);
        }
    }
}

fn attend_newest(gpu: &Arc<Gpu>, shape: AttentionShape, dtype: Dtype) {
    const SEQUENCES: usize = 80;
    let AttentionShape {
        heads,
        kv_heads,
        head_dim,
    } = shape;
    let frequencies: Vec<f32> = (0..head_dim / 2).map(|i| 1.0 / (1.0 + i as f32)).collect();
    let rotation = Rotation::new(&frequencies, 0..CAPACITY, 1.0);
    let turn = Turn::new(gpu, &rotation).unwrap();
    let cache = DeviceKeyValues::new(gpu, SEQUENCES, CAPACITY, shape, dtype).unwrap();
    let width = (heads + 2 * kv_heads) * head_dim;
    // Three contents for all sequences; their numbers are the same in both kinds of sixteen bits.
    let held = [CAPACITY - 37, 1, 257];
    let mut random = Random(heads as u64);
    let contents = held.map(|held| {
        let both = |x: &f16| f16::from_f32(bf16::from_f32(3.0 * x.to_f32()).to_f32());
        let rows = values(&mut random, held * width).iter().map(both).collect();
        Sequence { rows }
    });
    let bits = |rows: &[f16]| -> Vec<u16> {
        let bits = |x: &f16| match dtype {
            Dtype::BF16 => bf16::from_f32(x.to_f32()).to_bits(),
            _ => x.to_bits(),
        };
        rows.iter().map(bits).collect()
    };
    let outputs = |buffer: &Buffer| {
        [0, heads, heads + kv_heads].map(|before| Output {
            address: buffer.address() + 2 * (before * head_dim) as u64,
            pitch: width,
        })
    };
    let queries = heads * head_dim;
    let q = Buffer::new(gpu, CAPACITY.max(SEQUENCES) * queries * 2).unwrap();
    for sequence in 0..SEQUENCES {
        let rows = &contents[sequence % 3].rows;
        let there = Buffer::from_host(gpu, &bits(rows)).unwrap();
        let (of, count) = (TextRows::Prompt { sequence, first: 0 }, rows.len() / width);
        cache
            .store(q.address(), outputs(&there), count, of, None, 1e-5, &turn)
            .unwrap();
    }
    let newest: Vec<f16> = (0..SEQUENCES)
        .flat_map(|sequence| {
            let rows = &contents[sequence % 3].rows;
            rows[rows.len() - width..].to_vec()
        })
        .collect();
    let there = Buffer::from_host(gpu, &bits(&newest)).unwrap();
    let all: Vec<i32> = (0..SEQUENCES).map(|at| held[at % 3] as i32).collect();
    let all = Buffer::from_host(gpu, &all).unwrap();
    let (of, none) = (TextRows::Newest(&all), None);
    cache
        .store(
            q.address(),
            outputs(&there),
            SEQUENCES,
            of,
            none,
            1e-5,
            &turn,
        )
        .unwrap();
    let out = Buffer::new(gpu, SEQUENCES * queries * 2).unwrap();
    cache
        .attend_newest(out.address(), RowOrder::natural(queries), q.address(), &all)
        .unwrap();
    let place = DeviceMatrix {
        dtype,
        ..matrix(&out, SEQUENCES, queries)
    };
    let got = gpu.download(place).unwrap();
    let want = [0, 1, 2].map(|at| contents[at].attended(shape, held[at] - 1, &rotation));
    // Of numbers up to three, queries, keys and results are rounded.
    let tolerance = match dtype {
        Dtype::BF16 => 8.0 * 3.0 * TOLERANCE,
        _ => 3.0 * TOLERANCE,
    };
    for (sequence, got) in got.chunks(queries).enumerate() {
        for (at, (got, want)) in got.iter().zip(&want[sequence % 3]).enumerate() {
            assert!(
                (f64::from(*got) - want).abs() < tolerance,
                "{heads} heads of {head_dim}, {kv_heads} of keys, {dtype}, sequence {sequence}: {got} for {want} at {at}"
            );
        }
    }
}
