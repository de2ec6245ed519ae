//! Locks that admit one process at a time: one for each branch, one for the repository's state.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use gptq_packer::{FolderLock, LockError};

use super::state::State;
use crate::failure::Failure;

const PAUSE: Duration = Duration::from_millis(100);

/// Held until it is dropped.
pub struct Lock(Option<FolderLock>);

/// Taken, or why not: the sentence names the holder.
pub enum Asked {
    Taken(Lock),
    Held(String),
}

impl Lock {
    /// The lock of a branch, if it is free.
    pub fn ask(repository: &Path, branch: &str) -> Result<Asked, Failure> {
        let folder = State::folder(repository).join("locks");
        fs::create_dir_all(&folder).map_err(|error| {
            Failure::new(format!("cannot create `{}`: {error}", folder.display()))
        })?;
        match FolderLock::acquire(&folder.join(branch.replace('/', "%2F"))) {
            Ok(lock) => {
                if lock.is_line_only() {
                    eprintln!(
                        "warning: `{}` knows no locks: let one process alone work there",
                        folder.display()
                    );
                }
                Ok(Asked::Taken(Lock(Some(lock))))
            }
            Err(error @ LockError::Io { .. }) => Err(Failure::new(error.to_string())),
            Err(held) => Ok(Asked::Held(held.to_string())),
        }
    }

    /// The lock of a branch, when its holder has ended with it or is dead.
    pub fn wait(repository: &Path, branch: &str) -> Result<Lock, Failure> {
        loop {
            match Lock::ask(repository, branch)? {
                Asked::Taken(lock) => return Ok(lock),
                Asked::Held(_) => thread::sleep(PAUSE),
            }
        }
    }

    /// The lock of `matrix.json`, which is held for a moment; no branch has such a name.
    pub fn of_state(repository: &Path) -> Result<Lock, Failure> {
        Lock::wait(repository, ".matrix")
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // With its file, also where a killed process had left that.
        if let Some(lock) = self.0.take() {
            lock.release();
        }
    }
}
