//! Rounding of latents, their training, and codes that they follow.

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, DeviceLatents, DeviceMatrix, Gpu};
use gptq_kernels::{Adam, LearningRates, TrainedGrids, product_weight_backward, stored_scale};
use gptq_types::{Bits, Dtype, SolvedLayer};
use half::{bf16, f16};

use super::common::{Random, gpu};
use super::{BOTH, Cases, matrix, poisoned, upload, wide};

const RATES: LearningRates = LearningRates {
    latents: 0.004,
    scales: 0.0005,
};

/// A linear whose latents reach beyond its codes, on scales of both signs, some of them subnormal in f16.
struct Linear {
    layer: SolvedLayer,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    latents: Vec<f32>,
}

impl Linear {
    fn new(bits: Bits, k: usize, n: usize, g_idx: Vec<u32>) -> Self {
        let groups = *g_idx.iter().max().unwrap() as usize + 1;
        let mut random = Random((k * n) as u64 + u64::from(bits.width()));
        let max_code = bits.max_code();
        let scales: Vec<f16> = (0..groups * n)
            .map(|at| {
                let x = random.uniform();
                let magnitude = if at % 97 == 5 {
                    3e-5
                } else {
                    0.02 + 0.03 * x.abs()
                };
                f16::from_f32(magnitude.copysign(x))
            })
            .collect();
        let zeros: Vec<u16> = (0..groups * n)
            .map(|_| (random.next() % (max_code + 1)) as u16)
            .collect();
        let latents = (0..k * n)
            .map(|_| random.uniform() * 0.03 * max_code as f32)
            .collect();
        Linear {
            scales: scales.iter().map(|x| x.to_f32()).collect(),
            zeros: zeros.iter().map(|x| f32::from(*x)).collect(),
            latents,
            layer: SolvedLayer {
                bits,
                in_features: k,
                out_features: n,
                codes: vec![0; k * n],
                scales,
                zeros,
                g_idx,
            },
        }
    }

    fn grids(&self) -> TrainedGrids<'_, f32> {
        TrainedGrids {
            bits: self.layer.bits,
            out_features: self.layer.out_features,
            scales: &self.scales,
            zeros: &self.zeros,
            g_idx: &self.layer.g_idx,
        }
    }

    /// The processor's weight as a reader has it, `[N, K]` in bits of sixteen.
    fn weight(&self, dtype: Dtype) -> Vec<u16> {
        let (k, n) = (self.layer.in_features, self.layer.out_features);
        let mut weights = vec![0.0f32; k * n];
        self.grids().round(&mut weights, &self.latents);
        let stored = |x: f32| match dtype {
            Dtype::BF16 => bf16::from_f32(x).to_bits(),
            _ => f16::from_f32(x).to_bits(),
        };
        (0..n * k)
            .map(|at| stored(weights[at % k * n + at / k]))
            .collect()
    }
}

/// Groups in a row, scattered, of more channels than a part, all in one.
fn shapes() -> Vec<(usize, usize, Vec<u32>)> {
    let scattered = |k: usize, groups: usize| (0..k).map(|c| (c * 7 % groups) as u32).collect();
    vec![
        (96, 300, scattered(96, 3)),
        (256, 130, (0..256).map(|channel| channel / 128).collect()),
        (300, 65, vec![0; 300]),
        (700, 64, scattered(700, 2)),
        (37, 1, scattered(37, 5)),
    ]
}

fn names(linear: &Linear, dtype: Dtype) -> String {
    let layer = &linear.layer;
    format!(
        "{dtype}, {} bits, {} x {}, {} groups",
        layer.bits.width(),
        layer.in_features,
        layer.out_features,
        layer.groups()
    )
}

fn rounded_on(gpu: &Arc<Gpu>, latents: &DeviceLatents, dtype: Dtype) -> Vec<u16> {
    let count = latents.features() * latents.outputs();
    let out = poisoned(gpu, count);
    let place = matrix(&out, dtype, latents.outputs(), latents.features());
    latents.round_into(place).unwrap();
    out.to_host(count).unwrap()
}

/// Quarters from -1 to 1: sums of their products are exact in any order.
fn quarters(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| (random.next() % 9) as f32 / 4.0 - 1.0)
        .collect()
}

#[test]
fn steps_of_latents_and_scales() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("step");
    for bits in Bits::ALL {
        for (k, n, g_idx) in shapes() {
            for dtype in BOTH {
                let mut linear = Linear::new(bits, k, n, g_idx.clone());
                let what = names(&linear, dtype);
                let mut there = DeviceLatents::new(&gpu, &linear.layer, &linear.latents).unwrap();
                let weight = rounded_on(&gpu, &there, dtype);
                cases.same(&weight, &linear.weight(dtype), &format!("weight, {what}"));
                let (mut of_latents, mut of_scales) =
                    (Adam::new(k * n), Adam::new(linear.scales.len()));
                let mut random = Random(u64::from(bits.width()));
                let mut kept = (Vec::new(), Vec::new());
                for step in 0..4 {
                    // Two batches of different lengths; inputs are columns of a wider matrix.
                    let (mut d_weights, mut buffers) = (vec![0.0f32; k * n], Vec::new());
                    for rows in [64, 31] {
                        let x = quarters(&mut random, rows * (k + 8));
                        let dy = quarters(&mut random, rows * n);
                        let own: Vec<f32> = x
                            .chunks_exact(k + 8)
                            .flat_map(|row| row[..k].to_vec())
                            .collect();
                        product_weight_backward(&mut d_weights, &dy, &own, rows, k, n);
                        let [x, dy] = [x, dy].map(|x| upload(&gpu, dtype, &wide(&x)));
                        buffers.push((x, dy, rows));
                    }
                    let pairs: Vec<(DeviceMatrix, DeviceMatrix)> = (buffers.iter())
                        .map(|(x, dy, rows)| {
                            let x = matrix(x, dtype, *rows, k + 8).column_range(0..k);
                            (x, matrix(dy, dtype, *rows, n))
                        })
                        .collect();
                    let mut d_scales = vec![0.0; linear.scales.len()];
                    (linear.grids()).backward(&mut d_weights, &linear.latents, &mut d_scales);
                    of_latents.step(&mut linear.latents, &d_weights, RATES.latents);
                    of_scales.step(&mut linear.scales, &d_scales, RATES.scales);
                    if cases.ok(there.step(&pairs, RATES, step), &what).is_none() {
                        break;
                    }
                    let (latents, scales) =
                        (there.latents().unwrap(), there.trained_scales().unwrap());
                    let what = format!("after step {step}, {what}");
                    let exact = |got: &[f32], want: &[f32]| {
                        let other = got.iter().zip(want).filter(|(a, b)| a != b).count();
                        format!("{other} of {} not equal", got.len())
                    };
                    let equal = exact(&latents, &linear.latents);
                    let name = format!("latents, {what} ({equal})");
                    cases.near(&latents, &wide(&linear.latents), 1e-5, &name);
                    let equal = exact(&scales, &linear.scales);
                    let name = format!("scales, {what} ({equal})");
                    cases.near(&scales, &wide(&linear.scales), 1e-5, &name);
                    match step {
                        1 => {
                            there.snapshot().unwrap();
                            kept = (latents, scales);
                        }
                        3 => {
                            // The processor goes on from exactly what is there.
                            (linear.latents, linear.scales) = (latents, scales);
                        }
                        _ => {}
                    }
                }
                // What a checkpoint gets.
                let weight = rounded_on(&gpu, &there, dtype);
                cases.same(
                    &weight,
                    &linear.weight(dtype),
                    &format!("trained weight, {what}"),
                );
                let layer = there.layer().unwrap();
                let codes = linear.grids().codes(&linear.latents);
                cases.same(&layer.codes, &codes, &format!("codes, {what}"));
                let stored: Vec<f16> = (linear.scales.iter())
                    .map(|&scale| f16::from_f32(stored_scale(scale)))
                    .collect();
                cases.same(&layer.scales, &stored, &format!("stored scales, {what}"));
                cases.same(&layer.zeros, &linear.layer.zeros, &format!("zeros, {what}"));
                cases.same(&layer.g_idx, &g_idx, &format!("groups, {what}"));
                let clamped = (codes.iter())
                    .filter(|&&code| code == 0 || u32::from(code) == bits.max_code())
                    .count();
                cases.check(clamped > 0, &format!("{clamped} codes at the ends, {what}"));
                if !kept.0.is_empty() {
                    there.restore().unwrap();
                    let name = format!("latents put back, {what}");
                    cases.same(&there.latents().unwrap(), &kept.0, &name);
                    let name = format!("scales put back, {what}");
                    cases.same(&there.trained_scales().unwrap(), &kept.1, &name);
                }
                there.end_training();
            }
        }
    }
    cases.end();
}

/// The gradient of its weight takes more memory than there is for it at a time.
#[test]
fn a_large_weight_is_trained_for_some_outputs_after_the_other() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("large");
    let (k, n, last, rows, dtype) = (8192, 8256, 100, 16, Dtype::F16);
    let g_idx: Vec<u32> = (0..k as u32).map(|channel| channel * 5 % 3).collect();
    let whole = Linear::new(Bits::Four, k, n, g_idx.clone());
    // The last outputs by themselves: outputs do not know each other.
    let first = n - last;
    let part = |x: &[f32]| super::columns(x, n, first..n);
    let narrow_layer = SolvedLayer {
        out_features: last,
        codes: vec![0; k * last],
        scales: super::columns(&whole.layer.scales, n, first..n),
        zeros: super::columns(&whole.layer.zeros, n, first..n),
        ..whole.layer.clone()
    };
    let mut all = DeviceLatents::new(&gpu, &whole.layer, &whole.latents).unwrap();
    let mut few = DeviceLatents::new(&gpu, &narrow_layer, &part(&whole.latents)).unwrap();
    let mut random = Random(9);
    let [x, dy] =
        [k, n].map(|width| upload(&gpu, dtype, &wide(&quarters(&mut random, rows * width))));
    let (x, dy) = (matrix(&x, dtype, rows, k), matrix(&dy, dtype, rows, n));
    for step in 0..2 {
        all.step(&[(x, dy)], RATES, step).unwrap();
        few.step(&[(x, dy.column_range(first..n))], RATES, step)
            .unwrap();
    }
    let latents = all.latents().unwrap();
    let moved = latents
        .iter()
        .zip(&whole.latents)
        .filter(|(a, b)| a != b)
        .count();
    cases.check(
        moved > k * n / 3,
        &format!("{moved} of {} latents moved", k * n),
    );
    cases.same(
        &part(&latents),
        &few.latents().unwrap(),
        "latents of the last outputs",
    );
    let scales = all.trained_scales().unwrap();
    cases.same(
        &part(&scales),
        &few.trained_scales().unwrap(),
        "their scales",
    );
    cases.end();
}

#[test]
fn two_runs_train_alike() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("again");
    let (k, n, rows) = (1096, 520, 2048);
    let g_idx: Vec<u32> = (0..k as u32).map(|channel| channel * 3 % 9).collect();
    for dtype in BOTH {
        let linear = Linear::new(Bits::Four, k, n, g_idx.clone());
        let mut random = Random(3);
        let [x, dy] = [k, n].map(|width| {
            upload(
                &gpu,
                dtype,
                &super::values(&mut random, dtype, rows * width),
            )
        });
        let (x, dy) = (matrix(&x, dtype, rows, k), matrix(&dy, dtype, rows, n));
        let run = || {
            let mut there = DeviceLatents::new(&gpu, &linear.layer, &linear.latents).unwrap();
            for step in 0..5 {
                there.step(&[(x, dy), (x, dy)], RATES, step).unwrap();
            }
            [there.latents().unwrap(), there.trained_scales().unwrap()]
        };
        let [once, again] = [run(), run()];
        for (name, (once, again)) in ["latents", "scales"].iter().zip(once.iter().zip(&again)) {
            cases.same(again, once, &format!("{name}, {dtype}"));
        }
    }
    cases.end();
}

#[test]
fn latents_follow_codes() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("codes");
    for bits in Bits::ALL {
        for (k, n, g_idx) in shapes() {
            let linear = Linear::new(bits, k, n, g_idx);
            let what = names(&linear, Dtype::F32);
            let there = DeviceLatents::new(&gpu, &linear.layer, &linear.latents).unwrap();
            let mut codes = linear.grids().codes(&linear.latents);
            cases.same(
                &there.codes().unwrap(),
                &codes,
                &format!("of latents, {what}"),
            );
            for round in 0..2 {
                let mut want = there.latents().unwrap();
                linear.grids().move_to_codes(&mut want, &codes);
                let on_device = Buffer::from_host(&gpu, &codes).unwrap();
                there.move_to_codes(&on_device).unwrap();
                let got = there.latents().unwrap();
                cases.same(&got, &want, &format!("moved, {what}, round {round}"));
                cases.same(&there.codes().unwrap(), &codes, &format!("codes, {what}"));
                if round == 0 {
                    cases.same(&got, &linear.latents, &format!("nothing to move, {what}"));
                }
                for (at, code) in codes.iter_mut().enumerate() {
                    *code = (at * 31 % (bits.max_code() as usize + 1)) as u8;
                }
            }
        }
    }
    cases.end();
}
