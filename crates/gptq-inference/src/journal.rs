//! The journal of an evaluation: scores so far, in a file if they are to survive a kill.
//!
//! Lines of a sha256 and JSON: the first says of which evaluation, each further one is a group of
//! windows, passages or choices that one model has scored. A line is synced before the next group begins. The
//! sha256 is that of the line's JSON, after that of the first line: a line that was changed, or that
//! is of another evaluation, is an error and never part of a mean.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use gptq_types::outside_name::shown;
use gptq_types::{ContentHash, ContentHasher, LEAST_KL};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::perplexity::{Divergence, WindowScore};

/// A journal that cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum JournalError {
    #[error("`{path}`: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("`{0}` is not the state of an evaluation")]
    Foreign(PathBuf),
    #[error("`{0}` was begun by an older gptq: its lines have no checks")]
    Unchecked(PathBuf),
    #[error("`{path}` belongs to an evaluation with another {what}: {found}, here {wanted}")]
    Other {
        path: PathBuf,
        what: String,
        found: String,
        wanted: String,
    },
    #[error("`{0}` is in use by another evaluation")]
    Busy(PathBuf),
    #[error("line {line} of `{path}` {reason}")]
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
            | JournalError::Unchecked(_)
            | JournalError::Other { .. }
            | JournalError::Damaged { .. } => {
                Some("name a file that does not exist yet, or remove this one")
            }
            _ => None,
        }
    }
}

/// The kind of a scored group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Part {
    Windows,
    Passages,
    Choices,
}

/// A group that one model has scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Place {
    pub part: Part,
    pub group: usize,
    pub model: usize,
}

/// The scores of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    pub place: Place,
    pub seconds: f64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub windows: Vec<WindowScore>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub answers: Vec<bool>,
    /// Log-likelihoods of choices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub likelihoods: Vec<f64>,
}

/// The shape of a group, which determines how many values its entry holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GroupShape {
    /// Predictions of each window.
    pub predictions: Vec<usize>,
    /// Passages whose last word is guessed.
    pub passages: usize,
    /// Choices.
    pub choices: usize,
    /// Whether the model is compared with the reference.
    pub compared: bool,
}

/// Scores of groups, in memory and, where asked for, on disk.
pub struct Journal {
    file: Option<Stored>,
    entries: BTreeMap<Place, Entry>,
}

struct Stored {
    path: PathBuf,
    file: File,
    /// All whole lines.
    bytes: u64,
    /// Hash of the first line, part of every other line's check.
    evaluation: ContentHash,
    /// Line numbers of the entries that were read, from 1.
    lines: BTreeMap<Place, usize>,
}

/// Rounding makes the log-likelihood of what is certain a little more than 0.
const MOST_LIKELIHOOD: f64 = 1e-3;

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
        let evaluation = read_settings(path, text, settings)?;
        let (entries, lines) = read_entries(path, text, &evaluation)?;
        file.set_len(whole as u64).map_err(wrong)?;
        Ok(Journal {
            file: Some(Stored {
                path: path.to_path_buf(),
                file,
                bytes: whole as u64,
                evaluation,
                lines,
            }),
            entries,
        })
    }

    /// Refuses an entry that is not of the evaluation: `shape` knows its groups.
    pub(crate) fn check(
        &self,
        shape: &dyn Fn(Place) -> Option<GroupShape>,
    ) -> Result<(), JournalError> {
        let Some(stored) = &self.file else {
            return Ok(());
        };
        for (place, entry) in &self.entries {
            let found = match shape(*place) {
                None => Err("is of a group that this evaluation does not have"),
                Some(shape) => entry.fits(&shape),
            };
            found.map_err(|reason| JournalError::Damaged {
                path: stored.path.clone(),
                line: stored.lines.get(place).copied().unwrap_or(0),
                reason: reason.to_string(),
            })?;
        }
        Ok(())
    }

    pub(crate) fn get(&self, place: Place) -> Option<&Entry> {
        self.entries.get(&place)
    }

    /// Appends the entry, which is on disk when this returns. A partial line left by a full disk is removed.
    pub(crate) fn record(&mut self, entry: Entry) -> Result<(), JournalError> {
        if let Some(stored) = &mut self.file {
            let written = serde_json::to_string(&entry)
                .map_err(io::Error::from)
                .and_then(|json| stored.append(&json));
            if let Err(source) = written {
                // The write is the error to report; a line cut short is dropped by the next start.
                let _ = stored.file.set_len(stored.bytes);
                return Err(JournalError::Io {
                    path: stored.path.clone(),
                    source,
                });
            }
        }
        self.entries.insert(entry.place, entry);
        Ok(())
    }
}

impl Stored {
    fn append(&mut self, json: &str) -> io::Result<()> {
        let line = format!("{} {json}\n", check_of(&self.evaluation, json));
        self.file.write_all(line.as_bytes())?;
        self.file.sync_data()?;
        self.bytes += line.len() as u64;
        Ok(())
    }
}

impl Entry {
    /// Why it cannot be what was found out about a group of this shape.
    fn fits(&self, shape: &GroupShape) -> Result<(), &'static str> {
        let sizes = (self.answers.len(), self.likelihoods.len());
        if self.windows.len() != shape.predictions.len() || sizes != (shape.passages, shape.choices)
        {
            return Err("has another number of windows, passages or choices than its group");
        }
        let is_likelihood = |value: &f64| value.is_finite() && *value <= MOST_LIKELIHOOD;
        if !self.likelihoods.iter().all(is_likelihood) {
            return Err("has a likelihood that no model gives");
        }
        if !(self.seconds.is_finite() && self.seconds >= 0.0) {
            return Err("took a time that is no time");
        }
        for (window, &predictions) in self.windows.iter().zip(&shape.predictions) {
            if !(window.nll.is_finite() && -window.nll <= MOST_LIKELIHOOD) {
                return Err("has a likelihood that no model gives");
            }
            match (&window.divergence, shape.compared) {
                (None, false) => {}
                (Some(found), true) => found.fits(predictions)?,
                _ => return Err("is compared with the reference where it should not be, or not"),
            }
        }
        Ok(())
    }
}

impl Divergence {
    fn fits(&self, predictions: usize) -> Result<(), &'static str> {
        if self.by_position.len() != predictions {
            return Err("has another number of positions than its window");
        }
        let mut all = (self.by_position.iter().copied().map(f64::from)).chain([self.kl]);
        if !all.all(|kl| kl.is_finite() && kl >= LEAST_KL) {
            return Err("has a divergence that is none");
        }
        match (0.0..=1.0).contains(&self.top1) {
            true => Ok(()),
            false => Err("has a share that is not between 0 and 1"),
        }
    }
}

fn check_of(evaluation: &ContentHash, json: &str) -> ContentHash {
    let mut hasher = ContentHasher::default();
    hasher.update(evaluation.as_str().as_bytes());
    hasher.update(json.as_bytes());
    hasher.finish()
}

/// Creates the journal with its first line, atomically: a temporary file is renamed.
fn begin(path: &Path, settings: &Map<String, Value>) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = path.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    let json = serde_json::to_string(settings)?;
    let line = format!("{} {json}\n", ContentHash::of(json.as_bytes()));
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

/// The first line, where it is of the same evaluation; its check.
fn read_settings(
    path: &Path,
    text: &str,
    settings: &Map<String, Value>,
) -> Result<ContentHash, JournalError> {
    let foreign = || JournalError::Foreign(path.to_path_buf());
    let first = text.lines().next().unwrap_or_default();
    // Versions before 0.2 began with the settings themselves.
    if serde_json::from_str::<Map<String, Value>>(first).is_ok_and(|old| old.contains_key("tool")) {
        return Err(JournalError::Unchecked(path.to_path_buf()));
    }
    let (check, json) = first.split_once(' ').ok_or_else(foreign)?;
    let check = ContentHash::try_from(check.to_string()).map_err(|_| foreign())?;
    if check != ContentHash::of(json.as_bytes()) {
        return Err(damaged(path, 1, CHANGED));
    }
    let found: Map<String, Value> = serde_json::from_str(json).map_err(|_| foreign())?;
    if !found.contains_key("tool") {
        return Err(foreign());
    }
    // A setting missing on one side counts as null: tasks may have been added or dropped.
    for what in settings.keys().chain(found.keys()) {
        let of = |all: &Map<String, Value>| all.get(what).cloned().unwrap_or_default();
        let (found, wanted) = (of(&found), of(settings));
        if found != wanted {
            return Err(JournalError::Other {
                path: path.to_path_buf(),
                what: what.clone(),
                found: shown(&found.to_string(), SHOWN_CHARACTERS),
                wanted: shown(&wanted.to_string(), SHOWN_CHARACTERS),
            });
        }
    }
    Ok(check)
}

/// Characters of a setting that an error shows.
const SHOWN_CHARACTERS: usize = 90;
const CHANGED: &str = "was changed after it was written: its check does not fit";

type Entries = (BTreeMap<Place, Entry>, BTreeMap<Place, usize>);

fn read_entries(
    path: &Path,
    text: &str,
    evaluation: &ContentHash,
) -> Result<Entries, JournalError> {
    let (mut entries, mut lines) = (BTreeMap::new(), BTreeMap::new());
    for (index, line) in text.lines().enumerate().skip(1) {
        let number = index + 1;
        let entry: Entry = match line.split_once(' ') {
            Some((check, json)) if check == check_of(evaluation, json).as_str() => {
                serde_json::from_str(json)
                    .map_err(|error| damaged(path, number, &error.to_string()))?
            }
            _ => return Err(damaged(path, number, CHANGED)),
        };
        if let Some(first) = lines.insert(entry.place, number) {
            let reason = format!("repeats the group of line {first}");
            return Err(damaged(path, number, &reason));
        }
        entries.insert(entry.place, entry);
    }
    Ok((entries, lines))
}

fn damaged(path: &Path, line: usize, reason: &str) -> JournalError {
    JournalError::Damaged {
        path: path.to_path_buf(),
        line,
        reason: shown(reason, 2 * SHOWN_CHARACTERS),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Map<String, Value> {
        let settings = serde_json::json!({"tool": "gptq", "text": text});
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
            likelihoods: Vec::new(),
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
        text.push_str("0123abcd {\"place\":{\"part\":\"win");
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
        let older = serde_json::to_string(&settings("a")).unwrap();
        fs::write(&path, format!("{older}\n{{}}\n")).unwrap();
        assert!(refused(&settings("a")).contains("begun by an older gptq"));
        let nowhere = folder.path().join("none").join("state.jsonl");
        assert!(Journal::open(&nowhere, &settings("a")).is_err());
    }

    /// A line with an edited likelihood, or with one window of three, went into the mean.
    #[test]
    fn a_line_that_was_edited_moved_or_repeated_is_refused_by_its_number() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.jsonl");
        let mut journal = Journal::open(&path, &settings("a")).unwrap();
        for group in [0, 1] {
            journal.record(entry(group)).unwrap();
        }
        drop(journal);
        let whole = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = whole.lines().collect();
        let other = folder.path().join("other.jsonl");
        let mut journal = Journal::open(&other, &settings("b")).unwrap();
        journal.record(entry(2)).unwrap();
        drop(journal);
        let foreign = fs::read_to_string(&other).unwrap();
        let foreign = foreign.lines().last().unwrap();
        for (text, number, named) in [
            (whole.replacen("1709.7", "1708.7", 1), 2, CHANGED),
            (
                whole.replacen("\"text\":\"a\"", "\"text\":\"b\"", 1),
                1,
                CHANGED,
            ),
            (
                format!("{whole}{}\n", lines[1]),
                4,
                "repeats the group of line 2",
            ),
            (format!("{whole}{foreign}\n"), 4, CHANGED),
            (format!("{whole}\n"), 4, CHANGED),
        ] {
            fs::write(&path, &text).unwrap();
            let error = Journal::open(&path, &settings("a")).err().unwrap();
            assert!(error.hint().is_some());
            let told = error.to_string();
            assert!(told.starts_with(&format!("line {number} of ")), "{told}");
            assert!(told.contains(named), "{told}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }

    #[test]
    fn an_entry_that_no_group_gives_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.jsonl");
        let shape = |place: Place| {
            (place.group == 0).then_some(GroupShape {
                predictions: vec![4],
                compared: true,
                ..GroupShape::default()
            })
        };
        let told = |change: &dyn Fn(&mut Entry)| {
            let _ = fs::remove_file(&path);
            let mut journal = Journal::open(&path, &settings("a")).unwrap();
            let mut changed = entry(0);
            change(&mut changed);
            journal.record(changed).unwrap();
            drop(journal);
            let journal = Journal::open(&path, &settings("a")).unwrap();
            journal.check(&shape).map_err(|error| error.to_string())
        };
        told(&|_| {}).unwrap();
        // A model that is certain.
        told(&|entry| entry.windows[0].nll = 0.0).unwrap();
        let divergence = |entry: &mut Entry| entry.windows[0].divergence.clone().unwrap();
        let changes: [&dyn Fn(&mut Entry); 9] = [
            &|entry| entry.place.group = 1,
            &|entry| entry.windows.clear(),
            &|entry| entry.windows[0].nll = -0.5,
            &|entry| entry.windows[0].divergence = None,
            &|entry| entry.answers.push(true),
            &|entry| entry.likelihoods.push(-1.0),
            &|entry| entry.seconds = -1.0,
            &|entry| {
                let kl = -0.5;
                entry.windows[0].divergence = Some(Divergence {
                    kl,
                    ..divergence(entry)
                });
            },
            &|entry| {
                let by_position = Vec::new();
                entry.windows[0].divergence = Some(Divergence {
                    by_position,
                    ..divergence(entry)
                });
            },
        ];
        for change in changes {
            let told = told(change).unwrap_err();
            assert!(told.starts_with("line 2 of "), "{told}");
        }
    }

    /// Likelihoods are sums of logarithms of shares: none is above 0 but by rounding.
    #[test]
    fn a_likelihood_of_more_than_certainty_is_refused() {
        let shape = GroupShape {
            choices: 2,
            ..GroupShape::default()
        };
        let fits = |likelihoods: [f64; 2]| {
            let choices = Entry {
                windows: Vec::new(),
                likelihoods: likelihoods.to_vec(),
                ..entry(0)
            };
            choices.fits(&shape)
        };
        assert!(fits([-17.5, 1e-7]).is_ok());
        for wrong in [0.5, f64::NAN, f64::NEG_INFINITY] {
            assert!(fits([-1.0, wrong]).is_err());
        }
    }

    /// A state without tasks was called none of an evaluation where tasks were asked for, and one
    /// with them damaged where they were not.
    #[test]
    fn a_setting_that_only_one_has_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.jsonl");
        let plain = settings("a");
        let mut with_tasks = plain.clone();
        with_tasks.insert("set of questions".to_string(), Value::from("0123"));
        for (before, after, told) in [
            (&plain, &with_tasks, "null, here \"0123\""),
            (&with_tasks, &plain, "\"0123\", here null"),
        ] {
            drop(Journal::open(&path, before).unwrap());
            let error = Journal::open(&path, after).err().unwrap().to_string();
            let named = format!("belongs to an evaluation with another set of questions: {told}");
            assert!(error.ends_with(&named), "{error}");
            fs::remove_file(&path).unwrap();
        }
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
