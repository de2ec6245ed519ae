//! One process at a time: a file that its holder keeps locked, with a line that says who holds it.
//!
//! The lock is that of flock(2), which is released however its holder exits, and which NFS forwards to
//! its server. The line only names the holder in an error. On a file system without locks the line is the
//! lock, and holds until its process is dead.

use std::fs::{self, File, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gptq_types::outside_name::shown;
use serde::{Deserialize, Serialize};

/// A line of a holder has less; what is longer was not written here.
const MAX_LINE_BYTES: u64 = 4096;
/// A holder that has the lock writes its line at once; it is waited for this often.
const LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(10);

/// A lock that was not to be had.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum LockError {
    #[error("`{}` is held by process {pid} on `{host}`", path.display())]
    Held {
        path: PathBuf,
        host: String,
        pid: u32,
    },
    #[error("`{}` is held by a process that did not leave its name", path.display())]
    HeldByUnknown { path: PathBuf },
    #[error("cannot lock `{}`: {source}", path.display())]
    Io { path: PathBuf, source: io::Error },
}

impl LockError {
    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            LockError::Held { .. } | LockError::HeldByUnknown { .. } => {
                Some("wait for that process, or end it; the lock of one that is gone is taken over")
            }
            LockError::Io { .. } => None,
        }
    }
}

/// Who holds a lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Holder {
    host: String,
    pid: u32,
    /// When the process began, in clock ticks after the start of its machine: another process may
    /// get the same number later.
    began: u64,
}

/// A lock, until it is dropped.
///
/// The file goes with the lock, unless it was there before: what an interrupted process left stays
/// until [`FolderLock::release`].
#[derive(Debug)]
pub struct FolderLock {
    path: PathBuf,
    file: File,
    found: bool,
    line_only: bool,
}

impl FolderLock {
    /// Takes the lock at the file `path`, which is made if it is not there.
    ///
    /// # Errors
    /// A living process that holds it, this one included; a file that cannot be written.
    pub fn acquire(path: &Path) -> Result<Self, LockError> {
        let failed = |source| LockError::Io {
            path: path.to_path_buf(),
            source,
        };
        loop {
            let file = open(path).map_err(failed)?;
            let line_only = match file.try_lock() {
                Ok(()) => false,
                Err(TryLockError::WouldBlock) => return Err(held(path)),
                Err(TryLockError::Error(error)) if knows_no_locks(&error) => true,
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            };
            // The holder before may have removed the file between our opening and our lock.
            if !is_at(&file, path).map_err(failed)? {
                continue;
            }
            let before = read_holder(&file);
            match before {
                Some(holder) if line_only && holder.is_alive() => return Err(holder.error(path)),
                _ => {}
            }
            let found = file.metadata().map_err(failed)?.len() > 0;
            let mut lock = FolderLock {
                path: path.to_path_buf(),
                file,
                found,
                line_only,
            };
            // On a full disk the file goes again with the value.
            write_holder(&mut lock.file).map_err(failed)?;
            return Ok(lock);
        }
    }

    /// The file system has no locks, so a process on another machine that starts at the same moment is not
    /// kept out. Callers should warn the user.
    pub fn is_line_only(&self) -> bool {
        self.line_only
    }

    /// Releases the lock and removes its file, whoever made it.
    pub fn release(mut self) {
        self.found = false;
    }
}

impl Drop for FolderLock {
    fn drop(&mut self) {
        if !self.found {
            // Before the lock ends, so that nobody can take it in between. A file that stays only
            // looks untidy.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Holder {
    fn this_process() -> Self {
        let pid = std::process::id();
        Holder {
            host: host(),
            pid,
            began: began(pid).unwrap_or(0),
        }
    }

    /// Whether the process may still run; always true for one on another machine.
    fn is_alive(&self) -> bool {
        self.host != host() || began(self.pid) == Some(self.began)
    }

    fn error(self, path: &Path) -> LockError {
        LockError::Held {
            path: path.to_path_buf(),
            host: shown(&self.host, 64),
            pid: self.pid,
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    // The target of a link is not ours to write to.
    if fs::symlink_metadata(path).is_ok_and(|found| !found.is_file()) {
        return Err(io::Error::new(ErrorKind::InvalidInput, "not a plain file"));
    }
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
}

fn knows_no_locks(error: &io::Error) -> bool {
    /// "No locks available": an NFS server without a lock manager.
    const ENOLCK: i32 = 37;
    error.kind() == ErrorKind::Unsupported || error.raw_os_error() == Some(ENOLCK)
}

fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// The error that names the holder; it writes its line right after it got the lock.
fn held(path: &Path) -> LockError {
    for _ in 0..LOOKS {
        if let Some(holder) = File::open(path).ok().as_ref().and_then(read_holder) {
            return holder.error(path);
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
    LockError::HeldByUnknown {
        path: path.to_path_buf(),
    }
}

fn read_holder(mut file: &File) -> Option<Holder> {
    let mut line = String::new();
    file.rewind().ok()?;
    file.take(MAX_LINE_BYTES).read_to_string(&mut line).ok()?;
    serde_json::from_str(&line).ok()
}

fn write_holder(file: &mut File) -> io::Result<()> {
    let line = serde_json::to_string(&Holder::this_process())? + "\n";
    file.set_len(0)?;
    file.rewind()?;
    file.write_all(line.as_bytes())
}

fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    match name.trim() {
        "" => "unknown host".to_string(),
        name => name.to_string(),
    }
}

/// Field 22 of proc(5)'s stat, counted behind the name, which may hold anything.
fn began(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let behind = &stat[stat.rfind(')')? + 1..];
    behind.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid_of(error: &LockError) -> u32 {
        match error {
            LockError::Held { pid, host, .. } => {
                assert_eq!(*host, super::host());
                *pid
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn a_second_taker_learns_who_holds_it_and_a_third_gets_it_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".out.lock");
        let first = FolderLock::acquire(&path).unwrap();
        let error = FolderLock::acquire(&path).unwrap_err();
        assert_eq!(pid_of(&error), std::process::id());
        assert!(path.exists(), "the loser does not remove the winner's file");
        drop(first);
        assert!(!path.exists());
        drop(FolderLock::acquire(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn what_a_dead_process_left_is_taken_over() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(".out.lock");
        fs::write(&path, r#"{"host":"elsewhere","pid":1,"began":7}"#).unwrap();
        drop(FolderLock::acquire(&path).unwrap());
        assert!(
            path.exists(),
            "an interrupted run is not tidied up by the way"
        );
        FolderLock::acquire(&path).unwrap().release();
        assert!(!path.exists());
        fs::write(&path, [0xff; 9000]).unwrap();
        FolderLock::acquire(&path).unwrap().release();
    }

    #[test]
    fn only_one_of_many_takers_has_it_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let inside = std::sync::atomic::AtomicUsize::new(0);
        let order = std::sync::atomic::Ordering::SeqCst;
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        if let Ok(lock) = FolderLock::acquire(&path) {
                            assert_eq!(inside.fetch_add(1, order), 0);
                            inside.fetch_sub(1, order);
                            drop(lock);
                        }
                    }
                });
            }
        });
    }

    /// The line of a holder counts where there are no locks.
    #[test]
    fn the_living_are_told_from_the_dead() {
        let this = Holder::this_process();
        assert!(this.is_alive() && this.began > 0);
        let earlier = Holder {
            began: this.began - 1,
            ..this.clone()
        };
        assert!(!earlier.is_alive());
        let elsewhere = Holder {
            host: "elsewhere".to_string(),
            ..earlier
        };
        assert!(elsewhere.is_alive());
    }

    #[test]
    fn nothing_is_written_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("lock"), folder.path().join("other"));
        fs::write(&other, "x").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(matches!(
            FolderLock::acquire(&path),
            Err(LockError::Io { .. })
        ));
        assert_eq!(fs::read_to_string(&other).unwrap(), "x");
    }
}
