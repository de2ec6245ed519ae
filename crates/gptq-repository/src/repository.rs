//! A bare repository: its branches and their files.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use git2::{ErrorCode, ObjectType, Repository as Git};
use gptq_types::ContentHash;
use gptq_types::outside_name::{file_name, shown};

use crate::lfs::{Pointer, Store, hash_into};
use crate::make::{is_vacant, make};
use crate::{BranchFile, RepositoryError};

/// A bare git repository on this machine.
pub struct Repository {
    pub(crate) git: Git,
    pub(crate) store: Store,
    path: PathBuf,
}

impl Repository {
    /// Opens a repository or makes one in a folder that does not exist or is empty. `head` is the
    /// branch that a clone without a name gets. Several processes may do so at the same time.
    pub fn open_or_create(path: &Path, head: &str) -> Result<Self, RepositoryError> {
        if let Ok(opened) = Self::open(path) {
            return Ok(opened);
        }
        if !is_vacant(path) {
            // Or another process has finished it since.
            return Self::open(path).map_err(|_| RepositoryError::Occupied(path.to_path_buf()));
        }
        make(path, head)?;
        Self::open(path)
    }

    /// Opens a repository that is there.
    pub fn open(path: &Path) -> Result<Self, RepositoryError> {
        match Git::open_bare(path) {
            Ok(git) => Ok(Self::with(git, path)),
            Err(_) => Err(RepositoryError::NotARepository(path.to_path_buf())),
        }
    }

    fn with(git: Git, path: &Path) -> Self {
        Repository {
            git,
            store: Store::of(path),
            path: path.to_path_buf(),
        }
    }

    /// The path of the repository.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All branches, by name.
    pub fn branches(&self) -> Result<Vec<String>, RepositoryError> {
        let listed = self.git.references_glob("refs/heads/*");
        let references = listed.map_err(self.failed("list branches"))?;
        let mut names = Vec::new();
        for reference in references {
            let reference = reference.map_err(self.failed("list branches"))?;
            let name = String::from_utf8_lossy(reference.name_bytes()).into_owned();
            let Some(branch) = name.strip_prefix("refs/heads/") else {
                continue;
            };
            if name.as_bytes() != reference.name_bytes() {
                return Err(RepositoryError::BranchName {
                    branch: shown(branch, 80),
                    reason: "it is not UTF-8".to_string(),
                });
            }
            names.push(branch.to_string());
        }
        names.sort();
        Ok(names)
    }

    /// Whether the branch exists.
    pub fn has(&self, branch: &str) -> bool {
        self.git.find_reference(&head_of(branch)).is_ok()
    }

    /// Commit id at the tip of a branch.
    pub fn tip(&self, branch: &str) -> Result<String, RepositoryError> {
        Ok(self.commit(branch)?.id().to_string())
    }

    /// Writes the files of a branch into a folder that does not exist; LFS objects are copied, and
    /// hashed on the way. All names are looked at before the first file is made; an error leaves
    /// nothing.
    pub fn checkout(&self, branch: &str, folder: &Path) -> Result<(), RepositoryError> {
        let files = self.files(branch)?;
        for file in &files {
            self.check_presence(branch, file)?;
        }
        fs::create_dir(folder).map_err(RepositoryError::io("create", folder))?;
        let written = (files.iter()).try_for_each(|file| self.write_file(branch, file, folder));
        if written.is_err() {
            // The first error is reported; a folder that cannot be removed either is visible to the user.
            let _ = fs::remove_dir_all(folder);
        }
        written
    }

    fn write_file(
        &self,
        branch: &str,
        file: &BranchFile,
        folder: &Path,
    ) -> Result<(), RepositoryError> {
        let named = file_name(&file.name).map_err(|source| RepositoryError::Name {
            branch: branch.to_string(),
            source,
        })?;
        let target = folder.join(named);
        let mut out = File::create_new(&target).map_err(RepositoryError::io("write", &target))?;
        match &file.oid {
            Some(oid) => self.copy_object(branch, file, oid, &mut out)?,
            None => {
                let content = self.plain(branch, file)?;
                (out.write_all(&content)).map_err(RepositoryError::io("write", &target))?;
            }
        }
        out.sync_all()
            .map_err(RepositoryError::io("write", &target))
    }

    /// The path of an LFS file's content, which is hashed on every call; `None` for a file that git itself
    /// holds.
    pub fn object(
        &self,
        branch: &str,
        file: &BranchFile,
    ) -> Result<Option<PathBuf>, RepositoryError> {
        let Some(oid) = &file.oid else {
            return Ok(None);
        };
        self.check_presence(branch, file)?;
        self.copy_object(branch, file, oid, &mut std::io::sink())?;
        Ok(Some(self.store.path(oid)))
    }

    /// Cheap, so that what is plainly missing is named before gigabytes are copied.
    fn check_presence(&self, branch: &str, file: &BranchFile) -> Result<(), RepositoryError> {
        let Some(oid) = &file.oid else {
            return Ok(());
        };
        let pointer = Pointer {
            oid: oid.clone(),
            size: file.bytes,
        };
        match self.store.may_hold(&pointer) {
            true => Ok(()),
            false => Err(RepositoryError::MissingObject {
                branch: branch.to_string(),
                file: file.name.clone(),
                oid: oid.to_string(),
            }),
        }
    }

    fn copy_object(
        &self,
        branch: &str,
        file: &BranchFile,
        oid: &ContentHash,
        out: &mut dyn Write,
    ) -> Result<(), RepositoryError> {
        let object = self.store.path(oid);
        let found = hash_into(&object, out).map_err(RepositoryError::io("copy", &object))?;
        match found.oid == *oid {
            true => Ok(()),
            false => Err(RepositoryError::DamagedObject {
                branch: branch.to_string(),
                file: file.name.clone(),
                oid: oid.to_string(),
                found: found.oid.to_string(),
            }),
        }
    }

    pub(crate) fn commit(&self, branch: &str) -> Result<git2::Commit<'_>, RepositoryError> {
        let doing = format!("read branch `{branch}`");
        let id = match self.git.refname_to_id(&head_of(branch)) {
            Ok(id) => id,
            // A name that git refuses is that of no branch.
            Err(error) if matches!(error.code(), ErrorCode::NotFound | ErrorCode::InvalidSpec) => {
                return Err(RepositoryError::NoBranch {
                    path: self.path.clone(),
                    branch: shown(branch, 80),
                });
            }
            Err(error) => return Err(self.failed(&doing)(error)),
        };
        self.check_small(branch, id, ObjectType::Commit)?;
        self.git.find_commit(id).map_err(self.failed(&doing))
    }

    pub(crate) fn failed(&self, doing: &str) -> impl FnOnce(git2::Error) -> RepositoryError {
        failed(doing, &self.path)
    }
}

/// Full name of a branch.
pub(crate) fn head_of(branch: &str) -> String {
    format!("refs/heads/{branch}")
}

pub(crate) fn failed(doing: &str, path: &Path) -> impl FnOnce(git2::Error) -> RepositoryError {
    let (doing, path) = (doing.to_string(), path.to_path_buf());
    move |source| RepositoryError::Git {
        doing,
        path,
        source,
    }
}
