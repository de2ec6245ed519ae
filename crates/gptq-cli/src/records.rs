//! Records as they lie in a checkpoint folder.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_packer::{FolderVerdict, PACKED_SUFFIXES};
use gptq_pipeline::check_permutations;
use gptq_repository::{Repository, check_branch_names};
use gptq_types::outside_name::shown;
use gptq_types::{
    Branch, BranchRecord, CalibrationRequest, FileRecord, LEAST_KL, Permutation, RUN_RECORD_SCHEMA,
    RunRecord, TensorSource, branch_name, describe,
};

use crate::failure::Failure;
use crate::matrix::read_own;

/// The record of the run that made a checkpoint.
pub const RUN_RECORD: &str = "gptq_run.json";
/// The record of a checkpoint as a branch of a matrix.
pub const BRANCH_RECORD: &str = "gptq_branch.json";

/// A JSON file.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    serde_json::from_str(&read_own(path)?).map_err(|error| {
        let error = shown(&error.to_string(), 200);
        Failure::new(format!("`{}`: {error}", path.display()))
    })
}

/// A run record that this version understands.
pub fn read_run(path: &Path) -> Result<RunRecord, Failure> {
    let run: RunRecord = read_json(path)?;
    check_schema(&run, &path.display().to_string())?;
    Ok(run)
}

/// All files of a folder that `quantize` made, against what its record lists of them.
///
/// # Errors
/// A folder without a record, or with one of an older version, which lists no files; a file that
/// cannot be read.
pub fn check_folder(folder: &Path) -> Result<FolderVerdict, Failure> {
    let path = folder.join(RUN_RECORD);
    let run = read_run(&path)?;
    if run.files.is_empty() {
        return Err(Failure::with_hint(
            format!(
                "`{}` lists no files: an older version wrote it",
                path.display()
            ),
            "compare logits instead, with --expect",
        ));
    }
    let mut verdict = gptq_packer::check_files(folder, &run.files)
        .map_err(|error| Failure::new(error.to_string()))?;
    verdict.extra.retain(|name| name != RUN_RECORD);
    Ok(verdict)
}

/// Refuses the record of a later version.
pub fn check_schema(run: &RunRecord, place: &str) -> Result<(), Failure> {
    match run.schema <= RUN_RECORD_SCHEMA {
        true => Ok(()),
        false => Err(Failure::new(format!(
            "`{place}`: run record of version {}, known is {RUN_RECORD_SCHEMA}",
            run.schema
        ))),
    }
}

/// Refuses files that are not those which a run record lists: `found` has the length and hash of each.
/// False where the record is of a version that listed none.
pub fn check_listed(
    run: &RunRecord,
    found: &BTreeMap<String, FileRecord>,
    place: &str,
) -> Result<bool, Failure> {
    for (name, listed) in &run.files {
        let name = shown(name, 80);
        let wrong = match found.get(&name) {
            Some(file) if file == listed => continue,
            Some(file) => format!("has sha256 {}, {} was written", file.sha256, listed.sha256),
            None => "is missing".to_string(),
        };
        return Err(Failure::new(format!(
            "{place}: `{name}` {wrong}, says `{RUN_RECORD}`"
        )));
    }
    Ok(!run.files.is_empty())
}

/// Refuses a branch whose files differ from its run record, if it has one. Only small files are read: an
/// LFS object is identified by its hash.
pub fn check_branch_files(repository: &Repository, branch: &str) -> Result<(), Failure> {
    let place = format!("branch `{}`", shown(branch, 80));
    let Some(text) = repository.read(branch, RUN_RECORD)? else {
        return Ok(());
    };
    let run: RunRecord = serde_json::from_slice(&text).map_err(|error| {
        let error = shown(&error.to_string(), 200);
        Failure::new(format!("{place}, `{RUN_RECORD}`: {error}"))
    })?;
    check_schema(&run, &place)?;
    let mut found = BTreeMap::new();
    for file in repository.files(branch)? {
        let record = match file.oid {
            Some(sha256) => FileRecord {
                bytes: file.bytes,
                sha256,
            },
            None => FileRecord::of(&repository.read(branch, &file.name)?.unwrap_or_default()),
        };
        found.insert(file.name, record);
    }
    check_listed(&run, &found, &place).map(drop)
}

/// Refuses records that no run of this tool wrote: of another branch than their own, or with numbers
/// and texts that nothing measured.
pub fn check_branch(branch: &Branch, name: &str) -> Result<(), Failure> {
    let record = &branch.record;
    let asked = &record.permutation;
    if asked.branch != name {
        let other = shown(&asked.branch, 80);
        return Err(Failure::new(format!(
            "`{BRANCH_RECORD}` is that of branch `{other}`"
        )));
    }
    let wrong = |what: &str| Err(Failure::new(format!("`{BRANCH_RECORD}`: {what}")));
    if let Err(error) = check_permutations(std::slice::from_ref(asked)) {
        return wrong(&error.to_string());
    }
    // The name appears in the shell commands of a card, which readers copy.
    check_branch_names([name])?;
    if !(0.0..=64.0).contains(&record.bits_per_weight) {
        return wrong(&format!("{} bits per weight", record.bits_per_weight));
    }
    let scores = record.evaluation.iter();
    for scores in scores.flat_map(|both| [&both.reference, &both.branch]) {
        let share = scores.top1_agreement.unwrap_or(0.0);
        let positive = [
            scores.nll_stderr,
            scores.perplexity,
            scores.kl.unwrap_or(0.0),
        ];
        if scores.windows == 0
            || !(0.0..=1.0).contains(&share)
            // KL is a sum of rounded terms.
            || positive.iter().any(|&value| !value.is_finite() || value < LEAST_KL)
        {
            return wrong("scores that no evaluation gives");
        }
    }
    if let (Some(run), Some(own)) = (&branch.run.weights_sha256, &record.weights_sha256)
        && run != own
    {
        return wrong(&format!("identity {own}, and {run} in `{RUN_RECORD}`"));
    }
    Ok(())
}

/// The branch record of a folder, where it holds one.
pub fn read_branch(folder: &Path) -> Result<Option<BranchRecord>, Failure> {
    let stored = folder.join(BRANCH_RECORD);
    stored.exists().then(|| read_json(&stored)).transpose()
}

/// The record of a folder that `quantize` made: everything but scores.
pub fn measured_nothing(folder: &Path, run: &RunRecord) -> Result<BranchRecord, Failure> {
    let checkpoint = gptq_hub::Checkpoint::open(folder)?;
    let shapes: Vec<(usize, usize)> = (run.layers.iter())
        .map(|layer| (layer.in_features, layer.out_features))
        .collect();
    let calibration = run.calibration.as_ref();
    Ok(BranchRecord {
        permutation: Permutation {
            branch: branch_name(&run.spec),
            spec: run.spec.clone(),
            calibration: CalibrationRequest {
                dataset: calibration.map_or(String::new(), |c| c.dataset.clone()),
                column: None, // it is in the rule
                samples: calibration.map_or(0, |c| c.samples),
                seq_len: calibration.map_or(0, |c| c.seq_len),
                seed: calibration.map_or(0, |c| c.seed),
                window_bos: calibration.and_then(|c| c.window_bos),
            },
            desc: describe(&run.spec),
        },
        weights_sha256: run.weights_sha256.clone(),
        weight_bytes: checkpoint.weight_bytes(),
        bits_per_weight: bits_per_weight(&checkpoint, run),
        readings: gptq_packer::readings(&run.spec, &shapes),
        evaluation: None,
    })
}

fn bits_per_weight(checkpoint: &gptq_hub::Checkpoint, run: &RunRecord) -> f64 {
    let bytes: usize = (run.layers.iter())
        .flat_map(|row| PACKED_SUFFIXES.map(|s| row.layer.tensor(s)))
        .filter_map(|name| Some(checkpoint.info(&name)?.bytes()))
        .sum();
    let weights = run
        .layers
        .iter()
        .map(|layer| layer.in_features * layer.out_features);
    8.0 * bytes as f64 / weights.sum::<usize>().max(1) as f64
}
