//! Inputs that linears before have changed: the target of the sweep and the measure of its error, against
//! plain loops in f64 over the rows themselves.

use gptq_quantizer::{
    ActivationSink, Activations, After, Factor, GroupSum, HessianSum, HostGroup, Outputs, Weight,
    round_to_nearest, solve,
};
use gptq_types::{Bits, ColumnOrder, GroupSize, LossMeasure, PhaseTimes, QuantSpec};

const K: usize = 96;
const N: usize = 24;
const TOKENS: usize = 400;

struct Random(u64);

impl Random {
    fn normal(&mut self) -> f32 {
        let mut uniform = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
            self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..12).map(|_| uniform()).sum::<f32>() - 6.0
    }
}

/// Rows of the float model, the same rows a little off in a way that channels share, and a weight `[K, N]`.
struct Problem {
    float: Vec<f32>,
    x: Vec<f32>,
    weight: Vec<f32>,
}

fn problem() -> Problem {
    let mut random = Random(11);
    let (mut float, mut x) = (Vec::new(), Vec::new());
    for _ in 0..TOKENS {
        let shared = random.normal();
        let row: Vec<f32> = (0..K).map(|_| random.normal() + 0.5 * shared).collect();
        let off = (0..K).map(|k| row[k] + 0.1 * random.normal() - 0.2 * row[(k * 7) % K]);
        x.extend(off);
        float.extend(row);
    }
    let weight = (0..K * N).map(|_| random.normal() * 0.05).collect();
    Problem { float, x, weight }
}

fn spec(bits: Bits, order: ColumnOrder, input_mismatch: f64) -> QuantSpec {
    QuantSpec {
        bits,
        order,
        group_size: GroupSize::Channels(32),
        full_range: true,
        input_mismatch,
        ..QuantSpec::published()
    }
}

fn sum(p: &Problem) -> HessianSum {
    let mut sum = HessianSum::beside_float(K);
    // In two batches, as tokens arrive.
    for rows in [0..150, 150..TOKENS] {
        let part = |x: &'_ [f32]| x[rows.start * K..rows.end * K].to_vec();
        let (x, float) = (part(&p.x), part(&p.float));
        let (x, float) = (Activations::Host(&x), Activations::Host(&float));
        sum.observe_pair(x, float, rows.len(), K);
    }
    sum
}

/// `2 / tokens |a W - b Q|^2`.
fn difference(a: &[f32], w: &[f32], b: &[f32], q: &[f32]) -> f64 {
    let product = |x: &[f32], w: &[f32], row: usize, n: usize| -> f64 {
        (0..K)
            .map(|k| f64::from(x[row * K + k]) * f64::from(w[k * N + n]))
            .sum()
    };
    let mut sum = 0.0;
    for row in 0..TOKENS {
        for n in 0..N {
            sum += (product(a, w, row, n) - product(b, q, row, n)).powi(2);
        }
    }
    2.0 * sum / TOKENS as f64
}

#[test]
fn the_error_is_that_of_the_outputs_of_the_float_model() {
    let p = problem();
    let hessian = sum(&p).finish().unwrap();
    let outputs = Outputs::new(&hessian, &p.weight, N);
    for bits in [Bits::Two, Bits::Four, Bits::Eight] {
        let layer = round_to_nearest(&p.weight, N, &spec(bits, ColumnOrder::Natural, 0.5)).unwrap();
        let want = difference(&p.float, &p.weight, &p.x, &layer.dequantize());
        let got = outputs.error(&layer);
        assert!((got / want - 1.0).abs() < 1e-4, "{got} against {want}");
    }
    let zero = vec![0.0; K * N];
    let want = difference(&p.float, &p.weight, &p.x, &zero);
    assert!((outputs.signal() / want - 1.0).abs() < 1e-4);
}

/// At 8 bits nearly nothing is lost by rounding, so that all of the way leads to the least squares.
#[test]
fn all_of_the_way_is_the_weight_of_least_squares() {
    let p = problem();
    let hessian = sum(&p).finish().unwrap();
    let outputs = Outputs::new(&hessian, &p.weight, N);
    for order in [ColumnOrder::Natural, ColumnOrder::ActOrder] {
        let error = |input_mismatch: f64| {
            let spec = QuantSpec {
                damp_percent: 1e-4,
                ..spec(Bits::Eight, order, input_mismatch)
            };
            let mut stage = Box::new(HostGroup::beside_float(K));
            let (x, float) = (Activations::Host(&p.x), Activations::Host(&p.float));
            stage.observe_pair(x, float, TOKENS, K);
            let mut times = PhaseTimes::default();
            let hessian = stage.finish(&mut times).unwrap();
            let solver = hessian.factor(&spec, &mut times).unwrap();
            let weight = Weight::Host(p.weight.clone());
            let rounded = solver
                .round(weight, N, &spec, After::Replace, &mut times)
                .unwrap();
            assert_eq!(rounded.loss.measure, spec.measure());
            let layer = rounded.layer.finish().unwrap();
            assert!((outputs.error(&layer) / rounded.loss.error - 1.0).abs() < 1e-6);
            (rounded.loss.error, layer)
        };
        let (none, _) = error(0.0);
        let (half, _) = error(0.5);
        let (whole, layer) = error(1.0);
        assert!(whole < half && half < none, "{none} {half} {whole}");
        // A step from the least of a quadratic function costs its square: a quarter at half the way.
        assert!((half - whole) / (none - whole) < 0.26);
        // No direction leads further down: X~^T (X W - X~ Q) vanishes but for rounding and damping.
        let q = layer.dequantize();
        let gradient = |w: &[f32], k: usize, n: usize| -> f64 {
            (0..TOKENS)
                .map(|row| {
                    let dot = |x: &[f32], w: &[f32]| -> f64 {
                        (0..K)
                            .map(|i| f64::from(x[row * K + i]) * f64::from(w[i * N + n]))
                            .sum()
                    };
                    f64::from(p.x[row * K + k]) * (dot(&p.float, &p.weight) - dot(&p.x, w))
                })
                .sum()
        };
        let length = |w: &[f32]| -> f64 {
            let at = (0..K).map(|k| (k, k % N));
            at.map(|(k, n)| gradient(w, k, n).powi(2))
                .sum::<f64>()
                .sqrt()
        };
        let (before, after) = (length(&p.weight), length(&q));
        assert!(after < 0.1 * before, "{after} against {before}");
    }
}

#[test]
fn half_of_the_way_lowers_the_error_at_every_width_and_in_every_order() {
    let p = problem();
    let hessian = sum(&p).finish().unwrap();
    for bits in Bits::ALL {
        for order in [
            ColumnOrder::Natural,
            ColumnOrder::ActOrder,
            ColumnOrder::ActOrderStaticGroups,
            ColumnOrder::GroupAware,
        ] {
            let plain = spec(bits, order, 0.0);
            let factor = Factor::new(&hessian, &plain).unwrap();
            let outputs = Outputs::new(&hessian, &p.weight, N);
            let without = solve(&p.weight, N, &factor, &plain).unwrap();
            let aimed = factor.aimed(&p.weight, outputs.output_mismatch().unwrap(), 0.5, N);
            let with = solve(&aimed, N, &factor, &plain).unwrap();
            let (before, after) = (outputs.error(&without.layer), outputs.error(&with.layer));
            assert!(after < before, "{bits} {order:?}: {after} against {before}");
        }
    }
    assert_eq!(
        spec(Bits::Four, ColumnOrder::Natural, 0.5).measure(),
        LossMeasure::FloatOutputs
    );
}

/// Tokens that are held out for a choice end in the same sums: errors are those of a run that holds none.
#[test]
fn held_out_tokens_are_squared_like_all_others() {
    let p = problem();
    let spec = spec(Bits::Four, ColumnOrder::Natural, 0.5);
    let loss = |stage: HostGroup| {
        let mut stage = Box::new(stage);
        for batch in 0..48 {
            // Later batches differ more: which of them are squared shows.
            let off = 1.0 + batch as f32 / 400.0;
            let float: Vec<f32> = (p.float.iter().zip(&p.x))
                .map(|(float, x)| x + off * (float - x))
                .collect();
            let (x, float) = (Activations::Host(&p.x), Activations::Host(&float));
            stage.observe_pair(x, float, TOKENS, K);
        }
        let mut times = PhaseTimes::default();
        let mut hessian = stage.finish(&mut times).unwrap();
        let weight = || Weight::Host(p.weight.clone());
        let orders = [gptq_quantizer::Order::new(
            spec.order,
            spec.group_size,
            &hessian.diagonal(),
        )];
        hessian
            .choose(&orders, &[(weight(), N)], &spec, &mut times)
            .unwrap();
        let solver = hessian.factor(&spec, &mut times).unwrap();
        solver
            .round(weight(), N, &spec, After::Replace, &mut times)
            .unwrap()
            .loss
    };
    let (all, some) = (
        loss(HostGroup::beside_float(K)),
        loss(HostGroup::beside_float(K).holding_out()),
    );
    assert!(
        (some.error / all.error - 1.0).abs() < 1e-4,
        "{some:?} {all:?}"
    );
    assert!((some.signal / all.signal - 1.0).abs() < 1e-4);
}

/// A float stream does not follow all tokens.
#[test]
fn rows_without_a_partner_count_in_the_hessian_alone() {
    let p = problem();
    let mut sum = sum(&p);
    sum.observe(Activations::Host(&p.x), TOKENS, K);
    let (twice, once) = (sum.finish().unwrap(), self::sum(&p).finish().unwrap());
    assert_eq!((twice.tokens(), once.tokens()), (2 * TOKENS, TOKENS));
    let zero = vec![0.0; K * N];
    let signal = |hessian| Outputs::new(hessian, &p.weight, N).signal();
    // Observing the same rows twice changes no mean.
    assert!((signal(&twice) / signal(&once) - 1.0).abs() < 1e-4);
    let exact = difference(&p.float, &p.weight, &p.x, &zero);
    assert!((signal(&twice) / exact - 1.0).abs() < 1e-4);
}
