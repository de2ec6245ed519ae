//! A folder becomes a branch; a small file of a branch is replaced.

use std::fs;
use std::path::Path;

use git2::{Oid, Reference, Signature, Time};

use crate::lfs::{attributes, is_large};
use crate::repository::head_of;
use crate::{Repository, RepositoryError};

const ATTRIBUTES: &str = ".gitattributes";
const FILE_MODE: i32 = 0o100_644;

impl Repository {
    /// Makes `branch` of the files of `folder`, large ones through the LFS store. The branch is
    /// there when everything that it names is on disk, and not before; the folder stays.
    pub fn publish(
        &self,
        branch: &str,
        folder: &Path,
        message: &str,
    ) -> Result<(), RepositoryError> {
        if !Reference::is_valid_name(&head_of(branch)) {
            return Err(RepositoryError::BranchName(branch.to_string()));
        }
        let mut builder = (self.git.treebuilder(None)).map_err(self.failed("write a tree"))?;
        let (mut large, mut written) = (Vec::new(), Vec::new());
        let names = file_names(folder)?;
        for name in &names {
            let file = folder.join(name);
            let size = fs::metadata(&file)
                .map_err(RepositoryError::io("read", &file))?
                .len();
            let content = match is_large(name, size) {
                true => {
                    large.push(name.as_str());
                    self.store.take(&file)?.text().into_bytes()
                }
                false => fs::read(&file).map_err(RepositoryError::io("read", &file))?,
            };
            let blob = (self.git.blob(&content)).map_err(self.failed("write a blob"))?;
            (builder.insert(name, blob, FILE_MODE)).map_err(self.failed("write a tree"))?;
            written.push(blob);
        }
        let blob =
            (self.git.blob(attributes(&large).as_bytes())).map_err(self.failed("write a blob"))?;
        (builder.insert(ATTRIBUTES, blob, FILE_MODE)).map_err(self.failed("write a tree"))?;
        written.push(blob);
        let tree = builder.write().map_err(self.failed("write a tree"))?;
        self.record(branch, written, tree, message, &[])
    }

    /// Puts a small file into the tree of a branch with a commit of its own; no commit where the
    /// content is the same. True if there was one.
    pub fn replace(
        &self,
        branch: &str,
        name: &str,
        content: &[u8],
        message: &str,
    ) -> Result<bool, RepositoryError> {
        let parent = self.commit(branch)?;
        let before = self.tree(branch)?;
        let blob = self
            .git
            .blob(content)
            .map_err(self.failed("write a blob"))?;
        if before
            .get_name(name)
            .is_some_and(|entry| entry.id() == blob)
        {
            return Ok(false);
        }
        let mut builder =
            (self.git.treebuilder(Some(&before))).map_err(self.failed("write a tree"))?;
        (builder.insert(name, blob, FILE_MODE)).map_err(self.failed("write a tree"))?;
        let tree = builder.write().map_err(self.failed("write a tree"))?;
        self.record(branch, vec![blob], tree, message, &[&parent])?;
        Ok(true)
    }

    /// A commit, on disk before the branch points to it.
    fn record(
        &self,
        branch: &str,
        written: Vec<Oid>,
        tree: Oid,
        message: &str,
        parents: &[&git2::Commit<'_>],
    ) -> Result<(), RepositoryError> {
        let found = (self.git.find_tree(tree)).map_err(self.failed("write a tree"))?;
        let author = author().map_err(self.failed("sign a commit"))?;
        let commit = (self.git)
            .commit(None, &author, &author, message, &found, parents)
            .map_err(self.failed("write a commit"))?;
        for object in written.into_iter().chain([tree, commit]) {
            self.sync(&object)?;
        }
        let head = head_of(branch);
        let pointed = match parents {
            [] => self.git.reference(&head, commit, false, message),
            [parent, ..] => {
                (self.git).reference_matching(&head, commit, true, parent.id(), message)
            }
        };
        pointed.map_err(self.failed(&format!("write branch `{branch}`")))?;
        sync_file(&self.path().join(head))
    }

    /// Loose objects are files; what git has packed since is on disk already.
    fn sync(&self, object: &Oid) -> Result<(), RepositoryError> {
        let name = object.to_string();
        let path = self
            .path()
            .join("objects")
            .join(&name[..2])
            .join(&name[2..]);
        match path.exists() {
            true => sync_file(&path),
            false => Ok(()),
        }
    }
}

/// A file and its entry in the folder.
fn sync_file(path: &Path) -> Result<(), RepositoryError> {
    for place in [Some(path), path.parent()].into_iter().flatten() {
        let synced = fs::File::open(place).and_then(|file| file.sync_all());
        synced.map_err(RepositoryError::io("write", place))?;
    }
    Ok(())
}

fn file_names(folder: &Path) -> Result<Vec<String>, RepositoryError> {
    let listed = fs::read_dir(folder).map_err(RepositoryError::io("read", folder))?;
    let mut names = Vec::new();
    for entry in listed {
        let entry = entry.map_err(RepositoryError::io("read", folder))?;
        if entry.path().is_dir() {
            return Err(RepositoryError::Nested(entry.path()));
        }
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.retain(|name| name != ATTRIBUTES);
    names.sort();
    Ok(names)
}

fn author() -> Result<Signature<'static>, git2::Error> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let name = set("GIT_AUTHOR_NAME").unwrap_or_else(|| "gptq".to_string());
    let email = set("GIT_AUTHOR_EMAIL").unwrap_or_else(|| "gptq@localhost".to_string());
    match set("SOURCE_DATE_EPOCH").and_then(|seconds| seconds.parse().ok()) {
        Some(seconds) => Signature::new(&name, &email, &Time::new(seconds, 0)),
        None => Signature::now(&name, &email),
    }
}
