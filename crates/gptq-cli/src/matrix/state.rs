//! What a repository remembers of its matrix, so that the same command goes on where it stopped.

use std::fs;
use std::path::{Path, PathBuf};

use gptq_report::CardInfo;
use gptq_types::Permutation;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::failure::Failure;

const FOLDER: &str = "gptq";
const FILE: &str = "matrix.json";

/// Which text the branches are scored on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    pub dataset: String,
    pub seq_len: usize,
    pub max_windows: Option<usize>,
}

/// The matrix as it was first asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The model as published.
    pub model: String,
    /// sha256 of its config.json.
    pub config_sha256: String,
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

    /// Where a branch is made; a file of its name keeps the full record.
    pub fn work(repository: &Path, branch: &str) -> PathBuf {
        let name = branch.replace('/', "%2F");
        Self::folder(repository).join("work").join(name)
    }

    /// The full run record of a branch, times included.
    pub fn record(repository: &Path, branch: &str) -> PathBuf {
        let name = format!("{}.json", branch.replace('/', "%2F"));
        Self::folder(repository).join("records").join(name)
    }

    pub fn hash(config_json: &str) -> String {
        let digest = Sha256::digest(config_json.as_bytes());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What is there; `None` in a repository without a matrix.
    pub fn read(repository: &Path) -> Result<Option<Self>, Failure> {
        let path = Self::folder(repository).join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let text = super::read_text(&path)?;
        let state = serde_json::from_str(&text)
            .map_err(|error| Failure::new(format!("`{}`: {error}", path.display())))?;
        Ok(Some(state))
    }

    /// Keeps the state; refuses to go on with another one. Branches may be added, and the card may
    /// change.
    pub fn keep(&self, repository: &Path) -> Result<(), Failure> {
        let before = Self::read(repository)?;
        if before.as_ref() == Some(self) {
            return Ok(());
        }
        let mut kept = self.clone();
        if let Some(before) = before {
            before.check(self, repository)?;
            let gone = (before.branches.into_iter())
                .filter(|branch| self.branches.iter().all(|b| b.branch != branch.branch));
            kept.branches.extend(gone);
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
                "the matrix in `{}` has another {what}: {found}, now {wanted}",
                repository.display()
            );
            Err(Failure::with_hint(
                text,
                "repeat the command that began it, or name another repository",
            ))
        };
        for (what, found, wanted) in [
            ("model", &self.model, &now.model),
            ("config.json", &self.config_sha256, &now.config_sha256),
            ("tool", &self.tool, &now.tool),
        ] {
            if found != wanted {
                return differs(what.to_string(), found.clone(), wanted.clone());
            }
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

/// Writes beside, syncs, renames.
pub fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    let folder = path.parent().unwrap_or(Path::new("."));
    // As readable as any other new file, not for its owner alone.
    let readable = std::fs::Permissions::from_mode(0o666);
    let mut file = tempfile::Builder::new()
        .permissions(readable)
        .tempfile_in(folder)?;
    file.write_all(content)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}
