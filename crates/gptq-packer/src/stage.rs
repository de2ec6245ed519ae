//! A checkpoint is built in a partial folder next to its final place, and renamed once complete.
//!
//! The shard files have their full length and real disk blocks from the start, so a full disk is
//! found before hours of work and not after them. Tensors may be written in any order, from any
//! thread, and again after a restart.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use gptq_types::{ContentHash, FileRecord, SourceError, TensorInfo, TensorSource, outside_name};

use crate::durable::{parent_of, replace_file, sync_folder};
use crate::layout::{CheckpointLayout, INDEX_FILE, Placement};
use crate::lock::LockError;
use crate::place::ClaimedPlace;
use crate::shard_digests::ShardDigests;
use crate::shard_files::{
    fill, refuse_foreign_shards, remove_leftovers, reopen_shard, write_index,
};

/// A checkpoint that could not be staged.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum StageError {
    #[error("`{}` does not name a folder to write", .0.display())]
    BadName(PathBuf),
    #[error("`{}` exists and is not an empty folder", .0.display())]
    Occupied(PathBuf),
    #[error("`{}` is a link to a place that does not exist", .0.display())]
    LeadsNowhere(PathBuf),
    #[error("`{}` is a mount point and cannot be replaced by a rename", .0.display())]
    MountPoint(PathBuf),
    #[error("`{}` is left from an earlier run", .0.display())]
    PartialExists(PathBuf),
    #[error("`{}` does not exist", .0.display())]
    NoPartial(PathBuf),
    #[error(transparent)]
    Locked(#[from] LockError),
    #[error(
        "`{}` exists and is not an empty folder; the finished checkpoint lies in `{}`",
        out_dir.display(), partial.display()
    )]
    TargetTaken { out_dir: PathBuf, partial: PathBuf },
    #[error("`{}` needs {needed} bytes, {free} are free", path.display())]
    NoSpace {
        path: PathBuf,
        needed: u64,
        free: u64,
    },
    #[error("`{}` was begun with another layout: {difference}", path.display())]
    Differs { path: PathBuf, difference: String },
    #[error("tensor `{name}` is not part of `{}`", path.display())]
    Unknown { path: PathBuf, name: String },
    #[error("tensor `{name}` has {found} bytes, `{}` holds {expected} for it", path.display())]
    Length {
        path: PathBuf,
        name: String,
        found: u64,
        expected: u64,
    },
    #[error("{count} tensors were never written to `{}`, the first is `{first}`", path.display())]
    Unwritten {
        path: PathBuf,
        count: usize,
        first: String,
    },
    #[error("`{0}` is not a plain file name, or belongs to a shard")]
    BadFileName(String),
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

pub(crate) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StageError {
    let path = path.to_path_buf();
    move |source| StageError::Io {
        action,
        path,
        source,
    }
}

/// A checkpoint under construction. Dropping it leaves the partial folder for a later
/// [`StagedCheckpoint::reopen`].
#[derive(Debug)]
pub struct StagedCheckpoint {
    place: ClaimedPlace,
    layout: CheckpointLayout,
    /// One per shard.
    files: Vec<File>,
    /// One per tensor, by [`Placement`] number.
    written: Vec<AtomicBool>,
    digests: ShardDigests,
    /// The small files so far.
    added: Mutex<BTreeMap<String, FileRecord>>,
}

impl StagedCheckpoint {
    /// Makes `.{name}.partial` next to `out_dir` and allocates every shard in it.
    ///
    /// # Errors
    /// Those of [`ClaimedPlace::claim`], a partial folder of an earlier run, a disk without room.
    /// Nothing is left behind then.
    pub fn create(out_dir: &Path, layout: &CheckpointLayout) -> Result<Self, StageError> {
        ClaimedPlace::claim(out_dir)?.create(layout, 0)
    }

    /// Reopens the partial folder of an earlier run. No tensor counts as written before
    /// [`StagedCheckpoint::mark_written`] or [`StagedCheckpoint::write`].
    ///
    /// # Errors
    /// Those of [`ClaimedPlace::claim`]; shards whose headers are not byte for byte those of
    /// `layout`; the difference is named.
    pub fn reopen(out_dir: &Path, layout: &CheckpointLayout) -> Result<Self, StageError> {
        ClaimedPlace::claim(out_dir)?.reopen(layout)
    }

    pub(crate) fn begin_in(
        place: ClaimedPlace,
        layout: &CheckpointLayout,
        beside_shards: u64,
    ) -> Result<Self, StageError> {
        let files = begin(&place.partial, layout, beside_shards)?;
        Ok(Self::new(place, layout, files))
    }

    pub(crate) fn reopen_in(
        place: ClaimedPlace,
        layout: &CheckpointLayout,
    ) -> Result<Self, StageError> {
        let partial = &place.partial;
        if !partial.is_dir() {
            return Err(StageError::NoPartial(partial.clone()));
        }
        refuse_foreign_shards(partial, layout)?;
        let files = layout
            .shards()
            .iter()
            .map(|shard| reopen_shard(partial, shard))
            .collect::<Result<Vec<_>, _>>()?;
        remove_leftovers(partial)?;
        write_index(partial, layout)?;
        Ok(Self::new(place, layout, files))
    }

    fn new(place: ClaimedPlace, layout: &CheckpointLayout, files: Vec<File>) -> Self {
        let count = layout.tensors().len();
        StagedCheckpoint {
            place,
            layout: layout.clone(),
            files,
            written: (0..count).map(|_| AtomicBool::new(false)).collect(),
            digests: ShardDigests::new(layout),
            added: Mutex::default(),
        }
    }

    /// The folder that holds the files until they are published.
    pub fn partial_dir(&self) -> &Path {
        &self.place.partial
    }

    /// The plan this checkpoint follows.
    pub fn layout(&self) -> &CheckpointLayout {
        &self.layout
    }

    /// Puts a tensor in its place. Several threads may write at once.
    ///
    /// # Errors
    /// A name outside the layout, bytes of another length, and anything the disk refuses.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<(), StageError> {
        let placement = self.placement(name)?;
        if placement.bytes != bytes.len() as u64 {
            return Err(StageError::Length {
                path: self.shard_path(placement),
                name: name.to_string(),
                found: bytes.len() as u64,
                expected: placement.bytes,
            });
        }
        self.files[placement.shard]
            .write_all_at(bytes, placement.offset)
            .map_err(io_error("write", &self.shard_path(placement)))?;
        self.note_written(placement);
        Ok(())
    }

    fn note_written(&self, placement: Placement) {
        if self.written[placement.number].swap(true, Ordering::AcqRel) {
            self.digests.spoil(placement.shard);
        }
    }

    /// Writes a part of a tensor at offset `start` in bytes. Several threads may write at once. The tensor
    /// counts as written only after [`StagedCheckpoint::mark_written`].
    ///
    /// # Errors
    /// A name outside the layout, bytes beyond the tensor's end, and anything the disk refuses.
    pub fn write_part(&self, name: &str, start: u64, bytes: &[u8]) -> Result<(), StageError> {
        let placement = self.placement(name)?;
        let end = start.saturating_add(bytes.len() as u64);
        if end > placement.bytes {
            return Err(StageError::Length {
                path: self.shard_path(placement),
                name: name.to_string(),
                found: end,
                expected: placement.bytes,
            });
        }
        self.files[placement.shard]
            .write_all_at(bytes, placement.offset + start)
            .map_err(io_error("write", &self.shard_path(placement)))
    }

    /// Declares the tensor whole: an earlier run wrote it, or it was written in parts. Its bytes
    /// are not looked at.
    pub fn mark_written(&self, name: &str) -> Result<(), StageError> {
        let placement = self.placement(name)?;
        self.note_written(placement);
        Ok(())
    }

    /// Whether the tensor was written or declared written.
    pub fn is_written(&self, name: &str) -> bool {
        self.layout
            .placement(name)
            .is_some_and(|placement| self.written[placement.number].load(Ordering::Acquire))
    }

    /// Syncs everything written so far, so that it survives a power cut; call before adding to a journal.
    pub fn sync(&self) -> Result<(), StageError> {
        for (file, shard) in self.files.iter().zip(self.layout.shards()) {
            let path = self.partial_dir().join(&shard.file_name);
            file.sync_all().map_err(io_error("sync", &path))?;
        }
        sync_folder(self.partial_dir()).map_err(io_error("sync", self.partial_dir()))
    }

    /// Hashes the shards on, each up to its first tensor that is not yet written, so that less is
    /// left for [`StagedCheckpoint::file_records`]. Beside everything else, from one thread.
    pub fn hash_ahead(&self) -> Result<(), StageError> {
        for (index, file) in self.files.iter().enumerate() {
            (self.digests)
                .advance(index, file, &|placement| self.has(placement))
                .map_err(io_error("hash", &self.shard_file(index)))?;
        }
        Ok(())
    }

    /// Length and sha256 of every file so far, by name; a thread a shard reads what was not hashed
    /// before.
    ///
    /// # Errors
    /// Tensors that were never written.
    pub fn file_records(&self) -> Result<BTreeMap<String, FileRecord>, StageError> {
        self.refuse_unwritten()?;
        let hashes = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.files.len())
                .map(|index| scope.spawn(move || self.finished_hash(index)))
                .collect();
            (threads.into_iter())
                .map(|thread| thread.join().expect("hashing does not panic"))
                .collect::<Result<Vec<ContentHash>, StageError>>()
        })?;
        let mut records = self.added().clone();
        if let Some(index) = self.layout.index_json() {
            records.insert(INDEX_FILE.to_string(), FileRecord::of(index.as_bytes()));
        }
        for (shard, sha256) in self.layout.shards().iter().zip(hashes) {
            let bytes = shard.bytes;
            records.insert(shard.file_name.clone(), FileRecord { bytes, sha256 });
        }
        Ok(records)
    }

    fn finished_hash(&self, index: usize) -> Result<ContentHash, StageError> {
        let is_written = |placement| self.has(placement);
        loop {
            let hash = (self.digests).finish(index, &self.files[index], &is_written);
            let path = self.shard_file(index);
            if let Some(hash) = hash.map_err(io_error("hash", &path))? {
                return Ok(hash);
            }
        }
    }

    fn added(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, FileRecord>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, placement: Placement) -> bool {
        self.written[placement.number].load(Ordering::Acquire)
    }

    /// Adds a small file such as `config.json`; one of the same name is replaced.
    pub fn add_file(&self, file_name: &str, bytes: &[u8]) -> Result<(), StageError> {
        let path = self.extra_path(file_name)?;
        replace_file(&path, |file| file.write_all(bytes)).map_err(io_error("write", &path))?;
        let record = FileRecord::of(bytes);
        self.added().insert(file_name.to_string(), record);
        Ok(())
    }

    /// Syncs everything and renames the partial folder to `out_dir`, in one step: readers see no
    /// checkpoint or all of it.
    ///
    /// # Errors
    /// Tensors that were never written; an `out_dir` that has been filled meanwhile. The partial
    /// folder then stays.
    pub fn publish(self) -> Result<PathBuf, StageError> {
        self.publish_without(&[])
    }

    /// Like [`StagedCheckpoint::publish`], then removes the files `scaffold`, which a finished folder does
    /// not need. A process killed after the rename leaves a complete checkpoint that still holds them.
    ///
    /// # Errors
    /// Those of [`StagedCheckpoint::publish`].
    pub fn publish_without(self, scaffold: &[&str]) -> Result<PathBuf, StageError> {
        self.refuse_unwritten()?;
        self.sync()?;
        self.rename(scaffold)
    }

    /// Like [`StagedCheckpoint::publish`], without syncing the shards: a killed process never leaves half a
    /// checkpoint, but a power cut can. For checkpoints that a seed reproduces.
    ///
    /// # Errors
    /// Those of [`StagedCheckpoint::publish`].
    pub fn publish_unsynced(self) -> Result<PathBuf, StageError> {
        self.refuse_unwritten()?;
        sync_folder(self.partial_dir()).map_err(io_error("sync", self.partial_dir()))?;
        self.rename(&[])
    }

    fn rename(self, scaffold: &[&str]) -> Result<PathBuf, StageError> {
        let ClaimedPlace {
            out_dir, partial, ..
        } = &self.place;
        // rename(2) replaces an empty folder and refuses a full one.
        fs::rename(partial, out_dir).map_err(|source| match source.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::AlreadyExists | ErrorKind::NotADirectory => {
                StageError::TargetTaken {
                    out_dir: out_dir.clone(),
                    partial: partial.clone(),
                }
            }
            _ => io_error("rename the partial folder to", out_dir)(source),
        })?;
        let parent = parent_of(out_dir);
        sync_folder(&parent).map_err(io_error("sync", &parent))?;
        for name in scaffold {
            let path = out_dir.join(name);
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        sync_folder(out_dir).map_err(io_error("sync", out_dir))?;
        let out_dir = out_dir.clone();
        self.place.lock.release();
        Ok(out_dir)
    }

    /// Removes the partial folder with everything in it, and the folders above that
    /// [`ClaimedPlace::claim`] made, where nothing else lies in them.
    pub fn discard(self) -> Result<(), StageError> {
        self.place.discard_partial().map(drop)
    }

    fn refuse_unwritten(&self) -> Result<(), StageError> {
        let mut missing = self
            .layout
            .tensors()
            .keys()
            .filter(|name| !self.is_written(name));
        match missing.next() {
            None => Ok(()),
            Some(first) => Err(StageError::Unwritten {
                path: self.place.partial.clone(),
                first: first.clone(),
                count: 1 + missing.count(),
            }),
        }
    }

    fn placement(&self, name: &str) -> Result<Placement, StageError> {
        self.layout
            .placement(name)
            .ok_or_else(|| StageError::Unknown {
                path: self.place.partial.clone(),
                name: name.to_string(),
            })
    }

    fn shard_path(&self, placement: Placement) -> PathBuf {
        self.shard_file(placement.shard)
    }

    fn shard_file(&self, shard: usize) -> PathBuf {
        self.partial_dir()
            .join(&self.layout.shards()[shard].file_name)
    }

    fn extra_path(&self, file_name: &str) -> Result<PathBuf, StageError> {
        let Ok(plain) = outside_name::file_name(file_name) else {
            return Err(StageError::BadFileName(outside_name::shown(file_name, 80)));
        };
        if file_name == INDEX_FILE || file_name.ends_with(".safetensors") {
            return Err(StageError::BadFileName(file_name.to_string()));
        }
        Ok(self.partial_dir().join(plain))
    }
}

/// Written tensors can be read back before the checkpoint is published.
impl TensorSource for StagedCheckpoint {
    fn place(&self) -> String {
        self.partial_dir().display().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.layout.tensors().keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.layout.tensors().get(name).cloned()
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        let mut bytes = vec![0; self.require(name)?.bytes()];
        self.read_at(name, 0, &mut bytes)?;
        Ok(bytes)
    }

    fn read_at(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<(), SourceError> {
        let Some(placement) = self.layout.placement(name) else {
            return Err(SourceError::Missing {
                name: name.to_string(),
                place: self.place(),
            });
        };
        let invalid = |reason| SourceError::Invalid {
            name: name.to_string(),
            reason,
        };
        if !self.is_written(name) {
            return Err(invalid(format!("not yet written to {}", self.place())));
        }
        let end = offset + out.len();
        if end as u64 > placement.bytes {
            return Err(invalid(format!("has no bytes {offset}..{end}")));
        }
        self.files[placement.shard]
            .read_exact_at(out, placement.offset + offset as u64)
            .map_err(|source| SourceError::Read {
                name: name.to_string(),
                path: self.shard_path(placement).display().to_string(),
                source,
            })
    }
}

/// Makes the partial folder and every shard in it, or nothing.
fn begin(
    partial: &Path,
    layout: &CheckpointLayout,
    beside_shards: u64,
) -> Result<Vec<File>, StageError> {
    match fs::create_dir(partial) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {
            return Err(StageError::PartialExists(partial.to_path_buf()));
        }
        Err(source) => return Err(io_error("create", partial)(source)),
    }
    let filled = fill(partial, layout, beside_shards).and_then(|files| {
        let parent = parent_of(partial);
        sync_folder(&parent).map_err(io_error("sync", &parent))?;
        Ok(files)
    });
    if filled.is_err() {
        // The first error is the one to report; what remains is an empty promise either way.
        let _ = fs::remove_dir_all(partial);
    }
    filled
}

#[cfg(test)]
mod tests;
