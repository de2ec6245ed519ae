//! The blocks of a run, one after the other: solved, trained, or read back from an interrupted run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use gptq_model::{Decoder, ModelError, ModelSpec, Trainer, WeightSource, WindowRun};
use gptq_packer::{QuantizeConfig, StagedCheckpoint, read_layer};
use gptq_quantizer::{After, round_to_nearest};
use gptq_types::{BlockTraining, LayerRecord, Method, Phase, PhaseTimes, Warning};
use serde_json::{Map, Value};

use crate::estimate::{streamed_passes, trained_passes};
use crate::fold::{Fold, Folded};
use crate::journal::{BlockEntry, Journal};
use crate::layers::{LayerWork, observe};
use crate::reconstruct::reconstruct;
use crate::small_files::settings_text;
use crate::write::{Output, writing};
use crate::{Job, OutputPlan, PipelineError, Progress};

/// What the finished blocks tell of themselves.
pub(crate) struct Made {
    pub layers: Vec<LayerRecord>,
    pub training: Vec<BlockTraining>,
    pub warnings: Vec<Warning>,
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
pub(crate) enum Pass {
    Rounds(Box<dyn Decoder>),
    Trains(Box<dyn Trainer>),
}

impl Pass {
    pub fn open(
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

    pub fn decoder(&mut self) -> &mut dyn Decoder {
        match self {
            Pass::Rounds(decoder) => decoder.as_mut(),
            Pass::Trains(trainer) => trainer.as_mut(),
        }
    }
}

/// The parts of a run that its blocks need.
pub(crate) struct BlockLoop<'a> {
    pub job: &'a Job,
    pub model: &'a ModelSpec,
    pub weights: &'a dyn WeightSource,
    pub pass: Pass,
    pub staged: &'a StagedCheckpoint,
    pub times: PhaseTimes,
    pub made: Made,
}

impl BlockLoop<'_> {
    /// All blocks, those of an interrupted run that are `done` from its files.
    pub fn run(
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
