//! One group of linears that share an input: from Hessian to codes.

use std::time::Instant;

use gptq_model::{Decoder, Device, Streams};
use gptq_quantizer::{Facts, HostStage, QuantizeError, StageHessian, StageSum};
use gptq_types::{LayerName, LayerRecord, Phase, PhaseTimes, QuantSpec, Stage, Warning};

use crate::matrix::estimate::{FOLLOWED, SQUARED};
use crate::write::Output;
use crate::{Job, PipelineError, Progress};

/// What becomes of a weight after it was rounded.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// The rounded one takes its place: later stages see it.
    Replace,
    /// It stays: other settings need it too.
    Keep,
}

/// Quantises the linears of a block under one setting, stage by stage.
pub struct LayerWork<'a> {
    spec: &'a QuantSpec,
    writer: &'a dyn Output,
    all_tokens: usize,
    pub layers: Vec<LayerRecord>,
    pub warnings: Vec<Warning>,
}

impl<'a> LayerWork<'a> {
    /// Nothing done yet.
    pub fn new(job: &'a Job, writer: &'a dyn Output) -> Self {
        LayerWork {
            spec: &job.spec,
            writer,
            all_tokens: tokens(job),
            layers: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Solves the linears of a stage whose inputs were observed.
    pub fn solve(
        &mut self,
        decoder: &mut dyn Decoder,
        linears: &[(LayerName, usize, usize)],
        hessian: &dyn StageHessian,
        after: After,
        times: &mut PhaseTimes,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), PipelineError> {
        let (first, in_features, _) = &linears[0];
        let named = |layer: &LayerName| {
            let layer = layer.clone();
            move |source| PipelineError::Quantize { layer, source }
        };
        let solver = hessian.factor(self.spec, times).map_err(named(first))?;
        let facts = solver.facts();
        self.warn_about(facts, first, *in_features);

        for (layer, in_features, out_features) in linears {
            let mut weight = decoder.weight(layer)?;
            if after == After::Keep {
                weight = hessian.copied(weight).map_err(named(layer))?;
            }
            let start = Instant::now();
            let rounded = solver
                .round(weight, *out_features, self.spec, times)
                .map_err(named(layer))?;
            if after == After::Replace {
                decoder.replace_weight(layer, rounded.weight)?;
            }
            let record = LayerRecord {
                layer: layer.clone(),
                in_features: *in_features,
                out_features: *out_features,
                tokens: facts.tokens,
                token_share: facts.tokens as f64 / self.all_tokens as f64,
                loss: Some(rounded.loss),
                solve_seconds: start.elapsed().as_secs_f64(),
            };
            self.writer.store(layer.clone(), rounded.layer)?;
            if record.is_worse_than_rtn() {
                let text = "the GPTQ error is above that of rounding to nearest".to_string();
                self.warn(&record.layer, text);
            }
            progress(Progress::Layer { record: &record });
            self.layers.push(record);
        }
        Ok(())
    }

    fn warn_about(&mut self, facts: Facts, layer: &LayerName, in_features: usize) {
        if facts.tokens < in_features {
            let text = format!(
                "{} calibration tokens are fewer than the {in_features} input channels: \
                 the Hessian is singular but for damping",
                facts.tokens
            );
            self.warn(layer, text);
        }
        if facts.escalations > 0 {
            let text = format!(
                "the Hessian was singular: damp percent {} instead of {}",
                facts.damp_used, self.spec.damp_percent
            );
            self.warn(layer, text);
        }
        if facts.dead_channels > 0 {
            let text = format!(
                "{} input channels were zero on every calibration token",
                facts.dead_channels
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
}

fn tokens(job: &Job) -> usize {
    job.windows.iter().map(Vec::len).sum()
}

/// Shows the inputs of a stage to a Hessian. The linears that share it, by name and shape.
pub fn observe(
    decoder: &mut dyn Decoder,
    job: &Job,
    linears: &[(LayerName, usize, usize)],
    stage: Stage,
    times: &mut PhaseTimes,
) -> Result<Box<dyn StageHessian>, PipelineError> {
    let (layer, in_features, _) = &linears[0];
    let named = |source| PipelineError::Quantize {
        layer: layer.clone(),
        source,
    };
    let mut sum = stage_sum(job, *in_features).map_err(named)?;
    let start = Instant::now();
    decoder.stage(stage, sum.as_mut())?;
    let inside = sum.elapsed().map_err(named)?;
    times.add(Phase::Forward, start.elapsed().saturating_sub(inside));
    times.add(Phase::Hessian, inside);
    // A symmetric product needs half the operations of a full one.
    let flop = tokens(job) as f64 * *in_features as f64 * (*in_features as f64 + 1.0);
    // Beside a float stream a full product and another symmetric one, each of some of the tokens.
    let products = match job.streams() {
        Streams::One => 1.0,
        Streams::BesideFloat => 1.0 + 2.0 * FOLLOWED + SQUARED,
    };
    times.add_flop(Phase::Hessian, flop * products);
    sum.finish(times).map_err(named)
}

/// The sum of a stage on the device of the job; of pairs where the job has a float stream.
fn stage_sum(job: &Job, in_features: usize) -> Result<Box<dyn StageSum>, QuantizeError> {
    let beside_float = job.streams() == Streams::BesideFloat;
    match (job.device, beside_float) {
        (Device::Cpu, false) => Ok(Box::new(HostStage::new(in_features))),
        (Device::Cpu, true) => Ok(Box::new(HostStage::beside_float(in_features))),
        #[cfg(feature = "cuda")]
        (Device::Cuda { .. }, _) => {
            let gpu = gptq_model::gpu().expect("the decoder was opened on it");
            let sum = gptq_quantizer::DeviceSum::new(&gpu, in_features, beside_float)?;
            Ok(Box::new(sum))
        }
    }
}
