//! The journal of a run: one line when it begins, one for each block that lies safely on disk.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use gptq_types::{LayerRecord, Warning};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::PipelineError;

const FILE_NAME: &str = "journal.jsonl";

/// A finished block.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct BlockEntry {
    /// Index of the block.
    pub block: usize,
    /// Its linears.
    pub layers: Vec<LayerRecord>,
    /// What was seen in it.
    pub warnings: Vec<Warning>,
}

/// An append-only file in the partial folder.
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Starts a journal with everything that must be the same when the run is resumed.
    pub fn begin(folder: &Path, settings: &Map<String, Value>) -> Result<Self, PipelineError> {
        let path = folder.join(FILE_NAME);
        let file = File::create(&path).map_err(|error| failure(&path, &error))?;
        let mut journal = Journal { path, file };
        journal.append(&Value::Object(settings.clone()))?;
        Ok(journal)
    }

    /// Refuses other settings by name, before anybody looks at the shapes that follow from them.
    /// A folder without a journal says nothing.
    pub fn check(folder: &Path, settings: &Map<String, Value>) -> Result<(), PipelineError> {
        let path = folder.join(FILE_NAME);
        match std::fs::read_to_string(&path) {
            Ok(text) => refuse_other_settings(&path, &text, settings),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(failure(&path, &error)),
        }
    }

    /// Reopens a journal; refuses other settings by name. A last line that was cut short by the
    /// interruption is dropped.
    pub fn reopen(
        folder: &Path,
        settings: &Map<String, Value>,
    ) -> Result<(Self, Vec<BlockEntry>), PipelineError> {
        let path = folder.join(FILE_NAME);
        let text = std::fs::read_to_string(&path).map_err(|error| failure(&path, &error))?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        refuse_other_settings(&path, &text[..whole], settings)?;
        let entries = text[..whole]
            .lines()
            .skip(1)
            .map(serde_json::from_str)
            .collect::<Result<Vec<BlockEntry>, _>>()
            .map_err(|error| failure(&path, &error))?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|error| failure(&path, &error))?;
        file.set_len(whole as u64)
            .map_err(|error| failure(&path, &error))?;
        Ok((Journal { path, file }, entries))
    }

    /// Records a block whose tensors were synced before.
    pub fn record(&mut self, entry: &BlockEntry) -> Result<(), PipelineError> {
        let value = serde_json::to_value(entry).map_err(|error| failure(&self.path, &error))?;
        self.append(&value)
    }

    /// Removes the file: the folder is about to be published.
    pub fn end(self) -> Result<(), PipelineError> {
        std::fs::remove_file(&self.path).map_err(|error| failure(&self.path, &error))
    }

    fn append(&mut self, value: &Value) -> Result<(), PipelineError> {
        let line = format!("{value}\n");
        self.file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.sync_data())
            .map_err(|error| failure(&self.path, &error))
    }
}

/// The first line of a journal against what is asked for now.
fn refuse_other_settings(
    path: &Path,
    text: &str,
    settings: &Map<String, Value>,
) -> Result<(), PipelineError> {
    let first = text.lines().next().unwrap_or("{}");
    let found: Map<String, Value> =
        serde_json::from_str(first).map_err(|error| failure(path, &error))?;
    for (what, wanted) in settings {
        let found = found.get(what).cloned().unwrap_or(Value::Null);
        if found != *wanted {
            return Err(PipelineError::OtherSettings {
                path: path.parent().unwrap_or(path).to_path_buf(),
                what: what.clone(),
                found: found.to_string(),
                wanted: wanted.to_string(),
            });
        }
    }
    Ok(())
}

fn failure(path: &Path, error: &dyn std::error::Error) -> PipelineError {
    PipelineError::Journal {
        path: path.to_path_buf(),
        reason: error.to_string(),
    }
}
