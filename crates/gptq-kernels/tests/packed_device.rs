//! Packed products on the GPU against sums in f64, over widths, groups, orders and numbers of rows.
//! Skipped by name where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

mod common;

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, Gpu, PackedLinear};
use gptq_types::{Bits, Dtype, SolvedLayer};
use half::{bf16, f16};

use common::{Random, gpu};

/// Of the largest output: weights are rounded to sixteen bits before they are multiplied.
const F16_TOLERANCE: f64 = 2e-3;
const BF16_TOLERANCE: f64 = 1.6e-2;

#[derive(Clone, Copy, Debug)]
struct Case {
    bits: Bits,
    k: usize,
    n: usize,
    group: usize,
    act_order: bool,
    sym: bool,
}

fn layer(case: Case) -> SolvedLayer {
    let Case {
        bits, k, n, group, ..
    } = case;
    let mut random = Random((k * 31 + n * 7 + group) as u64);
    let groups = k.div_ceil(group);
    let mut g_idx: Vec<u32> = (0..k).map(|channel| (channel / group) as u32).collect();
    if case.act_order {
        for at in (1..k).rev() {
            g_idx.swap(at, random.next() as usize % (at + 1));
        }
    }
    let max = bits.max_code();
    SolvedLayer {
        bits,
        in_features: k,
        out_features: n,
        codes: (0..k * n)
            .map(|_| (random.next() % (max + 1)) as u8)
            .collect(),
        scales: (0..groups * n)
            .map(|_| f16::from_f32(0.01 + 0.02 * random.uniform().abs()))
            .collect(),
        zeros: (0..groups * n)
            .map(|_| match case.sym {
                true => (max as u16).div_ceil(2),
                false => (random.next() % (max + 2)) as u16,
            })
            .collect(),
        g_idx,
    }
}

fn check(gpu: &Arc<Gpu>, case: Case, rows: usize, dtype: Dtype) {
    let layer = layer(case);
    let (k, n) = (case.k, case.n);
    let mut random = Random(rows as u64);
    let round = |x: f32| match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_f32(),
        _ => f16::from_f32(x).to_f32(),
    };
    let bits_of = |x: f32| match dtype {
        Dtype::BF16 => bf16::from_f32(x).to_bits(),
        _ => f16::from_f32(x).to_bits(),
    };
    let value = |bits: u16| match dtype {
        Dtype::BF16 => bf16::from_bits(bits).to_f32(),
        _ => f16::from_bits(bits).to_f32(),
    };
    let x: Vec<f32> = (0..rows * k).map(|_| round(random.uniform())).collect();
    let before: Vec<f32> = (0..rows * n).map(|_| round(random.uniform())).collect();
    let bias: Vec<f32> = (0..n).map(|_| random.uniform()).collect();
    let weight = layer.dequantize();
    let halves = |values: &[f32]| values.iter().map(|&x| bits_of(x)).collect::<Vec<u16>>();
    let there = Buffer::from_host(gpu, &halves(&x)).unwrap();
    let out = Buffer::from_host(gpu, &halves(&before)).unwrap();
    let linear = PackedLinear::new(gpu, &layer, Some(&bias), dtype).unwrap();
    let given = there.matrix([rows, k], dtype);
    let sums = out.matrix([rows, n], dtype);
    linear.multiply(sums, given, true).unwrap();
    let got: Vec<u16> = out.to_host(rows * n).unwrap();
    let (mut worst, mut largest) = (0.0f64, 0.0f64);
    for row in 0..rows {
        let mut want: Vec<f64> = (0..n)
            .map(|o| f64::from(bias[o]) + f64::from(before[row * n + o]))
            .collect();
        for (channel, &x) in x[row * k..(row + 1) * k].iter().enumerate() {
            let weights = &weight[channel * n..(channel + 1) * n];
            for (want, &w) in want.iter_mut().zip(weights) {
                *want += f64::from(x) * f64::from(w);
            }
        }
        for (got, want) in got[row * n..].iter().zip(want) {
            worst = worst.max((f64::from(value(*got)) - want).abs());
            largest = largest.max(want.abs());
        }
    }
    let tolerance = match dtype {
        Dtype::BF16 => BF16_TOLERANCE,
        _ => F16_TOLERANCE,
    };
    assert!(
        worst <= tolerance * largest,
        "{case:?}, {rows} rows of {dtype}: {worst} of {largest}"
    );
}

const ROWS: [usize; 12] = [1, 2, 5, 8, 9, 16, 31, 33, 64, 65, 130, 300];

#[test]
fn products_agree_with_sums_in_f64_for_every_format() {
    let Some(gpu) = gpu() else { return };
    let sizes = [
        (256, 64, 128),
        (172, 43, 64),
        (576, 192, 64),
        (300, 24, 300),
        (1000, 100, 32),
    ];
    for bits in Bits::ALL {
        for (k, n, group) in sizes {
            for act_order in [false, true] {
                for sym in [false, true] {
                    let case = Case {
                        bits,
                        k,
                        n,
                        group,
                        act_order,
                        sym,
                    };
                    for rows in ROWS {
                        check(&gpu, case, rows, Dtype::F16);
                    }
                    check(&gpu, case, 1, Dtype::BF16);
                    check(&gpu, case, 33, Dtype::BF16);
                    check(&gpu, case, 70, Dtype::BF16);
                }
            }
        }
    }
}

/// Shared memory of a block on GPUs of compute capability 8.6 and 8.9, and 8.0.
const OTHERS_SHARED_MEMORY: [usize; 2] = [99 << 10, 163 << 10];

/// On a GPU with kernels of its own, those of the others.
#[test]
fn portable_kernels_agree_as_well() {
    if gpu().is_none() {
        return;
    }
    for shared_memory in OTHERS_SHARED_MEMORY {
        portable_kernels_agree(&Gpu::open_portable(0, shared_memory).unwrap());
    }
}

fn portable_kernels_agree(gpu: &Arc<Gpu>) {
    for bits in [Bits::Three, Bits::Four, Bits::Eight] {
        for (k, n, group, sym) in [(1024, 200, 128, true), (576, 192, 64, false)] {
            let case = Case {
                bits,
                k,
                n,
                group,
                act_order: !sym,
                sym,
            };
            for rows in ROWS {
                check(gpu, case, rows, Dtype::F16);
                check(gpu, case, rows, Dtype::BF16);
            }
        }
    }
}

#[test]
fn the_shapes_of_a_7b_model_and_odd_ones_agree() {
    let Some(gpu) = gpu() else { return };
    for (k, n, group) in [
        (4096, 1024, 128),
        (11008, 512, 128),
        (2056, 777, 40),
        (128, 1, 16),
    ] {
        for act_order in [false, true] {
            let case = Case {
                bits: Bits::Four,
                k,
                n,
                group,
                act_order,
                sym: true,
            };
            for rows in [1, 5, 8, 16, 64, 100, 260] {
                check(&gpu, case, rows, Dtype::F16);
            }
        }
    }
}

/// More blocks than multiprocessors: two beside each other, further ones when those are done, and with the
/// last shape several that share positions.
#[test]
fn many_blocks_of_more_rows_agree() {
    let Some(gpu) = gpu() else { return };
    for (bits, k, n, rows) in [
        (Bits::Four, 640, 11001, 130),
        (Bits::Four, 640, 11001, 250),
        (Bits::Eight, 640, 11001, 130),
        (Bits::Eight, 640, 11001, 250),
        (Bits::Four, 8192, 4096, 130),
    ] {
        let case = Case {
            bits,
            k,
            n,
            group: 128,
            act_order: false,
            sym: true,
        };
        check(&gpu, case, rows, Dtype::F16);
    }
}

/// Of so many rows a block puts several in order; the last block has fewer.
#[test]
fn many_rows_are_put_in_order() {
    let Some(gpu) = gpu() else { return };
    for (k, group) in [(300, 20), (2056, 40), (11008, 128)] {
        let case = Case {
            bits: Bits::Four,
            k,
            n: 16,
            group,
            act_order: true,
            sym: true,
        };
        check(&gpu, case, 1103, Dtype::F16);
    }
}

/// With so many outputs blocks of few rows are two, three and six warps wide.
#[test]
fn many_outputs_agree() {
    let Some(gpu) = gpu() else { return };
    let portable = Gpu::open_portable(0, OTHERS_SHARED_MEMORY[0]).unwrap();
    for (bits, group, sym) in [
        (Bits::Four, 128, true),
        (Bits::Two, 64, false),
        (Bits::Eight, 128, true),
        (Bits::Eight, 32, false),
    ] {
        for n in [8200, 11001, 22016] {
            let case = Case {
                bits,
                k: 640,
                n,
                group,
                act_order: false,
                sym,
            };
            for rows in [3, 11, 20] {
                check(&gpu, case, rows, Dtype::F16);
                check(&portable, case, rows, Dtype::F16);
            }
            check(&gpu, case, 11, Dtype::BF16);
        }
    }
}

/// Kernels begin before those ahead of them are done; what they read and write must not show it.
#[test]
fn products_queued_back_to_back_do_not_disturb_each_other() {
    let Some(gpu) = gpu() else { return };
    let shapes = [(512, 4096), (4096, 512), (512, 11008), (11008, 512)];
    let linears: Vec<PackedLinear> = (shapes.iter().enumerate())
        .map(|(at, &(k, n))| {
            let case = Case {
                bits: if at == 3 { Bits::Eight } else { Bits::Four },
                k,
                n,
                group: 128,
                act_order: at == 1,
                sym: true,
            };
            PackedLinear::new(&gpu, &layer(case), None, Dtype::F16).unwrap()
        })
        .collect();
    for rows in [1, 7, 16, 32, 40, 64] {
        let mut random = Random(rows as u64);
        let wide: Vec<u16> = (0..rows * 11008)
            .map(|_| f16::from_f32(1e-5 * random.uniform()).to_bits())
            .collect();
        // Each reads what the one before has written; the last numbers are 1e8 times the first.
        let run = |apart: bool| {
            let first = Buffer::from_host(&gpu, &wide).unwrap();
            let others: Vec<Buffer> = (0..8)
                .map(|_| Buffer::zeros(&gpu, rows * 11008 * 2).unwrap())
                .collect();
            let mut from = &first;
            for (at, out) in others.iter().enumerate() {
                let linear = &linears[at % 4];
                let x = from.matrix([rows, linear.features()], Dtype::F16);
                let there = out.matrix([rows, linear.outputs()], Dtype::F16);
                linear.multiply(there, x, at >= 4).unwrap();
                from = out;
                if apart {
                    gpu.synchronize().unwrap();
                }
            }
            (others.iter().enumerate())
                .flat_map(|(at, out)| out.to_host::<u16>(rows * shapes[at % 4].1).unwrap())
                .collect::<Vec<u16>>()
        };
        let alone = run(true);
        let finite = |&bits: &u16| f16::from_bits(bits).is_finite();
        assert!(alone.iter().all(finite), "{rows} rows overflow");
        assert!((0..10).all(|_| run(false) == alone), "{rows} rows");
    }
}
