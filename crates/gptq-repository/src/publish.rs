//! A folder becomes a branch; a small file of a branch is replaced.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use git2::{ErrorCode, Oid, Signature, Time};
use gptq_types::outside_name::{file_name, shown};

use crate::folder::ATTRIBUTES;
use crate::lfs::{attributes, is_large};
use crate::repository::head_of;
use crate::{Repository, RepositoryError, check_branch_names};

const FILE_MODE: i32 = 0o100_644;
/// Longest wait for git's lock of a reference, which is held while 41 bytes are written.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
const LOCK_PAUSE: Duration = Duration::from_millis(20);

impl Repository {
    /// Makes `branch` of the files of `folder`, large ones through the LFS store. The branch is
    /// there when everything that it names is on disk, and not before; the folder stays.
    pub fn publish(
        &self,
        branch: &str,
        folder: &Path,
        message: &str,
    ) -> Result<(), RepositoryError> {
        check_branch_names([branch])?;
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
        self.record(branch, written, tree, message, None).map(drop)
    }

    /// Puts a small file into the tree of a branch with a commit of its own; no commit where the
    /// content is the same, also where another process was faster. True if there was one.
    pub fn replace(
        &self,
        branch: &str,
        name: &str,
        content: &[u8],
        message: &str,
    ) -> Result<bool, RepositoryError> {
        let blob = (self.git.blob(content)).map_err(self.failed("write a blob"))?;
        loop {
            let parent = self.commit(branch)?;
            let before = self.tree(branch)?;
            let there = before.get_name(name);
            if there.is_some_and(|entry| entry.id() == blob) {
                return Ok(false);
            }
            let mut builder =
                (self.git.treebuilder(Some(&before))).map_err(self.failed("write a tree"))?;
            (builder.insert(name, blob, FILE_MODE)).map_err(self.failed("write a tree"))?;
            let tree = builder.write().map_err(self.failed("write a tree"))?;
            if self.record(branch, vec![blob], tree, message, Some(&parent))? {
                return Ok(true);
            }
        }
    }

    /// A commit, on disk before the branch points to it. False where the branch has moved from
    /// `parent` meanwhile.
    fn record(
        &self,
        branch: &str,
        written: Vec<Oid>,
        tree: Oid,
        message: &str,
        parent: Option<&git2::Commit<'_>>,
    ) -> Result<bool, RepositoryError> {
        let found = (self.git.find_tree(tree)).map_err(self.failed("write a tree"))?;
        let author = author()?;
        let parents: Vec<&git2::Commit<'_>> = parent.into_iter().collect();
        let commit = (self.git)
            .commit(None, &author, &author, message, &found, &parents)
            .map_err(self.failed("write a commit"))?;
        for object in written.into_iter().chain([tree, commit]) {
            self.sync(&object)?;
        }
        let parent = parent.map(git2::Commit::id);
        self.point(branch, commit, parent, message)
    }

    /// Lets the branch point to `commit`, if it points to `parent` now; false if it does not.
    fn point(
        &self,
        branch: &str,
        commit: Oid,
        parent: Option<Oid>,
        message: &str,
    ) -> Result<bool, RepositoryError> {
        let head = head_of(branch);
        let begun = Instant::now();
        loop {
            let pointed = match parent {
                None => self.git.reference(&head, commit, false, message),
                Some(parent) => (self.git).reference_matching(&head, commit, true, parent, message),
            };
            match pointed {
                Ok(_) => break,
                Err(error) if parent.is_some() && error.code() == ErrorCode::Modified => {
                    return Ok(false);
                }
                // Held for less than a millisecond, unless its holder was killed there.
                Err(error)
                    if error.code() == ErrorCode::Locked && begun.elapsed() < 6 * LOCK_PATIENCE =>
                {
                    if begun.elapsed() > LOCK_PATIENCE {
                        self.break_lock(&head)?;
                    }
                    thread::sleep(LOCK_PAUSE);
                }
                Err(error) => {
                    return Err(self.failed(&format!("write branch `{branch}`"))(error));
                }
            }
        }
        let file = self.path().join(head);
        // Git may have packed it since, and synced what it packed.
        if file.exists() {
            sync_file(&file)?;
        }
        Ok(true)
    }

    /// Removes git's lock of a reference, which no living process holds for seconds.
    fn break_lock(&self, head: &str) -> Result<(), RepositoryError> {
        let lock = self.path().join(format!("{head}.lock"));
        let age = fs::metadata(&lock).and_then(|found| found.modified());
        let age = age.ok().and_then(|changed| changed.elapsed().ok());
        match age.is_some_and(|age| age > LOCK_PATIENCE) {
            true => fs::remove_file(&lock).map_err(RepositoryError::io("remove", &lock)),
            false => Ok(()),
        }
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
        let kind = entry.file_type();
        if !kind.map_err(RepositoryError::io("read", folder))?.is_file() {
            return Err(RepositoryError::Nested(entry.path()));
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        file_name(&name).map_err(|source| RepositoryError::Name {
            branch: folder.display().to_string(),
            source,
        })?;
        names.push(name);
    }
    names.retain(|name| name != ATTRIBUTES);
    names.sort();
    Ok(names)
}

/// Refuses an environment that could sign no commit, before there is anything to commit.
pub fn check_signature() -> Result<(), RepositoryError> {
    author().map(drop)
}

fn author() -> Result<Signature<'static>, RepositoryError> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let name = set("GIT_AUTHOR_NAME").unwrap_or_else(|| "gptq".to_string());
    let email = set("GIT_AUTHOR_EMAIL").unwrap_or_else(|| "gptq@localhost".to_string());
    let signature = match set("SOURCE_DATE_EPOCH") {
        Some(text) => {
            // Git writes no date before 1970, and later readers take no year of six digits.
            let seconds = text
                .parse()
                .ok()
                .filter(|seconds| (0..1 << 40).contains(seconds));
            let seconds = seconds.ok_or_else(|| RepositoryError::Date(shown(&text, 80)))?;
            Signature::new(&name, &email, &Time::new(seconds, 0))
        }
        None => Signature::now(&name, &email),
    };
    signature.map_err(|error| RepositoryError::Author(error.message().to_string()))
}
