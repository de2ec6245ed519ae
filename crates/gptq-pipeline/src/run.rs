//! A whole run, from checks to the rename that publishes it.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use gptq_model::{
    Decoder, DeviceContext, FloatWeights, ModelError, ModelSpec, Trainer, WeightSource, WindowRun,
};
use gptq_packer::{ClaimedPlace, QuantizeConfig, StageError, StagedCheckpoint, read_layer};
use gptq_quantizer::{After, round_to_nearest};
use gptq_types::{
    BlockTraining, LayerRecord, Method, Phase, PhaseTimes, RUN_RECORD_SCHEMA, RunRecord, Warning,
};
use serde_json::{Map, Value};

use crate::estimate::{streamed_passes, trained_passes};
use crate::fold::{Fold, Folded};
use crate::journal::{BlockEntry, JOURNAL_FILE, Journal};
use crate::layers::{LayerWork, observe};
use crate::preflight::{check_declared_type, check_shapes, check_unquantized};
use crate::reconstruct::reconstruct;
use crate::resume::{Begun, begin, finished, is_interrupted, settings};
use crate::small_files::{SmallFiles, settings_text};
use crate::weights::CheckedWeights;
use crate::write::{Output, writing};
use crate::{Compare, Job, OutputPlan, PipelineError, Progress};

/// The run record's file name in the published folder.
pub(crate) const RECORD_FILE: &str = "gptq_run.json";

/// Quantizes a model and publishes the folder.
///
/// When it fails before the first block is finished nothing of it stays. Afterwards what is done is
/// kept in the partial folder, [`PipelineError::Kept`], and the same job with `resume` goes on there.
pub fn quantize(
    job: &Job,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<RunRecord, PipelineError> {
    quantize_and_compare(job, None, progress)
}

/// Like [`quantize`], but calls `compare` on the finished files before the folder is published, on this
/// thread, and puts its result into the record.
///
/// If the run is interrupted meanwhile or the comparison fails, all blocks are kept, and the same job with
/// `resume` compares again. The comparison is not a setting of the run, so its texts may change or be left
/// out. A folder that is already published is not compared again.
pub fn quantize_and_compare(
    job: &Job,
    compare: Option<&mut Compare<'_>>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<RunRecord, PipelineError> {
    let started = Instant::now();
    job.spec.validate()?;
    let model = read_model(job)?;
    let mut warnings = check_shapes(&model, &job.spec)?;
    warnings.extend(job.source.notes().into_iter().map(|text| Warning {
        module: String::new(),
        text,
    }));
    warnings.extend(check_declared_type(job.source.as_ref(), &model));
    if job.spec.method == Method::Gptq && job.windows.is_empty() {
        return Err(PipelineError::NoWindows);
    }
    let files = SmallFiles::prepare(job, &model)?;
    let place = match ClaimedPlace::claim(&job.out_dir) {
        Err(error @ StageError::Occupied(_)) => {
            let record = finished(job, &files, false)?.ok_or(error)?;
            progress(Progress::AlreadyDone);
            return Ok(record);
        }
        claimed => claimed?,
    };
    if let Some(warning) = place.warning() {
        progress(Progress::Warning(&warning));
    }
    if job.resume && !is_interrupted(&job.out_dir) {
        progress(Progress::NothingToResume);
    }
    let weights: Arc<dyn WeightSource> = Arc::new(FloatWeights::new(job.source.clone()));
    let mut pass = Pass::open(job, weights.clone(), &model)?;
    pass.decoder().leave_room(job.hessians_held_out());
    wait_on_the_processor(job)?;
    let plan = OutputPlan::new(job.source.as_ref(), &model, &job.spec, job.max_shard_bytes)?;
    let settings = settings(job, false);
    let beside = beside_shards(&model, &files);
    let Begun {
        staged,
        journal,
        done,
    } = begin(job, place, &model, &plan, &settings, beside)?;
    let mut run = Run {
        job,
        model: &model,
        weights: weights.as_ref(),
        pass,
        staged: &staged,
        times: PhaseTimes::default(),
        made: Made::new(warnings),
    };
    let outcome = run
        .blocks(&plan, &settings, journal, done, progress)
        .and_then(|()| {
            let record = record(job, &job.check.wait()?, run.made, started, run.times);
            // Freeing what a GPU run held takes about as long as hashing the ends of the shards.
            let mut record = std::thread::scope(|scope| {
                let finishing = scope.spawn(|| add_files(&staged, &files, record));
                drop(run.pass);
                finishing
                    .join()
                    .unwrap_or_else(|panic| resume_unwind(panic))
            })?;
            if let Some(compare) = compare {
                progress(Progress::Comparing);
                record.divergence = compare(staged.partial_dir())?;
            }
            add_record(&staged, record)
        });
    match outcome {
        Ok(record) => {
            publish(staged, model.blocks.len())?;
            progress(Progress::Published);
            Ok(record)
        }
        Err(error) => {
            // Weights that are not sound are the cause of whatever went wrong with them.
            let cause = job.check.wait().map_or_else(PipelineError::from, |_| error);
            Err(kept_or_discarded(staged, model.blocks.len(), cause))
        }
    }
}

/// Renames the partial folder to its final name, then removes the journal.
pub(crate) fn publish(staged: StagedCheckpoint, blocks: usize) -> Result<(), PipelineError> {
    let partial = staged.partial_dir().to_path_buf();
    let published = staged.publish_without(&[JOURNAL_FILE]);
    published.map(drop).map_err(|error| match partial.is_dir() {
        true => kept(partial, blocks, blocks, error.into()),
        // The folder has its final name, so nothing is left to resume.
        false => error.into(),
    })
}

/// Keeps the finished blocks of a failed run, or discards the folder if there are none.
pub(crate) fn kept_or_discarded(
    staged: StagedCheckpoint,
    blocks: usize,
    error: PipelineError,
) -> PipelineError {
    let partial = staged.partial_dir().to_path_buf();
    match Journal::blocks_in(&partial) {
        0 => {
            // The first error is the one to report.
            let _ = staged.discard();
            error
        }
        finished => kept(partial, finished, blocks, error),
    }
}

fn kept(folder: PathBuf, finished: usize, blocks: usize, error: PipelineError) -> PipelineError {
    PipelineError::Kept {
        folder,
        finished,
        blocks,
        source: Box::new(error),
    }
}

/// Room for all but the weight files. A linear takes less than 1 kB in the journal and in the
/// record.
pub(crate) fn beside_shards(model: &ModelSpec, files: &SmallFiles) -> u64 {
    let linears = model.quantized_linears();
    files.bytes() + linears as u64 * 2048 + (1 << 16)
}

/// The record of a finished run with Hessians of its own.
pub(crate) fn record(
    job: &Job,
    checked: &CheckedWeights,
    made: Made,
    started: Instant,
    phases: PhaseTimes,
) -> RunRecord {
    let Made {
        layers,
        training,
        mut warnings,
    } = made;
    if let Some(text) = job.calibration.as_ref().and_then(|tokens| tokens.doubt()) {
        let module = String::new();
        warnings.insert(0, Warning { module, text });
    }
    RunRecord {
        schema: RUN_RECORD_SCHEMA,
        tool: job.tool.clone(),
        model: job.model_name.clone(),
        tokenizer: job.tokenizer.clone(),
        weights_sha256: Some(checked.identity.clone()),
        spec: job.spec.clone(),
        calibration: job.calibration.clone(),
        device: job.device.name().to_string(),
        gpu_memory_peak: job.device.memory_peak(),
        layers,
        training,
        warnings,
        shared_hessian: false,
        divergence: Vec::new(),
        seconds: started.elapsed().as_secs_f64(),
        phases,
        files: BTreeMap::new(),
    }
}

/// On the processor a block may take minutes, and the check would slow it: unsound weights are
/// refused before. A GPU leaves the processor idle, and its first block ends when the check does.
pub(crate) fn wait_on_the_processor(job: &Job) -> Result<(), PipelineError> {
    match job.device {
        DeviceContext::Cpu => job.check.wait().map(drop).map_err(PipelineError::from),
        #[cfg(feature = "cuda")]
        DeviceContext::Cuda(_) => Ok(()),
    }
}

pub(crate) fn read_model(job: &Job) -> Result<ModelSpec, PipelineError> {
    let model = ModelSpec::read(&job.config_json, &job.source.names());
    let model = model.map_err(|source| PipelineError::Config {
        place: job.source.place(),
        source,
    })?;
    check_unquantized(job.source.as_ref(), &job.config_json)?;
    Ok(model)
}

/// What the finished blocks tell of themselves.
pub(crate) struct Made {
    layers: Vec<LayerRecord>,
    training: Vec<BlockTraining>,
    warnings: Vec<Warning>,
}

impl Made {
    /// Before the first block.
    pub fn new(warnings: Vec<Warning>) -> Self {
        Made {
            layers: Vec::new(),
            training: Vec::new(),
            warnings,
        }
    }

    /// Adds a block.
    pub fn keep(&mut self, entry: BlockEntry) {
        self.layers.extend(entry.layers);
        self.training.extend(entry.training);
        self.warnings.extend(entry.warnings);
    }
}

/// The forward pass of a run.
enum Pass {
    Rounds(Box<dyn Decoder>),
    Trains(Box<dyn Trainer>),
}

impl Pass {
    fn open(
        job: &Job,
        weights: Arc<dyn WeightSource>,
        model: &ModelSpec,
    ) -> Result<Self, ModelError> {
        let (model, device) = (model.clone(), &job.device);
        Ok(match job.spec.trains() {
            true => {
                let group_size = job.spec.group_size;
                Pass::Trains(gptq_model::open_trainer(
                    weights, model, device, group_size,
                )?)
            }
            false => Pass::Rounds(gptq_model::open(weights, model, device, job.streams())?),
        })
    }

    fn decoder(&mut self) -> &mut dyn Decoder {
        match self {
            Pass::Rounds(decoder) => decoder.as_mut(),
            Pass::Trains(trainer) => trainer.as_mut(),
        }
    }
}

/// The parts of a run that its blocks need.
struct Run<'a> {
    job: &'a Job,
    model: &'a ModelSpec,
    weights: &'a dyn WeightSource,
    pass: Pass,
    staged: &'a StagedCheckpoint,
    times: PhaseTimes,
    made: Made,
}

impl Run<'_> {
    fn blocks(
        &mut self,
        plan: &OutputPlan,
        settings: &Map<String, Value>,
        journal: Option<Journal>,
        done: Vec<BlockEntry>,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<(), PipelineError> {
        let blocks = self.model.blocks.len();
        // The hidden states are needed as long as a block is left.
        let forward = self.job.spec.method == Method::Gptq && done.len() < blocks;
        progress(Progress::Begin {
            blocks,
            resumed: done.len(),
        });
        let (staged, job) = (self.staged, self.job);
        let mut times = std::mem::take(&mut self.times);
        let outcome = writing(
            staged,
            job,
            settings,
            journal,
            &mut times,
            |writer, times| {
                writer.copy(&plan.copied)?;
                copy_permuted_biases(writer, self.model, job, &done)?;
                if forward {
                    times.time(Phase::Load, || self.pass.decoder().embed(&job.windows))?;
                }
                for index in 0..blocks {
                    match done.get(index) {
                        Some(entry) => self.replay(index, entry, forward, times)?,
                        None => {
                            let entry = match self.job.spec.method {
                                Method::Gptq => self.solve_block(index, writer, times, progress)?,
                                Method::Rtn => self.round_block(index, writer, times, progress)?,
                            };
                            writer.end_block(entry.clone())?;
                            self.made.keep(entry);
                        }
                    }
                    progress(Progress::Block {
                        done: index + 1,
                        blocks,
                    });
                }
                Ok(())
            },
        );
        self.times = times;
        outcome
    }

    /// One forward pass through a block: each capture group is solved as its inputs arrive, and the next
    /// one sees the quantized outputs. Then, if the job says so, the block is trained.
    fn solve_block(
        &mut self,
        index: usize,
        writer: &dyn Output,
        times: &mut PhaseTimes,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<BlockEntry, PipelineError> {
        let decoder = self.pass.decoder();
        times.time(Phase::Load, || decoder.load_block(index))?;
        count_forward(self.model, index, self.job, times);
        let after = match self.job.spec.trains() {
            true => After::Train,
            false => After::Replace,
        };
        let mut work = LayerWork::new(self.job, self.model, index, writer);
        for group in self.model.blocks[index].groups() {
            let mut hessian = observe(decoder, self.job, &group, times)?;
            let hessian = hessian.as_mut();
            work.solve(decoder, &group, hessian, after, times, progress)?;
        }
        let training = match &mut self.pass {
            Pass::Rounds(_) => None,
            Pass::Trains(trainer) => {
                let trainer = trainer.as_mut();
                count_training(self.model, index, self.job, times);
                Some(train_block(trainer, self.job, &mut work, times, progress)?)
            }
        };
        let (layers, warnings) = (work.layers, work.warnings);
        times.time(Phase::Forward, || self.pass.decoder().finish_block())?;
        Ok(BlockEntry {
            block: index,
            layers,
            training,
            warnings,
            tensors: BTreeMap::new(),
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
        for linear in self.model.block_linears(index) {
            let shape @ [in_features, out_features] = linear.shape();
            let layer = linear.name;
            let stored = times.time(Phase::Load, || weights.linear(&layer, shape, false))?;
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
                order: None,
                folded: None,
            };
            progress(Progress::Layer { record: &record });
            layers.push(record);
        }
        Ok(BlockEntry {
            block: index,
            layers,
            training: None,
            warnings: Vec::new(),
            tensors: BTreeMap::new(),
        })
    }

    /// A block of the interrupted run: while blocks are left its codes are read back, and the hidden
    /// states pass through them exactly as they did.
    fn replay(
        &mut self,
        index: usize,
        entry: &BlockEntry,
        forward: bool,
        times: &mut PhaseTimes,
    ) -> Result<(), PipelineError> {
        self.made.keep(entry.clone());
        if !forward {
            return Ok(());
        }
        let config = written_config(self.job, self.model)?;
        let folded = Folded::of(self.model, index, &self.job.spec, &entry.layers)?;
        times.time(Phase::Load, || self.pass.decoder().load_block(index))?;
        for linear in self.model.block_linears(index) {
            let (layer, shape) = (&linear.name, linear.shape());
            let solved = read_layer(self.staged, layer, shape, &config).map_err(|source| {
                PipelineError::Reread {
                    layer: layer.clone(),
                    source,
                }
            })?;
            let weight = folded.unfolded(layer, solved).dequantize();
            self.pass.decoder().replace_weight(layer, weight)?;
        }
        count_forward(self.model, index, self.job, times);
        times.time(Phase::Forward, || self.pass.decoder().forward_block())?;
        Ok(())
    }
}

/// Trains the resident block, hands over its linears, and takes the pass back before it.
fn train_block(
    trainer: &mut dyn Trainer,
    job: &Job,
    work: &mut LayerWork<'_>,
    times: &mut PhaseTimes,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<BlockTraining, PipelineError> {
    let start = Instant::now();
    trainer.finish_float()?;
    let (block, epochs) = (work.index(), job.spec.training_epochs);
    let training = reconstruct(
        trainer,
        work.trained().collect(),
        block,
        job.spec.bits,
        epochs,
        &mut |done| {
            progress(Progress::Epoch {
                done,
                epochs: epochs as usize,
            });
        },
    )?;
    work.judge(&training);
    work.store_trained()?;
    trainer.restart_block()?;
    times.add(Phase::Train, start.elapsed());
    Ok(training)
}

/// Writes the biases of finished blocks that are not copied as they are. They are in no journal: it vouches
/// for what cannot be made again so cheaply.
pub(crate) fn copy_permuted_biases(
    writer: &dyn Output,
    model: &ModelSpec,
    job: &Job,
    done: &[BlockEntry],
) -> Result<(), PipelineError> {
    if !job.spec.order.may_fold() {
        return Ok(());
    }
    let group_size = job.spec.group_size;
    for (index, entry) in done.iter().enumerate() {
        let folded = Folded::of(model, index, &job.spec, &entry.layers)?;
        for layer in Fold::all_before(model, index, group_size) {
            let outputs = folded.outputs_of(&layer).map(<[u32]>::to_vec);
            writer.copy_permuted(layer.tensor("bias"), outputs)?;
        }
    }
    Ok(())
}

/// The operations of one block for all windows.
pub(crate) fn count_forward(model: &ModelSpec, index: usize, job: &Job, times: &mut PhaseTimes) {
    for run in WindowRun::of(&job.windows) {
        let flop = model.block_flop(index, run.windows, run.tokens);
        times.add_flop(Phase::Forward, streamed_passes(&job.spec) * flop);
    }
}

/// Those of training it, and of the pass through what came of it: of `y = x W^T` a pass with gradients has two
/// products more, `dy W` and `dy^T x`.
fn count_training(model: &ModelSpec, index: usize, job: &Job, times: &mut PhaseTimes) {
    for run in WindowRun::of(&job.windows) {
        let flop = model.block_flop(index, run.windows, run.tokens);
        let [gradients, plain] = trained_passes(job.spec.training_epochs, run.steps());
        times.add_flop(Phase::Train, (3.0 * gradients + plain) * flop);
        times.add_flop(Phase::Forward, flop);
    }
}

fn written_config(job: &Job, model: &ModelSpec) -> Result<QuantizeConfig, PipelineError> {
    QuantizeConfig::from_quantize_config(&settings_text(job, model)).map_err(|source| {
        PipelineError::QuantizationConfig {
            place: "the output".to_string(),
            source,
        }
    })
}

/// The small files, after the last tensor; the record lists all files.
pub(crate) fn add_files(
    staged: &StagedCheckpoint,
    files: &SmallFiles,
    record: RunRecord,
) -> Result<RunRecord, PipelineError> {
    files.add_to(staged)?;
    let files = staged.file_records()?;
    Ok(RunRecord { files, ..record })
}

/// The record, after the last other file.
pub(crate) fn add_record(
    staged: &StagedCheckpoint,
    record: RunRecord,
) -> Result<RunRecord, PipelineError> {
    let text = serde_json::to_string_pretty(&record).map_err(|error| PipelineError::Journal {
        path: staged.partial_dir().join(RECORD_FILE),
        reason: error.to_string(),
    })?;
    staged.add_file(RECORD_FILE, text.as_bytes())?;
    Ok(record)
}
