//! Coordinate descent against plain sums in f64: what a pass may not do, and where passes end.

#[path = "../../../tests/support/random.rs"]
mod random;

use gptq_quantizer::{ActivationSink, Activations, Factor, Hessian, HessianSum, descend, solve};
use gptq_types::{Bits, ColumnOrder, GroupSize, QuantSpec, SolvedLayer};

use random::Random;

const TOKENS: usize = 300;

/// A Hessian of channels that share a direction, and a weight `[k, n]`.
fn problem(k: usize, n: usize) -> (Hessian, Vec<f32>) {
    let mut random = Random::new((k * 31 + n) as u64);
    let size: Vec<f32> = (0..k).map(|_| (0.6 * random.normal()).exp()).collect();
    let mut x = Vec::new();
    for _ in 0..TOKENS {
        let shared = random.normal();
        x.extend(size.iter().map(|s| s * (random.normal() + 0.8 * shared)));
    }
    let mut sum = HessianSum::new(k);
    sum.observe(Activations::Host(&x), TOKENS, k);
    let weight = (0..k * n).map(|_| random.normal() * 0.05).collect();
    (sum.finish().unwrap(), weight)
}

fn spec(bits: Bits, group_size: GroupSize, order: ColumnOrder) -> QuantSpec {
    QuantSpec {
        bits,
        group_size,
        order,
        full_range: true,
        ..QuantSpec::published()
    }
}

/// The damped Hessian `[k, k]` in f64, as the factor has it.
fn damped(hessian: &Hessian, factor: &Factor) -> Vec<f64> {
    let k = hessian.features();
    let mut h: Vec<f64> = hessian.values().iter().map(|&x| f64::from(x)).collect();
    for (&channel, &value) in factor.order.channels.iter().zip(&factor.importance) {
        h[channel * k + channel] = f64::from(value);
    }
    h
}

/// `H E` and, of each output, `E^T H E`, with `E = weight - dequantized`.
fn gradient(h: &[f64], weight: &[f32], layer: &SolvedLayer) -> (Vec<f64>, Vec<f64>) {
    let (k, n) = (layer.in_features, layer.out_features);
    let q = layer.dequantize();
    let e: Vec<f64> = (weight.iter().zip(&q))
        .map(|(w, q)| f64::from(*w) - f64::from(*q))
        .collect();
    let (mut gradient, mut errors) = (vec![0.0; k * n], vec![0.0; n]);
    for i in 0..k {
        for j in 0..k {
            for c in 0..n {
                gradient[i * n + c] += h[i * k + j] * e[j * n + c];
            }
        }
        for c in 0..n {
            errors[c] += e[i * n + c] * gradient[i * n + c];
        }
    }
    (gradient, errors)
}

#[test]
fn no_output_gets_worse_and_no_code_of_the_end_can_be_bettered() {
    let settings = [
        (96, GroupSize::Channels(32), ColumnOrder::Natural),
        (96, GroupSize::Channels(32), ColumnOrder::ActOrder),
        (
            100,
            GroupSize::Channels(64),
            ColumnOrder::ActOrderStaticGroups,
        ), // a short last group
        (300, GroupSize::None, ColumnOrder::GroupAware), // cut into blocks
    ];
    let n = 150; // two panels
    for (k, group_size, order) in settings {
        let (hessian, weight) = problem(k, n);
        for (bits, sym) in [(Bits::Two, true), (Bits::Three, false), (Bits::Four, true)] {
            let mut spec = spec(bits, group_size, order);
            spec.sym = sym;
            let factor = Factor::new(&hessian, &spec).unwrap();
            let h = damped(&hessian, &factor);
            let swept = solve(&weight, n, &factor, &spec).unwrap().layer;
            let (_, before) = gradient(&h, &weight, &swept);
            let mut layer = swept.clone();
            descend(&mut layer, &weight, &hessian, &factor, 1);
            let (_, once) = gradient(&h, &weight, &layer);
            descend(&mut layer, &weight, &hessian, &factor, 15);
            let (gradient, after) = gradient(&h, &weight, &layer);
            for c in 0..n {
                let room = 1e-5 * before[c];
                assert!(once[c] <= before[c] + room && after[c] <= once[c] + room);
            }
            let total = |errors: &[f64]| errors.iter().sum::<f64>();
            assert!(
                total(&once) < 0.998 * total(&before),
                "{bits} bits, {order:?}: {} of {}",
                total(&once),
                total(&before)
            );
            assert_eq!((&layer.zeros, &layer.g_idx), (&swept.zeros, &swept.g_idx));
            assert_no_code_can_be_bettered(&layer, &h, &gradient);
        }
    }
}

/// Moving one code by a step `d` changes the error, a quadratic function, by `d^2 H_ii - 2 d (H E)_i`
/// (in f64).
fn assert_no_code_can_be_bettered(layer: &SolvedLayer, h: &[f64], gradient: &[f64]) {
    let (k, n) = (layer.in_features, layer.out_features);
    let mut better = 0;
    for i in 0..k {
        for c in 0..n {
            let grid = layer.g_idx[i] as usize * n + c;
            let scale = layer.scales[grid].to_f64();
            let code = i64::from(layer.codes[i * n + c]);
            for new in [code - 1, code + 1] {
                if (0..=i64::from(layer.bits.max_code())).contains(&new) {
                    let d = (new - code) as f64 * scale;
                    let change = d * (d * h[i * k + i] - 2.0 * gradient[i * n + c]);
                    better += usize::from(change < -1e-3 * d * d * h[i * k + i]);
                }
            }
        }
    }
    // Sixteen passes do not settle the last few.
    assert!(better * 1000 <= k * n, "{better} of {} codes", k * n);
}

#[test]
fn scales_are_least_squares_on_their_codes() {
    let (k, n) = (96, 20);
    let (hessian, weight) = problem(k, n);
    let spec = spec(Bits::Three, GroupSize::Channels(32), ColumnOrder::Natural);
    let factor = Factor::new(&hessian, &spec).unwrap();
    let h = damped(&hessian, &factor);
    let mut layer = solve(&weight, n, &factor, &spec).unwrap().layer;
    let begun = layer.scales.clone();
    descend(&mut layer, &weight, &hessian, &factor, 16);
    assert_ne!(layer.scales, begun);
    let (gradient, _) = gradient(&h, &weight, &layer);
    for group in 0..k / 32 {
        for c in 0..n {
            let steps = |i: usize| {
                let zero = f64::from(layer.zeros[group * n + c]);
                f64::from(layer.codes[(group * 32 + i) * n + c]) - zero
            };
            let along: f64 = (0..32)
                .map(|i| steps(i) * gradient[(group * 32 + i) * n + c])
                .sum();
            let mut curvature = 0.0;
            for i in 0..32 {
                for j in 0..32 {
                    curvature += steps(i) * steps(j) * h[(group * 32 + i) * k + group * 32 + j];
                }
            }
            let scale = layer.scales[group * n + c].to_f64();
            let off = (along / curvature / scale).abs();
            // f16 has eleven bits, and groups after this one have moved since.
            assert!(off < 2e-3, "group {group}, output {c}: {off}");
        }
    }
}

#[test]
fn the_same_for_any_number_of_threads() {
    let (k, n) = (128, 300);
    let (hessian, weight) = problem(k, n);
    let spec = spec(Bits::Four, GroupSize::Channels(64), ColumnOrder::ActOrder);
    let factor = Factor::new(&hessian, &spec).unwrap();
    let swept = solve(&weight, n, &factor, &spec).unwrap().layer;
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let mut layer = swept.clone();
        let descend = || descend(&mut layer, &weight, &hessian, &factor, 2);
        pool.build().unwrap().install(descend);
        layer
    };
    let (one, three) = (with(1), with(3));
    assert_eq!(one, three);
    assert_ne!(one, swept);
}
