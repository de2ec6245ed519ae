//! An opened GGUF file: its checked header and the bytes of its tensors.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::BufReader;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use gptq_types::outside_name::shown;

use crate::HubError;
use crate::gguf::header::Header;
use crate::gguf::{BlockType, Value};
use crate::text_file::refuse_stand_in;

/// Characters of a file's text shown in an error.
const SHOWN_CHARACTERS: usize = 200;

/// The position of a tensor and its storage type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GgufTensor {
    /// The file's own name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// Row-major shape, outermost first: the reverse of the file's order.
    pub shape: Vec<usize>,
    /// Storage type.
    pub block_type: BlockType,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Bytes stored.
    pub bytes: u64,
}

impl GgufTensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A GGUF file whose header was read and checked.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    file: File,
    metadata: BTreeMap<String, Value>,
    tensors: Vec<GgufTensor>,
}

impl GgufFile {
    /// Reads and checks the header.
    ///
    /// Fails on another magic, version or byte order, on counts over the caps, on a file that ends
    /// early, on storage types that cannot be read, and on tensors that overlap.
    pub fn open(path: &Path) -> Result<Self, HubError> {
        refuse_stand_in(path)?;
        let file = File::open(path).map_err(|source| HubError::io("open", path, source))?;
        let length = file
            .metadata()
            .map_err(|source| HubError::io("read", path, source))?
            .len();
        let bad = |reason: String| HubError::Gguf {
            path: path.to_path_buf(),
            reason: shown(&reason, SHOWN_CHARACTERS),
        };
        let mut header = Header::new(BufReader::with_capacity(1 << 20, &file), length);
        let (metadata, tensors) = header.parse().map_err(bad)?;
        Ok(GgufFile {
            path: path.to_path_buf(),
            file,
            metadata,
            tensors,
        })
    }

    /// The file as given to [`GgufFile::open`].
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keys and values.
    pub fn metadata(&self) -> &BTreeMap<String, Value> {
        &self.metadata
    }

    /// All tensors, in the order of the header.
    pub fn tensors(&self) -> &[GgufTensor] {
        &self.tensors
    }

    /// The stored bytes of a tensor, blocks in row-major order.
    pub fn read(&self, tensor: &GgufTensor) -> Result<Vec<u8>, HubError> {
        let mut bytes = vec![0u8; tensor.bytes as usize];
        self.file
            .read_exact_at(&mut bytes, tensor.offset)
            .map_err(|source| {
                self.tensor_error(&tensor.name, format!("cannot be read: {source}"))
            })?;
        Ok(bytes)
    }

    pub(crate) fn metadata_error(&self, key: &str, reason: impl Into<String>) -> HubError {
        HubError::Metadata {
            path: self.path.clone(),
            key: shown(key, SHOWN_CHARACTERS),
            reason: shown(&reason.into(), SHOWN_CHARACTERS),
        }
    }

    pub(crate) fn tensor_error(&self, tensor: &str, reason: impl Into<String>) -> HubError {
        HubError::Tensor {
            path: self.path.clone(),
            tensor: shown(tensor, SHOWN_CHARACTERS),
            reason: shown(&reason.into(), SHOWN_CHARACTERS),
        }
    }

    /// A value read by `read`, `None` when the key is absent; an error when it is of another kind.
    pub(crate) fn optional<'a, T>(
        &'a self,
        key: &str,
        read: impl Fn(&'a Value) -> Option<T>,
        kind: &str,
    ) -> Result<Option<T>, HubError> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(value) => read(value)
                .map(Some)
                .ok_or_else(|| self.metadata_error(key, format!("is not {kind}"))),
        }
    }

    pub(crate) fn optional_u64(&self, key: &str) -> Result<Option<u64>, HubError> {
        self.optional(key, Value::as_u64, "a whole number")
    }

    pub(crate) fn optional_f64(&self, key: &str) -> Result<Option<f64>, HubError> {
        let finite = |value: &Value| value.as_f64().filter(|v| v.is_finite());
        self.optional(key, finite, "a finite number")
    }

    pub(crate) fn optional_str(&self, key: &str) -> Result<Option<&str>, HubError> {
        self.optional(key, Value::as_str, "text")
    }

    pub(crate) fn optional_bool(&self, key: &str) -> Result<Option<bool>, HubError> {
        self.optional(key, Value::as_bool, "true or false")
    }

    pub(crate) fn optional_array(&self, key: &str) -> Result<Option<&[Value]>, HubError> {
        self.optional(key, Value::as_array, "an array")
    }

    /// Turns an absent value into an error that names its key.
    pub(crate) fn require<T>(&self, key: &str, value: Option<T>) -> Result<T, HubError> {
        value.ok_or_else(|| self.metadata_error(key, "is missing"))
    }
}

#[cfg(test)]
mod tests;
