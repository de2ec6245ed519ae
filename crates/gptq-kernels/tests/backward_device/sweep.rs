//! What the sweep keeps of a weight for training.

use std::sync::Arc;

use gptq_kernels::TrainedGrids;
use gptq_kernels::cuda::{
    Buffer, DeviceFactor, DeviceHessian, DeviceLatents, Gpu, RawGridRule, SWEEP_CHANNELS, Step,
    SweepPlan, Swept, SweptHost,
};
use gptq_types::{Bits, Dtype};

use super::common::{Random, gpu};
use super::{BOTH, Cases, matrix, upload, values};

const OUTPUTS: usize = 75;

#[derive(Clone, Copy, Debug)]
enum Groups {
    /// Of so many channels, formed in the order of the sweep.
    Channels(usize),
    /// The same in stored order, fitted beforehand.
    Fixed(usize),
    /// All channels.
    One,
}

/// The group of each stored channel too.
fn plan(gpu: &Arc<Gpu>, order: &[u32], groups: Groups) -> (SweepPlan, Vec<u32>) {
    let k = order.len();
    let size = match groups {
        Groups::Channels(size) | Groups::Fixed(size) => size,
        Groups::One => k,
    };
    let is_fixed = matches!(groups, Groups::Fixed(_));
    let mut g_idx = vec![0; k];
    for (place, &channel) in order.iter().enumerate() {
        let of = if is_fixed { channel as usize } else { place };
        g_idx[channel as usize] = (of / size) as u32;
    }
    let mut steps = Vec::new();
    if matches!(groups, Groups::One) {
        steps.push(Step::Fit {
            group: 0,
            first: 0,
            count: k,
        });
    }
    steps.extend((0..k).step_by(SWEEP_CHANNELS).map(|first| Step::Sweep {
        first: k - k.min(first + SWEEP_CHANNELS),
        last: k - first,
        fit_inside: matches!(groups, Groups::Channels(_)),
    }));
    let channels: Vec<u32> = order.iter().rev().copied().collect();
    let of_rows: Vec<u32> = channels
        .iter()
        .map(|&channel| g_idx[channel as usize])
        .collect();
    let count = k.div_ceil(size);
    let plan = SweepPlan::new(gpu, &channels, &of_rows, count, is_fixed, steps).unwrap();
    (plan, g_idx)
}

fn rule(bits: Bits, is_searched: bool) -> RawGridRule {
    RawGridRule {
        max_code: bits.max_code() as f32,
        min_zero: 1.0,
        min_share: 0.55,
        sym: i32::from(!is_searched || bits == Bits::Two),
        full_range: i32::from(is_searched),
        shares: if is_searched { 20 } else { 1 },
        variants: if is_searched { 2 } else { 1 },
    }
}

/// A Hessian of correlated rows, and its factor in an order.
fn factored(gpu: &Arc<Gpu>, dtype: Dtype, order: &[u32]) -> (DeviceHessian, DeviceFactor) {
    let (k, rows) = (order.len(), 400);
    let mut random = Random(k as u64);
    let x = values(&mut random, dtype, rows * k);
    let x: Vec<f64> = (0..rows * k)
        .map(|at| x[at] + 0.7 * x[at / k * k + (at % k) / 2])
        .collect();
    let x = upload(gpu, dtype, &x);
    let mut hessian = DeviceHessian::new(gpu, k).unwrap();
    hessian.add(matrix(&x, dtype, rows, k)).unwrap();
    let diagonal = hessian.finish(2.0 / rows as f32).unwrap();
    let mean = f64::from(diagonal.iter().sum::<f32>()) / k as f64;
    let reversed: Vec<u32> = order.iter().rev().copied().collect();
    let factor = hessian.factor(&reversed, &vec![0.01 * mean; k], &vec![1.0; k]);
    (hessian, factor.unwrap())
}

#[test]
fn latents_of_the_sweep_round_to_its_codes() {
    let Some(gpu) = gpu() else { return };
    let mut cases = Cases::new("sweep");
    for k in [172usize, 384] {
        let natural: Vec<u32> = (0..k as u32).collect();
        let act_order: Vec<u32> = (0..k).map(|place| (place * 5 % k) as u32).collect();
        for (order, name) in [(&natural, "natural"), (&act_order, "act-order")] {
            for dtype in BOTH {
                let (hessian, factor) = factored(&gpu, dtype, order);
                for groups in [Groups::Channels(64), Groups::Fixed(32), Groups::One] {
                    let (plan, g_idx) = plan(&gpu, order, groups);
                    let sweeping = Sweeping {
                        hessian: &hessian,
                        factor: &factor,
                        plan: &plan,
                        g_idx: &g_idx,
                        first: order[0] as usize,
                        dtype,
                    };
                    for bits in Bits::ALL {
                        for is_searched in [false, true] {
                            let what = format!(
                                "{dtype}, {} bits, {k} channels, {name}, {groups:?}, searched {is_searched}",
                                bits.width()
                            );
                            let rule = rule(bits, is_searched);
                            check(&gpu, &mut cases, &sweeping, bits, rule, &what);
                        }
                    }
                }
            }
        }
    }
    cases.end();
}

/// What linears of a capture group are swept with.
struct Sweeping<'a> {
    hessian: &'a DeviceHessian,
    factor: &'a DeviceFactor,
    plan: &'a SweepPlan,
    g_idx: &'a [u32],
    /// The channel that is rounded first.
    first: usize,
    dtype: Dtype,
}

fn check(
    gpu: &Arc<Gpu>,
    cases: &mut Cases,
    swept: &Sweeping,
    bits: Bits,
    rule: RawGridRule,
    what: &str,
) {
    let Sweeping {
        hessian,
        factor,
        plan,
        g_idx,
        first,
        dtype,
    } = *swept;
    let k = g_idx.len();
    let mut random = Random(5);
    let weight = upload(gpu, dtype, &values(&mut random, dtype, OUTPUTS * k));
    let weight = matrix(&weight, dtype, OUTPUTS, k);
    let host = |swept: &Swept| -> SweptHost { swept.start_download().unwrap().receive().unwrap() };
    let without = host(&factor.sweep(weight, plan, rule, None, None, None).unwrap());
    let latents = Buffer::from_host(gpu, &vec![f32::NAN; k * OUTPUTS]).unwrap();
    let target = hessian.target(OUTPUTS).unwrap();
    let kept = factor.sweep(weight, plan, rule, None, Some(&target), Some(&latents));
    let Some(swept) = cases.ok(kept, what) else {
        return;
    };
    let with = host(&swept);
    let same =
        with.codes == without.codes && with.scales == without.scales && with.zeros == without.zeros;
    cases.check(
        same,
        &format!("codes and grids with latents as without, {what}"),
    );
    let own: Vec<f32> = latents.to_host(k * OUTPUTS).unwrap();
    let grids = TrainedGrids {
        bits,
        out_features: OUTPUTS,
        scales: &with.scales,
        zeros: &with.zeros,
        g_idx,
    };
    cases.same(
        &grids.codes(&own),
        &with.codes,
        &format!("codes of latents, {what}"),
    );
    // Nothing was passed on to the first channel.
    let shown = gpu.download(weight).unwrap();
    let of_weight: Vec<f32> = shown.chunks_exact(k).map(|row| row[first]).collect();
    let name = format!("latents of the first channel, {what}");
    cases.same(&own[first * OUTPUTS..][..OUTPUTS], &of_weight, &name);

    hessian
        .descend(factor, &swept, plan, &target, rule, 2)
        .unwrap();
    let after = host(&swept);
    let moved = after
        .codes
        .iter()
        .zip(&with.codes)
        .filter(|(a, b)| a != b)
        .count();
    let mut want = own;
    let grids = TrainedGrids {
        scales: &after.scales,
        zeros: &after.zeros,
        ..grids
    };
    grids.move_to_codes(&mut want, &after.codes);
    let trained = DeviceLatents::from_swept(&swept, plan, latents, bits);
    let Some(trained) = cases.ok(trained, what) else {
        return;
    };
    let name = format!("latents after the descent ({moved} codes moved), {what}");
    cases.same(&trained.latents().unwrap(), &want, &name);
    let layer = trained.layer().unwrap();
    cases.same(
        &layer.codes,
        &after.codes,
        &format!("codes after the descent, {what}"),
    );
    cases.same(&layer.g_idx, g_idx, &format!("groups, {what}"));
    let scales: Vec<f32> = layer.scales.iter().map(|scale| scale.to_f32()).collect();
    cases.same(
        &scales,
        &after.scales,
        &format!("scales after the descent, {what}"),
    );
}
