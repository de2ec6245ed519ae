//! One group of linears that share an input: from Hessian to codes.

use std::time::Instant;

use gptq_model::{Decoder, Device};
use gptq_quantizer::{Facts, HostStage, QuantizeError, StageSolver, StageSum};
use gptq_types::{LayerName, LayerRecord, Phase, PhaseTimes, QuantSpec, Stage, Warning};

use crate::write::Writer;
use crate::{Job, PipelineError, Progress};

/// Quantises the linears of a block, stage by stage.
pub struct LayerWork<'a, 'b> {
    pub spec: &'a QuantSpec,
    pub device: Device,
    pub writer: &'a Writer<'b>,
    pub times: &'a mut PhaseTimes,
    pub all_tokens: usize,
    pub layers: Vec<LayerRecord>,
    pub warnings: Vec<Warning>,
}

impl<'a, 'b> LayerWork<'a, 'b> {
    /// Nothing done yet.
    pub fn new(job: &'a Job, writer: &'a Writer<'b>, times: &'a mut PhaseTimes) -> Self {
        LayerWork {
            spec: &job.spec,
            device: job.device,
            writer,
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
        let solver = self.prepare(decoder, stage, &first, in_features)?;
        let facts = solver.facts();
        self.warn_about(facts, &first, in_features);

        for (layer, in_features, out_features) in linears {
            let weight = decoder.weight(&layer)?;
            let start = Instant::now();
            let rounded = solver
                .round(weight, out_features, self.spec, self.times)
                .map_err(|source| PipelineError::Quantize {
                    layer: layer.clone(),
                    source,
                })?;
            decoder.replace_weight(&layer, rounded.weight)?;
            let record = LayerRecord {
                layer: layer.clone(),
                in_features,
                out_features,
                tokens: facts.tokens,
                token_share: facts.tokens as f64 / self.all_tokens as f64,
                loss: Some(rounded.loss),
                solve_seconds: start.elapsed().as_secs_f64(),
            };
            self.writer.store(layer, rounded.layer)?;
            if record.is_worse_than_rtn() {
                let text = "the GPTQ error is above that of rounding to nearest".to_string();
                self.warn(&record.layer, text);
            }
            progress(Progress::Layer { record: &record });
            self.layers.push(record);
        }
        Ok(())
    }

    /// The inputs of a stage, summed and factored.
    fn prepare(
        &mut self,
        decoder: &mut dyn Decoder,
        stage: Stage,
        layer: &LayerName,
        in_features: usize,
    ) -> Result<Box<dyn StageSolver>, PipelineError> {
        let named = |source| PipelineError::Quantize {
            layer: layer.clone(),
            source,
        };
        let mut sum = stage_sum(self.device, in_features).map_err(named)?;
        let start = Instant::now();
        decoder.stage(stage, sum.as_mut())?;
        let inside = sum.elapsed().map_err(named)?;
        self.times
            .add(Phase::Forward, start.elapsed().saturating_sub(inside));
        self.times.add(Phase::Hessian, inside);
        // A symmetric product needs half the operations of a full one.
        let flop = self.all_tokens as f64 * in_features as f64 * (in_features as f64 + 1.0);
        self.times.add_flop(Phase::Hessian, flop);
        sum.finish(self.spec, self.times).map_err(named)
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

/// The sum of a stage on the device of the job.
fn stage_sum(device: Device, in_features: usize) -> Result<Box<dyn StageSum>, QuantizeError> {
    match device {
        Device::Cpu => Ok(Box::new(HostStage::new(in_features))),
        #[cfg(feature = "cuda")]
        Device::Cuda { .. } => {
            let gpu = gptq_model::gpu().expect("the decoder was opened on it");
            Ok(Box::new(gptq_quantizer::DeviceSum::new(&gpu, in_features)?))
        }
    }
}
