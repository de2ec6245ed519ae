//! The files of a branch as its tree names them. A tree is written by whoever made the repository:
//! its names choose no path, and its sizes no memory, before they are looked at here.

use std::collections::BTreeMap;

use git2::{ObjectType, Oid};
use gptq_types::ContentHash;
use gptq_types::outside_name::{file_name, shown};

use crate::lfs::{MAX_POINTER, Pointer};
use crate::loose::check_loose;
use crate::{Repository, RepositoryError};

/// Largest commit or tree that is read, bytes; one of ours has less than a kilobyte.
const MAX_TREE_BYTES: usize = 4 << 20;
/// Largest file that is read out of git itself, bytes: larger ones lie in the LFS store.
const MAX_PLAIN_BYTES: usize = 256 << 20;
const SHOWN: usize = 80;

/// A file of a branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BranchFile {
    /// Its name: one normal component of a path. Branches have no folders.
    pub name: String,
    /// Bytes of its content, wherever they lie.
    pub bytes: u64,
    /// Git's id of what stands in the tree: the content, or the pointer to it.
    pub git_oid: String,
    /// sha256 where the content lies in the LFS store.
    pub oid: Option<ContentHash>,
}

impl Repository {
    /// The files of a branch, by name.
    ///
    /// Fails on names that are no file directly in a folder, that are there twice or differ in case
    /// alone, on entries that are no files (folders, links, submodules), on damaged LFS pointers and
    /// on sizes that no file of a checkpoint has.
    pub fn files(&self, branch: &str) -> Result<Vec<BranchFile>, RepositoryError> {
        let tree = self.tree(branch)?;
        let mut names = BTreeMap::new();
        let mut files = Vec::new();
        for entry in &tree {
            let name = String::from_utf8_lossy(entry.name_bytes()).into_owned();
            let refused = |reason: String| RepositoryError::Entry {
                branch: branch.to_string(),
                file: shown(&name, SHOWN),
                reason,
            };
            file_name(&name).map_err(|source| RepositoryError::Name {
                branch: branch.to_string(),
                source,
            })?;
            if entry.name_bytes() != name.as_bytes() {
                return Err(refused("its name is not UTF-8".to_string()));
            }
            if let Some(kind) = other_than_a_file(entry.filemode()) {
                return Err(refused(format!("it is {kind}; branches hold files alone")));
            }
            if let Some(other) = names.insert(name.to_lowercase(), name.clone()) {
                let other = shown(&other, SHOWN);
                return Err(refused(format!(
                    "`{other}` is the same file on some systems"
                )));
            }
            files.push(self.file(branch, name, entry.id())?);
        }
        Ok(files)
    }

    fn file(&self, branch: &str, name: String, id: Oid) -> Result<BranchFile, RepositoryError> {
        let bytes = self.blob_bytes(branch, &name, id)?;
        let pointer = match bytes <= MAX_POINTER {
            true => self.pointer(branch, &name, id)?,
            false => None,
        };
        Ok(BranchFile {
            name,
            bytes: pointer
                .as_ref()
                .map_or(bytes as u64, |pointer| pointer.size),
            git_oid: id.to_string(),
            oid: pointer.map(|pointer| pointer.oid),
        })
    }

    /// Content of a small file as it stands in git; `None` where the branch has no such file.
    ///
    /// Fails like [`Repository::files`], and where an LFS pointer stands in its place.
    pub fn read(&self, branch: &str, name: &str) -> Result<Option<Vec<u8>>, RepositoryError> {
        let files = self.files(branch)?;
        match files.iter().find(|file| file.name == name) {
            Some(file) => self.plain(branch, file).map(Some),
            None => Ok(None),
        }
    }

    /// Content of a file that lies in git itself.
    pub(crate) fn plain(
        &self,
        branch: &str,
        file: &BranchFile,
    ) -> Result<Vec<u8>, RepositoryError> {
        let id = Oid::from_str(&file.git_oid).map_err(self.failed("read a tree"))?;
        match self.pointer(branch, &file.name, id)? {
            Some(_) => Err(RepositoryError::Entry {
                branch: branch.to_string(),
                file: shown(&file.name, SHOWN),
                reason: "it is an LFS pointer, and should be a small file".to_string(),
            }),
            None => self.blob(branch, id),
        }
    }

    fn pointer(
        &self,
        branch: &str,
        name: &str,
        id: Oid,
    ) -> Result<Option<Pointer>, RepositoryError> {
        let content = self.blob(branch, id)?;
        Pointer::parse(&content).map_err(|reason| RepositoryError::Entry {
            branch: branch.to_string(),
            file: shown(name, SHOWN),
            reason: reason.to_string(),
        })
    }

    fn blob(&self, branch: &str, id: Oid) -> Result<Vec<u8>, RepositoryError> {
        let blob = self.git.find_blob(id);
        let blob = blob.map_err(self.failed(&format!("read branch `{branch}`")))?;
        Ok(blob.content().to_vec())
    }

    /// Size of a blob, from its header alone: a few kilobytes of git can hold gigabytes of zeros.
    fn blob_bytes(&self, branch: &str, name: &str, id: Oid) -> Result<usize, RepositoryError> {
        let (bytes, kind) = self.header(branch, id)?;
        let refused = |reason: String| RepositoryError::Entry {
            branch: branch.to_string(),
            file: shown(name, SHOWN),
            reason,
        };
        match kind {
            ObjectType::Blob if bytes <= MAX_PLAIN_BYTES => Ok(bytes),
            ObjectType::Blob => Err(refused(format!(
                "it has {bytes} bytes in git itself; more than {MAX_PLAIN_BYTES} belong to the LFS store"
            ))),
            other => Err(refused(format!("its object is a {other}"))),
        }
    }

    /// The tree at the tip of a branch.
    pub(crate) fn tree(&self, branch: &str) -> Result<git2::Tree<'_>, RepositoryError> {
        let commit = self.commit(branch)?;
        self.check_small(branch, commit.tree_id(), ObjectType::Tree)?;
        (commit.tree()).map_err(self.failed(&format!("read branch `{branch}`")))
    }

    /// Refuses an object of another kind, or larger than a commit or tree has any reason to be.
    pub(crate) fn check_small(
        &self,
        branch: &str,
        id: Oid,
        wanted: ObjectType,
    ) -> Result<(), RepositoryError> {
        let (bytes, kind) = self.header(branch, id)?;
        match kind == wanted && bytes <= MAX_TREE_BYTES {
            true => Ok(()),
            false => Err(RepositoryError::Entry {
                branch: branch.to_string(),
                file: id.to_string(),
                reason: format!("a {kind} of {bytes} bytes where a {wanted} belongs"),
            }),
        }
    }

    fn header(&self, branch: &str, id: Oid) -> Result<(usize, ObjectType), RepositoryError> {
        check_loose(&self.git.path().join("objects"), id).map_err(|error| {
            RepositoryError::Entry {
                branch: branch.to_string(),
                file: id.to_string(),
                reason: format!("its object is damaged: {error}"),
            }
        })?;
        let header = (self.git.odb()).and_then(|objects| objects.read_header(id));
        header.map_err(self.failed(&format!("read branch `{branch}`")))
    }
}

/// The kind of an entry by its mode; `None` for a file.
fn other_than_a_file(mode: i32) -> Option<&'static str> {
    match mode {
        // The last is that of git before 2005, which old repositories still hold.
        0o100_644 | 0o100_755 | 0o100_664 => None,
        0o040_000 => Some("a folder"),
        0o120_000 => Some("a symbolic link"),
        0o160_000 => Some("a submodule"),
        _ => Some("of an unknown mode"),
    }
}
