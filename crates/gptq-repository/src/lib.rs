//! Checkpoints as branches of one bare git repository, weights through Git LFS.
//!
//! Knows: which files of a folder go to the LFS store, and their pointers in git; how a branch is made
//! atomically, how one of its small files is replaced, how a branch becomes a folder again; which names
//! from outside are valid for branches and files; that the content of an LFS object matches its hash.
//!
//! Does not know: the meaning of files, remotes, the network. The only thing it ever deletes is the
//! folder that a branch was made from.
//!
//! Commits are as reproducible as their content: `SOURCE_DATE_EPOCH` fixes their date,
//! `GIT_AUTHOR_NAME` and `GIT_AUTHOR_EMAIL` their author; git's own configuration is not read.

mod branch_name;
mod error;
mod folder;
mod lfs;
mod loose;
mod make;
mod publish;
mod repository;
mod tree;

pub use branch_name::check_branch_names;
pub use error::RepositoryError;
pub use folder::{FolderContent, FolderFile, folder_files};
pub use publish::check_signature;
pub use repository::Repository;
pub use tree::BranchFile;
