//! A capture group on the GPU: the same steps as on the processor, on matrices that never leave it but as
//! codes.

mod sum;
mod trained;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gptq_kernels::Weight;
use gptq_kernels::cuda::{
    Buffer, CudaError, DeviceFactor, DeviceHessian, DeviceLatents, DeviceMatrix,
    DeviceOutputMismatch, Gpu, RawGridRule, SWEEP_CHANNELS, Step, SweepPlan, Swept, SweptHost,
};
use gptq_types::{Bits, Phase, PhaseTimes, QuantSpec, SolvedLayer};
use half::f16;

use trained::DeviceTrained;

pub use sum::DeviceSum;

use crate::factor::{Damping, importance};
use crate::group::{
    After, FactorStats, GroupHessian, GroupSolver, Rounded, RoundedLayer, count, factor_flop,
    least, outputs_of_a_trial,
};
use crate::search::SearchRule;
use crate::{Order, QuantizeError};

/// `H` on the GPU, and its diagonal here.
struct DeviceReady {
    gpu: Arc<Gpu>,
    hessian: DeviceHessian,
    /// The Hessian of the held-out tokens, and their number.
    held_out: Option<(DeviceHessian, usize)>,
    diagonal: Vec<f32>,
    tokens: usize,
    /// The factor made last: settings of a matrix often differ in the grid alone.
    last: RefCell<Option<Rc<Damped>>>,
}

/// A factor and what it was made with.
struct Damped {
    channels: Vec<u32>,
    damp_percent: f64,
    factor: DeviceFactor,
    stats: FactorStats,
}

impl GroupHessian for DeviceReady {
    fn diagonal(&self) -> Vec<f32> {
        self.diagonal.clone()
    }

    fn choose(
        &mut self,
        orders: &[Order],
        linears: &[(Weight<'_>, usize)],
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Option<usize>, QuantizeError> {
        let Some((held_out, more)) = self.held_out.take() else {
            return Ok(None);
        };
        let errors = (orders.iter())
            .map(|order| self.error_held_out(&held_out, order, linears, spec, times))
            .collect::<Result<Vec<f64>, _>>()?;
        self.diagonal = self.hessian.merge(self.tokens, &held_out, more)?;
        self.tokens += more;
        self.last.replace(None);
        Ok(least(&errors))
    }

    fn factor_in(
        &self,
        order: Order,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn GroupSolver + '_>, QuantizeError> {
        Ok(Box::new(self.group(order, spec, times)?))
    }
}

fn there<'a>(weight: &Weight<'a>) -> DeviceMatrix<'a> {
    let Weight::Device(there) = weight else {
        unreachable!("a decoder on the GPU has its weights there");
    };
    *there
}

impl DeviceReady {
    fn group(
        &self,
        order: Order,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<DeviceGroup<'_>, QuantizeError> {
        let start = Instant::now();
        let channels: Vec<u32> = order.channels.iter().rev().map(|&c| c as u32).collect();
        let groups: Vec<u32> = order.groups.iter().rev().copied().collect();
        let plan = SweepPlan::new(
            &self.gpu,
            &channels,
            &groups,
            spec.group_size.count(self.diagonal.len()),
            order.fixed_grids,
            steps(&order),
        )?;
        let damped = self.damped(channels, spec.damp_percent, times)?;
        times.add(Phase::Factor, start.elapsed());
        Ok(DeviceGroup {
            hessian: &self.hessian,
            damped,
            plan,
            order,
        })
    }

    /// Error on the held-out tokens of the first outputs of `linears`, solved in `order`.
    fn error_held_out(
        &self,
        held_out: &DeviceHessian,
        order: &Order,
        linears: &[(Weight<'_>, usize)],
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<f64, QuantizeError> {
        let group = self.group(order.clone(), spec, times)?;
        let start = Instant::now();
        let mut error = 0.0;
        for (weight, outputs) in linears {
            let part = there(weight).row_range(0..outputs_of_a_trial(*outputs));
            let size = spec.group_size.resolve(part.columns());
            let rule = rule(spec);
            let (_, output_mismatch) = self.hessian.rounding_cost(part, size, rule)?;
            let swept = group.swept(part, rule, output_mismatch.as_ref(), spec, None)?;
            let (_, output_mismatch) = held_out.rounding_cost(part, size, rule)?;
            let copy = self.gpu.copied(part)?;
            let copy = copy.matrix([part.rows(), part.columns()], part.dtype());
            error += held_out.write_back(copy, &swept, &group.plan, output_mismatch.as_ref())?;
        }
        times.add(Phase::Sweep, start.elapsed());
        Ok(error)
    }

    /// The factor for `channels`, in reversed processing order; the last one where it serves again.
    fn damped(
        &self,
        channels: Vec<u32>,
        damp_percent: f64,
        times: &mut PhaseTimes,
    ) -> Result<Rc<Damped>, QuantizeError> {
        let serves =
            |last: &Rc<Damped>| last.channels == channels && last.damp_percent == damp_percent;
        if let Some(last) = self.last.take().filter(serves) {
            self.last.replace(Some(last.clone()));
            return Ok(last);
        }
        times.add_flop(Phase::Factor, factor_flop(self.diagonal.len()));
        let damping = Damping::new(&self.diagonal);
        let attempt = |share| {
            let added = damping.added(&self.diagonal, share);
            let rows = channels.iter().map(|&channel| channel as usize);
            let weights = importance(rows, &self.diagonal, &added);
            match self.hessian.factor(&channels, &added, &weights) {
                Ok(factor) => Ok(Ok(factor)),
                Err(CudaError::NotPositive { row }) => Ok(Err(row)),
                Err(error) => Err(error.into()),
            }
        };
        let (factor, damp_used, escalations) = damping.escalate(damp_percent, attempt)?;
        let damped = Rc::new(Damped {
            channels,
            damp_percent,
            factor,
            stats: FactorStats {
                tokens: self.tokens,
                damp_used,
                escalations,
                dead_channels: damping.dead_channels,
            },
        });
        self.last.replace(Some(damped.clone()));
        Ok(damped)
    }
}

/// The factor of `H` and the order of the sweep, on the GPU.
struct DeviceGroup<'a> {
    hessian: &'a DeviceHessian,
    damped: Rc<Damped>,
    plan: SweepPlan,
    order: Order,
}

/// Blocks of the sweep as the processor cuts them, counted from the other end.
fn steps(order: &Order) -> Vec<Step> {
    let k = order.channels.len();
    let rows = |first: usize, last: usize| (k - last, k - first);
    let mut steps = Vec::new();
    let mut first = 0;
    while first < k {
        let last = order.block_end(first, SWEEP_CHANNELS);
        let begins = !order.fixed_grids && order.begins_group(first);
        let fit_inside = begins && order.group_end(first) <= last;
        if begins && !fit_inside {
            let (begin, end) = rows(first, order.group_end(first));
            steps.push(Step::Fit {
                group: order.groups[first] as usize,
                first: begin,
                count: end - begin,
            });
        }
        let (begin, end) = rows(first, last);
        steps.push(Step::Sweep {
            first: begin,
            last: end,
            fit_inside,
        });
        first = last;
    }
    steps
}

fn rule(spec: &QuantSpec) -> RawGridRule {
    let search = SearchRule::new(spec);
    RawGridRule {
        max_code: spec.bits.max_code() as f32,
        min_zero: spec.min_zero() as f32,
        min_share: search.least,
        sym: spec.sym.into(),
        full_range: spec.full_range.into(),
        shares: search.shares as i32,
        variants: search.ways as i32,
    }
}

impl DeviceGroup<'_> {
    /// Aims, sweeps and descends as the spec says; in `latents` stays what the sweep rounded.
    fn swept(
        &self,
        weight: DeviceMatrix,
        rule: RawGridRule,
        output_mismatch: Option<&DeviceOutputMismatch>,
        spec: &QuantSpec,
        latents: Option<&Buffer>,
    ) -> Result<Swept, CudaError> {
        let aim =
            output_mismatch.map(|output_mismatch| (output_mismatch, spec.input_mismatch as f32));
        let target = match spec.descent_passes {
            0 => None,
            _ => Some(self.hessian.target(weight.rows())?),
        };
        let (factor, plan) = (&self.damped.factor, &self.plan);
        let swept = factor.sweep(weight, plan, rule, aim, target.as_deref(), latents)?;
        if let Some(target) = target {
            let passes = spec.descent_passes;
            self.hessian
                .descend(factor, &swept, plan, &target, rule, passes)?;
        }
        Ok(swept)
    }
}

impl GroupSolver for DeviceGroup<'_> {
    fn stats(&self) -> FactorStats {
        self.damped.stats
    }

    fn round(
        &self,
        weight: Weight<'_>,
        out_features: usize,
        spec: &QuantSpec,
        after: After,
        times: &mut PhaseTimes,
    ) -> Result<Rounded, QuantizeError> {
        let shown = there(&weight);
        let copy = match after {
            After::Replace | After::Train => None,
            After::Keep => Some(self.hessian.gpu().copied(shown)?),
        };
        let there = match &copy {
            None => shown,
            Some(copy) => copy.matrix([shown.rows(), shown.columns()], shown.dtype()),
        };
        assert_eq!(there.rows(), out_features, "out_features of the weight");
        let size = spec.group_size.resolve(there.columns());
        let rule = rule(spec);
        count(times, there.columns(), out_features, spec);
        let (cost, output_mismatch) = times.time(Phase::Measure, || {
            self.hessian.rounding_cost(there, size, rule)
        })?;
        let output_mismatch = output_mismatch.as_ref();
        let start = Instant::now();
        let gpu = self.hessian.gpu();
        let latents = match after {
            After::Train => Some(Buffer::new(gpu, 4 * out_features * there.columns())?),
            After::Replace | After::Keep => None,
        };
        let begin = gpu.mark()?;
        let swept = self.swept(there, rule, output_mismatch, spec, latents.as_ref())?;
        let end = gpu.mark()?;
        let download = match after {
            After::Train => None,
            After::Replace | After::Keep => Some(swept.start_download()?),
        };
        let error = (self.hessian).write_back(there, &swept, &self.plan, output_mismatch)?;
        if let Some(download) = &download {
            download.order_after(gpu)?;
        }
        let sweep = Duration::from_secs_f64(begin.seconds_to(&end)?);
        times.add(Phase::Sweep, sweep);
        times.add(Phase::Measure, start.elapsed().saturating_sub(sweep));
        let (bits, g_idx) = (spec.bits, self.order.g_idx());
        let layer = match (latents, download) {
            (Some(latents), _) => {
                let latents = DeviceLatents::from_swept(&swept, &self.plan, latents, bits)?;
                RoundedLayer::Trained(Box::new(DeviceTrained::new(gpu, latents)))
            }
            (None, download) => {
                let download = download.expect("started above");
                RoundedLayer::Final(Box::new(move || {
                    layer(download.receive()?, bits, g_idx, out_features)
                }))
            }
        };
        Ok(Rounded {
            layer,
            loss: (self.stats()).loss(spec.measure(), error, cost.rtn_error, cost.signal),
            replacement: None,
        })
    }
}

fn layer(
    swept: SweptHost,
    bits: Bits,
    g_idx: Vec<u32>,
    out_features: usize,
) -> Result<SolvedLayer, QuantizeError> {
    if let Some(at) = swept.scales.iter().position(|scale| !scale.is_finite()) {
        return Err(QuantizeError::ScaleOverflow {
            group: at / out_features,
            scale: swept.scales[at],
        });
    }
    let to_half = |&scale: &f32| f16::from_f32(scale);
    Ok(SolvedLayer {
        bits,
        in_features: g_idx.len(),
        out_features,
        codes: swept.codes,
        scales: swept.scales.iter().map(to_half).collect(),
        zeros: swept.zeros.iter().map(|&zero| zero as u16).collect(),
        g_idx,
    })
}

#[cfg(test)]
mod tests {
    use gptq_types::{ColumnOrder, GroupSize};

    use super::*;

    fn steps_of(k: usize, size: GroupSize, order: ColumnOrder) -> Vec<Step> {
        let diagonal: Vec<f32> = (0..k).map(|i| i as f32 + 1.0).collect();
        steps(&Order::new(order, size, &diagonal))
    }

    #[test]
    fn every_row_is_swept_once_from_the_last_to_the_first() {
        for (k, size) in [(172, 64), (172, 16), (11008, 128), (600, 256), (300, 136)] {
            let size = GroupSize::Channels(size);
            for order in [
                ColumnOrder::Natural,
                ColumnOrder::ActOrder,
                ColumnOrder::ActOrderStaticGroups,
                ColumnOrder::GroupAware,
            ] {
                let mut next = k;
                for step in steps_of(k, size, order) {
                    if let Step::Sweep { first, last, .. } = step {
                        assert_eq!(last, next);
                        assert!(last - first <= SWEEP_CHANNELS && last > first);
                        next = first;
                    }
                }
                assert_eq!(next, 0);
            }
        }
    }

    #[test]
    fn a_group_longer_than_a_sweep_is_fitted_before_its_first_row() {
        let steps = steps_of(300, GroupSize::None, ColumnOrder::Natural);
        let fit = Step::Fit {
            group: 0,
            first: 0,
            count: 300,
        };
        assert_eq!(steps[0], fit);
        assert_eq!(
            steps
                .iter()
                .filter(|step| matches!(step, Step::Fit { .. }))
                .count(),
            1
        );
        let short = steps_of(172, GroupSize::Channels(64), ColumnOrder::Natural);
        let whole = |first, last| Step::Sweep {
            first,
            last,
            fit_inside: true,
        };
        assert_eq!(short, [whole(44, 172), whole(0, 44)]);
        // The rest of a long group is not swept together with the short one after it.
        let mixed = steps_of(172, GroupSize::Channels(136), ColumnOrder::Natural);
        assert!(mixed.contains(&Step::Sweep {
            first: 36,
            last: 44,
            fit_inside: false
        }));
        assert_eq!(mixed.last(), Some(&whole(0, 36)));
    }
}
