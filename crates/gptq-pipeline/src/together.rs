//! Several settings in one pass: one forward pass of the float model and one Hessian a stage serve
//! them all.
//!
//! No setting sees what another one did, nor what it did itself in earlier layers: errors of
//! earlier layers are not made up for by later ones. That is the price of the time it saves.

use std::sync::Arc;
use std::time::Instant;

use gptq_model::{Decoder, DecoderConfig, FloatWeights, WeightSource};
use gptq_packer::StagedCheckpoint;
use gptq_types::{LayerRecord, Method, Phase, PhaseTimes, RunRecord, Stage, Warning};

use crate::journal::{BlockEntry, Journal};
use crate::layers::{After, LayerWork, observe};
use crate::preflight::{check_shapes, check_unquantised};
use crate::run::{checked_weights, count_forward, finish, read_config, record, resume_settings};
use crate::weights::CheckedWeights;
use crate::write::{Output, writing};
use crate::{Job, OutputPlan, PipelineError, Progress};

/// One setting on its way to a folder.
struct Target<'a> {
    job: &'a Job,
    staged: StagedCheckpoint,
    copied: Vec<String>,
    layers: Vec<LayerRecord>,
    warnings: Vec<Warning>,
}

/// Quantises one model under the settings of all `jobs`, which differ in nothing else but their
/// folders. When it fails nothing of any of them stays; it does not resume.
///
/// # Panics
/// Without jobs, or with one of `method rtn`, which has no Hessian to share.
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
    let config = read_config(first)?;
    check_unquantised(first.source.as_ref(), &first.config_json)?;
    if first.windows.is_empty() {
        return Err(PipelineError::NoWindows);
    }
    let weights: Arc<dyn WeightSource> = Arc::new(FloatWeights::new(first.source.clone()));
    let mut decoder = gptq_model::open(weights, config.clone(), first.device)?;
    let mut times = PhaseTimes::default();
    let checked = checked_weights(first, &mut times)?;
    let mut targets = Vec::new();
    let outcome = (jobs.iter())
        .try_for_each(|job| {
            targets.push(Target::new(job, &config)?);
            Ok(())
        })
        .and_then(|()| {
            run(
                &config,
                &checked,
                decoder.as_mut(),
                &mut targets,
                &mut times,
                progress,
            )
        });
    let journals = match outcome {
        Ok(journals) => journals,
        Err(error) => return Err(discard(targets, error)),
    };
    let mut records = Vec::new();
    let mut journals = journals.into_iter();
    while !targets.is_empty() {
        let target = targets.remove(0);
        let record = target.record(&checked, &times, started);
        let journal = journals.next().expect("one for each target");
        if let Err(error) = finish(target.job, &target.staged, journal, &record) {
            targets.push(target);
            return Err(discard(targets, error));
        }
        target.staged.publish()?;
        records.push(record);
    }
    progress(Progress::Published);
    Ok(records)
}

fn discard(targets: Vec<Target<'_>>, error: PipelineError) -> PipelineError {
    for target in targets {
        if let Err(left) = target.staged.discard() {
            return left.into();
        }
    }
    error
}

impl<'a> Target<'a> {
    fn new(job: &'a Job, config: &DecoderConfig) -> Result<Self, PipelineError> {
        job.spec.validate()?;
        let warnings = check_shapes(config, &job.spec)?;
        let plan = OutputPlan::new(job.source.as_ref(), config, &job.spec, job.max_shard_bytes)?;
        Ok(Target {
            staged: StagedCheckpoint::create(&job.out_dir, &plan.layout)?,
            copied: plan.copied,
            layers: Vec::new(),
            warnings,
            job,
        })
    }

    fn record(&self, checked: &CheckedWeights, times: &PhaseTimes, started: Instant) -> RunRecord {
        let (layers, warnings) = (self.layers.clone(), self.warnings.clone());
        RunRecord {
            shared_hessian: true,
            ..record(self.job, checked, layers, warnings, started, times.clone())
        }
    }
}

/// All blocks, for all targets; their journals once all is on disk.
fn run(
    config: &DecoderConfig,
    checked: &CheckedWeights,
    decoder: &mut dyn Decoder,
    targets: &mut [Target<'_>],
    times: &mut PhaseTimes,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Vec<Journal>, PipelineError> {
    let mut done: Vec<(Vec<LayerRecord>, Vec<Warning>)> = vec![Default::default(); targets.len()];
    let journals = {
        let targets: &[Target<'_>] = targets;
        let mut work = |writers: &[&dyn Output], times: &mut PhaseTimes| {
            blocks(
                config, decoder, targets, writers, &mut done, times, progress,
            )
        };
        with_writers(targets, checked, &[], times, &mut work)?
    };
    for (target, (layers, warnings)) in targets.iter_mut().zip(done) {
        target.layers = layers;
        target.warnings.extend(warnings);
    }
    Ok(journals)
}

type Work<'a> = dyn FnMut(&[&dyn Output], &mut PhaseTimes) -> Result<(), PipelineError> + 'a;

/// Opens a writer for each of `targets`, each inside the one before, and then works.
fn with_writers(
    targets: &[Target<'_>],
    checked: &CheckedWeights,
    open: &[&dyn Output],
    times: &mut PhaseTimes,
    work: &mut Work<'_>,
) -> Result<Vec<Journal>, PipelineError> {
    let Some((target, rest)) = targets.split_first() else {
        work(open, times)?;
        return Ok(Vec::new());
    };
    let settings = resume_settings(target.job, checked);
    let journal = Journal::begin(target.staged.partial_dir(), &settings)?;
    let (mut inner, journal) = writing(
        &target.staged,
        target.job,
        journal,
        times,
        |writer, times| {
            writer.copy(&target.copied)?;
            let open: Vec<&dyn Output> = open.iter().copied().chain([writer as _]).collect();
            with_writers(rest, checked, &open, times, work)
        },
    )?;
    inner.insert(0, journal);
    Ok(inner)
}

fn blocks(
    config: &DecoderConfig,
    decoder: &mut dyn Decoder,
    targets: &[Target<'_>],
    writers: &[&dyn Output],
    done: &mut [(Vec<LayerRecord>, Vec<Warning>)],
    times: &mut PhaseTimes,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), PipelineError> {
    let first = targets[0].job;
    let blocks = config.num_hidden_layers;
    progress(Progress::Begin { blocks, resumed: 0 });
    times.time(Phase::Load, || decoder.embed(&first.windows))?;
    for index in 0..blocks {
        times.time(Phase::Load, || decoder.load_block(index))?;
        count_forward(config, first, times);
        let mut works: Vec<LayerWork<'_>> = (targets.iter().zip(writers))
            .map(|(target, writer)| LayerWork::new(target.job, *writer))
            .collect();
        for stage in Stage::ALL {
            let linears = config.linears(index, stage);
            let hessian = observe(decoder, first, &linears, stage, times)?;
            for work in &mut works {
                let hessian = hessian.as_ref();
                work.solve(decoder, &linears, hessian, After::Keep, times, progress)?;
            }
        }
        times.time(Phase::Forward, || decoder.finish_block())?;
        for ((work, writer), done) in works.into_iter().zip(writers).zip(&mut *done) {
            writer.end_block(BlockEntry {
                block: index,
                layers: work.layers.clone(),
                warnings: work.warnings.clone(),
            })?;
            done.0.extend(work.layers);
            done.1.extend(work.warnings);
        }
        progress(Progress::Block {
            done: index + 1,
            blocks,
        });
    }
    Ok(())
}
