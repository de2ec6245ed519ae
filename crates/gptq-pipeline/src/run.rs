//! A whole run, from checks to the rename that publishes it.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use gptq_model::{DeviceContext, FloatWeights, ModelSpec, WeightSource};
use gptq_packer::{ClaimedPlace, StageError, StagedCheckpoint};
use gptq_types::{Method, PhaseTimes, RUN_RECORD_SCHEMA, RunRecord, Warning};

use crate::block_loop::{BlockLoop, Made, Pass};
use crate::journal::{JOURNAL_FILE, Journal};
use crate::preflight::{check_declared_type, check_shapes, check_unquantized};
use crate::resume::{Begun, begin, finished, is_interrupted, settings};
use crate::small_files::SmallFiles;
use crate::weights::CheckedWeights;
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
    let mut run = BlockLoop {
        job,
        model: &model,
        weights: weights.as_ref(),
        pass,
        staged: &staged,
        times: PhaseTimes::default(),
        made: Made::new(warnings),
    };
    let outcome = run
        .run(&plan, &settings, journal, done, progress)
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
