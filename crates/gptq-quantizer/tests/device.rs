//! The solver on the GPU against the solver on the processor, over every setting. Skipped by name
//! where there is no GPU.
#![cfg(feature = "cuda")]
#![allow(clippy::print_stderr)]

#[path = "../../../tests/support/data.rs"]
mod data;

use std::sync::Arc;

use gptq_kernels::cuda::{Buffer, DeviceMatrix, Gpu};
use gptq_quantizer::{
    ActivationSink, Activations, After, DeviceSum, GroupSum, HostGroup, QuantizeError, Weight,
};
use gptq_types::{
    Bits, CheckpointFormat, ColumnOrder, Dtype, GroupSize, LayerLoss, PhaseTimes, QuantSpec,
    SolvedLayer,
};
use half::f16;

/// Sums in another order put codes on a rounding boundary elsewhere; what they cost stays.
const RELATIVE_ERROR_TOLERANCE: f64 = 5e-3;

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

/// Inputs `[tokens, k]` and a weight `[n, k]`, both exact in f16.
struct Problem {
    k: usize,
    n: usize,
    tokens: usize,
    x: Vec<f16>,
    /// The rows of a float stream, a little off.
    float: Vec<f16>,
    weight: Vec<f16>,
}

fn problem(k: usize, n: usize, tokens: usize) -> Problem {
    let mut random = Random(k as u64 * 31 + n as u64);
    let size: Vec<f32> = (0..k).map(|_| (random.normal() * 0.8).exp()).collect();
    let mut x = Vec::with_capacity(tokens * k);
    for _ in 0..tokens {
        let shared = random.normal();
        x.extend(
            size.iter()
                .map(|s| f16::from_f32(s * (random.normal() + 0.7 * shared))),
        );
    }
    let float = (x.iter())
        .map(|x| f16::from_f32(x.to_f32() * (1.0 + 0.05 * random.normal())))
        .collect();
    let weight = (0..n * k)
        .map(|_| f16::from_f32(random.normal() * 0.05))
        .collect();
    Problem {
        k,
        n,
        tokens,
        x,
        float,
        weight,
    }
}

fn gpu() -> Option<Arc<Gpu>> {
    match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            data::skipped(data::Cause::Machine, &format!("a GPU ({error})"));
            None
        }
    }
}

fn matrix(buffer: &Buffer, rows: usize, columns: usize) -> DeviceMatrix<'_> {
    buffer.matrix([rows, columns], Dtype::F16)
}

/// Rows that the forward pass left on the GPU.
fn rows(buffer: &Buffer, rows: usize, columns: usize) -> Activations<'_> {
    Activations::Device(matrix(buffer, rows, columns))
}

/// A linear that has arrived.
struct Arrived {
    layer: SolvedLayer,
    loss: LayerLoss,
}

type Solved = Result<(Arrived, gptq_quantizer::FactorStats), QuantizeError>;

fn on_device(gpu: &Arc<Gpu>, p: &Problem, spec: &QuantSpec) -> Solved {
    let mut times = PhaseTimes::default();
    let x = Buffer::from_host(gpu, &p.x)?;
    let weight = Buffer::from_host(gpu, &p.weight)?;
    let beside_float = spec.input_mismatch != 0.0;
    let float = Buffer::from_host(gpu, &p.float)?;
    let mut sum = Box::new(DeviceSum::new(gpu, p.k, beside_float, false)?);
    let [x, float] = [&x, &float].map(|x| rows(x, p.tokens, p.k));
    match beside_float {
        true => sum.observe_pair(x, float, p.tokens, p.k),
        false => sum.observe(x, p.tokens, p.k),
    }
    let hessian = sum.finish(&mut times)?;
    let solver = hessian.factor(spec, &mut times)?;
    let there = Weight::Device(matrix(&weight, p.n, p.k));
    // A weight that is kept stays as it is.
    let beside = solver.round(there.clone(), p.n, spec, After::Keep, &mut times)?;
    assert_eq!(weight.to_host::<f16>(p.n * p.k)?, p.weight);
    let rounded = solver.round(there, p.n, spec, After::Replace, &mut times)?;
    // On the GPU it is written over, or was a copy.
    assert!(beside.replacement.is_none() && rounded.replacement.is_none());
    let layer = rounded.layer.finish()?;
    assert_eq!(layer, beside.layer.finish()?);
    // Later stages see the dequantized weights of the file.
    let put_back: Vec<f16> = weight.to_host(p.n * p.k)?;
    let dequantized = layer.dequantize();
    for (n, row) in put_back.chunks(p.k).enumerate() {
        for (k, value) in row.iter().enumerate() {
            assert_eq!(
                *value,
                f16::from_f32(dequantized[k * p.n + n]),
                "weight [{k}, {n}]"
            );
        }
    }
    let loss = rounded.loss;
    Ok((Arrived { layer, loss }, solver.stats()))
}

/// The weight as the processor has it, `[k, n]`.
fn input_major(p: &Problem) -> Vec<f32> {
    let mut weight = vec![0.0; p.n * p.k];
    for (n, row) in p.weight.chunks(p.k).enumerate() {
        for (k, value) in row.iter().enumerate() {
            weight[k * p.n + n] = value.to_f32();
        }
    }
    weight
}

fn on_host(p: &Problem, spec: &QuantSpec) -> Solved {
    let mut times = PhaseTimes::default();
    let x: Vec<f32> = p.x.iter().map(|x| x.to_f32()).collect();
    let weight = input_major(p);
    let mut sum = Box::new(HostGroup::beside_float(p.k));
    match spec.input_mismatch == 0.0 {
        true => {
            sum = Box::new(HostGroup::new(p.k));
            sum.observe(Activations::Host(&x), p.tokens, p.k);
        }
        false => {
            let float: Vec<f32> = p.float.iter().map(|x| x.to_f32()).collect();
            let (x, float) = (Activations::Host(&x), Activations::Host(&float));
            sum.observe_pair(x, float, p.tokens, p.k);
        }
    }
    let hessian = sum.finish(&mut times)?;
    let solver = hessian.factor(spec, &mut times)?;
    let weight = Weight::Host(weight);
    let rounded = solver.round(weight, p.n, spec, After::Keep, &mut times)?;
    let arrived = Arrived {
        layer: rounded.layer.finish()?,
        loss: rounded.loss,
    };
    Ok((arrived, solver.stats()))
}

fn close(got: f64, want: f64, what: &str) {
    let difference = (got / want - 1.0).abs();
    assert!(
        difference < RELATIVE_ERROR_TOLERANCE,
        "{what}: {got} against {want}"
    );
}

const ORDERS: [ColumnOrder; 4] = [
    ColumnOrder::Natural,
    ColumnOrder::ActOrder,
    ColumnOrder::ActOrderStaticGroups,
    ColumnOrder::GroupAware,
];

#[test]
fn the_gpu_rounds_as_well_as_the_processor_for_every_setting() {
    let Some(gpu) = gpu() else { return };
    for (k, n) in [(172, 43), (320, 130), (600, 96)] {
        let p = problem(k, n, 2 * k);
        for bits in Bits::ALL {
            for group in [
                GroupSize::Channels(16),
                GroupSize::Channels(64),
                GroupSize::Channels(136),
                GroupSize::None,
            ] {
                for order in ORDERS {
                    for (sym, scale_search, full_range, input_mismatch, descent_passes) in [
                        (true, true, false, 0.0, 0),
                        (true, false, false, 0.0, 0),
                        (false, true, false, 0.0, 0),
                        (false, false, false, 0.0, 0),
                        (true, true, true, 0.0, 0),
                        (false, true, true, 0.0, 0),
                        (true, true, true, 0.5, 0),
                        (false, true, true, 0.5, 0),
                        (true, true, true, 0.5, 2),
                        (false, true, true, 0.0, 2),
                    ] {
                        let spec = QuantSpec {
                            bits,
                            group_size: group,
                            order,
                            sym,
                            scale_search,
                            full_range,
                            input_mismatch,
                            descent_passes,
                            ..QuantSpec::published()
                        };
                        let what = format!("{k}x{n} {spec:?}");
                        let (device, _) = on_device(&gpu, &p, &spec).expect(&what);
                        let (host, _) = on_host(&p, &spec).expect(&what);
                        // At 8 bits a handful of codes on a boundary decide; and a code that moved or
                        // not leads a descent to another end.
                        let slack = match (bits, descent_passes) {
                            (Bits::Eight, _) => 2.0,
                            (_, 0) => 1.0,
                            _ => 3.0,
                        };
                        let (got, want) = (device.loss.error, host.loss.error);
                        assert!(
                            (got / want - 1.0).abs() < RELATIVE_ERROR_TOLERANCE * slack,
                            "{what}: {got} against {want}"
                        );
                        close(device.loss.rtn_error, host.loss.rtn_error, &what);
                        close(device.loss.signal, host.loss.signal, &what);
                        assert_eq!(device.layer.g_idx, host.layer.g_idx, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn two_runs_give_the_same_codes() {
    let Some(gpu) = gpu() else { return };
    let p = problem(704, 200, 3000);
    let spec = QuantSpec::published();
    let (first, _) = on_device(&gpu, &p, &spec).unwrap();
    let (second, _) = on_device(&gpu, &p, &spec).unwrap();
    assert_eq!(first.layer, second.layer);
}

/// Batches held out are chosen by alike, and end in the same Hessian.
#[test]
fn an_order_is_chosen_as_on_the_processor() {
    let Some(gpu) = gpu() else { return };
    let p = problem(320, 256, 1600);
    let (rows, batches) = (p.tokens / 8, 0..8usize);
    for (input_mismatch, descent_passes) in [(0.0, 0), (0.5, 2)] {
        let spec = QuantSpec {
            bits: Bits::Three,
            group_size: GroupSize::Channels(64),
            full_range: true,
            input_mismatch,
            descent_passes,
            ..QuantSpec::published()
        };
        let beside_float = input_mismatch != 0.0;
        let mut times = PhaseTimes::default();
        let mut there = DeviceSum::new(&gpu, p.k, beside_float, true).unwrap();
        let mut here = match beside_float {
            true => HostGroup::beside_float(p.k).holding_out(),
            false => HostGroup::new(p.k).holding_out(),
        };
        for batch in batches.clone() {
            let part = |x: &[f16]| x[batch * rows * p.k..(batch + 1) * rows * p.k].to_vec();
            let (x, float) = (part(&p.x), part(&p.float));
            let on_gpu = [&x, &float].map(|x| Buffer::from_host(&gpu, x).unwrap());
            let [x, float] = [x, float].map(|x| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
            let [seen, seen_float] = [0, 1].map(|at| self::rows(&on_gpu[at], rows, p.k));
            let (x, float) = (Activations::Host(&x), Activations::Host(&float));
            if beside_float {
                there.observe_pair(seen, seen_float, rows, p.k);
                here.observe_pair(x, float, rows, p.k);
            } else {
                there.observe(seen, rows, p.k);
                here.observe(x, rows, p.k);
            }
        }
        let mut there = Box::new(there).finish(&mut times).unwrap();
        let mut here = Box::new(here).finish(&mut times).unwrap();
        let orders = |diagonal: &[f32]| {
            [
                ColumnOrder::Natural,
                ColumnOrder::ActOrder,
                ColumnOrder::GroupAware,
            ]
            .map(|order| gptq_quantizer::Order::new(order, spec.group_size, diagonal))
        };
        let weight = Buffer::from_host(&gpu, &p.weight).unwrap();
        let on_gpu = [(Weight::Device(matrix(&weight, p.n, p.k)), p.n)];
        let on_host = [(Weight::Host(input_major(&p)), p.n)];
        let chosen = there.choose(&orders(&there.diagonal()), &on_gpu, &spec, &mut times);
        let want = here.choose(&orders(&here.diagonal()), &on_host, &spec, &mut times);
        assert_eq!(chosen.unwrap(), want.unwrap());
        for (got, want) in there.diagonal().iter().zip(here.diagonal()) {
            assert!((got / want - 1.0).abs() < 1e-3, "{got} against {want}");
        }
        assert_eq!(weight.to_host::<f16>(p.n * p.k).unwrap(), p.weight);
        assert!(
            there
                .choose(&[], &on_gpu, &spec, &mut times)
                .unwrap()
                .is_none()
        );
    }
}

#[test]
fn dead_channels_and_singular_hessians_are_counted_alike() {
    let Some(gpu) = gpu() else { return };
    let mut p = problem(160, 40, 60); // fewer tokens than channels
    for row in p.x.chunks_mut(160) {
        row[5] = f16::ZERO;
        row[77] = f16::ZERO;
    }
    for format in [CheckpointFormat::Gptq, CheckpointFormat::GptqV2] {
        let spec = QuantSpec {
            format,
            ..QuantSpec::published()
        };
        let (device, device_facts) = on_device(&gpu, &p, &spec).unwrap();
        let (host, host_facts) = on_host(&p, &spec).unwrap();
        assert_eq!(device_facts, host_facts);
        assert_eq!(device_facts.dead_channels, 2);
        close(device.loss.error, host.loss.error, "singular");
    }
    // Damping so small that the matrix is singular to f64 precision.
    let spec = QuantSpec {
        damp_percent: 1e-18,
        ..QuantSpec::published()
    };
    let (_, device_facts) = on_device(&gpu, &p, &spec).unwrap();
    let (_, host_facts) = on_host(&p, &spec).unwrap();
    assert!(device_facts.escalations > 0, "{device_facts:?}");
    assert!(host_facts.escalations > 0, "{host_facts:?}");
}

#[test]
fn an_activation_that_overflowed_is_named() {
    let Some(gpu) = gpu() else { return };
    let mut p = problem(64, 32, 100);
    p.x[3 * 64 + 17] = f16::INFINITY;
    let error = on_device(&gpu, &p, &QuantSpec::published()).err().unwrap();
    assert!(
        matches!(error, QuantizeError::NotFinite { channel: 17, .. }),
        "{error}"
    );
}
