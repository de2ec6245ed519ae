//! Everything that can be wrong with a tokenizer, a text or a request for windows.

use std::fmt::Display;
use std::path::Path;

use gptq_types::outside_name::shown;

/// Characters of a cause that an error repeats.
const SHOWN_CHARACTERS: usize = 200;

/// Windows that could not be made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum CalibrationError {
    #[error("{path}: {source}")]
    Read {
        path: String,
        source: std::io::Error,
    },
    #[error("`tokenizer.json` is missing from {folder}")]
    TokenizerMissing { folder: String },
    #[error("{path} is {reason}")]
    TokenizerForeign { path: String, reason: String },
    #[error("{path}: {reason}")]
    TokenizerInvalid { path: String, reason: String },
    #[error("a text of {bytes} bytes could not be tokenized: {reason}")]
    Encode { bytes: usize, reason: String },
    #[error("{tokens} tokens could not be decoded: {reason}")]
    Decode { tokens: usize, reason: String },
    #[error(
        "token `{token}` of {path} has id {id}, but the model's vocabulary ends before {model_vocab}"
    )]
    Vocabulary {
        path: String,
        token: String,
        id: u32,
        model_vocab: usize,
    },
    #[error(
        "token {position} of window {window} is {id}, but the model's vocabulary ends before {model_vocab}"
    )]
    TokenOutOfRange {
        window: usize,
        position: usize,
        id: u32,
        model_vocab: usize,
    },
    #[error("source `{name}` is not one of {known}")]
    UnknownSource { name: String, known: String },
    #[error("{path} ends with none of {known}")]
    UnknownFormat { path: String, known: String },
    #[error("the rule of `{name}` needs {needs}, and {path} is a {format} file")]
    Rule {
        name: String,
        path: String,
        format: &'static str,
        needs: &'static str,
    },
    #[error("source `self` holds no text: its windows come from the model")]
    Generated,
    #[error("manifest `{name}`: {reason}")]
    Manifest { name: String, reason: String },
    #[error("dataset `{dataset}`: {reason}")]
    Dataset { dataset: String, reason: String },
    #[error("file `{file}` of dataset `{repo}` at `{revision}`: {reason}")]
    Fetch {
        repo: String,
        revision: String,
        file: String,
        reason: String,
    },
    #[error("{path} has sha256 {found}, expected {expected}")]
    Hash {
        path: String,
        found: String,
        expected: String,
    },
    #[error("{place} {reason}")]
    Row {
        /// The row in words.
        place: String,
        /// From 1.
        row: usize,
        reason: String,
    },
    #[error("{place} {reason}")]
    NoColumn { place: String, reason: String },
    #[error("{place} has the columns of no task that is known ({known}), it has {found}")]
    NoTask {
        place: String,
        known: String,
        found: String,
    },
    #[error("column `{column}` of {path} has type {found}, expected strings")]
    ColumnType {
        path: String,
        column: String,
        found: String,
    },
    #[error(
        "`--column {column}` chooses among the columns of rows, and {given} has none to choose"
    )]
    NoRows { column: String, given: String },
    #[error("column `{column}` holds conversations, and the model has no chat template")]
    NoChatTemplate { column: String },
    #[error("{0}")]
    ChatTemplate(String),
    #[error("{path}: {reason}")]
    Malformed { path: String, reason: String },
    #[error("{path} is not UTF-8 at byte {offset}, in line {line}")]
    NotUtf8 {
        path: String,
        offset: usize,
        line: usize,
    },
    #[error("{path} holds {bytes} bytes or more of text, the limit is {limit}")]
    TooLarge {
        path: String,
        bytes: u64,
        limit: u64,
    },
    #[error("{path} holds no text")]
    Empty { path: String },
    #[error("tensor `{tensor}` in {path}: {reason}")]
    Tensor {
        path: String,
        tensor: &'static str,
        reason: String,
    },
    #[error("{path} has {found} tokens, a window needs {needed}")]
    TooShort {
        path: String,
        found: usize,
        needed: usize,
    },
    #[error(
        "none of the {documents} documents of {path} has {needed} tokens, the longest has {longest}"
    )]
    NoLongDocument {
        path: String,
        documents: usize,
        longest: usize,
        needed: usize,
    },
    #[error(
        "{path} has room for {found} windows of {seq_len} tokens beside those of calibration, not for the {wanted} that are to be held out"
    )]
    HeldOut {
        path: String,
        found: usize,
        wanted: usize,
        seq_len: usize,
    },
    #[error("`{field}` is {value}, expected {expected}")]
    Spec {
        field: &'static str,
        value: usize,
        expected: String,
    },
}

impl CalibrationError {
    /// Advice to the user, if any; never part of the cause.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::TokenizerMissing { .. } | Self::TokenizerForeign { .. } => {
                "`tokenizer.json` or a `tokenizer.model` of SentencePiece is read: copy that of the same model on the hub into the folder"
            }
            Self::Vocabulary { .. } | Self::TokenOutOfRange { .. } => {
                "the tokenizer belongs to another model, or tokens were added to it and not to the model"
            }
            Self::UnknownFormat { .. } => {
                "what is there as a file or folder is not looked for on the hub"
            }
            Self::UnknownSource { .. } => {
                "a local file is given as a path, or as NAME=PATH under the rule of a named dataset"
            }
            Self::Fetch { .. } => "a local copy can be given as NAME=PATH",
            Self::Hash { .. } => "remove the cached file and fetch it again",
            Self::TooShort { .. } | Self::NoLongDocument { .. } => {
                "give a longer text or ask for shorter windows"
            }
            Self::HeldOut { .. } => {
                "ask for fewer with --check-windows, give a longer text, or another one with --check-dataset"
            }
            Self::NoColumn { .. } => {
                "--column NAME names one; read without it are `text`, `content`, conversations in `messages` or `conversations`, and `instruction`/`input`/`output`, `prompt`/`completion`, `prompt`/`response`, `question`/`answer`"
            }
            Self::NoChatTemplate { .. } => {
                "give rows of text, or the model's chat_template.jinja beside its tokenizer; --column NAME names another column"
            }
            Self::TooLarge { .. } => "give a part of the text: a run needs a few megabytes",
            _ => return None,
        })
    }

    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read {
            path: path.display().to_string(),
            source,
        }
    }

    pub(crate) fn malformed(path: &Path, reason: impl Display) -> Self {
        Self::Malformed {
            path: path.display().to_string(),
            reason: one_line(reason),
        }
    }
}

/// Causes from other libraries may span lines and repeat the data; an error here is one line.
pub(crate) fn one_line(reason: impl Display) -> String {
    let text = reason.to_string();
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    shown(&text, SHOWN_CHARACTERS)
}
