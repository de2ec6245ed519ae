//! One group of linears that share an input: from Hessian to verified bytes.

use std::time::Instant;

use gptq_model::Decoder;
use gptq_packer::{StagedCheckpoint, pack, verify_layer};
use gptq_quantizer::{Factor, Hessian, HessianSum, output_error, round_to_nearest, signal, solve};
use gptq_types::{
    ActivationSink, LayerLoss, LayerName, LayerRecord, Phase, PhaseTimes, QuantSpec, SolvedLayer,
    Stage, Warning,
};

use crate::{Job, PipelineError, Progress};

/// Collects a Hessian and the time it takes, so that the forward pass can be timed without it.
struct TimedHessian<'a> {
    sum: HessianSum,
    times: &'a mut PhaseTimes,
}

impl ActivationSink for TimedHessian<'_> {
    fn observe(&mut self, x: &[f32], tokens: usize, in_features: usize) {
        let sum = &mut self.sum;
        self.times
            .time(Phase::Hessian, || sum.observe(x, tokens, in_features));
        // A symmetric product needs half the operations of a full one.
        let flop = tokens as f64 * in_features as f64 * (in_features as f64 + 1.0);
        self.times.add_flop(Phase::Hessian, flop);
    }
}

/// Quantises the linears of a block, stage by stage.
pub struct LayerWork<'a> {
    pub spec: &'a QuantSpec,
    pub staged: &'a StagedCheckpoint,
    pub times: &'a mut PhaseTimes,
    pub all_tokens: usize,
    pub layers: Vec<LayerRecord>,
    pub warnings: Vec<Warning>,
}

impl<'a> LayerWork<'a> {
    /// Nothing done yet.
    pub fn new(job: &'a Job, staged: &'a StagedCheckpoint, times: &'a mut PhaseTimes) -> Self {
        LayerWork {
            spec: &job.spec,
            staged,
            times,
            all_tokens: job.windows.iter().map(Vec::len).sum(),
            layers: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Shows the inputs of a stage to a Hessian, solves its linears and puts them in place.
    pub fn stage(
        &mut self,
        decoder: &mut dyn Decoder,
        index: usize,
        stage: Stage,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), PipelineError> {
        let linears = decoder.config().linears(index, stage);
        let (first, in_features, _) = linears[0].clone();
        let named = |source| PipelineError::Quantize {
            layer: first.clone(),
            source,
        };
        let hessian = self.collect(decoder, stage, in_features).map_err(named)?;
        let start = Instant::now();
        let factor = Factor::new(&hessian, self.spec).map_err(named)?;
        let factor_seconds = start.elapsed().as_secs_f64() / linears.len() as f64;
        self.times.add(Phase::Factor, start.elapsed());
        self.warn_about(&hessian, &factor, &linears);

        for (layer, in_features, out_features) in linears {
            let weight = decoder.weight(&layer)?;
            let start = Instant::now();
            let quantize = |source| PipelineError::Quantize {
                layer: layer.clone(),
                source,
            };
            let solved = solve(&weight, out_features, &factor, self.spec).map_err(quantize)?;
            self.times.add(Phase::Sweep, start.elapsed());
            let solve_seconds = start.elapsed().as_secs_f64() + factor_seconds;

            let start = Instant::now();
            let rounded = round_to_nearest(&weight, out_features, self.spec).map_err(quantize)?;
            let loss = LayerLoss {
                error: output_error(&hessian, &weight, &solved.layer),
                rtn_error: output_error(&hessian, &weight, &rounded),
                signal: signal(&hessian, &weight, out_features),
                damp_used: factor.damp_used,
                damp_escalations: factor.escalations,
                dead_channels: factor.dead_channels,
            };
            self.times.add(Phase::Measure, start.elapsed());

            self.store(&layer, &solved.layer)?;
            decoder.replace_weight(&layer, solved.layer.dequantise())?;
            let record = LayerRecord {
                layer,
                in_features,
                out_features,
                tokens: hessian.tokens(),
                token_share: hessian.tokens() as f64 / self.all_tokens as f64,
                loss: Some(loss),
                solve_seconds,
            };
            if record.is_worse_than_rtn() {
                let text = "the GPTQ error is above that of rounding to nearest".to_string();
                self.warn(&record.layer, text);
            }
            progress(Progress::Layer { record: &record });
            self.layers.push(record);
        }
        Ok(())
    }

    fn collect(
        &mut self,
        decoder: &mut dyn Decoder,
        stage: Stage,
        in_features: usize,
    ) -> Result<Hessian, gptq_quantizer::QuantizeError> {
        let start = Instant::now();
        let before = self
            .times
            .seconds
            .get(&Phase::Hessian)
            .copied()
            .unwrap_or(0.0);
        let mut sink = TimedHessian {
            sum: HessianSum::new(in_features),
            times: self.times,
        };
        decoder.stage(stage, &mut sink);
        let sum = sink.sum;
        let inside = self
            .times
            .seconds
            .get(&Phase::Hessian)
            .copied()
            .unwrap_or(0.0)
            - before;
        let outside = start.elapsed().as_secs_f64() - inside;
        *self.times.seconds.entry(Phase::Forward).or_default() += outside;
        self.times.time(Phase::Hessian, || sum.finish())
    }

    fn warn_about(
        &mut self,
        hessian: &Hessian,
        factor: &Factor,
        linears: &[(LayerName, usize, usize)],
    ) {
        let (layer, in_features, _) = &linears[0];
        if hessian.tokens() < *in_features {
            let text = format!(
                "{} calibration tokens are fewer than the {in_features} input channels: \
                 the Hessian is singular but for damping",
                hessian.tokens()
            );
            self.warn(layer, text);
        }
        if factor.escalations > 0 {
            let text = format!(
                "the Hessian was singular: damp percent {} instead of {}",
                factor.damp_used, self.spec.damp_percent
            );
            self.warn(layer, text);
        }
        if factor.dead_channels > 0 {
            let text = format!(
                "{} input channels were zero on every calibration token",
                factor.dead_channels
            );
            self.warn(layer, text);
        }
    }

    fn warn(&mut self, layer: &LayerName, text: String) {
        self.warnings.push(Warning {
            module: layer.to_string(),
            text,
        });
    }

    /// Packs, writes, and reads back what was written.
    pub fn store(&mut self, layer: &LayerName, solved: &SolvedLayer) -> Result<(), PipelineError> {
        let format = self.spec.format;
        let packed = self
            .times
            .time(Phase::Pack, || pack(solved, format))
            .map_err(|source| PipelineError::Pack {
                layer: layer.clone(),
                source,
            })?;
        let start = Instant::now();
        for (name, bytes) in packed.tensors(layer) {
            self.staged.write(&name, bytes)?;
        }
        self.times.add(Phase::Write, start.elapsed());
        self.times
            .time(Phase::Verify, || {
                verify_layer(self.staged, layer, solved, format)
            })
            .map_err(|source| PipelineError::Verify {
                layer: layer.clone(),
                source,
            })
    }
}
