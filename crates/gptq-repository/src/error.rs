//! Errors of a repository.

use std::path::{Path, PathBuf};

use gptq_types::outside_name::OutsideNameError;

/// A repository that cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum RepositoryError {
    #[error("`{}` is not a git repository and not an empty folder", .0.display())]
    Occupied(PathBuf),
    #[error("`{}` is not a git repository", .0.display())]
    NotARepository(PathBuf),
    #[error("`{}` has no branch `{branch}`", path.display())]
    NoBranch { path: PathBuf, branch: String },
    #[error("`{branch}` cannot be the name of a branch: {reason}")]
    BranchName { branch: String, reason: String },
    #[error("`{}` is not a file; branches hold files alone", .0.display())]
    Nested(PathBuf),
    #[error("branch `{branch}`: {source}")]
    Name {
        branch: String,
        source: OutsideNameError,
    },
    #[error("branch `{branch}`, `{file}`: {reason}")]
    Entry {
        branch: String,
        file: String,
        reason: String,
    },
    #[error("branch `{branch}`, file `{file}`: the LFS object {oid} is missing or cut short")]
    MissingObject {
        branch: String,
        file: String,
        oid: String,
    },
    #[error("branch `{branch}`, file `{file}`: the LFS object {oid} is damaged: sha256 {found}")]
    DamagedObject {
        branch: String,
        file: String,
        oid: String,
        found: String,
    },
    #[error("SOURCE_DATE_EPOCH `{0}` is not a number of seconds")]
    Date(String),
    #[error("GIT_AUTHOR_NAME and GIT_AUTHOR_EMAIL sign no commit: {0}")]
    Author(String),
    #[error("cannot {doing} `{}`: {source}", path.display())]
    Io {
        doing: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot {doing} in `{}`: {}", path.display(), source.message())]
    Git {
        doing: String,
        path: PathBuf,
        source: git2::Error,
    },
}

impl RepositoryError {
    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            RepositoryError::Occupied(_) => Some("name a folder that does not exist yet"),
            RepositoryError::NotARepository(_) => Some("`gptq matrix MODEL -o REPO` makes one"),
            RepositoryError::MissingObject { .. } | RepositoryError::DamagedObject { .. } => {
                Some("`git lfs fsck` lists what is wrong; fetch it or make the branch again")
            }
            RepositoryError::Io { source, .. }
                if source.kind() == std::io::ErrorKind::StorageFull =>
            {
                Some("make room and repeat the command: it goes on where it stopped")
            }
            _ => None,
        }
    }

    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| RepositoryError::Io {
            doing,
            path,
            source,
        }
    }
}
