//! What an evaluation has found out so far; in a file if it is to outlive a kill.
//!
//! JSON lines: the first says of which evaluation, each further one is a group of windows or
//! passages that one model has scored. A line is synced before the next group begins.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::perplexity::WindowScore;

/// A journal that cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum JournalError {
    #[error("`{path}`: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("`{0}` is not the state of an evaluation")]
    Foreign(PathBuf),
    #[error("`{path}` belongs to an evaluation with another {what}: {found}, here {wanted}")]
    Other {
        path: PathBuf,
        what: String,
        found: String,
        wanted: String,
    },
    #[error("`{0}` is in use by another evaluation")]
    Busy(PathBuf),
    #[error("line {line} of `{path}`: {reason}")]
    Damaged {
        path: PathBuf,
        line: usize,
        reason: String,
    },
}

impl JournalError {
    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            JournalError::Foreign(_)
            | JournalError::Other { .. }
            | JournalError::Damaged { .. } => {
                Some("name a file that does not exist yet, or remove this one")
            }
            _ => None,
        }
    }
}

/// What was scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Part {
    Windows,
    Passages,
}

/// A group that one model has scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Place {
    pub part: Part,
    pub group: usize,
    pub model: usize,
}

/// What it said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    #[serde(flatten)]
    pub place: Place,
    pub seconds: f64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub windows: Vec<WindowScore>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<bool>,
}

/// Scores of groups, in memory and, where asked for, on disk.
pub struct Journal {
    file: Option<(PathBuf, File)>,
    entries: BTreeMap<Place, Entry>,
}

impl Journal {
    /// Forgotten when the process ends.
    pub fn in_memory() -> Self {
        Journal {
            file: None,
            entries: BTreeMap::new(),
        }
    }

    /// Goes on with the journal at `path`, or begins it with `settings`: everything that must be
    /// the same for its scores to be those of this evaluation. A last line that a kill cut short
    /// is dropped.
    ///
    /// Fails on a file that is something else, on other settings (by name), and on one that
    /// another process writes to; none of these is changed.
    pub fn open(path: &Path, settings: &Map<String, Value>) -> Result<Self, JournalError> {
        let wrong = |source| JournalError::Io {
            path: path.to_path_buf(),
            source,
        };
        if !path.exists() {
            begin(path, settings).map_err(wrong)?;
        }
        let options = OpenOptions::new().read(true).append(true).open(path);
        let file = options.map_err(wrong)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::Busy(path.to_path_buf())),
            Err(TryLockError::Error(source)) => return Err(wrong(source)),
        }
        let bytes = fs::read(path).map_err(wrong)?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n');
        let whole = whole.map_or(0, |end| end + 1);
        let text = std::str::from_utf8(&bytes[..whole])
            .map_err(|_| JournalError::Foreign(path.to_path_buf()))?;
        refuse_other_settings(path, text, settings)?;
        let entries = read_entries(path, text)?;
        file.set_len(whole as u64).map_err(wrong)?;
        Ok(Journal {
            file: Some((path.to_path_buf(), file)),
            entries,
        })
    }

    pub(crate) fn get(&self, place: Place) -> Option<&Entry> {
        self.entries.get(&place)
    }

    /// Keeps the entry; it is on disk when this returns.
    pub(crate) fn record(&mut self, entry: Entry) -> Result<(), JournalError> {
        if let Some((path, file)) = &mut self.file {
            let written = serde_json::to_string(&entry)
                .map_err(io::Error::from)
                .and_then(|line| file.write_all((line + "\n").as_bytes()))
                .and_then(|()| file.sync_data());
            written.map_err(|source| JournalError::Io {
                path: path.clone(),
                source,
            })?;
        }
        self.entries.insert(entry.place, entry);
        Ok(())
    }
}

/// The first line, whole or not at all: written beside, then renamed.
fn begin(path: &Path, settings: &Map<String, Value>) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    let line = serde_json::to_string(settings)? + "\n";
    let written = File::create(&beside)
        .and_then(|mut file| {
            file.write_all(line.as_bytes())?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // The first error is the one to report; a leftover here is only untidy.
        let _ = fs::remove_file(&beside);
        return written;
    }
    let folder = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty());
    File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
}

fn refuse_other_settings(
    path: &Path,
    text: &str,
    settings: &Map<String, Value>,
) -> Result<(), JournalError> {
    let first = text.lines().next().unwrap_or_default();
    let found: Map<String, Value> =
        serde_json::from_str(first).map_err(|_| JournalError::Foreign(path.to_path_buf()))?;
    for (what, wanted) in settings {
        let Some(found) = found.get(what) else {
            return Err(JournalError::Foreign(path.to_path_buf()));
        };
        if found != wanted {
            return Err(JournalError::Other {
                path: path.to_path_buf(),
                what: what.clone(),
                found: found.to_string(),
                wanted: wanted.to_string(),
            });
        }
    }
    Ok(())
}

fn read_entries(path: &Path, text: &str) -> Result<BTreeMap<Place, Entry>, JournalError> {
    (text.lines().enumerate().skip(1))
        .map(|(index, line)| {
            let entry: Entry =
                serde_json::from_str(line).map_err(|error| JournalError::Damaged {
                    path: path.to_path_buf(),
                    line: index + 1,
                    reason: error.to_string(),
                })?;
            Ok((entry.place, entry))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::perplexity::Divergence;

    fn settings(text: &str) -> Map<String, Value> {
        let settings = serde_json::json!({"models": 1, "text": text});
        settings.as_object().unwrap().clone()
    }

    fn entry(group: usize) -> Entry {
        Entry {
            place: Place {
                part: Part::Windows,
                group,
                model: 1,
            },
            seconds: 0.125,
            windows: vec![WindowScore {
                nll: 1709.7900745221255,
                divergence: Some(Divergence {
                    kl: 0.245_740_773_795_163_18,
                    top1: 1.0 / 3.0,
                    by_position: vec![1e-9, 0.1, 16_777_216.0, -3e-8],
                }),
            }],
            answers: Vec::new(),
        }
    }

    #[test]
    fn what_was_recorded_is_there_again_to_the_last_bit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.jsonl");
        let mut journal = Journal::open(&path, &settings("a")).unwrap();
        for group in [0, 1] {
            journal.record(entry(group)).unwrap();
        }
        drop(journal);
        // a kill in the middle of a line
        let mut text = fs::read_to_string(&path).unwrap();
        text.push_str("{\"part\":\"windows\",\"gro");
        fs::write(&path, &text).unwrap();
        let mut journal = Journal::open(&path, &settings("a")).unwrap();
        assert_eq!(journal.get(entry(1).place), Some(&entry(1)));
        assert_eq!(journal.get(entry(2).place), None);
        journal.record(entry(2)).unwrap();
        drop(journal);
        let journal = Journal::open(&path, &settings("a")).unwrap();
        assert_eq!(journal.get(entry(2).place), Some(&entry(2)));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_of_something_else_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.jsonl");
        drop(Journal::open(&path, &settings("a")).unwrap());
        let refused = |settings: &Map<String, Value>| {
            let before = fs::read(&path).unwrap();
            let error = Journal::open(&path, settings).err().unwrap().to_string();
            assert_eq!(fs::read(&path).unwrap(), before);
            error
        };
        let named = "belongs to an evaluation with another text: \"a\", here \"b\"";
        assert!(refused(&settings("b")).ends_with(named));
        for other in ["", "no line", "notes\n", "[1]\n", "{\"text\": \"a\"}\n"] {
            fs::write(&path, other).unwrap();
            let error = refused(&settings("a"));
            assert!(
                error.ends_with("is not the state of an evaluation"),
                "{error}"
            );
        }
        let whole = serde_json::to_string(&settings("a")).unwrap();
        fs::write(&path, format!("{whole}\n{{}}\n")).unwrap();
        assert!(refused(&settings("a")).starts_with("line 2 of "));
        let nowhere = folder.path().join("none").join("state.jsonl");
        assert!(Journal::open(&nowhere, &settings("a")).is_err());
    }

    #[test]
    fn two_evaluations_do_not_share_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.jsonl");
        let _first = Journal::open(&path, &settings("a")).unwrap();
        let second = Journal::open(&path, &settings("a")).err().unwrap();
        assert!(matches!(second, JournalError::Busy(_)), "{second}");
    }
}
