//! The blocked f32 solver against the plain f64 reference, over every setting.

use gptq_quantizer::{
    ActivationSink, Activations, Factor, Hessian, HessianSum, output_error, reference,
    round_to_nearest, solve,
};
use gptq_types::{Bits, CheckpointFormat, ColumnOrder, GroupSize, Method, QuantSpec};

/// Both solvers see the same problem; where two codes or two grids are equally good the reference
/// follows the solver.
const RELATIVE_ERROR_TOLERANCE: f64 = 1e-3;

const ORDERS: [ColumnOrder; 4] = [
    ColumnOrder::Natural,
    ColumnOrder::ActOrder,
    ColumnOrder::ActOrderStaticGroups,
    ColumnOrder::GroupAware,
];

struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 24) as f32
    }

    fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.uniform()).sum::<f32>() - 6.0
    }
}

/// Inputs with correlated channels of very different size, as layer norms leave them.
fn inputs(tokens: usize, k: usize, random: &mut Random) -> Vec<f32> {
    let size: Vec<f32> = (0..k).map(|_| (random.normal() * 0.8).exp()).collect();
    let mut x = Vec::with_capacity(tokens * k);
    for _ in 0..tokens {
        let shared = random.normal();
        x.extend(size.iter().map(|s| s * (random.normal() + 0.7 * shared)));
    }
    x
}

struct Problem {
    k: usize,
    n: usize,
    weight: Vec<f32>,
    hessian: Hessian,
}

fn problem(k: usize, n: usize, seed: u64) -> Problem {
    let mut random = Random(seed);
    let tokens = 3 * k;
    let mut sum = HessianSum::new(k);
    let x = inputs(tokens, k, &mut random);
    sum.observe(Activations::Host(&x), tokens, k);
    Problem {
        k,
        n,
        weight: (0..k * n).map(|_| random.normal() * 0.05).collect(),
        hessian: sum.finish().unwrap(),
    }
}

fn spec(bits: Bits, group_size: GroupSize, order: ColumnOrder, sym: bool) -> QuantSpec {
    QuantSpec {
        bits,
        group_size,
        order,
        sym,
        ..QuantSpec::published()
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

#[test]
fn errors_match_the_f64_reference_for_every_setting() {
    // 172 is divided by no group; 320 spans three blocks; group 200 ends inside a block.
    for (k, n, seed) in [(172, 43, 1), (320, 130, 2)] {
        let problem = problem(k, n, seed);
        for bits in Bits::ALL {
            // Blocks know nothing of widths, and the reference is slow.
            if k > 200 && bits != Bits::Four {
                continue;
            }
            for group_size in [16, 48, 128, 200]
                .map(GroupSize::Channels)
                .into_iter()
                .chain([GroupSize::None])
            {
                for order in ORDERS {
                    for sym in [true, false] {
                        let mut spec = spec(bits, group_size, order, sym);
                        check(&problem, &spec);
                        // The larger problem is for blocks, which know nothing of grids.
                        spec.full_range = k < 200;
                        if spec.full_range {
                            check(&problem, &spec);
                        }
                        (spec.scale_search, spec.full_range) = (false, false);
                        check(&problem, &spec);
                    }
                }
            }
        }
    }
}

fn check(problem: &Problem, spec: &QuantSpec) {
    let Problem {
        k,
        n,
        weight,
        hessian,
    } = problem;
    let factor = Factor::new(hessian, spec).unwrap();
    let ours = solve(weight, *n, &factor, spec).unwrap().layer;
    let (w, h) = (wide(weight), wide(hessian.values()));
    let want = reference::gptq(&w, &h, *n, spec, Some(&ours)).unwrap();
    assert_eq!(ours.g_idx, want.g_idx, "{spec:?}");
    assert_eq!((ours.in_features, ours.out_features), (*k, *n));

    let got_error = output_error(hessian, weight, &ours);
    let want_error = output_error(hessian, weight, &want);
    let relative = (got_error / want_error - 1.0).abs();
    assert!(
        relative < RELATIVE_ERROR_TOLERANCE,
        "error {got_error} against {want_error} ({relative:e}) with {spec:?}"
    );
}

#[test]
fn measured_error_is_the_definition() {
    let problem = problem(96, 20, 3);
    let spec = spec(
        Bits::Three,
        GroupSize::Channels(32),
        ColumnOrder::Natural,
        true,
    );
    let layer = round_to_nearest(&problem.weight, problem.n, &spec).unwrap();
    let got = output_error(&problem.hessian, &problem.weight, &layer);
    let want = reference::output_error(
        &wide(&problem.weight),
        &wide(problem.hessian.values()),
        &layer,
    );
    assert!((got / want - 1.0).abs() < 1e-4, "{got} against {want}");
}

#[test]
fn gptq_beats_rounding_to_nearest() {
    let problem = problem(256, 64, 4);
    for bits in Bits::ALL {
        for order in ORDERS {
            let spec = spec(bits, GroupSize::Channels(64), order, true);
            let factor = Factor::new(&problem.hessian, &spec).unwrap();
            let solved = solve(&problem.weight, problem.n, &factor, &spec).unwrap();
            let rounded = round_to_nearest(&problem.weight, problem.n, &spec).unwrap();
            let gptq = output_error(&problem.hessian, &problem.weight, &solved.layer);
            let rtn = output_error(&problem.hessian, &problem.weight, &rounded);
            assert!(gptq < rtn, "{gptq} against {rtn} with {spec:?}");
        }
    }
}

/// A search over all grids of the format costs less than one over positive scales, or over zeros that
/// follow from the scale.
#[test]
fn grids_of_the_full_range_cost_less() {
    let problem = problem(256, 64, 8);
    for bits in Bits::ALL {
        for (group_size, sym) in [
            (GroupSize::Channels(32), true),
            (GroupSize::Channels(32), false),
            (GroupSize::None, true),
        ] {
            let mut spec = spec(bits, group_size, ColumnOrder::Natural, sym);
            let mut error = |full_range| {
                spec.full_range = full_range;
                let factor = Factor::new(&problem.hessian, &spec).unwrap();
                let solved = solve(&problem.weight, problem.n, &factor, &spec).unwrap();
                let negative = solved.layer.scales.iter().any(|s| s.to_f32() < 0.0);
                assert_eq!(negative, full_range && sym);
                output_error(&problem.hessian, &problem.weight, &solved.layer)
            };
            let (before, after) = (error(false), error(true));
            // With so many codes there is next to nothing to gain.
            let before = if bits == Bits::Eight {
                before * 1.01
            } else {
                before
            };
            assert!(after < before, "{after} against {before} with {spec:?}");
        }
    }
}

#[test]
fn compensated_error_is_the_damped_trace() {
    let problem = problem(128, 32, 5);
    let spec = spec(
        Bits::Four,
        GroupSize::Channels(64),
        ColumnOrder::ActOrder,
        true,
    );
    let factor = Factor::new(&problem.hessian, &spec).unwrap();
    let solved = solve(&problem.weight, problem.n, &factor, &spec).unwrap();
    let diagonal = problem.hessian.diagonal();
    let damp = 0.1 * diagonal.iter().map(|&d| f64::from(d)).sum::<f64>() / 128.0;
    let squares: f64 = (solved.layer.dequantize().iter())
        .zip(&problem.weight)
        .map(|(q, w)| f64::from(q - w).powi(2))
        .sum();
    let undamped = output_error(&problem.hessian, &problem.weight, &solved.layer);
    let want = undamped + damp * squares;
    assert!((solved.compensated_error / want - 1.0).abs() < 1e-3);
}

#[test]
fn zeros_of_a_v1_file_are_at_least_one() {
    let mut problem = problem(64, 24, 6);
    problem.weight.iter_mut().for_each(|w| *w = w.abs());
    let mut spec = spec(
        Bits::Four,
        GroupSize::Channels(16),
        ColumnOrder::Natural,
        false,
    );
    for (format, least) in [(CheckpointFormat::Gptq, 1), (CheckpointFormat::GptqV2, 0)] {
        spec.format = format;
        let factor = Factor::new(&problem.hessian, &spec).unwrap();
        let zeros = solve(&problem.weight, problem.n, &factor, &spec)
            .unwrap()
            .layer
            .zeros;
        assert_eq!(zeros.into_iter().min(), Some(least));
    }
}

#[test]
fn rtn_codes_are_the_nearest_grid_points() {
    let problem = problem(40, 9, 7);
    let mut spec = spec(
        Bits::Four,
        GroupSize::Channels(16),
        ColumnOrder::Natural,
        true,
    );
    spec.method = Method::Rtn;
    let layer = round_to_nearest(&problem.weight, problem.n, &spec).unwrap();
    assert_eq!(layer.groups(), 3);
    for (at, (q, w)) in layer.dequantize().iter().zip(&problem.weight).enumerate() {
        let (channel, output) = (at / problem.n, at % problem.n);
        let scale = layer.scales[channel / 16 * problem.n + output].to_f32();
        // The largest positive weight lies half a step outside the symmetric grid.
        assert!(
            (q - w).abs() <= scale * 0.502,
            "{q} for {w} at scale {scale}"
        );
    }
}

#[test]
fn a_dead_channel_is_rounded_to_nearest_and_counted() {
    let (k, n) = (64, 16);
    let mut random = Random(8);
    let mut x = inputs(200, k, &mut random);
    x.iter_mut().skip(10).step_by(k).for_each(|x| *x = 0.0);
    let mut sum = HessianSum::new(k);
    sum.observe(Activations::Host(&x), 200, k);
    let hessian = sum.finish().unwrap();
    let weight: Vec<f32> = (0..k * n).map(|_| random.normal()).collect();
    // Without a search no weight lies beyond the grid.
    let spec = QuantSpec {
        scale_search: false,
        ..spec(Bits::Eight, GroupSize::None, ColumnOrder::Natural, true)
    };
    let factor = Factor::new(&hessian, &spec).unwrap();
    assert_eq!(factor.dead_channels, 1);
    let layer = solve(&weight, n, &factor, &spec).unwrap().layer;
    for output in 0..n {
        let at = 10 * n + output;
        let scale = layer.scales[output].to_f32();
        assert!((layer.dequantize()[at] - weight[at]).abs() <= scale * 0.6);
    }
}

#[test]
fn a_singular_hessian_is_damped_further_and_counted() {
    // Rank 1 and slightly indefinite, as rounding leaves it.
    let k = 8;
    let values: Vec<f32> = (0..k * k)
        .map(|at| if at == 9 { 0.9 } else { 1.0 })
        .collect();
    let hessian = Hessian::from_values(k, 1, values);
    let mut spec = spec(Bits::Four, GroupSize::None, ColumnOrder::Natural, true);
    spec.damp_percent = 0.01;
    let factor = Factor::new(&hessian, &spec).unwrap();
    assert!(factor.escalations > 0);
    assert!(factor.damp_used > 0.01);
}

#[test]
fn an_overflowed_activation_is_named() {
    let mut sum = HessianSum::new(3);
    let x = [1.0, 2.0, 3.0, 1.0, f32::INFINITY, 3.0];
    sum.observe(Activations::Host(&x), 2, 3);
    let message = sum.finish().err().unwrap().to_string();
    assert_eq!(
        message,
        "the Hessian holds inf for input channel 1: an activation overflowed"
    );
    let no_tokens = HessianSum::new(3).finish().err().unwrap().to_string();
    assert_eq!(no_tokens, "no calibration token reached the layer");
}

#[test]
fn codes_are_the_same_for_any_number_of_threads() {
    let problem = problem(192, 300, 9);
    let spec = spec(
        Bits::Four,
        GroupSize::Channels(64),
        ColumnOrder::ActOrder,
        true,
    );
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let factor = Factor::new(&problem.hessian, &spec).unwrap();
            solve(&problem.weight, problem.n, &factor, &spec)
                .unwrap()
                .layer
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

#[test]
fn searched_scales_lower_the_error() {
    let problem = problem(256, 64, 10);
    for (bits, most) in [(Bits::Two, 0.65), (Bits::Three, 0.8), (Bits::Four, 0.9)] {
        for order in ORDERS {
            for sym in [true, false] {
                let ratio = search_gain(&problem, spec(bits, GroupSize::Channels(64), order, sym));
                assert!(ratio <= most, "{ratio} with {bits} bits, {order:?}, {sym}");
            }
        }
    }
}

/// Error with the search as a share of that without.
fn search_gain(problem: &Problem, spec: QuantSpec) -> f64 {
    let error = |scale_search| {
        let spec = QuantSpec {
            scale_search,
            ..spec.clone()
        };
        let factor = Factor::new(&problem.hessian, &spec).unwrap();
        let solved = solve(&problem.weight, problem.n, &factor, &spec).unwrap();
        output_error(&problem.hessian, &problem.weight, &solved.layer)
    };
    error(true) / error(false)
}

#[test]
fn an_outlier_that_hardly_matters_is_clipped() {
    let (k, n, outlier) = (32, 12, 21);
    let mut random = Random(11);
    // One-sided: shrinking an asymmetric grid clips nothing that matters at its other end.
    let mut weight: Vec<f32> = (0..k * n).map(|_| random.normal().abs() * 0.05).collect();
    weight[outlier * n..][..n].fill(0.5);
    let mut values = vec![0.0; k * k];
    for channel in 0..k {
        values[channel * k + channel] = if channel == outlier { 1e-6 } else { 1.0 };
    }
    let hessian = Hessian::from_values(k, 1, values);
    for order in ORDERS {
        for sym in [true, false] {
            let mut spec = spec(Bits::Four, GroupSize::Channels(16), order, sym);
            spec.damp_percent = 1e-5;
            let factor = Factor::new(&hessian, &spec).unwrap();
            let group = factor.order.g_idx()[outlier] as usize;
            let mut scales = |scale_search| {
                spec.scale_search = scale_search;
                let layer = solve(&weight, n, &factor, &spec).unwrap().layer;
                layer.scales[group * n..][..n].to_vec()
            };
            let shares: Vec<f32> = (scales(true).iter().zip(scales(false)))
                .map(|(searched, largest)| searched.to_f32() / largest.to_f32())
                .collect();
            let mean = shares.iter().sum::<f32>() / n as f32;
            let clipped = shares.iter().all(|&share| share < 1.0);
            assert!(clipped && mean < 0.7, "{shares:?} with {order:?}, {sym}");
        }
    }
}

#[test]
fn without_a_search_the_codes_are_those_of_the_reference() {
    let problem = problem(96, 40, 12);
    for order in ORDERS {
        for sym in [true, false] {
            let spec = QuantSpec {
                scale_search: false,
                ..spec(Bits::Four, GroupSize::Channels(32), order, sym)
            };
            let factor = Factor::new(&problem.hessian, &spec).unwrap();
            let got = solve(&problem.weight, problem.n, &factor, &spec).unwrap();
            let (weight, hessian) = (wide(&problem.weight), wide(problem.hessian.values()));
            let want = reference::gptq(&weight, &hessian, problem.n, &spec, None).unwrap();
            assert_eq!(got.layer, want, "{spec:?}");
        }
    }
}

#[test]
fn zero_and_one_sided_groups_are_searched_too() {
    let mut problem = problem(64, 24, 13);
    let (zero, above) = problem.weight.split_at_mut(16 * 24);
    zero.fill(0.0);
    above.iter_mut().for_each(|w| *w = w.abs());
    for bits in Bits::ALL {
        for sym in [true, false] {
            let spec = spec(bits, GroupSize::Channels(16), ColumnOrder::Natural, sym);
            check(&problem, &spec);
            let factor = Factor::new(&problem.hessian, &spec).unwrap();
            let layer = solve(&problem.weight, 24, &factor, &spec).unwrap().layer;
            assert!(layer.dequantize()[..16 * 24].iter().all(|&w| w == 0.0));
        }
    }
}
