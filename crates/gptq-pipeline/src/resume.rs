//! Resuming an interrupted run: checks that the journal belongs to the same job, and that the files are still
//! those that it vouches for.

use std::path::Path;

use gptq_model::ModelSpec;
use gptq_packer::{ClaimedPlace, PACKED_SUFFIXES, StagedCheckpoint, check_files, partial_path};
use gptq_types::{ContentHash, ContentHasher, QuantSpec, RunRecord, TensorSource};
use rayon::iter::{IntoParallelIterator, ParallelIterator};
use serde_json::{Map, Value, json};

use crate::fold::Folded;
use crate::journal::{BlockEntry, JOURNAL_FILE, Journal};
use crate::run::RECORD_FILE;
use crate::small_files::SmallFiles;
use crate::weights::WeightCheck;
use crate::{Job, OutputPlan, PipelineError};

/// Bytes of a tensor hashed at a time.
const PIECE: usize = 1 << 20;
/// The largest record that is read.
const MAX_RECORD_BYTES: u64 = 256 << 20;

/// A staged checkpoint with its journal, begun or taken up.
pub struct Begun {
    /// The folder under construction.
    pub staged: StagedCheckpoint,
    /// Open for the next block; nothing before the first, with which the writer begins it.
    pub journal: Option<Journal>,
    /// Blocks that need no more work.
    pub done: Vec<BlockEntry>,
}

/// Resumes an interrupted run in a claimed place if the job asks for it, or begins a new one. The disk must
/// have room for `beside_shards` bytes in addition to the weight files.
pub fn begin(
    job: &Job,
    place: ClaimedPlace,
    model: &ModelSpec,
    plan: &OutputPlan,
    settings: &Map<String, Value>,
    beside_shards: u64,
) -> Result<Begun, PipelineError> {
    let partial = place.partial_dir().to_path_buf();
    if job.resume && partial.is_dir() {
        let settings = of_weights(settings, &job.check)?;
        if let Some((journal, done)) = Journal::reopen(&partial, &settings)? {
            check_entries(&partial, &done, model, &job.spec)?;
            let staged = place.reopen(&plan.layout)?;
            check_tensors(&staged, &done)?;
            return Ok(Begun {
                staged,
                journal: Some(journal),
                done,
            });
        }
        if partial.join(RECORD_FILE).exists() {
            return Err(PipelineError::Unvouched(partial));
        }
        // The run was interrupted before its first journal line: there is nothing to resume.
        place.discard_partial()?;
    }
    Ok(Begun {
        staged: place.create(&plan.layout, beside_shards)?,
        journal: None,
        done: Vec::new(),
    })
}

/// The settings that must not change between an interrupted run and its continuation, apart from the weights.
/// Call it on the thread that opened the device, which alone knows the device's name.
pub fn settings(job: &Job, shared_hessian: bool) -> Map<String, Value> {
    let tokens = job.calibration.as_ref().map(|record| &record.token_sha256);
    let entries = [
        ("tool", json!(job.tool)),
        ("model", json!(job.model_name)),
        ("config.json", json!(job.config_json)),
        ("calibration tokens", json!(tokens)),
        // Another device rounds its sums otherwise: half of each would be the result of neither.
        ("device", json!(job.device.name())),
        ("shared Hessian", json!(shared_hessian)),
    ];
    let mut settings: Map<String, Value> = entries
        .into_iter()
        .map(|(name, value)| (name.to_string(), value))
        .collect();
    // One entry per setting, so that an error can name the one that differs.
    if let Value::Object(spec) = json!(job.spec) {
        settings.extend(spec);
    }
    settings
}

/// The settings with the identity of the weights, for which it waits.
pub fn of_weights(
    settings: &Map<String, Value>,
    check: &WeightCheck,
) -> Result<Map<String, Value>, PipelineError> {
    let mut settings = settings.clone();
    settings.insert("weights".to_string(), json!(check.wait()?.identity));
    Ok(settings)
}

/// Whether an existing output folder may be the result of this very run, interrupted after its rename or
/// repeated by a scheduler.
pub fn may_be_finished(out_dir: &Path, resume: bool) -> bool {
    out_dir.join(RECORD_FILE).is_file() && (resume || out_dir.join(JOURNAL_FILE).is_file())
}

/// The record of a folder that is this job's result with all files unchanged. Leftovers of an interruption
/// after the rename are removed.
pub fn finished(
    job: &Job,
    files: &SmallFiles,
    shared_hessian: bool,
) -> Result<Option<RunRecord>, PipelineError> {
    if !may_be_finished(&job.out_dir, job.resume) {
        return Ok(None);
    }
    let checked = job.check.wait()?;
    let path = job.out_dir.join(RECORD_FILE);
    let small = std::fs::metadata(&path).is_ok_and(|found| found.len() <= MAX_RECORD_BYTES);
    let text = small.then(|| std::fs::read_to_string(&path).ok()).flatten();
    let record: Option<RunRecord> = text.and_then(|text| serde_json::from_str(&text).ok());
    let Some(record) = record.filter(|record| {
        record.tool == job.tool
            && record.model == job.model_name
            && record.weights_sha256.as_ref() == Some(&checked.identity)
            && record.spec == job.spec
            && record.tokenizer == job.tokenizer
            && record.calibration == job.calibration
            && record.device == job.device.name()
            && record.shared_hessian == shared_hessian
            && files.are_among(&record.files)
    }) else {
        return Ok(None);
    };
    if !check_files(&job.out_dir, &record.files)?.is_sound() {
        return Ok(None);
    }
    let journal = job.out_dir.join(JOURNAL_FILE);
    match std::fs::remove_file(&journal) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(PipelineError::Journal {
            path: journal,
            reason: error.to_string(),
        }),
        _ => Ok(Some(record)),
    }
}

/// Whether there is a run to resume.
pub fn is_interrupted(out_dir: &Path) -> bool {
    partial_path(out_dir).is_ok_and(|partial| partial.join(JOURNAL_FILE).exists())
}

/// The lines must be of this model: its blocks, in each its linears with all their tensors.
fn check_entries(
    partial: &Path,
    done: &[BlockEntry],
    model: &ModelSpec,
    spec: &QuantSpec,
) -> Result<(), PipelineError> {
    let damaged = |line: usize, reason: String| PipelineError::DamagedLine {
        path: partial.join(JOURNAL_FILE),
        line,
        reason,
    };
    let blocks = model.blocks.len();
    if done.len() > blocks {
        let reason = format!("block {blocks} of a model with {blocks}");
        return Err(damaged(blocks + 2, reason));
    }
    for entry in done {
        let linears = model.block_linears(entry.block);
        let listed =
            (entry.layers.iter()).map(|row| (&row.layer, row.in_features, row.out_features));
        let same = listed.eq(linears
            .iter()
            .map(|linear| (&linear.name, linear.in_features, linear.out_features)));
        let same = same && Folded::of(model, entry.block, spec, &entry.layers).is_ok();
        let mut names: Vec<String> = (linears.iter())
            .flat_map(|linear| PACKED_SUFFIXES.map(|suffix| linear.name.tensor(suffix)))
            .collect();
        names.sort();
        if !same || !entry.tensors.keys().eq(names.iter()) {
            let reason = format!("its layers are not those of block {}", entry.block);
            return Err(damaged(entry.block + 2, reason));
        }
    }
    Ok(())
}

/// Every tensor that the journal vouches for, against its sha256, on all threads.
fn check_tensors(staged: &StagedCheckpoint, done: &[BlockEntry]) -> Result<(), PipelineError> {
    let vouched: Vec<(usize, &String, &ContentHash)> = (done.iter())
        .flat_map(|entry| {
            entry
                .tensors
                .iter()
                .map(|(name, hash)| (entry.block, name, hash))
        })
        .collect();
    for (_, name, _) in &vouched {
        staged.mark_written(name)?;
    }
    let found: Vec<Result<(), PipelineError>> = (vouched.into_par_iter())
        .map(
            |(block, name, hash)| match hash_stored(staged, name)? == *hash {
                true => Ok(()),
                false => Err(PipelineError::DamagedTensor {
                    folder: staged.partial_dir().to_path_buf(),
                    name: name.clone(),
                    line: block + 2,
                }),
            },
        )
        .collect();
    found.into_iter().collect()
}

fn hash_stored(source: &dyn TensorSource, name: &str) -> Result<ContentHash, PipelineError> {
    let bytes = source.require(name)?.bytes();
    let mut hasher = ContentHasher::default();
    let mut buffer = vec![0; PIECE.min(bytes)];
    for start in (0..bytes).step_by(PIECE) {
        let piece = &mut buffer[..PIECE.min(bytes - start)];
        source.read_at(name, start, piece)?;
        hasher.update(piece);
    }
    Ok(hasher.finish())
}
