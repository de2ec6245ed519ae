//! Several settings in one pass: one forward pass of the float model and one Hessian a capture group serve
//! them all.
//!
//! No setting sees what another one did, nor what it did itself in earlier layers: errors of
//! earlier layers are not made up for by later ones. That is the price of the time it saves.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use gptq_model::{Decoder, FloatWeights, ModelSpec, Streams, WeightSource};
use gptq_packer::{ClaimedPlace, StagedCheckpoint};
use gptq_quantizer::After;
use gptq_types::{Method, Phase, PhaseTimes, RunRecord, Warning};
use serde_json::{Map, Value};

use crate::block_loop::{Made, copy_permuted_biases, count_forward};
use crate::journal::{BlockEntry, Journal};
use crate::layers::{LayerWork, observe};
use crate::preflight::{check_declared_type, check_shapes, check_unquantized};
use crate::resume::{begin, settings};
use crate::run::{
    add_files, add_record, beside_shards, kept_or_discarded, publish, read_model, record,
    wait_on_the_processor,
};
use crate::small_files::SmallFiles;
use crate::weights::CheckedWeights;
use crate::write::{Output, writing};
use crate::{Job, OutputPlan, PipelineError, Progress};

/// One setting on its way to a folder.
struct Target<'a> {
    job: &'a Job,
    files: SmallFiles,
    settings: Map<String, Value>,
    staged: StagedCheckpoint,
    copied: Vec<String>,
    done: Vec<BlockEntry>,
    warnings: Vec<Warning>,
}

/// Quantizes one model under the settings of all `jobs`, which differ in nothing else but their
/// folders.
///
/// When it fails, a job without a finished block leaves nothing; finished blocks of the others stay,
/// and the same jobs with `resume` go on there.
///
/// # Panics
/// Without jobs, or with one of `method rtn`, which has no Hessian to share, of `input_mismatch`, which
/// needs a quantized stream of its own, or of order `auto`, which holds tokens out.
pub fn quantize_together(
    jobs: &[Job],
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<RunRecord>, PipelineError> {
    let started = Instant::now();
    let first = jobs.first().expect("a job");
    assert!(
        jobs.iter().all(|job| job.spec.method == Method::Gptq),
        "method gptq"
    );
    assert!(
        jobs.iter().all(|job| job.streams() == Streams::One),
        "no job that aims at float outputs"
    );
    assert!(
        !jobs.iter().any(Job::holds_out),
        "no job that holds tokens out"
    );
    let model = read_model(first)?;
    check_unquantized(first.source.as_ref(), &first.config_json)?;
    if first.windows.is_empty() {
        return Err(PipelineError::NoWindows);
    }
    let weights: Arc<dyn WeightSource> = Arc::new(FloatWeights::new(first.source.clone()));
    let mut decoder = gptq_model::open(weights, model.clone(), &first.device, Streams::One)?;
    let mut times = PhaseTimes::default();
    wait_on_the_processor(first)?;
    let (mut targets, mut journals) = (Vec::new(), Vec::new());
    let blocks = model.blocks.len();
    let outcome = (jobs.iter())
        .try_for_each(|job| {
            let (target, journal) = Target::new(job, &model)?;
            targets.push(target);
            journals.push(journal);
            Ok(())
        })
        .and_then(|()| {
            run(
                &model,
                decoder.as_mut(),
                &mut targets,
                journals,
                &mut times,
                progress,
            )
        })
        .and_then(|()| {
            let checked = first.check.wait()?;
            (targets.iter())
                .map(|target| target.finish(&checked, &times, started))
                .collect::<Result<Vec<RunRecord>, _>>()
        });
    match outcome {
        Ok(records) => {
            for target in targets {
                publish(target.staged, blocks)?;
            }
            progress(Progress::Published);
            Ok(records)
        }
        Err(error) => {
            let mut error = first
                .check
                .wait()
                .map_or_else(PipelineError::from, |_| error);
            // There is one error for all targets; in reverse order, it ends with the first target's folder.
            for target in targets.into_iter().rev() {
                error = kept_or_discarded(target.staged, blocks, error.cause());
            }
            Err(error)
        }
    }
}

impl<'a> Target<'a> {
    fn new(job: &'a Job, model: &ModelSpec) -> Result<(Self, Option<Journal>), PipelineError> {
        job.spec.validate()?;
        let mut warnings = check_shapes(model, &job.spec)?;
        warnings.extend(check_declared_type(job.source.as_ref(), model));
        let files = SmallFiles::prepare(job, model)?;
        let plan = OutputPlan::new(job.source.as_ref(), model, &job.spec, job.max_shard_bytes)?;
        let place = ClaimedPlace::claim(&job.out_dir)?;
        let settings = settings(job, true);
        let beside = beside_shards(model, &files);
        let begun = begin(job, place, model, &plan, &settings, beside)?;
        let target = Target {
            staged: begun.staged,
            done: begun.done,
            copied: plan.copied,
            files,
            settings,
            warnings,
            job,
        };
        Ok((target, begun.journal))
    }

    fn finish(
        &self,
        checked: &CheckedWeights,
        times: &PhaseTimes,
        started: Instant,
    ) -> Result<RunRecord, PipelineError> {
        let mut made = Made::new(self.warnings.clone());
        self.done.iter().cloned().for_each(|entry| made.keep(entry));
        let record = RunRecord {
            shared_hessian: true,
            ..record(self.job, checked, made, started, times.clone())
        };
        let record = add_files(&self.staged, &self.files, record)?;
        add_record(&self.staged, record)
    }
}

/// All blocks, for all targets.
fn run(
    model: &ModelSpec,
    decoder: &mut dyn Decoder,
    targets: &mut [Target<'_>],
    journals: Vec<Option<Journal>>,
    times: &mut PhaseTimes,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), PipelineError> {
    let mut new: Vec<Vec<BlockEntry>> = vec![Vec::new(); targets.len()];
    {
        let targets: &[Target<'_>] = targets;
        let mut work = |writers: &[&dyn Output], times: &mut PhaseTimes| {
            blocks(model, decoder, targets, writers, &mut new, times, progress)
        };
        let journals = &mut journals.into_iter();
        with_writers(model, targets, journals, &[], times, &mut work)?;
    }
    for (target, new) in targets.iter_mut().zip(new) {
        target.done.extend(new);
    }
    Ok(())
}

type Work<'a> = dyn FnMut(&[&dyn Output], &mut PhaseTimes) -> Result<(), PipelineError> + 'a;

/// Opens a writer for each of `targets`, each inside the one before, and then works.
fn with_writers(
    model: &ModelSpec,
    targets: &[Target<'_>],
    journals: &mut dyn Iterator<Item = Option<Journal>>,
    open: &[&dyn Output],
    times: &mut PhaseTimes,
    work: &mut Work<'_>,
) -> Result<(), PipelineError> {
    let (Some((target, rest)), Some(journal)) = (targets.split_first(), journals.next()) else {
        return work(open, times);
    };
    let staged = &target.staged;
    writing(
        staged,
        target.job,
        &target.settings,
        journal,
        times,
        |writer, times| {
            writer.copy(&target.copied)?;
            copy_permuted_biases(writer, model, target.job, &target.done)?;
            let open: Vec<&dyn Output> = open.iter().copied().chain([writer as _]).collect();
            with_writers(model, rest, journals, &open, times, work)
        },
    )
}

fn blocks(
    model: &ModelSpec,
    decoder: &mut dyn Decoder,
    targets: &[Target<'_>],
    writers: &[&dyn Output],
    new: &mut [Vec<BlockEntry>],
    times: &mut PhaseTimes,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), PipelineError> {
    let first = targets[0].job;
    let blocks = model.blocks.len();
    let least = targets.iter().map(|target| target.done.len()).min();
    let resumed = least.unwrap_or(0);
    progress(Progress::Begin { blocks, resumed });
    if resumed == blocks {
        return Ok(());
    }
    times.time(Phase::Load, || decoder.embed(&first.windows))?;
    for index in 0..blocks {
        times.time(Phase::Load, || decoder.load_block(index))?;
        count_forward(model, index, first, times);
        if index < resumed {
            // No setting changes what the next block sees.
            times.time(Phase::Forward, || decoder.forward_block())?;
        } else {
            let mut works: Vec<(usize, LayerWork<'_>)> = (targets.iter().zip(writers))
                .enumerate()
                .filter(|(_, (target, _))| target.done.len() <= index)
                .map(|(at, (target, writer))| {
                    (at, LayerWork::new(target.job, model, index, *writer))
                })
                .collect();
            for group in model.blocks[index].groups() {
                let mut hessian = observe(decoder, first, &group, times)?;
                for (_, work) in &mut works {
                    let hessian = hessian.as_mut();
                    work.solve(decoder, &group, hessian, After::Keep, times, progress)?;
                }
            }
            times.time(Phase::Forward, || decoder.finish_block())?;
            for (at, work) in works {
                let entry = BlockEntry {
                    block: index,
                    layers: work.layers,
                    training: None,
                    warnings: work.warnings,
                    tensors: BTreeMap::new(),
                };
                writers[at].end_block(entry.clone())?;
                new[at].push(entry);
            }
        }
        progress(Progress::Block {
            done: index + 1,
            blocks,
        });
    }
    Ok(())
}
