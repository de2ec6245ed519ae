//! Small text files of a model folder, read within a limit; what lies in place of a file that
//! never arrived is named.

use std::fs;
use std::io::Read;
use std::path::Path;

use gptq_types::{STAND_IN_BYTES, StandIn};

use crate::HubError;

pub(crate) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// Reads a small text file, refusing one larger than `limit` bytes and one that stands in for
/// another.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, HubError> {
    let file = fs::File::open(path).map_err(|source| HubError::io("read", path, source))?;
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| HubError::io("read", path, source))?;
    let bad = |reason: String| HubError::BadFile {
        path: path.to_path_buf(),
        reason,
    };
    if bytes.len() as u64 > limit {
        return Err(bad(format!("larger than {limit} bytes")));
    }
    if let Some(what) = StandIn::of(&bytes) {
        let path = path.to_path_buf();
        return Err(HubError::StandIn { path, what });
    }
    String::from_utf8(bytes).map_err(|_| bad("not UTF-8 text".into()))
}

/// Refuses a file that is an LFS pointer or a web page, by its first bytes. Empty files are valid:
/// `merges.txt` may be empty.
pub(crate) fn refuse_stand_in(path: &Path) -> Result<(), HubError> {
    let file = fs::File::open(path).map_err(|source| HubError::io("read", path, source))?;
    let mut first = Vec::new();
    file.take(STAND_IN_BYTES as u64)
        .read_to_end(&mut first)
        .map_err(|source| HubError::io("read", path, source))?;
    match StandIn::of(&first) {
        None | Some(StandIn::Empty) => Ok(()),
        Some(what) => Err(HubError::StandIn {
            path: path.to_path_buf(),
            what,
        }),
    }
}
