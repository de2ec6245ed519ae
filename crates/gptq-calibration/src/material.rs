//! From a source to its texts or stored windows, wherever the bytes lie.

use std::path::{Path, PathBuf};

use crate::CalibrationError;
use crate::conversation::ChatTemplate;
use crate::digest::verify_file;
use crate::document::{MAX_TEXT_BYTES, open, read_text};
use crate::json;
use crate::manifest::{HubFile, Manifest, Rule};
use crate::rows::{Amount, MAX_FILE_TEXT_BYTES, Reading, Rows, limit};
use crate::source::{Dataset, Format, Origin, Packing, Source};
use crate::stored;
use crate::table;
use crate::tokenizer::Tokenizer;

/// Text of a dataset without a manifest, for each token that is asked for: four times as much as a
/// token has, so that windows seldom overlap.
const START_BYTES_PER_TOKEN: usize = 16;
const MIN_START_BYTES: usize = 1 << 22;

/// Gets files of dataset repositories; the only way by which this crate meets a network.
pub trait DatasetFiles {
    /// A local path of `file` of the dataset `repo` (`owner/name`) at `revision` (commit or
    /// branch); the error is a reason in one line.
    fn fetch(&self, repo: &str, revision: &str, file: &str) -> Result<PathBuf, String>;

    /// The files with rows of one split of a dataset, in order; the error is a reason in one line.
    fn find(&self, dataset: &Dataset) -> Result<FoundDataset, String> {
        Err(format!(
            "files of `{}` cannot be looked for here",
            dataset.repo
        ))
    }
}

/// Files of a dataset that has no manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundDataset {
    /// The branch that they were found on.
    pub revision: String,
    /// Its commit, at which they are fetched.
    pub commit: String,
    /// Paths in the repository; at least one.
    pub files: Vec<String>,
}

/// Tokenizer, hub access and chat template for reading a source.
#[derive(Clone, Copy)]
pub struct Means<'a> {
    /// The tokenizer of the model.
    pub tokenizer: &'a Tokenizer,
    /// The way to the hub.
    pub files: &'a dyn DatasetFiles,
    /// The model's chat template, or [`crate::NoTemplate`].
    pub chat: &'a dyn ChatTemplate,
    /// The beginning-of-sequence token that every window begins with, where the model computes nonsense
    /// without it; else windows begin anywhere in the text, as those of the papers.
    pub bos: Option<u32>,
}

/// Selects one of a dataset's two files.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    Calibration,
    Evaluation,
}

/// The content of a source.
pub(crate) enum Content {
    Rows(Rows),
    Whole(String),
    Windows(Vec<Vec<u32>>),
}

/// The content of a source, its location, and the rule for windows.
pub(crate) struct Material {
    pub(crate) content: Content,
    /// Path, for errors.
    pub(crate) path: PathBuf,
    /// Name and split or file name, for protocols: never a whole path.
    pub(crate) title: String,
    pub(crate) rule: Rule,
    /// The manifest's words for the rule, for a named dataset.
    pub(crate) words: Option<String>,
    /// The BOS token of every window; `None` for stored windows, which are taken as they are.
    pub(crate) bos: Option<u32>,
    /// The commit of a dataset without a manifest, in words.
    commit: Option<String>,
}

impl Material {
    /// Reads everything that `source` holds for `purpose`, fetched from the hub if necessary. A dataset
    /// without a manifest may hold terabytes, so only its first rows are read, which give `tokens` tokens
    /// several times over.
    pub(crate) fn read(
        source: &Source,
        purpose: Purpose,
        tokens: usize,
        chat: &dyn ChatTemplate,
        files: &dyn DatasetFiles,
    ) -> Result<Self, CalibrationError> {
        let amount = match source.rule() {
            Rule::Documents => Amount::All(MAX_FILE_TEXT_BYTES),
            Rule::Joined => Amount::All(MAX_TEXT_BYTES),
        };
        let reading = Reading {
            column: source.column(),
            chat,
            amount,
        };
        let material = match source.origin() {
            Origin::Generated => return Err(CalibrationError::Generated),
            Origin::Hub(manifest) => Self::of_hub(manifest, purpose, reading, files)?,
            Origin::Copy(manifest, path, format) => {
                Self::of_copy(manifest, path, *format, purpose, reading)?
            }
            Origin::Dataset(dataset) => {
                let bytes = tokens.saturating_mul(START_BYTES_PER_TOKEN);
                let amount = Amount::Start(bytes.clamp(MIN_START_BYTES, MAX_TEXT_BYTES / 2));
                Self::of_dataset(dataset, Reading { amount, ..reading }, files)?
            }
            Origin::File(path, format) => Self {
                content: read_content(path, *format, Packing::of(&file_name(path)), reading)?,
                path: path.clone(),
                title: format!("`{}`", file_name(path)),
                rule: Rule::Joined,
                words: None,
                bos: None,
                commit: None,
            },
        };
        material.refuse_empty()
    }

    /// To be taken in windows that begin with `bos`, but for those that are stored.
    pub(crate) fn behind_bos(mut self, bos: Option<u32>) -> Self {
        self.bos = bos.filter(|_| !matches!(self.content, Content::Windows(_)));
        self
    }

    fn of_hub(
        manifest: &Manifest,
        purpose: Purpose,
        reading: Reading<'_>,
        files: &dyn DatasetFiles,
    ) -> Result<Self, CalibrationError> {
        let hub = hub_file(manifest, purpose);
        let path = fetch(manifest, hub, files)?;
        // a cache may store blobs without their names, so the manifest's file name determines the format
        let format = Format::of(&hub.file).ok_or_else(|| CalibrationError::Manifest {
            name: manifest.name.clone(),
            reason: format!("file `{}` has no known extension", hub.file),
        })?;
        Ok(Self {
            content: read_content(&path, format, Packing::of(&hub.file), reading)?,
            path,
            title: format!("`{}` {} split", manifest.name, hub.split),
            rule: manifest.rule,
            words: Some(hub.words.clone()),
            bos: None,
            commit: None,
        })
    }

    fn of_copy(
        manifest: &Manifest,
        path: &Path,
        format: Format,
        purpose: Purpose,
        reading: Reading<'_>,
    ) -> Result<Self, CalibrationError> {
        let packing = Packing::of(&file_name(path));
        let content = match read_content(path, format, packing, reading)? {
            // the rule joins the hub's rows, of which a raw text is another wrapping
            Content::Whole(text) => Content::Rows(Rows::of_raw_wikitext(&text)),
            content => content,
        };
        Ok(Self {
            content,
            path: path.to_path_buf(),
            title: format!("`{}` as local copy `{}`", manifest.name, file_name(path)),
            rule: manifest.rule,
            words: Some(hub_file(manifest, purpose).words.clone()),
            bos: None,
            commit: None,
        })
    }

    /// Rows of one split, file after file, until there are enough.
    fn of_dataset(
        dataset: &Dataset,
        reading: Reading<'_>,
        files: &dyn DatasetFiles,
    ) -> Result<Self, CalibrationError> {
        let failed = |revision: &str, file: &str, reason| CalibrationError::Fetch {
            repo: dataset.repo.clone(),
            revision: revision.to_string(),
            file: file.to_string(),
            reason,
        };
        let found = files
            .find(dataset)
            .map_err(|reason| CalibrationError::Dataset {
                dataset: dataset.to_string(),
                reason,
            })?;
        let (mut rows, mut path) = (Rows::default(), PathBuf::new());
        for file in &found.files {
            let fetched = files.fetch(&dataset.repo, &found.commit, file);
            path = fetched.map_err(|reason| failed(&found.revision, file, reason))?;
            let left = reading.amount.after(rows.bytes());
            let amount = Reading {
                amount: left,
                ..reading
            };
            let format = Format::of(file).filter(|format| format.has_rows());
            let format = format.ok_or_else(|| {
                failed(&found.revision, file, "it is no file of rows".to_string())
            })?;
            match read_content(&path, format, Packing::of(file), amount)? {
                Content::Rows(more) => rows.append(more),
                _ => continue, // a format with rows gives rows
            }
            if rows.is_start() {
                break;
            }
        }
        Ok(Self {
            content: Content::Rows(rows),
            path,
            title: format!("`{dataset}`"),
            rule: Rule::Joined,
            words: None,
            bos: None,
            commit: Some(format!("commit {}", found.commit)),
        })
    }

    /// The beginning of the rule's description: the rows and columns of a file, where not obvious.
    pub(crate) fn rows_words(&self) -> String {
        match &self.content {
            Content::Rows(rows) => [self.commit.clone(), rows.words()]
                .into_iter()
                .flatten()
                .map(|words| words + "; ")
                .collect(),
            _ => String::new(),
        }
    }

    fn refuse_empty(self) -> Result<Self, CalibrationError> {
        let is_empty = match &self.content {
            Content::Rows(rows) => rows.hold_nothing(),
            Content::Whole(text) => text.is_empty(),
            Content::Windows(windows) => windows.is_empty(),
        };
        if is_empty {
            return Err(CalibrationError::Empty { path: self.place() });
        }
        Ok(self)
    }

    /// The path as text.
    pub(crate) fn place(&self) -> String {
        self.path.display().to_string()
    }
}

/// Rows as one text, refused above [`MAX_TEXT_BYTES`].
pub(crate) fn join(rows: &Rows, path: &Path) -> Result<String, CalibrationError> {
    let joined = rows.joined();
    limit(path, joined.len(), MAX_TEXT_BYTES)?;
    Ok(joined)
}

fn hub_file(manifest: &Manifest, purpose: Purpose) -> &HubFile {
    match purpose {
        Purpose::Calibration => &manifest.calibration,
        Purpose::Evaluation => &manifest.evaluation,
    }
}

fn fetch(
    manifest: &Manifest,
    hub: &HubFile,
    files: &dyn DatasetFiles,
) -> Result<PathBuf, CalibrationError> {
    let sha256 = hub.sha256.as_deref();
    fetch_checked(&manifest.repo, &manifest.revision, &hub.file, sha256, files)
}

/// A file of the hub, whose content is that of `sha256` where one is known.
pub(crate) fn fetch_checked(
    repo: &str,
    revision: &str,
    file: &str,
    sha256: Option<&str>,
    files: &dyn DatasetFiles,
) -> Result<PathBuf, CalibrationError> {
    let path = files
        .fetch(repo, revision, file)
        .map_err(|reason| CalibrationError::Fetch {
            repo: repo.to_string(),
            revision: revision.to_string(),
            file: file.to_string(),
            reason,
        })?;
    if let Some(sha256) = sha256 {
        verify_file(&path, sha256)?;
    }
    Ok(path)
}

fn read_content(
    path: &Path,
    format: Format,
    packing: Packing,
    reading: Reading<'_>,
) -> Result<Content, CalibrationError> {
    Ok(match format {
        Format::Parquet => Content::Rows(table::read_parquet(path, reading)?),
        Format::Arrow => Content::Rows(table::read_arrow(path, reading)?),
        Format::Json => Content::Rows(json::read_rows(open(path, packing)?, path, reading)?),
        Format::Text => Content::Whole(read_text(path, packing)?),
        Format::Tokens => Content::Windows(stored::read_windows(path)?),
    })
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |n| n.to_string_lossy().into_owned(),
    )
}
