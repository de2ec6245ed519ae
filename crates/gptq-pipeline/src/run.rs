//! A whole run, from checks to the rename that publishes it.

use std::sync::Arc;
use std::time::Instant;

use gptq_model::{Decoder, DecoderConfig, Device, FloatWeights, WeightSource};
use gptq_packer::{
    QuantizeConfig, StagedCheckpoint, config_json_with_quantization, partial_path,
    quantize_config_json, read_layer,
};
use gptq_quantizer::round_to_nearest;
use gptq_types::{
    LayerRecord, Method, Phase, PhaseTimes, RUN_RECORD_SCHEMA, RunRecord, Stage, Warning, Weight,
};
use serde_json::{Map, Value, json};

use crate::journal::{BlockEntry, Journal};
use crate::layers::{After, LayerWork, observe};
use crate::preflight::{check_shapes, check_unquantised};
use crate::weights::{CheckedWeights, check_weights};
use crate::write::{Output, writing};
use crate::{Job, OutputPlan, PipelineError, Progress};

/// The run record's file name in the published folder.
const RECORD_FILE: &str = "gptq_run.json";

/// Quantises a model and publishes the folder. When it fails nothing of it stays, unless it was
/// the continuation of an interrupted run.
pub fn quantize(
    job: &Job,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<RunRecord, PipelineError> {
    let started = Instant::now();
    job.spec.validate()?;
    let config = read_config(job)?;
    let mut warnings = check_shapes(&config, &job.spec)?;
    warnings.extend(job.source.notes().into_iter().map(|text| Warning {
        module: String::new(),
        text,
    }));
    if job.spec.method == Method::Gptq && job.windows.is_empty() {
        return Err(PipelineError::NoWindows);
    }
    let weights: Arc<dyn WeightSource> = Arc::new(FloatWeights::new(job.source.clone()));
    let mut decoder = gptq_model::open(weights.clone(), config.clone(), job.device)?;
    let mut times = PhaseTimes::default();
    let checked = checked_weights(job, &mut times)?;
    let settings = resume_settings(job, &checked);

    let plan = OutputPlan::new(job.source.as_ref(), &config, &job.spec, job.max_shard_bytes)?;
    let staged = match job.resume {
        true => {
            Journal::check(&partial_path(&job.out_dir)?, &settings)?;
            StagedCheckpoint::reopen(&job.out_dir, &plan.layout)?
        }
        false => StagedCheckpoint::create(&job.out_dir, &plan.layout)?,
    };
    let mut run = Run {
        job,
        config: &config,
        weights: weights.as_ref(),
        decoder: decoder.as_mut(),
        staged: &staged,
        times,
        layers: Vec::new(),
        warnings: Vec::new(),
    };
    let outcome = run.blocks(&plan, &settings, progress);
    let (layers, times) = (run.layers, run.times);
    warnings.extend(run.warnings);
    let record = record(job, &checked, layers, warnings, started, times);
    match outcome.and_then(|journal| finish(job, &staged, journal, &record)) {
        Ok(()) => {
            staged.publish()?;
            progress(Progress::Published);
            Ok(record)
        }
        Err(error) if job.resume => Err(error),
        Err(error) => {
            staged.discard()?;
            Err(error)
        }
    }
}

/// What a finished run leaves; the Hessians are its own.
pub(crate) fn record(
    job: &Job,
    checked: &CheckedWeights,
    layers: Vec<LayerRecord>,
    mut warnings: Vec<Warning>,
    started: Instant,
    phases: PhaseTimes,
) -> RunRecord {
    if let Some(text) = job.calibration.as_ref().and_then(|tokens| tokens.doubt()) {
        let module = String::new();
        warnings.insert(0, Warning { module, text });
    }
    RunRecord {
        schema: RUN_RECORD_SCHEMA,
        tool: job.tool.clone(),
        model: job.model_name.clone(),
        weights_sha256: Some(checked.identity.clone()),
        spec: job.spec.clone(),
        calibration: job.calibration.clone(),
        device: device_name(job.device),
        gpu_memory_peak: gpu_memory_peak(job.device),
        layers,
        warnings,
        shared_hessian: false,
        seconds: started.elapsed().as_secs_f64(),
        phases,
    }
}

/// All weights were read and found finite, here or before.
pub(crate) fn checked_weights(
    job: &Job,
    times: &mut PhaseTimes,
) -> Result<CheckedWeights, PipelineError> {
    match &job.checked {
        Some(checked) => Ok(checked.clone()),
        None => Ok(times.time(Phase::Load, || check_weights(job.source.as_ref()))?),
    }
}

fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "cpu".to_string(),
        #[cfg(feature = "cuda")]
        Device::Cuda { .. } => {
            gptq_model::gpu().map_or(String::new(), |gpu| gpu.name().to_string())
        }
    }
}

fn gpu_memory_peak(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => None,
        #[cfg(feature = "cuda")]
        Device::Cuda { .. } => Some(gptq_model::gpu()?.memory().ok()?.peak as u64),
    }
}

pub(crate) fn read_config(job: &Job) -> Result<DecoderConfig, PipelineError> {
    let config =
        DecoderConfig::parse(&job.config_json).map_err(|source| PipelineError::Config {
            place: job.source.place(),
            source,
        })?;
    check_unquantised(job.source.as_ref(), &job.config_json)?;
    Ok(config)
}

/// The parts of a run that its blocks need.
struct Run<'a> {
    job: &'a Job,
    config: &'a DecoderConfig,
    weights: &'a dyn WeightSource,
    decoder: &'a mut dyn Decoder,
    staged: &'a StagedCheckpoint,
    times: PhaseTimes,
    layers: Vec<LayerRecord>,
    warnings: Vec<Warning>,
}

impl Run<'_> {
    fn blocks(
        &mut self,
        plan: &OutputPlan,
        settings: &Map<String, Value>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Journal, PipelineError> {
        let blocks = self.config.num_hidden_layers;
        let folder = self.staged.partial_dir();
        let (journal, done) = match self.job.resume {
            true => Journal::reopen(folder, settings)?,
            false => (Journal::begin(folder, settings)?, Vec::new()),
        };
        progress(Progress::Begin {
            blocks,
            resumed: done.len(),
        });
        let (staged, job) = (self.staged, self.job);
        let mut times = std::mem::take(&mut self.times);
        let outcome = writing(staged, job, journal, &mut times, |writer, times| {
            writer.copy(&plan.copied)?;
            if job.spec.method == Method::Gptq {
                times.time(Phase::Load, || self.decoder.embed(&job.windows))?;
            }
            for index in 0..blocks {
                match done.get(index) {
                    Some(entry) => self.replay(index, entry, times)?,
                    None => {
                        let entry = match self.job.spec.method {
                            Method::Gptq => self.solve_block(index, writer, times, progress)?,
                            Method::Rtn => self.round_block(index, writer, times, progress)?,
                        };
                        writer.end_block(entry.clone())?;
                        self.keep(entry);
                    }
                }
                progress(Progress::Block {
                    done: index + 1,
                    blocks,
                });
            }
            Ok(())
        });
        self.times = times;
        let ((), journal) = outcome?;
        Ok(journal)
    }

    fn keep(&mut self, entry: BlockEntry) {
        self.layers.extend(entry.layers);
        self.warnings.extend(entry.warnings);
    }

    /// One forward pass through a block: each stage is solved as its inputs arrive, and the next
    /// stage sees the quantised outputs.
    fn solve_block(
        &mut self,
        index: usize,
        writer: &dyn Output,
        times: &mut PhaseTimes,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<BlockEntry, PipelineError> {
        times.time(Phase::Load, || self.decoder.load_block(index))?;
        count_forward(self.config, self.job, times);
        let mut work = LayerWork::new(self.job, writer);
        for stage in Stage::ALL {
            let linears = self.config.linears(index, stage);
            let hessian = observe(self.decoder, self.job, &linears, stage, times)?;
            let decoder = &mut *self.decoder;
            work.solve(
                decoder,
                &linears,
                hessian.as_ref(),
                After::Replace,
                times,
                progress,
            )?;
        }
        let (layers, warnings) = (work.layers, work.warnings);
        times.time(Phase::Forward, || self.decoder.finish_block())?;
        Ok(BlockEntry {
            block: index,
            layers,
            warnings,
        })
    }

    /// Rounding to nearest looks at weights alone: no forward pass.
    fn round_block(
        &mut self,
        index: usize,
        writer: &dyn Output,
        times: &mut PhaseTimes,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<BlockEntry, PipelineError> {
        let weights = self.weights;
        let spec = &self.job.spec;
        let mut layers = Vec::new();
        for (layer, in_features, out_features) in self.config.block_linears(index) {
            let stored = times.time(Phase::Load, || weights.linear(&layer, false))?;
            let start = Instant::now();
            let weight = stored.weight.input_major(in_features, out_features);
            let solved = round_to_nearest(&weight, out_features, spec).map_err(|source| {
                PipelineError::Quantize {
                    layer: layer.clone(),
                    source,
                }
            })?;
            times.add(Phase::Sweep, start.elapsed());
            let solve_seconds = start.elapsed().as_secs_f64();
            writer.store(layer.clone(), Box::new(|| Ok(solved)))?;
            let record = LayerRecord {
                layer,
                in_features,
                out_features,
                tokens: 0,
                token_share: 0.0,
                loss: None,
                solve_seconds,
            };
            progress(Progress::Layer { record: &record });
            layers.push(record);
        }
        Ok(BlockEntry {
            block: index,
            layers,
            warnings: Vec::new(),
        })
    }

    /// A block of the interrupted run: its codes are read back, and the hidden states pass through
    /// them exactly as they did.
    fn replay(
        &mut self,
        index: usize,
        entry: &BlockEntry,
        times: &mut PhaseTimes,
    ) -> Result<(), PipelineError> {
        let config = written_config(self.job)?;
        let gptq = self.job.spec.method == Method::Gptq;
        if gptq {
            times.time(Phase::Load, || self.decoder.load_block(index))?;
        }
        for (layer, _, _) in self.config.block_linears(index) {
            for suffix in ["qweight", "qzeros", "scales", "g_idx"] {
                self.staged.mark_written(&layer.tensor(suffix))?;
            }
            let solved = read_layer(self.staged, &layer, &config).map_err(|source| {
                PipelineError::Reread {
                    layer: layer.clone(),
                    source,
                }
            })?;
            if gptq {
                let weight = Weight::Host(solved.dequantise());
                self.decoder.replace_weight(&layer, weight)?;
            }
        }
        if gptq {
            count_forward(self.config, self.job, times);
            times.time(Phase::Forward, || self.decoder.forward_block())?;
        }
        self.keep(entry.clone());
        Ok(())
    }
}

/// The operations of one block for all windows.
pub(crate) fn count_forward(config: &DecoderConfig, job: &Job, times: &mut PhaseTimes) {
    for same_length in job.windows.chunk_by(|a, b| a.len() == b.len()) {
        let flop = config.block_flop(same_length.len(), same_length[0].len());
        times.add_flop(Phase::Forward, flop);
    }
}

fn no_meta() -> Map<String, Value> {
    Map::new()
}

fn settings_text(job: &Job) -> String {
    quantize_config_json(&job.spec, &job.tool, &job.model_name, &no_meta())
}

fn written_config(job: &Job) -> Result<QuantizeConfig, PipelineError> {
    QuantizeConfig::from_quantize_config(&settings_text(job)).map_err(|source| {
        PipelineError::QuantizationConfig {
            place: "the output".to_string(),
            source,
        }
    })
}

/// What must not change between an interrupted run and its continuation.
pub(crate) fn resume_settings(job: &Job, checked: &CheckedWeights) -> Map<String, Value> {
    let tokens = job.calibration.as_ref().map(|record| &record.token_sha256);
    let entries = [
        ("tool", json!(job.tool)),
        ("model", json!(job.model_name)),
        ("weights", json!(checked.identity)),
        ("config.json", json!(job.config_json)),
        ("calibration tokens", json!(tokens)),
        // Another device rounds its sums otherwise: half of each would be the result of neither.
        ("device", json!(device_name(job.device))),
    ];
    let mut settings: Map<String, Value> = entries
        .into_iter()
        .map(|(name, value)| (name.to_string(), value))
        .collect();
    // Each under its own name, so that the one that differs can be named.
    if let Value::Object(spec) = json!(job.spec) {
        settings.extend(spec);
    }
    settings
}

/// The small files, after the last tensor.
pub(crate) fn finish(
    job: &Job,
    staged: &StagedCheckpoint,
    journal: Journal,
    record: &RunRecord,
) -> Result<(), PipelineError> {
    let config = config_json_with_quantization(&job.config_json, &job.spec, &job.tool, &no_meta())
        .map_err(|source| PipelineError::QuantizationConfig {
            place: job.source.place(),
            source,
        })?;
    staged.add_file("config.json", config.as_bytes())?;
    staged.add_file("quantize_config.json", settings_text(job).as_bytes())?;
    for file in &job.companions {
        staged.copy_file(file)?;
    }
    let text = serde_json::to_string_pretty(record).map_err(|error| PipelineError::Journal {
        path: job.out_dir.join(RECORD_FILE),
        reason: error.to_string(),
    })?;
    staged.add_file(RECORD_FILE, text.as_bytes())?;
    journal.end()
}
