//! The linears that share one input, on whatever device the input is: first a sum over tokens,
//! then a factor for each setting, then a solution for each linear.

use std::time::{Duration, Instant};

use gptq_kernels::{ActivationSink, Activations, Weight};
use gptq_types::{LayerLoss, LossMeasure, Phase, PhaseTimes, QuantSpec, SolvedLayer};

use crate::trained::{HostTrained, TrainedLinear};
use crate::{
    Factor, Hessian, HessianSum, Order, Outputs, QuantizeError, Solved, descend, output_error,
    round_to_nearest, solve,
};

/// The sum while tokens arrive.
pub trait GroupSum: ActivationSink {
    /// Time spent in it so far, so that the forward pass can be timed without it.
    fn elapsed(&mut self) -> Result<Duration, QuantizeError>;

    /// The Hessian, checked; adds the time to `times`.
    fn finish(
        self: Box<Self>,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn GroupHessian>, QuantizeError>;
}

/// `H` of a capture group, to be factored under one setting or several.
pub trait GroupHessian {
    /// The diagonal `[K]`, which determines column orders.
    fn diagonal(&self) -> Vec<f32>;

    /// Index of the order with the least error on held-out tokens, summed over the first outputs of
    /// `linears`, pairs of weights and their number of outputs; `None` without held-out tokens. Afterwards
    /// these tokens are part of `H`.
    fn choose(
        &mut self,
        orders: &[Order],
        linears: &[(Weight<'_>, usize)],
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Option<usize>, QuantizeError>;

    /// Damps and factors in `order`; adds the time to `times`.
    fn factor_in(
        &self,
        order: Order,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn GroupSolver + '_>, QuantizeError>;

    /// Damps and factors in the order of the spec.
    fn factor(
        &self,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn GroupSolver + '_>, QuantizeError> {
        let order = Order::new(spec.order, spec.group_size, &self.diagonal());
        self.factor_in(order, spec, times)
    }
}

/// The fate of a float weight after rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// The rounded weight replaces it, so that later groups see the error.
    Replace,
    /// Likewise, and latents and scales are trained before the codes are known.
    Train,
    /// The float weight is kept for other settings.
    Keep,
}

/// Statistics of a capture group's factor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FactorStats {
    /// Tokens that went into the Hessian.
    pub tokens: usize,
    /// Share of the mean diagonal that was added in the end.
    pub damp_used: f64,
    /// Failed factorizations before.
    pub escalations: u32,
    /// Channels that were zero on every token.
    pub dead_channels: usize,
}

impl FactorStats {
    /// The loss of a linear that the factor rounded.
    pub(crate) fn loss(
        &self,
        measure: LossMeasure,
        error: f64,
        rtn_error: f64,
        signal: f64,
    ) -> LayerLoss {
        LayerLoss {
            measure,
            error,
            rtn_error,
            signal,
            damp_used: self.damp_used,
            damp_escalations: self.escalations,
            dead_channels: self.dead_channels,
        }
    }
}

/// A rounded layer whose codes and grids may still be downloading. Calling it waits, on any thread.
pub type PendingLayer = Box<dyn FnOnce() -> Result<SolvedLayer, QuantizeError> + Send>;

/// What a linear was rounded to.
pub enum RoundedLayer {
    /// Codes and grids.
    Final(PendingLayer),
    /// Latents and scales, with [`After::Train`].
    Trained(Box<dyn TrainedLinear>),
}

impl RoundedLayer {
    /// Codes and grids as they are now.
    pub fn finish(self) -> Result<SolvedLayer, QuantizeError> {
        match self {
            RoundedLayer::Final(pending) => pending(),
            RoundedLayer::Trained(trained) => trained.finish(),
        }
    }
}

/// A rounded linear.
pub struct Rounded {
    /// Codes and grids, or what they will be made of.
    pub layer: RoundedLayer,
    /// The error of the rounding.
    pub loss: LayerLoss,
    /// The dequantized weight `[in_features, out_features]`, for the groups that follow. None where the
    /// weight stays, and where the rounded one was written over it on a GPU.
    pub replacement: Option<Vec<f32>>,
}

/// Solves linears with the factor that they share.
pub trait GroupSolver {
    /// Statistics of the factor.
    fn stats(&self) -> FactorStats;

    /// Rounds one linear; adds the time of the sweep and of measuring to `times`.
    fn round(
        &self,
        weight: Weight<'_>,
        out_features: usize,
        spec: &QuantSpec,
        after: After,
        times: &mut PhaseTimes,
    ) -> Result<Rounded, QuantizeError>;
}

/// A Cholesky factorization and a triangular inverse, a third of `K^3` each.
pub(crate) fn factor_flop(features: usize) -> f64 {
    2.0 / 3.0 * (features as f64).powi(3)
}

/// The trailing updates of a sweep, a product with the Hessian for each pass of descent, and the three
/// products that measure what they did.
pub(crate) fn count(
    times: &mut PhaseTimes,
    in_features: usize,
    out_features: usize,
    spec: &QuantSpec,
) {
    let square = (in_features as f64).powi(2) * out_features as f64;
    let passes = f64::from(spec.descent_passes);
    times.add_flop(Phase::Sweep, square * (1.0 + 2.0 * passes));
    times.add_flop(Phase::Measure, 6.0 * square);
}

/// One batch in eight is held out if an order is to be chosen: the second one, so that few batches are enough.
const HELD_OUT: usize = 1;

/// Whether the batch with index `batch` is held out.
pub(crate) fn is_held_out(batch: usize) -> bool {
    batch % 8 == HELD_OUT
}

/// Outputs by which an order is chosen: a share of all, which are as many samples as there are weights.
pub(crate) fn outputs_of_a_trial(outputs: usize) -> usize {
    (outputs / 8).max(32).min(outputs)
}

/// A capture group on the processor.
pub struct HostGroup {
    sum: HessianSum,
    held_out: Option<HessianSum>,
    batches: usize,
    elapsed: Duration,
}

impl HostGroup {
    /// For linears of `features` input channels.
    pub fn new(features: usize) -> Self {
        HostGroup {
            sum: HessianSum::new(features),
            held_out: None,
            batches: 0,
            elapsed: Duration::ZERO,
        }
    }

    /// For linears that are shown pairs of quantized and float rows.
    pub fn beside_float(features: usize) -> Self {
        HostGroup {
            sum: HessianSum::beside_float(features),
            ..Self::new(features)
        }
    }

    /// Holds some batches out for [`GroupHessian::choose`].
    pub fn holding_out(mut self) -> Self {
        self.held_out = Some(self.sum.another());
        self
    }

    /// Tokens so far, held out or not.
    fn tokens(&self) -> usize {
        self.sum.tokens() + self.held_out.as_ref().map_or(0, HessianSum::tokens)
    }

    /// The sum that the next batch belongs to.
    fn next(&mut self) -> &mut HessianSum {
        self.batches += 1;
        match &mut self.held_out {
            Some(held_out) if is_held_out(self.batches - 1) => held_out,
            _ => &mut self.sum,
        }
    }
}

impl ActivationSink for HostGroup {
    fn observe(&mut self, x: Activations<'_>, tokens: usize, in_features: usize) {
        let start = Instant::now();
        self.next().observe(x, tokens, in_features);
        self.elapsed += start.elapsed();
    }

    fn observe_pair(
        &mut self,
        x: Activations<'_>,
        float: Activations<'_>,
        tokens: usize,
        in_features: usize,
    ) {
        let start = Instant::now();
        let seen = self.tokens();
        (self.next()).observe_pair_at(seen, x, float, tokens, in_features);
        self.elapsed += start.elapsed();
    }
}

impl GroupSum for HostGroup {
    fn elapsed(&mut self) -> Result<Duration, QuantizeError> {
        Ok(self.elapsed)
    }

    fn finish(
        self: Box<Self>,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn GroupHessian>, QuantizeError> {
        let HostGroup { sum, held_out, .. } = *self;
        let hessian = times.time(Phase::Hessian, || sum.finish())?;
        let held_out = match held_out {
            Some(sum) if sum.tokens() > 0 => Some(times.time(Phase::Hessian, || sum.finish())?),
            _ => None,
        };
        Ok(Box::new(HostHessian { hessian, held_out }))
    }
}

struct HostHessian {
    hessian: Hessian,
    held_out: Option<Hessian>,
}

impl HostHessian {
    /// Error on the held-out tokens of the first outputs of `linears`, solved in `order`.
    fn error_held_out(
        &self,
        held_out: &Hessian,
        order: &Order,
        linears: &[(Weight<'_>, usize)],
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<f64, QuantizeError> {
        let solver = self.solver(order.clone(), spec, times)?;
        let mut error = 0.0;
        for (weight, outputs) in linears {
            let part = outputs_of_a_trial(*outputs);
            let weight: Vec<f32> = (host(weight).chunks_exact(*outputs))
                .flat_map(|row| &row[..part])
                .copied()
                .collect();
            let before = Outputs::new(&self.hessian, &weight, part);
            let solved =
                times.time(Phase::Sweep, || solver.solved(&weight, &before, part, spec))?;
            error += times.time(Phase::Measure, || {
                output_error(held_out, &weight, &solved.layer)
            });
        }
        Ok(error)
    }

    fn solver(
        &self,
        order: Order,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<HostSolver<'_>, QuantizeError> {
        times.add_flop(Phase::Factor, factor_flop(self.hessian.features()));
        let factor = times.time(Phase::Factor, || {
            Factor::in_order(&self.hessian, order, spec.damp_percent)
        })?;
        Ok(HostSolver {
            hessian: &self.hessian,
            factor,
        })
    }
}

impl GroupHessian for HostHessian {
    fn diagonal(&self) -> Vec<f32> {
        self.hessian.diagonal()
    }

    fn choose(
        &mut self,
        orders: &[Order],
        linears: &[(Weight<'_>, usize)],
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Option<usize>, QuantizeError> {
        let Some(held_out) = self.held_out.take() else {
            return Ok(None);
        };
        let errors = (orders.iter())
            .map(|order| self.error_held_out(&held_out, order, linears, spec, times))
            .collect::<Result<Vec<f64>, _>>()?;
        self.hessian.merge(&held_out);
        Ok(least(&errors))
    }

    fn factor_in(
        &self,
        order: Order,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn GroupSolver + '_>, QuantizeError> {
        Ok(Box::new(self.solver(order, spec, times)?))
    }
}

/// The place of the first of the smallest.
pub(crate) fn least(errors: &[f64]) -> Option<usize> {
    let places = errors.iter().enumerate();
    (places.min_by(|(_, a), (_, b)| a.total_cmp(b))).map(|(at, _)| at)
}

fn host<'a>(weight: &'a Weight<'_>) -> &'a [f32] {
    let Weight::Host(weight) = weight else {
        unreachable!("a decoder on the processor has its weights in host memory");
    };
    weight
}

struct HostSolver<'a> {
    hessian: &'a Hessian,
    factor: Factor,
}

impl HostSolver<'_> {
    /// Aims, sweeps and descends as the spec says.
    fn solved(
        &self,
        weight: &[f32],
        outputs: &Outputs<'_>,
        out_features: usize,
        spec: &QuantSpec,
    ) -> Result<Solved, QuantizeError> {
        let alpha = spec.input_mismatch as f32;
        let aimed = (outputs.output_mismatch()).map(|output_mismatch| {
            self.factor
                .aimed(weight, output_mismatch, alpha, out_features)
        });
        let aim = aimed.as_deref().unwrap_or(weight);
        let mut solved = solve(aim, out_features, &self.factor, spec)?;
        if spec.descent_passes != 0 {
            let layer = &mut solved.layer;
            descend(layer, aim, self.hessian, &self.factor, spec.descent_passes);
        }
        Ok(solved)
    }
}

impl GroupSolver for HostSolver<'_> {
    fn stats(&self) -> FactorStats {
        FactorStats {
            tokens: self.hessian.tokens(),
            damp_used: self.factor.damp_used,
            escalations: self.factor.escalations,
            dead_channels: self.factor.dead_channels,
        }
    }

    fn round(
        &self,
        weight: Weight<'_>,
        out_features: usize,
        spec: &QuantSpec,
        after: After,
        times: &mut PhaseTimes,
    ) -> Result<Rounded, QuantizeError> {
        let weight = host(&weight);
        let outputs = times.time(Phase::Measure, || {
            Outputs::new(self.hessian, weight, out_features)
        });
        let solved = times.time(Phase::Sweep, || {
            self.solved(weight, &outputs, out_features, spec)
        })?;
        count(times, self.hessian.features(), out_features, spec);
        let loss = times.time(Phase::Measure, || {
            let rounded = round_to_nearest(weight, out_features, spec)?;
            Ok::<_, QuantizeError>(self.stats().loss(
                spec.measure(),
                outputs.error(&solved.layer),
                outputs.error(&rounded),
                outputs.signal(),
            ))
        })?;
        let replacement = match after {
            After::Replace | After::Train => Some(solved.layer.dequantize()),
            After::Keep => None,
        };
        let layer = match after {
            After::Train => {
                let trained = HostTrained::new(&solved.layer, solved.latents);
                RoundedLayer::Trained(Box::new(trained))
            }
            After::Replace | After::Keep => RoundedLayer::Final(Box::new(|| Ok(solved.layer))),
        };
        Ok(Rounded {
            layer,
            loss,
            replacement,
        })
    }
}
