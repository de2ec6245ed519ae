//! The files of a checkpoint folder as a branch would hold them, without making one.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use git2::{ObjectType, Oid};
use gptq_types::outside_name::file_name;
use gptq_types::{ContentHash, ContentHasher};

use crate::RepositoryError;
use crate::lfs::{attributes, hash_into, is_large};

pub(crate) const ATTRIBUTES: &str = ".gitattributes";

/// A file on its way into a branch, hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FolderFile {
    /// Its name, one normal component of a path.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// sha256 of its content.
    pub sha256: ContentHash,
    /// Whether git or the LFS store holds it.
    pub content: FolderContent,
}

/// The storage of a file's content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FolderContent {
    /// In git itself.
    Plain {
        /// The whole file.
        bytes: Vec<u8>,
        /// Git's id of it.
        git_oid: String,
    },
    /// In the LFS store.
    Large {
        /// The file that holds it.
        file: PathBuf,
    },
}

/// The named files of `folder`, and the `.gitattributes` that go with them.
///
/// Fails on names that are no file directly in the folder, and on what is no regular file: a link may
/// lead anywhere.
pub fn folder_files(folder: &Path, names: &[String]) -> Result<Vec<FolderFile>, RepositoryError> {
    let mut files = Vec::new();
    for name in names {
        let named = file_name(name).map_err(|source| RepositoryError::Name {
            branch: folder.display().to_string(),
            source,
        })?;
        files.push(read(&folder.join(named), name)?);
    }
    let large = |file: &&FolderFile| matches!(file.content, FolderContent::Large { .. });
    let large: Vec<&str> = (files.iter().filter(large))
        .map(|file| file.name.as_str())
        .collect();
    let text = attributes(&large).into_bytes();
    files.push(plain(ATTRIBUTES, text)?);
    Ok(files)
}

fn read(path: &Path, name: &str) -> Result<FolderFile, RepositoryError> {
    let found = fs::symlink_metadata(path).map_err(RepositoryError::io("read", path))?;
    if !found.is_file() {
        return Err(RepositoryError::Nested(path.to_path_buf()));
    }
    if !is_large(name, found.len()) {
        let bytes = fs::read(path).map_err(RepositoryError::io("read", path))?;
        return plain(name, bytes);
    }
    let pointer = hash_into(path, &mut io::sink()).map_err(RepositoryError::io("read", path))?;
    Ok(FolderFile {
        name: name.to_string(),
        bytes: pointer.size,
        sha256: pointer.oid,
        content: FolderContent::Large {
            file: path.to_path_buf(),
        },
    })
}

fn plain(name: &str, bytes: Vec<u8>) -> Result<FolderFile, RepositoryError> {
    let id = Oid::hash_object(ObjectType::Blob, &bytes).map_err(|source| RepositoryError::Git {
        doing: "hash a file".to_string(),
        path: PathBuf::from(name),
        source,
    })?;
    let mut hasher = ContentHasher::default();
    hasher.update(&bytes);
    Ok(FolderFile {
        name: name.to_string(),
        bytes: bytes.len() as u64,
        sha256: hasher.finish(),
        content: FolderContent::Plain {
            bytes,
            git_oid: id.to_string(),
        },
    })
}
