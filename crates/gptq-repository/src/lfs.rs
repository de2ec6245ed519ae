//! Git LFS: large files lie beside git's objects under their sha256, a pointer stands for each.
//!
//! Pointer and layout of the store: the specification of Git LFS, version 1.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::RepositoryError;

/// Files above this size are refused by git hosts in plain git.
const PLAIN_LIMIT: u64 = 10 << 20;
const VERSION: &str = "version https://git-lfs.github.com/spec/v1";
/// Pointers are a few lines.
const MAX_POINTER: usize = 1024;

/// What stands for a large file in git.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    /// sha256 of the content, in hexadecimal.
    pub oid: String,
    pub size: u64,
}

impl Pointer {
    pub fn text(&self) -> String {
        format!("{VERSION}\noid sha256:{}\nsize {}\n", self.oid, self.size)
    }

    /// `None` for anything that is not a pointer.
    pub fn parse(blob: &[u8]) -> Option<Self> {
        if blob.len() > MAX_POINTER {
            return None;
        }
        let mut lines = std::str::from_utf8(blob).ok()?.lines();
        if lines.next()? != VERSION {
            return None;
        }
        let oid = lines.next()?.strip_prefix("oid sha256:")?;
        let size = lines.next()?.strip_prefix("size ")?.parse().ok()?;
        let is_hash = oid.len() == 64 && oid.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hash.then(|| Pointer {
            oid: oid.to_string(),
            size,
        })
    }
}

/// Whether a file goes to the store.
pub(crate) fn is_large(name: &str, size: u64) -> bool {
    name.ends_with(".safetensors") || size > PLAIN_LIMIT
}

/// `.gitattributes` for the large ones of `names`: weights by their ending, others one by one.
pub(crate) fn attributes(names: &[&str]) -> String {
    let mut patterns = vec!["*.safetensors".to_string()];
    let others = names.iter().filter(|name| !name.ends_with(".safetensors"));
    patterns.extend(others.map(|name| name.replace(' ', "[[:space:]]")));
    let line = |pattern: String| format!("{pattern} filter=lfs diff=lfs merge=lfs -text\n");
    patterns.into_iter().map(line).collect()
}

/// The objects of one repository.
pub(crate) struct Store(PathBuf);

impl Store {
    /// Below a bare repository.
    pub fn of(repository: &Path) -> Self {
        Store(repository.join("lfs").join("objects"))
    }

    pub fn path(&self, oid: &str) -> PathBuf {
        self.0.join(&oid[..2]).join(&oid[2..4]).join(oid)
    }

    /// Takes in a file: a hard link where the file system has them, else a copy. The file stays.
    pub fn take(&self, file: &Path) -> Result<Pointer, RepositoryError> {
        let pointer = hash(file)?;
        let place = self.path(&pointer.oid);
        let parent = place.parent().unwrap_or(&self.0);
        fs::create_dir_all(parent).map_err(RepositoryError::io("create", parent))?;
        if self.holds(&pointer) {
            return Ok(pointer);
        }
        // A name of its own until it is whole: several processes may take the same file.
        let beside = tempfile::Builder::new()
            .prefix(".taking-")
            .tempdir_in(parent)
            .map_err(RepositoryError::io("write into", parent))?;
        let part = beside.path().join("object");
        if fs::hard_link(file, &part).is_err() {
            fs::copy(file, &part).map_err(RepositoryError::io("copy", file))?;
        }
        let synced = File::open(&part).and_then(|part| part.sync_all());
        synced.map_err(RepositoryError::io("write", &part))?;
        fs::rename(&part, &place).map_err(RepositoryError::io("write", &place))?;
        let synced = File::open(parent).and_then(|folder| folder.sync_all());
        synced.map_err(RepositoryError::io("write", parent))?;
        Ok(pointer)
    }

    /// Whether the object is there at its full length.
    pub fn holds(&self, pointer: &Pointer) -> bool {
        fs::metadata(self.path(&pointer.oid)).is_ok_and(|found| found.len() == pointer.size)
    }
}

fn hash(file: &Path) -> Result<Pointer, RepositoryError> {
    let mut reader = File::open(file).map_err(RepositoryError::io("read", file))?;
    let mut sha = Sha256::new();
    let mut buffer = vec![0; 4 << 20];
    let mut size = 0;
    loop {
        let read = (reader.read(&mut buffer)).map_err(RepositoryError::io("read", file))?;
        if read == 0 {
            break;
        }
        sha.update(&buffer[..read]);
        size += read as u64;
    }
    let oid = sha
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Ok(Pointer { oid, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_reads_back_and_nothing_else_is_one() {
        let pointer = Pointer {
            oid: "ab".repeat(32),
            size: 7,
        };
        assert_eq!(Pointer::parse(pointer.text().as_bytes()), Some(pointer));
        for other in ["", "version 1", "{\"a\": 1}"] {
            assert_eq!(Pointer::parse(other.as_bytes()), None);
        }
    }

    #[test]
    fn weights_and_large_files_go_to_the_store() {
        assert!(is_large("model-00001-of-00002.safetensors", 10));
        assert!(is_large("tokenizer.json", 11 << 20));
        assert!(!is_large("tokenizer.json", 1 << 20));
        let text = attributes(&["model.safetensors", "tokenizer.json"]);
        assert_eq!(text.lines().count(), 2);
        assert!(text.contains("\ntokenizer.json filter=lfs"));
    }
}
