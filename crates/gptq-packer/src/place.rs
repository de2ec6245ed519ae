//! The place where a checkpoint is to appear: free, writable, and one process's alone.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::durable::{make_folders, parent_of, remove_empty};
use crate::layout::CheckpointLayout;
use crate::lock::FolderLock;
use crate::stage::{StageError, StagedCheckpoint, io_error};

/// A folder to be written, which no other process can claim while this value lives.
#[derive(Debug)]
pub struct ClaimedPlace {
    pub(crate) out_dir: PathBuf,
    pub(crate) partial: PathBuf,
    // Given up in this order: the lock lies in the folders.
    pub(crate) lock: FolderLock,
    _made: MadeFolders,
}

/// Folders above the output that were made for it, the deepest first; they go where nothing came to
/// lie in them.
#[derive(Debug)]
struct MadeFolders(Vec<PathBuf>);

impl Drop for MadeFolders {
    fn drop(&mut self) {
        remove_empty(&self.0);
    }
}

impl ClaimedPlace {
    /// Claims `out_dir` with the lock `.{name}.lock` next to it. Missing parent folders are made.
    ///
    /// # Errors
    /// An `out_dir` that is not empty, no folder, a dangling link, or not replaceable by a rename; a parent
    /// folder that cannot be written; another process that holds the lock. Nothing changes then.
    pub fn claim(out_dir: &Path) -> Result<Self, StageError> {
        let out_dir = vacant(out_dir)?;
        let partial = partial_path(&out_dir)?;
        let parent = parent_of(&out_dir);
        let made = make_folders(&parent).map_err(io_error("create", &parent))?;
        let made = MadeFolders(made);
        let lock = FolderLock::acquire(&beside(&out_dir, ".lock")?)?;
        // Another process may have published while this one waited for nothing.
        vacant(&out_dir)?;
        Ok(ClaimedPlace {
            out_dir,
            partial,
            lock,
            _made: made,
        })
    }

    /// The folder that holds the files until they are published.
    pub fn partial_dir(&self) -> &Path {
        &self.partial
    }

    /// The warning to show the user about the lock, if any.
    pub fn warning(&self) -> Option<String> {
        self.lock.is_line_only().then(|| {
            format!(
                "`{}` lies on a file system without locks: two processes that begin at the same \
                 moment on different machines are not kept apart",
                parent_of(&self.out_dir).display()
            )
        })
    }

    /// Begins a checkpoint; see [`StagedCheckpoint::create`]. The disk must have room for `beside_shards`
    /// bytes in addition to the weight files.
    ///
    /// # Errors
    /// A partial folder of an earlier run, a disk without room. Nothing is left behind then.
    pub fn create(
        self,
        layout: &CheckpointLayout,
        beside_shards: u64,
    ) -> Result<StagedCheckpoint, StageError> {
        StagedCheckpoint::begin_in(self, layout, beside_shards)
    }

    /// Takes up the partial folder of an earlier run; see [`StagedCheckpoint::reopen`].
    pub fn reopen(self, layout: &CheckpointLayout) -> Result<StagedCheckpoint, StageError> {
        StagedCheckpoint::reopen_in(self, layout)
    }

    /// Removes the partial folder of an earlier run; returns whether there was one.
    pub fn discard_partial(&self) -> Result<bool, StageError> {
        match fs::remove_dir_all(&self.partial) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
            Err(source) => Err(io_error("remove", &self.partial)(source)),
        }
    }
}

/// The folder in which a checkpoint for `out_dir` is built: `.{name}.partial` next to it, so that the
/// final rename stays on one file system.
pub fn partial_path(out_dir: &Path) -> Result<PathBuf, StageError> {
    beside(out_dir, ".partial")
}

/// Removes the partial folder of an earlier run; returns whether there was one.
///
/// # Errors
/// A partial folder that another process is writing.
pub fn discard_partial(out_dir: &Path) -> Result<bool, StageError> {
    match partial_path(&vacant(out_dir)?)?.exists() {
        true => ClaimedPlace::claim(out_dir)?.discard_partial(),
        false => Ok(false),
    }
}

fn beside(out_dir: &Path, ending: &str) -> Result<PathBuf, StageError> {
    let name = out_dir
        .file_name()
        .ok_or_else(|| StageError::BadName(out_dir.to_path_buf()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(ending);
    Ok(out_dir.with_file_name(hidden))
}

/// The absolute path, which is free: nothing there, or an empty folder that a rename can replace.
fn vacant(out_dir: &Path) -> Result<PathBuf, StageError> {
    match fs::symlink_metadata(out_dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let path = std::path::absolute(out_dir).map_err(io_error("resolve", out_dir))?;
            return match path.file_name() {
                Some(_) => Ok(path),
                None => Err(StageError::BadName(out_dir.to_path_buf())),
            };
        }
        Err(source) => return Err(io_error("look at", out_dir)(source)),
        Ok(found) if found.is_symlink() && !out_dir.exists() => {
            return Err(StageError::LeadsNowhere(out_dir.to_path_buf()));
        }
        Ok(_) => {}
    }
    let path = fs::canonicalize(out_dir).map_err(io_error("resolve", out_dir))?;
    let occupied = !path.is_dir()
        || fs::read_dir(&path)
            .map_err(io_error("read", &path))?
            .next()
            .is_some();
    if occupied {
        return Err(StageError::Occupied(path));
    }
    match is_mount_point(&path)? {
        true => Err(StageError::MountPoint(path)),
        false => Ok(path),
    }
}

/// A folder of another file system than the one above, or one that is bound to its place: rename(2)
/// replaces neither.
fn is_mount_point(path: &Path) -> Result<bool, StageError> {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
    let here = device(path).map_err(io_error("read", path))?;
    let above = device(&parent_of(path)).map_err(io_error("read", path))?;
    // Without /proc only the first kind is known.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let bound = mounts
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .any(|place| unescaped(place) == path.as_os_str().as_bytes());
    Ok(here != above || bound)
}

/// proc(5) writes blanks of a path as `\040` and so on.
fn unescaped(place: &str) -> Vec<u8> {
    let (mut bytes, mut rest) = (Vec::new(), place.as_bytes());
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        let escaped = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match escaped.filter(|_| first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_could_not_be_published_is_refused_and_left_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        symlink("nowhere", at("dangling")).unwrap();
        symlink("loop", at("loop")).unwrap();
        fs::write(at("file"), "x").unwrap();
        symlink("file", at("to-file")).unwrap();
        fs::create_dir(at("full")).unwrap();
        fs::write(at("full/x"), "x").unwrap();
        let before = fs::read_dir(folder.path()).unwrap().count();
        for name in ["dangling", "loop"] {
            let error = ClaimedPlace::claim(&at(name)).unwrap_err();
            assert!(matches!(error, StageError::LeadsNowhere(_)), "{error}");
        }
        for name in ["file", "to-file", "full"] {
            let error = ClaimedPlace::claim(&at(name)).unwrap_err();
            assert!(matches!(error, StageError::Occupied(_)), "{error}");
        }
        ClaimedPlace::claim(&at("file/below")).unwrap_err();
        ClaimedPlace::claim(Path::new("/proc/sys")).unwrap_err();
        ClaimedPlace::claim(Path::new("/proc/new")).unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), before);
    }

    #[test]
    fn a_claim_leaves_nothing_and_keeps_others_out() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("a/b/out");
        let claim = ClaimedPlace::claim(&out).unwrap();
        let error = ClaimedPlace::claim(&out).unwrap_err().to_string();
        assert!(error.contains(&std::process::id().to_string()), "{error}");
        drop(claim);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

        fs::create_dir(folder.path().join("real")).unwrap();
        symlink("real", folder.path().join("link")).unwrap();
        let claim = ClaimedPlace::claim(&folder.path().join("link")).unwrap();
        assert!(claim.partial_dir().ends_with(".real.partial"));
    }

    #[test]
    fn paths_of_mounts_are_read() {
        assert_eq!(unescaped(r"/a\040b\134c"), b"/a b\\c");
        assert_eq!(unescaped(r"/end\04"), br"/end\04");
        assert!(is_mount_point(Path::new("/proc")).unwrap());
    }
}
