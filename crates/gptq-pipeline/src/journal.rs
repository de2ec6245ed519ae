//! The journal of a run: one line when it begins, one for each block that lies safely on disk.
//!
//! A line is believed only as it was written: it ends with a sha256 over itself and the line before,
//! and it carries the sha256 of every tensor that it vouches for.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use gptq_types::outside_name::shown;
use gptq_types::{BlockTraining, ContentHash, ContentHasher, LayerRecord, Warning};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::PipelineError;

/// Its name in the partial folder.
pub const JOURNAL_FILE: &str = "journal.jsonl";

/// A block of a 70B model takes 10 kB.
const MAX_BYTES: u64 = 256 << 20;

/// A finished block.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockEntry {
    /// Index of the block.
    pub block: usize,
    /// Its linears.
    pub layers: Vec<LayerRecord>,
    /// Its training, if it was trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub training: Option<BlockTraining>,
    /// Warnings about the block.
    pub warnings: Vec<Warning>,
    /// The packed tensors of its linears, as they lie on disk.
    #[serde(default)]
    pub tensors: BTreeMap<String, ContentHash>,
}

/// An append-only file in the partial folder.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// The seal of the line before.
    seal: Option<ContentHash>,
}

impl Journal {
    /// Starts a journal with everything that must be the same when the run is resumed.
    pub fn begin(folder: &Path, settings: &Map<String, Value>) -> Result<Self, PipelineError> {
        let path = folder.join(JOURNAL_FILE);
        let file = File::create(&path).map_err(|error| failure(&path, &error))?;
        let mut journal = Journal {
            path,
            file,
            seal: None,
        };
        journal.append(&Value::Object(settings.clone()))?;
        Ok(journal)
    }

    /// Reopens a journal; nothing where not even its first line is whole. Refuses other settings by
    /// name, and lines that are not as they were written. A last line that was cut short by the
    /// interruption is dropped.
    pub fn reopen(
        folder: &Path,
        settings: &Map<String, Value>,
    ) -> Result<Option<(Self, Vec<BlockEntry>)>, PipelineError> {
        let path = folder.join(JOURNAL_FILE);
        let text = read(&path)?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        if whole == 0 {
            return Ok(None);
        }
        let mut lines = text[..whole].lines().enumerate();
        let mut seal = None;
        let mut entries = Vec::new();
        if let Some((_, first)) = lines.next() {
            refuse_other_settings(&path, first, settings)?;
            open_line(&path, 0, first, &mut seal)?;
        }
        for (number, line) in lines {
            let body = open_line(&path, number, line, &mut seal)?;
            let entry: BlockEntry = serde_json::from_str(&body)
                .map_err(|error| damaged(&path, number, &error.to_string()))?;
            if entry.block != entries.len() {
                let reason = format!("block {} instead of {}", entry.block, entries.len());
                return Err(damaged(&path, number, &reason));
            }
            entries.push(entry);
        }
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|error| failure(&path, &error))?;
        file.set_len(whole as u64)
            .map_err(|error| failure(&path, &error))?;
        Ok(Some((Journal { path, file, seal }, entries)))
    }

    /// Lines of blocks in the journal of a folder, whether they can be believed or not.
    pub fn blocks_in(folder: &Path) -> usize {
        let text = read(&folder.join(JOURNAL_FILE)).unwrap_or_default();
        text.matches('\n').count().saturating_sub(1)
    }

    /// Records a block whose tensors were synced before.
    pub fn record(&mut self, entry: &BlockEntry) -> Result<(), PipelineError> {
        let value = serde_json::to_value(entry).map_err(|error| failure(&self.path, &error))?;
        self.append(&value)
    }

    fn append(&mut self, value: &Value) -> Result<(), PipelineError> {
        let body = value.to_string();
        let seal = seal_of(&body, self.seal.as_ref());
        let line = format!("{}{SEAL}{seal}\"}}\n", &body[..body.len() - 1]);
        self.file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.sync_data())
            .map_err(|error| failure(&self.path, &error))?;
        self.seal = Some(seal);
        Ok(())
    }
}

/// The text before the seal, which is the last member of a line.
const SEAL: &str = ",\"sha256\":\"";

fn seal_of(body: &str, before: Option<&ContentHash>) -> ContentHash {
    let mut hasher = ContentHasher::default();
    hasher.update(before.map_or("", ContentHash::as_str).as_bytes());
    hasher.update(body.as_bytes());
    hasher.finish()
}

/// The text of a line without its seal, which must be right; it is the next line's to build on.
fn open_line(
    path: &Path,
    number: usize,
    line: &str,
    seal: &mut Option<ContentHash>,
) -> Result<String, PipelineError> {
    let (body, found) = line
        .strip_suffix("\"}")
        .and_then(|line| line.rsplit_once(SEAL))
        .ok_or_else(|| damaged(path, number, "it has no sha256"))?;
    let body = format!("{body}}}");
    let computed = seal_of(&body, seal.as_ref());
    if computed.as_str() != found {
        let reason = "its sha256 is another one, or that of the line before";
        return Err(damaged(path, number, reason));
    }
    *seal = Some(computed);
    Ok(body)
}

/// Empty where there is no journal.
fn read(path: &Path) -> Result<String, PipelineError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
        opened => opened.map_err(|error| failure(path, &error))?,
    };
    let mut bytes = Vec::new();
    (file.take(MAX_BYTES).read_to_end(&mut bytes)).map_err(|error| failure(path, &error))?;
    String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let number = before.iter().filter(|&&byte| byte == b'\n').count();
        damaged(path, number, "it is not UTF-8 text")
    })
}

/// The first line of a journal against what is asked for now.
fn refuse_other_settings(
    path: &Path,
    first: &str,
    settings: &Map<String, Value>,
) -> Result<(), PipelineError> {
    let found: Map<String, Value> =
        serde_json::from_str(first).map_err(|error| damaged(path, 0, &error.to_string()))?;
    for (what, wanted) in settings {
        let found = found.get(what).cloned().unwrap_or(Value::Null);
        if found != *wanted {
            return Err(PipelineError::OtherSettings {
                path: path.parent().unwrap_or(path).to_path_buf(),
                what: what.clone(),
                found: shown(&found.to_string(), 100),
                wanted: shown(&wanted.to_string(), 100),
            });
        }
    }
    Ok(())
}

/// The line `number`, counted from 0.
fn damaged(path: &Path, number: usize, reason: &str) -> PipelineError {
    PipelineError::DamagedLine {
        path: path.to_path_buf(),
        line: number + 1,
        reason: shown(reason, 150),
    }
}

fn failure(path: &Path, error: &dyn std::error::Error) -> PipelineError {
    PipelineError::Journal {
        path: path.to_path_buf(),
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(block: usize) -> BlockEntry {
        BlockEntry {
            block,
            layers: Vec::new(),
            training: None,
            warnings: Vec::new(),
            tensors: BTreeMap::from([(format!("t{block}"), ContentHash::of(b"x"))]),
        }
    }

    fn settings() -> Map<String, Value> {
        Map::from_iter([("bits".to_string(), Value::from(4))])
    }

    fn blocks(folder: &Path) -> Result<usize, String> {
        match Journal::reopen(folder, &settings()) {
            Ok(found) => Ok(found.map_or(0, |(_, entries)| entries.len())),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn any_change_of_any_line_is_found_and_a_torn_one_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::begin(folder.path(), &settings()).unwrap();
        (0..3).for_each(|block| journal.record(&entry(block)).unwrap());
        let path = folder.path().join(JOURNAL_FILE);
        let text = std::fs::read(&path).unwrap();
        for at in 0..text.len() {
            let mut changed = text.clone();
            changed[at] ^= 2;
            std::fs::write(&path, &changed).unwrap();
            // A line end that became something else makes the last line a torn one.
            let torn = at + 1 == text.len();
            assert_eq!(blocks(folder.path()).ok(), torn.then_some(2), "byte {at}");
        }
        let lines: Vec<&[u8]> = text.split_inclusive(|&byte| byte == b'\n').collect();
        for (kept, found) in [
            (vec![0, 1, 2, 3], Some(3)),
            (vec![0, 1], Some(1)),
            (vec![0], Some(0)),
            (vec![0, 2, 3], None),
            (vec![0, 1, 3], None),
            (vec![0, 1, 1], None),
        ] {
            let changed: Vec<u8> = kept.iter().flat_map(|&line| lines[line]).copied().collect();
            std::fs::write(&path, changed).unwrap();
            assert_eq!(blocks(folder.path()).ok(), found, "{kept:?}");
        }
        std::fs::write(&path, &text[..lines[0].len() - 1]).unwrap();
        assert!(
            Journal::reopen(folder.path(), &settings())
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_reopened_journal_goes_on_where_it_stopped() {
        let folder = tempfile::tempdir().unwrap();
        Journal::begin(folder.path(), &settings()).unwrap();
        for block in 0..3 {
            let (mut journal, entries) = Journal::reopen(folder.path(), &settings())
                .unwrap()
                .unwrap();
            assert_eq!(entries.len(), block);
            journal.record(&entry(block)).unwrap();
        }
        assert_eq!(blocks(folder.path()), Ok(3));
        assert_eq!(Journal::blocks_in(folder.path()), 3);
    }
}
