//! A bare repository: its branches and their files.

use std::fs;
use std::path::{Path, PathBuf};

use git2::{ErrorCode, Repository as Git, RepositoryInitOptions};

use crate::RepositoryError;
use crate::lfs::{Pointer, Store};

/// A bare git repository on this machine.
pub struct Repository {
    pub(crate) git: Git,
    pub(crate) store: Store,
    path: PathBuf,
}

/// A file of a branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchFile {
    /// Its name; branches have no folders.
    pub name: String,
    /// Bytes of its content, wherever they lie.
    pub bytes: u64,
    /// Git's id of what stands in the tree: the content, or the pointer to it.
    pub git_oid: String,
    /// sha256 where the content lies in the LFS store.
    pub oid: Option<String>,
}

impl Repository {
    /// Opens a repository or makes one in a folder that does not exist or is empty. `head` is the
    /// branch that a clone without a name gets.
    pub fn open_or_create(path: &Path, head: &str) -> Result<Self, RepositoryError> {
        let occupied = match fs::read_dir(path) {
            Ok(mut entries) => entries.next().is_some(),
            Err(_) => path.exists(),
        };
        if occupied {
            return match Self::open(path) {
                Err(RepositoryError::NotARepository(_)) => {
                    Err(RepositoryError::Occupied(path.to_path_buf()))
                }
                opened => opened,
            };
        }
        let mut options = RepositoryInitOptions::new();
        options
            .bare(true)
            .initial_head(head)
            .external_template(false);
        let git = Git::init_opts(path, &options).map_err(failed("make a repository", path))?;
        Ok(Self::with(git, path))
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

    /// Where it lies.
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
            let name = reference.name().unwrap_or_default();
            names.extend(name.strip_prefix("refs/heads/").map(str::to_string));
        }
        names.sort();
        Ok(names)
    }

    /// Whether there is such a branch.
    pub fn has(&self, branch: &str) -> bool {
        self.git.find_reference(&head_of(branch)).is_ok()
    }

    /// Commit id at the tip of a branch.
    pub fn tip(&self, branch: &str) -> Result<String, RepositoryError> {
        Ok(self.commit(branch)?.id().to_string())
    }

    /// The files of a branch, by name.
    pub fn files(&self, branch: &str) -> Result<Vec<BranchFile>, RepositoryError> {
        let tree = self.tree(branch)?;
        (tree.iter())
            .map(|entry| {
                let found = self.git.find_blob(entry.id());
                let blob = found.map_err(self.failed(&format!("read branch `{branch}`")))?;
                let pointer = Pointer::parse(blob.content());
                Ok(BranchFile {
                    name: entry.name().unwrap_or_default().to_string(),
                    bytes: pointer.as_ref().map_or(blob.size() as u64, |p| p.size),
                    git_oid: entry.id().to_string(),
                    oid: pointer.map(|p| p.oid),
                })
            })
            .collect()
    }

    /// Content of a small file as it stands in git; `None` where the branch has no such file.
    pub fn read(&self, branch: &str, name: &str) -> Result<Option<Vec<u8>>, RepositoryError> {
        let tree = self.tree(branch)?;
        let Some(entry) = tree.get_name(name) else {
            return Ok(None);
        };
        let blob =
            (self.git.find_blob(entry.id())).map_err(self.failed(&format!("read `{name}`")))?;
        Ok(Some(blob.content().to_vec()))
    }

    /// Writes the files of a branch into a new or empty folder; LFS objects are copied.
    pub fn checkout(&self, branch: &str, folder: &Path) -> Result<(), RepositoryError> {
        let files = self.files(branch)?;
        for file in files.iter().filter(|file| file.oid.is_some()) {
            self.check_object(branch, file)?;
        }
        fs::create_dir_all(folder).map_err(RepositoryError::io("create", folder))?;
        for file in files {
            let target = folder.join(&file.name);
            match &file.oid {
                Some(oid) => {
                    let object = self.store.path(oid);
                    fs::copy(&object, &target).map_err(RepositoryError::io("copy", &object))?;
                }
                None => {
                    let content = self.read(branch, &file.name)?.unwrap_or_default();
                    fs::write(&target, content).map_err(RepositoryError::io("write", &target))?;
                }
            }
        }
        Ok(())
    }

    /// Where the content of an LFS file of a branch lies; it is there at its full length.
    pub fn object(&self, branch: &str, file: &BranchFile) -> Result<PathBuf, RepositoryError> {
        self.check_object(branch, file)?;
        Ok(self.store.path(file.oid.as_deref().unwrap_or_default()))
    }

    fn check_object(&self, branch: &str, file: &BranchFile) -> Result<(), RepositoryError> {
        let oid = file.oid.clone().unwrap_or_default();
        let pointer = Pointer {
            oid: oid.clone(),
            size: file.bytes,
        };
        match self.store.holds(&pointer) {
            true => Ok(()),
            false => Err(RepositoryError::MissingObject {
                branch: branch.to_string(),
                file: file.name.clone(),
                oid,
            }),
        }
    }

    pub(crate) fn commit(&self, branch: &str) -> Result<git2::Commit<'_>, RepositoryError> {
        let reference = self.git.find_reference(&head_of(branch));
        match reference {
            Ok(reference) => (reference.peel_to_commit())
                .map_err(self.failed(&format!("read branch `{branch}`"))),
            Err(error) if error.code() == ErrorCode::NotFound => Err(RepositoryError::NoBranch {
                path: self.path.clone(),
                branch: branch.to_string(),
            }),
            Err(error) => Err(self.failed(&format!("read branch `{branch}`"))(error)),
        }
    }

    pub(crate) fn tree(&self, branch: &str) -> Result<git2::Tree<'_>, RepositoryError> {
        (self.commit(branch)?.tree()).map_err(self.failed(&format!("read branch `{branch}`")))
    }

    pub(crate) fn failed(&self, doing: &str) -> impl FnOnce(git2::Error) -> RepositoryError {
        failed(doing, &self.path)
    }
}

/// Full name of a branch.
pub(crate) fn head_of(branch: &str) -> String {
    format!("refs/heads/{branch}")
}

fn failed(doing: &str, path: &Path) -> impl FnOnce(git2::Error) -> RepositoryError {
    let (doing, path) = (doing.to_string(), path.to_path_buf());
    move |source| RepositoryError::Git {
        doing,
        path,
        source,
    }
}
