//! One branch: quantized, scored, published.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use gptq_calibration::{EvaluationWindows, Windows};
use gptq_hub::Checkpoint;
use gptq_model::DeviceContext;
use gptq_packer::{discard_partial, partial_path};
use gptq_pipeline::{CheckedWeights, JOURNAL_FILE, Job, WeightCheck};
use gptq_repository::Repository;
use gptq_types::{
    BranchEvaluation, BranchRecord, EvalRecord, Method, Permutation, PlannedBranch, RunRecord,
};

use super::state::{State, replace};
use crate::datasets::public_name;
use crate::failure::Failure;
use crate::models::Model;
use crate::records::{BRANCH_RECORD, RUN_RECORD, check_folder, read_json};
use crate::scoring::Scorer;
use crate::watch::{TOOL, View, watch, watch_together};

/// Inputs that all branches share.
pub struct Shared<'a> {
    pub model: &'a Model,
    /// The result of the check of its weights.
    pub checked: CheckedWeights,
    /// The model's name as published.
    pub model_name: &'a str,
    /// The source of its tokenizer as published, if another folder.
    pub tokenizer: Option<String>,
    /// Windows of each request, by [`Shared::key`].
    pub windows: HashMap<String, Windows>,
    /// The windows that branches are scored on.
    pub text: Option<EvaluationWindows>,
    pub max_shard_bytes: u64,
    /// Files that go with every branch.
    pub companions: Vec<PathBuf>,
    pub repository: &'a Path,
    /// Several branches are made side by side.
    pub side_by_side: bool,
}

impl Shared<'_> {
    pub fn key(permutation: &Permutation) -> String {
        serde_json::to_string(&permutation.calibration).unwrap_or_default()
    }
}

/// Makes branches on one device, one after the other.
pub struct Maker<'a> {
    shared: &'a Shared<'a>,
    device: DeviceContext,
    scorer: Option<Scorer<'a>>,
    reference: Option<EvalRecord>,
}

impl<'a> Maker<'a> {
    pub fn new(shared: &'a Shared<'a>, device: DeviceContext) -> Self {
        let scorer = (shared.text.as_ref())
            .map(|text| Scorer::new(text, device.clone(), shared.side_by_side));
        Maker {
            shared,
            device,
            scorer,
            reference: None,
        }
    }

    /// Quantizes and scores a branch, or does what is left of that; [`publish`] comes after it.
    pub fn make(&mut self, planned: &PlannedBranch) -> Result<(), Failure> {
        let branch = &planned.permutation.branch;
        let work = State::work(self.shared.repository, branch);
        match work.exists() {
            false => self.quantize(planned, &work)?,
            true => check_found(&work)?,
        }
        self.keep(branch, &work)?;
        let evaluation = self.score(branch, &work)?;
        let record = BranchRecord {
            permutation: published(&planned.permutation),
            weights_sha256: Some(self.shared.checked.identity.clone()),
            weight_bytes: planned.weight_bytes,
            bits_per_weight: planned.bits_per_weight,
            readings: planned.readings.clone(),
            evaluation,
        };
        let text = serde_json::to_string_pretty(&record)? + "\n";
        write(&work.join(BRANCH_RECORD), text.as_bytes())
    }

    fn quantize(&self, planned: &PlannedBranch, work: &Path) -> Result<(), Failure> {
        let permutation = &planned.permutation;
        let journal = partial_path(work)
            .map(|partial| partial.join(JOURNAL_FILE))
            .is_ok_and(|journal| journal.exists());
        if !journal {
            // Killed before its first block: there is nothing to go on with.
            discard_partial(work).map_err(|error| Failure::new(error.to_string()))?;
        }
        let job = self.job(permutation, work, journal);
        let view = View {
            branch: Some(&permutation.branch),
            plain: self.shared.side_by_side,
            forecast: planned.forecast.as_ref(),
        };
        watch(&job, view).map(drop)
    }

    /// The full record stays in the repository's own folder; the branch gets one without times,
    /// which differ from run to run. A run that was killed in between left it with times.
    fn keep(&self, branch: &str, work: &Path) -> Result<(), Failure> {
        let place = work.join(RUN_RECORD);
        let record: RunRecord = read_json(&place)?;
        let timeless = record.clone().timeless();
        if record == timeless {
            return Ok(());
        }
        eprint!("{branch}: {}", gptq_report::summary(&record));
        let full = serde_json::to_string_pretty(&record)?;
        let own = State::record(self.shared.repository, branch);
        write(&own, full.as_bytes())?;
        let text = serde_json::to_string_pretty(&timeless)? + "\n";
        write(&place, text.as_bytes())
    }

    /// Quantizes branches with the same tokens in one pass; [`Maker::make`] does the rest.
    pub fn quantize_together(&self, planned: &[&PlannedBranch]) -> Result<(), Failure> {
        let repository = self.shared.repository;
        let mut permutations: Vec<&Permutation> = Vec::new();
        for permutation in planned.iter().map(|branch| &branch.permutation) {
            let work = State::work(repository, &permutation.branch);
            if !work.exists() {
                discard_partial(&work).map_err(|error| Failure::new(error.to_string()))?;
                permutations.push(permutation);
            }
        }
        if permutations.is_empty() {
            return Ok(());
        }
        let jobs: Vec<Job> = (permutations.iter())
            .map(|permutation| {
                let work = State::work(repository, &permutation.branch);
                self.job(permutation, &work, false)
            })
            .collect();
        watch_together(&jobs, "blocks of all branches").map(drop)
    }

    fn job(&self, permutation: &Permutation, work: &Path, resume: bool) -> Job {
        let Shared { model, windows, .. } = self.shared;
        let windows = match permutation.spec.method {
            Method::Gptq => windows.get(&Shared::key(permutation)),
            Method::Rtn => None,
        };
        Job {
            source: model.checkpoint.clone(),
            config_json: model.config_json.clone(),
            model_name: self.shared.model_name.to_string(),
            tokenizer: self.shared.tokenizer.clone(),
            spec: permutation.spec.clone(),
            windows: windows.map_or(Vec::new(), |windows| windows.ids.clone()),
            calibration: windows.map(|windows| windows.record.clone()),
            companions: self.shared.companions.clone(),
            out_dir: work.to_path_buf(),
            max_shard_bytes: self.shared.max_shard_bytes,
            check: WeightCheck::done(self.shared.checked.clone()),
            device: self.device.clone(),
            resume,
            tool: TOOL.to_string(),
        }
    }

    fn score(&mut self, branch: &str, work: &Path) -> Result<Option<BranchEvaluation>, Failure> {
        let Some(scorer) = &mut self.scorer else {
            return Ok(None);
        };
        let timeless = |mut record: EvalRecord| {
            record.seconds = 0.0;
            record
        };
        let reference = match self.reference.take() {
            Some(reference) => reference,
            None => timeless(scorer.score(self.shared.model_name, self.shared.model)?),
        };
        self.reference = Some(reference.clone());
        let checkpoint = Arc::new(Checkpoint::open(work)?);
        let made = Model::of(checkpoint)?;
        let record = timeless(scorer.score(branch, &made)?);
        eprintln!(
            "{branch}: perplexity {:.3}, original {:.3}",
            record.perplexity, reference.perplexity
        );
        Ok(Some(BranchEvaluation {
            reference,
            branch: record,
        }))
    }
}

/// Commits the work folder that [`Maker::make`] left as a branch, whole or not at all.
pub fn publish(repository: &Repository, planned: &PlannedBranch) -> Result<(), Failure> {
    let branch = &planned.permutation.branch;
    let work = State::work(repository.path(), branch);
    let message = format!("{branch}: {}", planned.permutation.desc);
    repository.publish(branch, &work, &message)?;
    remove(&work)
}

/// Removes the folder of a branch that is there.
pub fn remove(work: &Path) -> Result<(), Failure> {
    fs::remove_dir_all(work)
        .map_err(|error| Failure::new(format!("cannot remove `{}`: {error}", work.display())))
}

/// Checks that a folder finished by an earlier run is unchanged, and removes a leftover journal.
fn check_found(work: &Path) -> Result<(), Failure> {
    let journal = work.join(JOURNAL_FILE);
    if journal.exists() {
        // Killed between the last rename and the end.
        fs::remove_file(&journal).map_err(|error| {
            Failure::new(format!("cannot remove `{}`: {error}", journal.display()))
        })?;
    }
    match check_folder(work)?.first_fault() {
        None => Ok(()),
        Some(wrong) => Err(Failure::with_hint(
            format!("`{}`: {wrong}", work.display()),
            "delete the folder, and the same command makes it again",
        )),
    }
}

fn published(permutation: &Permutation) -> Permutation {
    let mut permutation = permutation.clone();
    permutation.calibration.dataset = public_name(&permutation.calibration.dataset);
    permutation
}

fn write(path: &Path, content: &[u8]) -> Result<(), Failure> {
    replace(path, content)
        .map_err(|error| Failure::new(format!("cannot write `{}`: {error}", path.display())))
}
