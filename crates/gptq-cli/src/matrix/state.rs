//! The state of a matrix, kept in its repository so that the same command resumes where it stopped.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_pipeline::check_permutations;
use gptq_report::CardInfo;
use gptq_repository::check_branch_names;
use gptq_types::outside_name::shown;
use gptq_types::{ContentHash, Permutation};
use serde::{Deserialize, Serialize};

use super::lock::Lock;
use crate::failure::Failure;
use crate::models::Model;

const FOLDER: &str = "gptq";
const FILE: &str = "matrix.json";
/// Largest file that is read back: the record of a model with 100,000 linears has 50 MB.
const MAX_BYTES: u64 = 64 << 20;

/// The text that branches are scored on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub dataset: String,
    pub seq_len: usize,
    pub max_windows: Option<usize>,
    /// Absent where nothing was asked for, and in older repositories.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bos: Option<bool>,
}

/// The matrix as it was first asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The model as published.
    pub model: String,
    /// Identity of its weights; unknown in repositories from before it was kept, and until the
    /// weights were read.
    #[serde(default)]
    pub weights_sha256: Option<ContentHash>,
    /// sha256 of its config.json, its tokenizer and what else travels with it, by file; empty in
    /// repositories from before it was kept.
    #[serde(default)]
    pub files: BTreeMap<String, ContentHash>,
    pub tool: String,
    pub model_type: String,
    pub branches: Vec<Permutation>,
    pub evaluation: Option<Evaluation>,
    /// False in repositories from before there was a choice.
    #[serde(default)]
    pub shared_hessian: bool,
    pub card: CardInfo,
}

impl State {
    /// Folder of everything that is not git's.
    pub fn folder(repository: &Path) -> PathBuf {
        repository.join(FOLDER)
    }

    /// The work folder of a branch.
    pub fn work(repository: &Path, branch: &str) -> PathBuf {
        let name = branch.replace('/', "%2F");
        Self::folder(repository).join("work").join(name)
    }

    /// The full run record of a branch, times included.
    pub fn record(repository: &Path, branch: &str) -> PathBuf {
        let name = format!("{}.json", branch.replace('/', "%2F"));
        Self::folder(repository).join("records").join(name)
    }

    /// Hashes of the files that identify a model, apart from its weights.
    pub fn hash_files(model: &Model) -> Result<BTreeMap<String, ContentHash>, Failure> {
        let mut files = BTreeMap::new();
        files.insert(
            "config.json".to_string(),
            ContentHash::of(model.config_json.as_bytes()),
        );
        for path in model.companions() {
            let content = fs::read(&path).map_err(|error| {
                Failure::new(format!("cannot read `{}`: {error}", path.display()))
            })?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            files.insert(name.into_owned(), ContentHash::of(&content));
        }
        Ok(files)
    }

    /// Reads the stored state; `None` in a repository without a matrix.
    pub fn read(repository: &Path) -> Result<Option<Self>, Failure> {
        let path = Self::folder(repository).join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let wrong = |reason: &str| {
            let reason = shown(reason, 200);
            Failure::new(format!("`{}`: {reason}", path.display()))
        };
        let text = read_own(&path)?;
        let state: State =
            serde_json::from_str(&text).map_err(|error| wrong(&error.to_string()))?;
        check_permutations(&state.branches).map_err(|error| wrong(&error.to_string()))?;
        let names = state.branches.iter().map(|branch| branch.branch.as_str());
        check_branch_names(names).map_err(|error| wrong(&error.to_string()))?;
        Ok(Some(state))
    }

    /// Refuses to go on with the matrix of another model, text or setting.
    pub fn refuse_other(&self, repository: &Path) -> Result<(), Failure> {
        match Self::read(repository)? {
            Some(before) => before.check(self, repository),
            None => Ok(()),
        }
    }

    /// Keeps the state; refuses to go on with another one. Branches may be added, and the card may
    /// change.
    pub fn keep(&self, repository: &Path) -> Result<(), Failure> {
        let _lock = Lock::of_state(repository)?;
        let before = Self::read(repository)?;
        if before.as_ref() == Some(self) {
            return Ok(());
        }
        let mut kept = self.clone();
        if let Some(before) = before {
            before.check(self, repository)?;
            kept.weights_sha256 = kept.weights_sha256.or(before.weights_sha256);
            let gone = (before.branches.into_iter())
                .filter(|branch| self.branches.iter().all(|b| b.branch != branch.branch));
            kept.branches.extend(gone);
            // The name of an existing branch and that of a requested one may exclude each other.
            check_branch_names(kept.branches.iter().map(|branch| branch.branch.as_str()))?;
        }
        let folder = Self::folder(repository);
        let failed = |error: std::io::Error| {
            Failure::new(format!("cannot write `{}`: {error}", folder.display()))
        };
        for inner in ["work", "records"] {
            fs::create_dir_all(folder.join(inner)).map_err(failed)?;
        }
        let text = serde_json::to_string_pretty(&kept)?;
        replace(&folder.join(FILE), text.as_bytes()).map_err(failed)
    }

    fn check(&self, now: &State, repository: &Path) -> Result<(), Failure> {
        let differs = |what: String, found: String, wanted: String| {
            let text = format!(
                "the matrix in `{}` has another {what}: {}, now {}",
                repository.display(),
                shown(&found, 200),
                shown(&wanted, 200)
            );
            Err(Failure::with_hint(
                text,
                "repeat the command that began it, or name another repository",
            ))
        };
        for (what, found, wanted) in [
            ("model", &self.model, &now.model),
            ("tool", &self.tool, &now.tool),
        ] {
            if found != wanted {
                return differs(what.to_string(), found.clone(), wanted.clone());
            }
        }
        // Files that no one asked about then are no reason to stop now.
        for (name, found) in &self.files {
            let wanted = now.files.get(name);
            if wanted != Some(found) {
                let wanted = wanted.map_or("absent".to_string(), ContentHash::to_string);
                return differs(format!("`{name}`"), format!("sha256 {found}"), wanted);
            }
        }
        if let Some(name) = now
            .files
            .keys()
            .find(|name| !self.files.contains_key(*name))
            && !self.files.is_empty()
        {
            return differs(
                format!("`{name}`"),
                "absent".to_string(),
                "there".to_string(),
            );
        }
        if let (Some(found), Some(wanted)) = (&self.weights_sha256, &now.weights_sha256)
            && found != wanted
        {
            let text = |hash: &ContentHash| format!("identity {hash}");
            return differs("model's weights".to_string(), text(found), text(wanted));
        }
        if self.shared_hessian != now.shared_hessian {
            let text = |shared: bool| if shared { "shared" } else { "exact" }.to_string();
            let (found, wanted) = (text(self.shared_hessian), text(now.shared_hessian));
            return differs("kind of Hessians".to_string(), found, wanted);
        }
        if self.evaluation != now.evaluation {
            let text = |e: &Option<Evaluation>| serde_json::to_string(e).unwrap_or_default();
            let (found, wanted) = (text(&self.evaluation), text(&now.evaluation));
            return differs("evaluation".to_string(), found, wanted);
        }
        for branch in &now.branches {
            let before = self.branches.iter().find(|b| b.branch == branch.branch);
            if let Some(before) = before
                && (&before.spec, &before.calibration) != (&branch.spec, &branch.calibration)
            {
                let text = |b: &Permutation| {
                    serde_json::to_string(&(&b.spec, &b.calibration)).unwrap_or_default()
                };
                let what = format!("branch `{}`", branch.branch);
                return differs(what, text(before), text(branch));
            }
        }
        Ok(())
    }
}

/// A file that this tool wrote: no pipe, and of no more bytes than it ever has.
pub fn read_own(path: &Path) -> Result<String, Failure> {
    let failed = |reason: &str| Failure::new(format!("cannot read `{}`: {reason}", path.display()));
    let found = fs::metadata(path).map_err(|error| failed(&error.to_string()))?;
    match found.is_file() && found.len() <= MAX_BYTES {
        true => fs::read_to_string(path).map_err(|error| failed(&error.to_string())),
        false => Err(failed("it is no file of at most 64 MB")),
    }
}

/// Replaces a file atomically: writes a temporary file in its folder, syncs, renames.
pub fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    let folder = path.parent().unwrap_or(Path::new("."));
    // Temporary files are private to the owner; this one gets the mode of any new file.
    let readable = std::fs::Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new()
        .permissions(readable)
        .tempfile_in(folder)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}
