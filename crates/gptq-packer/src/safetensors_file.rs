//! One safetensors file, read by position; and small ones, written in one go.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use gptq_types::{STAND_IN_BYTES, SourceError, StandIn, TensorInfo, TensorSource};

use crate::durable::replace_file;
use crate::header::{self, HeaderError, LENGTH_BYTES, MAX_HEADER_BYTES};

/// A safetensors file that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SafetensorsError {
    #[error("cannot open `{}`: {source}", path.display())]
    Open { path: PathBuf, source: io::Error },
    #[error("`{}` {what}", path.display())]
    StandIn { path: PathBuf, what: StandIn },
    #[error("`{}`: the header has {length} bytes, more than {MAX_HEADER_BYTES}", path.display())]
    HeaderLength { path: PathBuf, length: u64 },
    #[error("`{}`: {source}", path.display())]
    Header { path: PathBuf, source: HeaderError },
    #[error("`{}` is cut short: {needed} bytes needed, {found} found", path.display())]
    Truncated {
        path: PathBuf,
        needed: u64,
        found: u64,
    },
    #[error("`{}` has bytes after its last tensor: {needed} needed, {found} found", path.display())]
    Trailing {
        path: PathBuf,
        needed: u64,
        found: u64,
    },
    #[error("tensor `{name}` is missing from `{}`", path.display())]
    Missing { path: PathBuf, name: String },
    #[error("tensor `{name}` in `{}`: {source}", path.display())]
    Read {
        path: PathBuf,
        name: String,
        source: io::Error,
    },
    #[error("tensor `{name}` for `{}` has {found} bytes, {expected} expected", path.display())]
    Length {
        path: PathBuf,
        name: String,
        expected: u64,
        found: u64,
    },
    #[error("cannot write `{}`: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// An open file whose header was read and found to cover the file exactly.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    file: File,
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, TensorInfo>,
    /// Absolute positions; the same keys as `tensors`.
    positions: BTreeMap<String, u64>,
}

impl SafetensorsFile {
    /// Reads the header only.
    ///
    /// # Errors
    /// A file that is shorter or longer than its header says, repeated names, element types that
    /// [`gptq_types::Dtype`] does not have, and headers over [`MAX_HEADER_BYTES`].
    pub fn open(path: &Path) -> Result<Self, SafetensorsError> {
        let path = path.to_path_buf();
        let (file, found) = match open_with_length(&path) {
            Ok(opened) => opened,
            Err(source) => return Err(SafetensorsError::Open { path, source }),
        };
        let json = read_header(&file, found, &path)?;
        let header = match header::parse(&json) {
            Ok(header) => header,
            Err(source) => return Err(SafetensorsError::Header { path, source }),
        };
        let data_start = LENGTH_BYTES + json.len() as u64;
        let needed = data_start.saturating_add(header.data_bytes());
        if found < needed {
            return Err(SafetensorsError::Truncated {
                path,
                needed,
                found,
            });
        }
        if found > needed {
            return Err(SafetensorsError::Trailing {
                path,
                needed,
                found,
            });
        }
        let mut tensors = BTreeMap::new();
        let mut positions = BTreeMap::new();
        for tensor in header.tensors {
            positions.insert(tensor.name.clone(), data_start + tensor.start);
            tensors.insert(tensor.name, tensor.info);
        }
        Ok(SafetensorsFile {
            path,
            file,
            metadata: header.metadata,
            tensors,
            positions,
        })
    }

    /// Type and shape of every tensor, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The `__metadata__` of the header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The path given to [`SafetensorsFile::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The stored bytes of one tensor, little-endian, row-major.
    pub fn read(&self, name: &str) -> Result<Vec<u8>, SafetensorsError> {
        let (Some(info), Some(&position)) = (self.tensors.get(name), self.positions.get(name))
        else {
            return Err(SafetensorsError::Missing {
                path: self.path.clone(),
                name: name.to_string(),
            });
        };
        let mut bytes = vec![0; info.bytes()];
        self.fill(name, &mut bytes, position)?;
        Ok(bytes)
    }

    /// Fills `out` with bytes of a tensor from `offset` on; fails beyond the tensor's end.
    pub fn read_at(
        &self,
        name: &str,
        offset: usize,
        out: &mut [u8],
    ) -> Result<(), SafetensorsError> {
        let found = self.tensors.get(name).zip(self.positions.get(name));
        let end = offset.checked_add(out.len());
        match found.filter(|(info, _)| end.is_some_and(|end| end <= info.bytes())) {
            Some((_, &position)) => self.fill(name, out, position + offset as u64),
            None => Err(SafetensorsError::Missing {
                path: self.path.clone(),
                name: name.to_string(),
            }),
        }
    }

    fn fill(&self, name: &str, out: &mut [u8], position: u64) -> Result<(), SafetensorsError> {
        (self.file.read_exact_at(out, position)).map_err(|source| SafetensorsError::Read {
            path: self.path.clone(),
            name: name.to_string(),
            source,
        })
    }

    fn as_source_error(&self, name: &str, error: SafetensorsError) -> SourceError {
        match error {
            SafetensorsError::Read { path, name, source } => SourceError::Read {
                name,
                path: path.display().to_string(),
                source,
            },
            _ => SourceError::Missing {
                name: name.to_string(),
                place: self.place(),
            },
        }
    }
}

fn open_with_length(path: &Path) -> io::Result<(File, u64)> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    Ok((file, length))
}

fn read_header(file: &File, found: u64, path: &Path) -> Result<Vec<u8>, SafetensorsError> {
    let truncated = |needed| SafetensorsError::Truncated {
        path: path.to_path_buf(),
        needed,
        found,
    };
    let unreadable = |source| SafetensorsError::Open {
        path: path.to_path_buf(),
        source,
    };
    // before the length: the first letters of a pointer are a length of 10^18
    let mut first = [0; STAND_IN_BYTES];
    let first = &mut first[..found.min(STAND_IN_BYTES as u64) as usize];
    file.read_exact_at(first, 0).map_err(unreadable)?;
    if let Some(what) = StandIn::of(first) {
        let path = path.to_path_buf();
        return Err(SafetensorsError::StandIn { path, what });
    }
    if found < LENGTH_BYTES {
        return Err(truncated(LENGTH_BYTES));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0).map_err(unreadable)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        return Err(SafetensorsError::HeaderLength {
            path: path.to_path_buf(),
            length,
        });
    }
    if found < LENGTH_BYTES + length {
        return Err(truncated(LENGTH_BYTES + length));
    }
    let mut json = vec![0; length as usize];
    file.read_exact_at(&mut json, LENGTH_BYTES)
        .map_err(unreadable)?;
    Ok(json)
}

impl TensorSource for SafetensorsFile {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).cloned()
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        self.read(name)
            .map_err(|error| self.as_source_error(name, error))
    }

    fn read_at(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<(), SourceError> {
        SafetensorsFile::read_at(self, name, offset, out)
            .map_err(|error| self.as_source_error(name, error))
    }
}

/// Writes a whole file from memory: a temporary file next to `path`, synced, then renamed over it.
///
/// Tensors with larger elements are placed first so that each is aligned to its element size.
///
/// # Errors
/// Bytes that do not fit the type and shape, repeated names, and anything the disk refuses.
pub fn write_safetensors(
    path: &Path,
    tensors: &[(&str, TensorInfo, &[u8])],
    metadata: &BTreeMap<String, String>,
) -> Result<(), SafetensorsError> {
    let unfit = |source| SafetensorsError::Header {
        path: path.to_path_buf(),
        source,
    };
    let described: Vec<(String, TensorInfo)> = tensors
        .iter()
        .map(|(name, info, _)| (name.to_string(), info.clone()))
        .collect();
    let placed = header::place(&described).map_err(unfit)?;
    let head = header::render(&placed, metadata).map_err(unfit)?;
    let data: BTreeMap<&str, &[u8]> = tensors
        .iter()
        .map(|&(name, _, bytes)| (name, bytes))
        .collect();
    for tensor in &placed {
        let (expected, found) = (
            tensor.end - tensor.start,
            data[tensor.name.as_str()].len() as u64,
        );
        if expected != found {
            return Err(SafetensorsError::Length {
                path: path.to_path_buf(),
                name: tensor.name.clone(),
                expected,
                found,
            });
        }
    }
    replace_file(path, |file| {
        file.write_all(&head)?;
        placed
            .iter()
            .try_for_each(|tensor| file.write_all(data[tensor.name.as_str()]))
    })
    .map_err(|source| SafetensorsError::Write {
        path: path.to_path_buf(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use gptq_types::Dtype;

    use super::*;

    fn sample(folder: &Path) -> PathBuf {
        let path = folder.join("small.safetensors");
        let half = TensorInfo {
            dtype: Dtype::F16,
            shape: vec![3],
        };
        let word = TensorInfo {
            dtype: Dtype::I32,
            shape: vec![1, 2],
        };
        write_safetensors(
            &path,
            &[("half", half, &[1, 2, 3, 4, 5, 6]), ("word", word, &[7; 8])],
            &BTreeMap::from([("format".to_string(), "pt".to_string())]),
        )
        .unwrap();
        path
    }

    #[test]
    fn what_was_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = sample(folder.path());
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.read("half").unwrap(), [1, 2, 3, 4, 5, 6]);
        assert_eq!(file.read("word").unwrap(), [7; 8]);
        assert_eq!(file.metadata()["format"], "pt");
        assert_eq!(file.names(), ["half", "word"]);
        assert!(matches!(
            file.read("none"),
            Err(SafetensorsError::Missing { .. })
        ));
        let entries = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(entries, 1, "nothing is left beside the file");
    }

    #[test]
    fn the_safetensors_crate_reads_it() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = std::fs::read(sample(folder.path())).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(read.tensor("half").unwrap().data(), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_cut_file_names_itself_and_both_lengths() {
        let folder = tempfile::tempdir().unwrap();
        let path = sample(folder.path());
        let whole = std::fs::read(&path).unwrap();
        for cut in [1, 7, 20, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let error = SafetensorsFile::open(&path).unwrap_err();
            let SafetensorsError::Truncated { needed, found, .. } = &error else {
                panic!("{error}");
            };
            assert_eq!(*found, cut as u64);
            assert!(needed > found);
            assert!(error.to_string().contains("small.safetensors"), "{error}");
        }
        std::fs::write(&path, [&whole[..], &[0]].concat()).unwrap();
        assert!(matches!(
            SafetensorsFile::open(&path),
            Err(SafetensorsError::Trailing { .. })
        ));
    }

    #[test]
    fn an_absurd_header_length_is_refused_unread() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("evil.safetensors");
        std::fs::write(&path, u64::MAX.to_le_bytes()).unwrap();
        assert!(matches!(
            SafetensorsFile::open(&path),
            Err(SafetensorsError::HeaderLength {
                length: u64::MAX,
                ..
            })
        ));
    }

    #[test]
    fn what_lies_in_place_of_weights_is_named() {
        // a clone without LFS once read "the header has 2336927755350992246 bytes"
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n";
        for (text, what) in [
            (pointer, StandIn::LfsPointer),
            ("<!doctype html><html>", StandIn::WebPage),
            ("", StandIn::Empty),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = SafetensorsFile::open(&path).unwrap_err();
            let SafetensorsError::StandIn { what: found, .. } = error else {
                panic!("{error}");
            };
            assert_eq!(found, what);
        }
    }

    #[test]
    fn a_file_cut_after_opening_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = sample(folder.path());
        let file = SafetensorsFile::open(&path).unwrap();
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_len(40)
            .unwrap();
        assert!(matches!(
            file.read("half"),
            Err(SafetensorsError::Read { .. })
        ));
    }

    #[test]
    fn bytes_that_do_not_fit_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let info = TensorInfo {
            dtype: Dtype::I32,
            shape: vec![2],
        };
        let path = folder.path().join("x.safetensors");
        let error =
            write_safetensors(&path, &[("x", info, &[0; 7])], &BTreeMap::new()).unwrap_err();
        assert!(matches!(
            error,
            SafetensorsError::Length {
                expected: 8,
                found: 7,
                ..
            }
        ));
        assert!(!path.exists());
    }
}
