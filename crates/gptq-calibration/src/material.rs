//! From a source to its texts or stored windows, wherever the bytes lie.

use std::path::{Path, PathBuf};

use crate::CalibrationError;
use crate::digest::verify_file;
use crate::document::{MAX_TEXT_BYTES, open, read_text};
use crate::json;
use crate::manifest::{HubFile, Manifest, Rule};
use crate::rows::{Rows, limit};
use crate::source::{Format, Origin, Packing, Source};
use crate::stored;
use crate::table;

/// Gets files of dataset repositories; the only way by which this crate meets a network.
pub trait DatasetFiles {
    /// A local path of `file` of the dataset `repo` (`owner/name`) at `revision` (commit or
    /// branch); the error is a reason in one line.
    fn fetch(&self, repo: &str, revision: &str, file: &str) -> Result<PathBuf, String>;
}

/// Which of a dataset's two files is meant.
#[derive(Clone, Copy)]
pub(crate) enum Purpose {
    Calibration,
    Evaluation,
}

/// What a source holds.
pub(crate) enum Content {
    Rows(Rows),
    Whole(String),
    Windows(Vec<Vec<u32>>),
}

/// What a source holds, where it lay, and how windows are to be taken from it.
pub(crate) struct Material {
    pub(crate) content: Content,
    /// Path, for errors.
    pub(crate) path: PathBuf,
    /// Name and split or file name, for protocols: never a whole path.
    pub(crate) title: String,
    pub(crate) rule: Rule,
    /// The manifest's words for the rule, for a named dataset.
    pub(crate) words: Option<String>,
}

impl Material {
    /// Reads everything that `source` holds for `purpose`; fetches first where it is on the hub.
    pub(crate) fn read(
        source: &Source,
        purpose: Purpose,
        files: &dyn DatasetFiles,
    ) -> Result<Self, CalibrationError> {
        let material = match source.origin() {
            Origin::Generated => return Err(CalibrationError::Generated),
            Origin::Hub(manifest) => Self::of_hub(manifest, purpose, files)?,
            Origin::Copy(manifest, path, format) => {
                Self::of_copy(manifest, path, *format, purpose)?
            }
            Origin::File(path, format) => Self {
                content: read_content(path, *format, Packing::of(&file_name(path)))?,
                path: path.clone(),
                title: format!("`{}`", file_name(path)),
                rule: Rule::Joined,
                words: None,
            },
        };
        material.refuse_empty()
    }

    fn of_hub(
        manifest: &Manifest,
        purpose: Purpose,
        files: &dyn DatasetFiles,
    ) -> Result<Self, CalibrationError> {
        let hub = hub_file(manifest, purpose);
        let path = fetch(manifest, hub, files)?;
        // a cache may store blobs without their names, so the manifest's name says the format
        let format = Format::of(&hub.file).ok_or_else(|| CalibrationError::Manifest {
            name: manifest.name.clone(),
            reason: format!("file `{}` has no known extension", hub.file),
        })?;
        Ok(Self {
            content: read_content(&path, format, Packing::of(&hub.file))?,
            path,
            title: format!("`{}` {} split", manifest.name, hub.split),
            rule: manifest.rule,
            words: Some(hub.words.clone()),
        })
    }

    fn of_copy(
        manifest: &Manifest,
        path: &Path,
        format: Format,
        purpose: Purpose,
    ) -> Result<Self, CalibrationError> {
        let content = match read_content(path, format, Packing::of(&file_name(path)))? {
            // the rule joins the hub's rows, of which a raw text is another wrapping
            Content::Whole(text) => Content::Rows(Rows::of_raw_wikitext(&text, path)?),
            content => content,
        };
        Ok(Self {
            content,
            path: path.to_path_buf(),
            title: format!("`{}` as local copy `{}`", manifest.name, file_name(path)),
            rule: manifest.rule,
            words: Some(hub_file(manifest, purpose).words.clone()),
        })
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
) -> Result<Content, CalibrationError> {
    Ok(match format {
        Format::Parquet => Content::Rows(table::read_parquet(path)?),
        Format::Arrow => Content::Rows(table::read_arrow(path)?),
        Format::Json => Content::Rows(json::read_rows(open(path, packing)?, path)?),
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
