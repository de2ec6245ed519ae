//! Records as they lie in a checkpoint folder.

use std::path::Path;

use gptq_packer::{FolderVerdict, PACKED_SUFFIXES};
use gptq_types::{
    BranchRecord, CalibrationRequest, Permutation, RUN_RECORD_SCHEMA, RunRecord, TensorSource,
    branch_name, describe,
};

use crate::failure::Failure;
use crate::matrix::read_text;

/// How a checkpoint was made.
pub const RUN_RECORD: &str = "gptq_run.json";
/// What it is as a branch of a matrix.
pub const BRANCH_RECORD: &str = "gptq_branch.json";

/// A JSON file.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Failure> {
    serde_json::from_str(&read_text(path)?)
        .map_err(|error| Failure::new(format!("`{}`: {error}", path.display())))
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
                samples: calibration.map_or(0, |c| c.samples),
                seq_len: calibration.map_or(0, |c| c.seq_len),
                seed: calibration.map_or(0, |c| c.seed),
            },
            desc: describe(&run.spec),
        },
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
