//! Checkpoints as branches of one bare git repository, weights through Git LFS.
//!
//! Knows: which files of a folder go to the LFS store and what stands for them in git, how a branch
//! comes into being whole or not at all, how a small file of a branch is replaced, how a branch
//! becomes a folder again; which names from outside are those of branches and files, and that an LFS
//! object is what its hash says.
//!
//! Does not know: what the files mean, remotes, the network. Nothing is ever deleted but the folder
//! that a branch was made from.
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
