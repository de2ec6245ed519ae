//! The linears that share one input, on whatever device the input is: first a sum over tokens,
//! then a factor for each setting, then a solution for each linear.

use std::time::{Duration, Instant};

use gptq_types::{
    ActivationSink, Activations, LayerLoss, LossMeasure, Phase, PhaseTimes, QuantSpec, SolvedLayer,
    Weight,
};

use crate::{
    Factor, Hessian, HessianSum, Outputs, QuantizeError, descend, round_to_nearest, solve,
};

/// The sum while tokens arrive.
pub trait StageSum: ActivationSink {
    /// Time spent in it so far, so that the forward pass can be timed without it.
    fn elapsed(&mut self) -> Result<Duration, QuantizeError>;

    /// The Hessian, checked; adds the time to `times`.
    fn finish(
        self: Box<Self>,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn StageHessian>, QuantizeError>;
}

/// `H` of a stage, to be factored under one setting or several.
pub trait StageHessian {
    /// Damps and factors; adds the time to `times`.
    fn factor(
        &self,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn StageSolver + '_>, QuantizeError>;

    /// A weight to round in the place of `weight`, which stays as it is: rounding overwrites what
    /// lies on a GPU. Valid until the next call.
    fn copied(&self, weight: Weight) -> Result<Weight, QuantizeError>;
}

/// What a factor says about its stage.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Facts {
    /// Tokens that went into the Hessian.
    pub tokens: usize,
    /// Share of the mean diagonal that was added in the end.
    pub damp_used: f64,
    /// Failed factorisations before.
    pub escalations: u32,
    /// Channels that were zero on every token.
    pub dead_channels: usize,
}

impl Facts {
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

/// Codes and grids that may still be on their way: waits for them, on any thread.
pub type Arriving = Box<dyn FnOnce() -> Result<SolvedLayer, QuantizeError> + Send>;

/// A rounded linear.
pub struct Rounded {
    /// Codes and grids.
    pub layer: Arriving,
    /// What the rounding cost.
    pub loss: LayerLoss,
    /// The dequantised weight, for the stages that follow.
    pub weight: Weight,
}

/// Solves linears with the factor that they share.
pub trait StageSolver {
    /// About the factor.
    fn facts(&self) -> Facts;

    /// Rounds one linear; adds the time of the sweep and of measuring to `times`.
    fn round(
        &self,
        weight: Weight,
        out_features: usize,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Rounded, QuantizeError>;
}

/// A Cholesky factorisation and a triangular inverse, a third of `K^3` each.
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

/// A stage on the processor.
pub struct HostStage {
    sum: HessianSum,
    elapsed: Duration,
}

impl HostStage {
    /// For linears of `features` input channels.
    pub fn new(features: usize) -> Self {
        HostStage {
            sum: HessianSum::new(features),
            elapsed: Duration::ZERO,
        }
    }

    /// The same, shown pairs of rows.
    pub fn beside_float(features: usize) -> Self {
        HostStage {
            sum: HessianSum::beside_float(features),
            elapsed: Duration::ZERO,
        }
    }
}

impl ActivationSink for HostStage {
    fn observe(&mut self, x: Activations<'_>, tokens: usize, in_features: usize) {
        let start = Instant::now();
        self.sum.observe(x, tokens, in_features);
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
        self.sum.observe_pair(x, float, tokens, in_features);
        self.elapsed += start.elapsed();
    }
}

impl StageSum for HostStage {
    fn elapsed(&mut self) -> Result<Duration, QuantizeError> {
        Ok(self.elapsed)
    }

    fn finish(
        self: Box<Self>,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn StageHessian>, QuantizeError> {
        let hessian = times.time(Phase::Hessian, || self.sum.finish())?;
        Ok(Box::new(HostHessian(hessian)))
    }
}

struct HostHessian(Hessian);

impl StageHessian for HostHessian {
    fn factor(
        &self,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Box<dyn StageSolver + '_>, QuantizeError> {
        let factor = times.time(Phase::Factor, || Factor::new(&self.0, spec))?;
        times.add_flop(Phase::Factor, factor_flop(self.0.features()));
        Ok(Box::new(HostSolver {
            hessian: &self.0,
            factor,
        }))
    }

    fn copied(&self, weight: Weight) -> Result<Weight, QuantizeError> {
        Ok(weight) // the decoder showed a copy
    }
}

struct HostSolver<'a> {
    hessian: &'a Hessian,
    factor: Factor,
}

impl StageSolver for HostSolver<'_> {
    fn facts(&self) -> Facts {
        Facts {
            tokens: self.hessian.tokens(),
            damp_used: self.factor.damp_used,
            escalations: self.factor.escalations,
            dead_channels: self.factor.dead_channels,
        }
    }

    fn round(
        &self,
        weight: Weight,
        out_features: usize,
        spec: &QuantSpec,
        times: &mut PhaseTimes,
    ) -> Result<Rounded, QuantizeError> {
        let Weight::Host(weight) = weight else {
            unreachable!("a decoder on the processor has its weights in host memory");
        };
        let outputs = times.time(Phase::Measure, || {
            Outputs::new(self.hessian, &weight, out_features)
        });
        let solved = times.time(Phase::Sweep, || {
            let alpha = spec.input_mismatch as f32;
            let aimed = (outputs.carried())
                .map(|carried| self.factor.aimed(&weight, carried, alpha, out_features));
            let aim = aimed.as_ref().unwrap_or(&weight);
            let mut solved = solve(aim, out_features, &self.factor, spec)?;
            if spec.descent_passes != 0 {
                let layer = &mut solved.layer;
                descend(layer, aim, self.hessian, &self.factor, spec.descent_passes);
            }
            Ok::<_, QuantizeError>(solved)
        })?;
        count(times, self.hessian.features(), out_features, spec);
        let loss = times.time(Phase::Measure, || {
            let rounded = round_to_nearest(&weight, out_features, spec)?;
            Ok::<_, QuantizeError>(self.facts().loss(
                spec.measure(),
                outputs.error(&solved.layer),
                outputs.error(&rounded),
                outputs.signal(),
            ))
        })?;
        Ok(Rounded {
            weight: Weight::Host(solved.layer.dequantise()),
            layer: Box::new(|| Ok(solved.layer)),
            loss,
        })
    }
}
