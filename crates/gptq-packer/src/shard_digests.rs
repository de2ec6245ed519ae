//! The sha256 of every shard, computed while tensors are still being written.
//!
//! sha256 runs through a file in order. A shard's first tensors are usually those of the first blocks, so
//! most of it can be hashed during work on later blocks, which leaves little for the end.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use gptq_types::{ContentHash, ContentHasher};

use crate::layout::{CheckpointLayout, Placement};

/// Bytes read at a time.
const PIECE: u64 = 1 << 20;

/// The shards of a checkpoint under construction.
#[derive(Debug)]
pub(crate) struct ShardDigests(Vec<ShardDigest>);

#[derive(Debug)]
struct ShardDigest {
    /// By their place in the file.
    tensors: Vec<Placement>,
    bytes: u64,
    /// Something was written again that may have been hashed already.
    spoiled: AtomicBool,
    reached: Mutex<Reached>,
}

#[derive(Default)]
struct Reached {
    hasher: ContentHasher,
    bytes: u64,
    tensors: usize,
}

impl std::fmt::Debug for Reached {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.bytes)
    }
}

impl ShardDigests {
    /// Digests of shards of which nothing is hashed yet.
    pub fn new(layout: &CheckpointLayout) -> Self {
        let mut tensors: Vec<Vec<Placement>> = vec![Vec::new(); layout.shards().len()];
        for name in layout.tensors().keys() {
            if let Some(placement) = layout.placement(name) {
                tensors[placement.shard].push(placement);
            }
        }
        let digests = (layout.shards().iter().zip(tensors)).map(|(shard, mut tensors)| {
            tensors.sort_by_key(|placement| (placement.offset, placement.bytes));
            ShardDigest {
                tensors,
                bytes: shard.bytes,
                spoiled: AtomicBool::new(false),
                reached: Mutex::default(),
            }
        });
        ShardDigests(digests.collect())
    }

    /// A tensor of the shard was written again.
    pub fn spoil(&self, shard: usize) {
        self.0[shard].spoiled.store(true, Ordering::Release);
    }

    /// Hashes a shard on, up to its first tensor that is not yet written.
    pub fn advance(
        &self,
        shard: usize,
        file: &File,
        is_written: &dyn Fn(Placement) -> bool,
    ) -> io::Result<()> {
        self.0[shard].advance(file, is_written)
    }

    /// The hash of a whole shard; nothing where a tensor is not written.
    pub fn finish(
        &self,
        shard: usize,
        file: &File,
        is_written: &dyn Fn(Placement) -> bool,
    ) -> io::Result<Option<ContentHash>> {
        let digest = &self.0[shard];
        digest.advance(file, is_written)?;
        let reached = digest
            .reached
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Ok((reached.bytes == digest.bytes).then(|| reached.hasher.clone().finish()))
    }
}

impl ShardDigest {
    fn advance(&self, file: &File, is_written: &dyn Fn(Placement) -> bool) -> io::Result<()> {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        if self.spoiled.swap(false, Ordering::AcqRel) {
            *reached = Reached::default();
        }
        while let Some(&next) = self.tensors.get(reached.tensors) {
            if !is_written(next) {
                return Ok(());
            }
            reached.read_to(file, next.offset + next.bytes)?;
            reached.tensors += 1;
        }
        reached.read_to(file, self.bytes)
    }
}

impl Reached {
    fn read_to(&mut self, file: &File, end: u64) -> io::Result<()> {
        let mut piece = vec![0; PIECE.min(end - self.bytes) as usize];
        while self.bytes < end {
            let piece = &mut piece[..PIECE.min(end - self.bytes) as usize];
            file.read_exact_at(piece, self.bytes)?;
            self.hasher.update(piece);
            self.bytes += piece.len() as u64;
        }
        Ok(())
    }
}
