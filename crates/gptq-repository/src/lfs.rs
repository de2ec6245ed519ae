//! Git LFS: large files are stored by their sha256 outside git's objects, and git holds a pointer to each.
//!
//! Pointers and the layout of the store follow the specification of Git LFS, version 1. An object is
//! identified by its hash alone, so every object that is stored or read is hashed on the way.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use gptq_types::{ContentHash, ContentHasher};

use crate::RepositoryError;

/// Files above this size are refused by git hosts in plain git.
const PLAIN_LIMIT: u64 = 10 << 20;
const VERSION: &str = "version https://git-lfs.github.com/spec/v1";
/// Longest pointer, by the specification.
pub(crate) const MAX_POINTER: usize = 1024;
const PIECE_BYTES: usize = 4 << 20;

/// The pointer to a large file, stored in git.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pointer {
    pub oid: ContentHash,
    pub size: u64,
}

impl Pointer {
    pub fn text(&self) -> String {
        format!("{VERSION}\noid sha256:{}\nsize {}\n", self.oid, self.size)
    }

    /// `None` for anything that does not claim to be a pointer; an error for a damaged one, and for
    /// one with further keys, whose content would not be that of the object.
    pub fn parse(blob: &[u8]) -> Result<Option<Self>, &'static str> {
        if !blob.starts_with(VERSION.as_bytes()) {
            return Ok(None);
        }
        if blob.len() > MAX_POINTER {
            return Err("its LFS pointer has more than 1024 bytes");
        }
        let damaged = "its LFS pointer is not three lines of version, oid and size";
        let text = std::str::from_utf8(blob).map_err(|_| damaged)?;
        let lines: Vec<&str> = text.lines().collect();
        let [VERSION, oid, size] = lines[..] else {
            return Err(damaged);
        };
        let oid = oid.strip_prefix("oid sha256:").ok_or(damaged)?;
        let oid = ContentHash::try_from(oid.to_string())
            .map_err(|_| "the oid of its LFS pointer is not a sha256")?;
        let digits = size.strip_prefix("size ").ok_or(damaged)?;
        let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
        match digits.parse() {
            Ok(size) if plain => Ok(Some(Pointer { oid, size })),
            _ => Err("the size of its LFS pointer is not a number of bytes"),
        }
    }
}

/// Whether a file goes to the LFS store.
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

    pub fn path(&self, oid: &ContentHash) -> PathBuf {
        let digits = oid.as_str();
        self.0.join(&digits[..2]).join(&digits[2..4]).join(digits)
    }

    /// Takes in a file: a hard link where the file system has them, else a copy. The file stays. An
    /// object that is there is replaced: only what was hashed just now is known to be whole.
    pub fn take(&self, file: &Path) -> Result<Pointer, RepositoryError> {
        fs::create_dir_all(&self.0).map_err(RepositoryError::io("create", &self.0))?;
        // A name of its own until it is whole: several processes may take the same file.
        let beside = tempfile::Builder::new()
            .prefix(".taking-")
            .tempdir_in(&self.0)
            .map_err(RepositoryError::io("write into", &self.0))?;
        let part = beside.path().join("object");
        let pointer = match fs::hard_link(file, &part) {
            Ok(()) => {
                hash_into(&part, &mut io::sink()).map_err(RepositoryError::io("read", file))?
            }
            Err(_) => {
                let mut copy =
                    File::create_new(&part).map_err(RepositoryError::io("write", &part))?;
                hash_into(file, &mut copy).map_err(RepositoryError::io("copy", file))?
            }
        };
        let synced = File::open(&part).and_then(|part| part.sync_all());
        synced.map_err(RepositoryError::io("write", &part))?;
        let place = self.path(&pointer.oid);
        let parent = place.parent().unwrap_or(&self.0);
        fs::create_dir_all(parent).map_err(RepositoryError::io("create", parent))?;
        fs::rename(&part, &place).map_err(RepositoryError::io("write", &place))?;
        let synced = File::open(parent).and_then(|folder| folder.sync_all());
        synced.map_err(RepositoryError::io("write", parent))?;
        Ok(pointer)
    }

    /// Whether a file of the object's length is in its place.
    pub fn may_hold(&self, pointer: &Pointer) -> bool {
        fs::metadata(self.path(&pointer.oid))
            .is_ok_and(|found| found.is_file() && found.len() == pointer.size)
    }
}

/// Copies a file to `out` in one read, and returns its pointer.
pub(crate) fn hash_into(file: &Path, out: &mut dyn Write) -> io::Result<Pointer> {
    let mut reader = File::open(file)?;
    let mut hasher = ContentHasher::default();
    let mut buffer = vec![0; PIECE_BYTES];
    let mut size = 0;
    loop {
        let read = reader.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        out.write_all(&buffer[..read])?;
        size += read as u64;
    }
    let oid = hasher.finish();
    Ok(Pointer { oid, size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pointer_reads_back_and_nothing_else_is_one() {
        let pointer = Pointer {
            oid: ContentHash::of(b"content"),
            size: 7,
        };
        let read = Pointer::parse(pointer.text().as_bytes());
        assert_eq!(read, Ok(Some(pointer)));
        for other in ["", "version 1", "{\"a\": 1}"] {
            assert_eq!(Pointer::parse(other.as_bytes()), Ok(None));
        }
    }

    #[test]
    fn a_damaged_pointer_is_not_a_plain_file() {
        let oid = "ab".repeat(32);
        for rest in [
            String::new(),
            format!("oid sha256:{oid}\n"),
            format!("oid sha256:{oid}\nsize x\n"),
            format!("oid sha256:{oid}\nsize +5\n"),
            format!("oid sha256:{oid}\nsize 99999999999999999999\n"),
            format!("oid sha256:{oid}\nsize -1\n"),
            format!("oid md5:{oid}\nsize 5\n"),
            "oid sha256:../../../../etc/passwd\nsize 5\n".to_string(),
            format!("oid sha256:{}\nsize 5\n", oid.to_uppercase()),
            format!("ext-0-foo sha256:{oid}\noid sha256:{oid}\nsize 5\n"),
            format!("oid sha256:{oid}\nsize 5\n{}", "\n".repeat(1024)),
        ] {
            let text = format!("{VERSION}\n{rest}");
            assert!(Pointer::parse(text.as_bytes()).is_err(), "{text}");
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
