//! Pushes branches to the hub: large files through Git LFS, small ones inside a commit.
//!
//! The protocol is the hub's own HTTP API with the batch API of Git LFS. The same call resumes an
//! interrupted push: the hub reports which objects it has, and a complete branch is left alone. A
//! branch shows no file before its commit, which comes last.

use std::path::PathBuf;

use gptq_types::ContentHash;

use crate::{HubError, ResolveOptions};

/// Branches to push, and their destination.
pub struct Push<'a> {
    /// `owner/name`; made where it does not exist.
    pub repo: &'a str,
    /// Only its owner sees a repository that this makes.
    pub private: bool,
    /// Replace the files of branches that hold others.
    pub update: bool,
    /// Branches, in the order in which they become visible.
    pub branches: Vec<(String, Vec<PushFile>)>,
    /// Title of the commits.
    pub message: &'a str,
}

/// A file of a branch.
#[derive(Clone, Debug)]
pub struct PushFile {
    /// Its name.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// The content, or the file that holds it.
    pub content: PushContent,
}

/// Content of a file, with the name under which the hub knows it.
#[derive(Clone, Debug)]
pub enum PushContent {
    /// Sent inside the commit.
    Inline {
        /// The file.
        bytes: Vec<u8>,
        /// Its git object id.
        git_oid: String,
    },
    /// Sent to the LFS store.
    Object {
        /// The path of the file.
        file: PathBuf,
        /// sha256 of the content.
        oid: ContentHash,
    },
}

/// The outcome for a branch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// All its files were there.
    AlreadyThere,
    /// It has a new commit.
    Committed {
        /// Files sent to the LFS store; those that were there are not counted.
        objects: usize,
    },
}

/// Pushes all branches. `progress` hears of the name of a large file, the bytes sent and all its
/// bytes; the result has a row for each branch.
///
/// Fails when there is no token or the hub does not accept it, when a branch holds other files and
/// `update` is not set, when a quota is full, or when the connection breaks; the token is never
/// part of an error.
pub fn push_branches(
    push: &Push<'_>,
    options: &ResolveOptions,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<Vec<(String, Pushed)>, HubError> {
    #[cfg(feature = "hub")]
    {
        crate::upload::push(push, options, progress)
    }
    #[cfg(not(feature = "hub"))]
    {
        let _ = (push, options, progress);
        Err(HubError::NoUploads)
    }
}
