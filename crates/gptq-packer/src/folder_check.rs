//! Files of a folder against the hashes that its record lists.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use gptq_types::outside_name::{self, OutsideNameError};
use gptq_types::{ContentHash, ContentHasher, FileRecord};
use rayon::iter::{IntoParallelIterator, ParallelIterator};

/// Bytes of a file read at a time.
const PIECE: usize = 1 << 20;

/// A folder that could not be checked.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum FolderCheckError {
    #[error("the record lists a file that it cannot: {0}")]
    Name(#[from] OutsideNameError),
    #[error("cannot read `{}`: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
}

/// The result of a check; names are sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FolderVerdict {
    /// Files that are unchanged.
    pub sound: Vec<String>,
    /// Files that differ, with the reason.
    pub differing: Vec<(String, String)>,
    /// Files that are listed and not there.
    pub missing: Vec<String>,
    /// Files that are there and not listed: nothing is known of them.
    pub extra: Vec<String>,
}

impl FolderVerdict {
    /// Every listed file is there, byte for byte.
    pub fn is_sound(&self) -> bool {
        self.first_fault().is_none()
    }

    /// The first file that is missing, else the first that differs, in words.
    pub fn first_fault(&self) -> Option<String> {
        let missing = (self.missing.first()).map(|name| format!("`{name}` is missing"));
        missing.or_else(|| {
            let (name, how) = self.differing.first()?;
            Some(format!("`{name}` {how}"))
        })
    }
}

/// Reads all files that `listed` names in `folder`, side by side, and compares length and sha256.
///
/// # Errors
/// A name in the list that is not the name of a file; a file that is there and cannot be read.
pub fn check_files(
    folder: &Path,
    listed: &BTreeMap<String, FileRecord>,
) -> Result<FolderVerdict, FolderCheckError> {
    for name in listed.keys() {
        outside_name::file_name(name)?;
    }
    let found: Vec<Result<Found, FolderCheckError>> = (listed.iter().collect::<Vec<_>>())
        .into_par_iter()
        .map(|(name, record)| check_file(&folder.join(name), record))
        .collect();
    let mut verdict = FolderVerdict::default();
    for (name, found) in listed.keys().zip(found) {
        match found? {
            Found::Sound => verdict.sound.push(name.clone()),
            Found::Missing => verdict.missing.push(name.clone()),
            Found::Differs(how) => verdict.differing.push((name.clone(), how)),
        }
    }
    verdict.extra = names_in(folder)?;
    verdict.extra.retain(|name| !listed.contains_key(name));
    Ok(verdict)
}

/// The sha256 of a file's bytes.
///
/// # Errors
/// What the disk says.
pub fn hash_file(path: &Path) -> io::Result<ContentHash> {
    let mut file = File::open(path)?;
    let mut hasher = ContentHasher::default();
    let mut buffer = vec![0; PIECE];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finish()),
            read => hasher.update(&buffer[..read]),
        }
    }
}

enum Found {
    Sound,
    Missing,
    Differs(String),
}

fn check_file(path: &Path, record: &FileRecord) -> Result<Found, FolderCheckError> {
    let failed = |source| FolderCheckError::Read {
        path: path.to_path_buf(),
        source,
    };
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
        metadata => metadata.map_err(failed)?,
    };
    if !metadata.is_file() {
        return Ok(Found::Differs("is not a file".to_string()));
    }
    if metadata.len() != record.bytes {
        let how = format!(
            "has {} bytes, {} were written",
            metadata.len(),
            record.bytes
        );
        return Ok(Found::Differs(how));
    }
    let sha256 = hash_file(path).map_err(failed)?;
    match sha256 == record.sha256 {
        true => Ok(Found::Sound),
        false => Ok(Found::Differs(format!(
            "has sha256 {sha256}, {} was written",
            record.sha256
        ))),
    }
}

fn names_in(folder: &Path) -> Result<Vec<String>, FolderCheckError> {
    let failed = |source| FolderCheckError::Read {
        path: folder.to_path_buf(),
        source,
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_is_told_by_what_became_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let mut listed = BTreeMap::new();
        for name in ["a", "b", "c", "d", "e"] {
            fs::write(folder.path().join(name), name.repeat(9)).unwrap();
            listed.insert(name.to_string(), FileRecord::of(name.repeat(9).as_bytes()));
        }
        assert!(check_files(folder.path(), &listed).unwrap().is_sound());
        fs::write(folder.path().join("b"), "a".repeat(9)).unwrap();
        fs::write(folder.path().join("c"), "c").unwrap();
        fs::remove_file(folder.path().join("d")).unwrap();
        fs::write(folder.path().join("f"), "").unwrap();
        let verdict = check_files(folder.path(), &listed).unwrap();
        assert_eq!(verdict.sound, ["a", "e"]);
        assert_eq!(verdict.missing, ["d"]);
        assert_eq!(verdict.extra, ["f"]);
        let differing: Vec<_> = verdict.differing.iter().map(|(name, _)| name).collect();
        assert_eq!(differing, ["b", "c"]);
        listed.insert("../x".to_string(), FileRecord::of(b""));
        assert!(check_files(folder.path(), &listed).is_err());
    }
}
