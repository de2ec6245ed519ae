//! Inputs and contents of a report.

use gptq_types::{BranchRecord, EvalRecord, Reading, RunRecord};
use serde::Serialize;

use super::degraded::Degraded;

/// Version of [`Report`] as JSON.
pub(super) const REPORT_SCHEMA: u32 = 1;

/// Records that do not make a report.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Neither a run nor a score.
    #[error("a report needs at least one run record or score")]
    Empty,
    /// One run under two arguments would be two rows.
    #[error("the run `{0}` was given twice")]
    Twice(String),
    /// A score that more than one run could own.
    #[error("the score of `{model}` could be that of {runs}")]
    Ambiguous {
        /// The model as given to `gptq eval`.
        model: String,
        /// The places of those runs.
        runs: String,
    },
    /// Two scores of one file that one run would own.
    #[error("the scores of `{0}` and `{1}` could both be that of one run")]
    Contested(String, String),
    /// A mistake in the page's template.
    #[error("report template: {0}")]
    Template(String),
}

impl ReportError {
    /// Advice to the user.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            ReportError::Ambiguous { .. } | ReportError::Contested(..) => {
                Some("give runs by the same paths as `gptq eval` was given them")
            }
            _ => None,
        }
    }
}

/// The given inputs, in their order.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Runs.
    pub runs: Vec<FoundRun>,
    /// Files of `gptq eval --json`: in each, the first record of a text is what the others on that
    /// text are compared with.
    pub evaluations: Vec<Vec<EvalRecord>>,
}

/// A run as it was found.
#[derive(Clone, Debug)]
pub struct FoundRun {
    /// The place as given: a folder, a file, or `repository:branch`.
    pub place: String,
    /// Branch or folder.
    pub name: String,
    /// How it was made.
    pub run: RunRecord,
    /// Sizes, runtimes and perhaps scores.
    pub record: Option<BranchRecord>,
}

/// Facts about the report itself.
#[derive(Clone, Debug)]
pub struct Made {
    /// Name and version of the tool.
    pub tool: String,
    /// Seconds since 1970 in UTC.
    pub seconds: i64,
}

/// Everything a report says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// 1.
    pub schema: u32,
    /// Name and version of the tool that made the report.
    pub tool: String,
    /// When, in UTC.
    pub date: String,
    /// The models that were quantized, as run records have them.
    pub models: Vec<String>,
    /// Scored texts; the first one is in the table of branches.
    pub texts: Vec<Text>,
    /// References, then runs as given, then checkpoints of which only scores are known.
    pub rows: Vec<Row>,
    /// Reasons why rows are hard to compare.
    pub doubts: Vec<String>,
}

/// Tokens that perplexities are of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Text {
    /// Text, join, window and count, in words.
    pub protocol: String,
    /// sha256 of the token ids as little-endian u32.
    pub token_sha256: String,
    /// Windows.
    pub windows: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Name of the row that others are compared with.
    pub reference: Option<String>,
}

/// A checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Branch or folder, unique in the report.
    pub name: String,
    /// Short name for figures, unique too.
    pub label: String,
    /// Whether other scores are relative to it while it is not a run of this report.
    pub is_reference: bool,
    /// Packing in words, as `gptq eval` saw it.
    pub kind: Option<String>,
    /// A sentence for people who choose a branch.
    pub desc: Option<String>,
    /// Bytes of all weight files.
    pub weight_bytes: Option<u64>,
    /// Bits for each weight of the quantized linears, grids and g_idx included.
    pub bits_per_weight: Option<f64>,
    /// Runtimes; empty where not known.
    pub readings: Vec<Reading>,
    /// At most one for each text.
    pub scores: Vec<Score>,
    /// Degradations of the run; absent without a run record.
    pub degraded: Option<Degraded>,
    /// How it was made.
    pub run: Option<RunRecord>,
}

/// The score of a checkpoint on a text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Index into [`Report::texts`].
    pub text: usize,
    /// Name of the row that KL, agreement and difference are relative to.
    pub against: Option<String>,
    /// The measurement.
    pub record: EvalRecord,
}

impl Row {
    /// Its score on a text.
    pub fn score(&self, text: usize) -> Option<&EvalRecord> {
        let mut scores = self.scores.iter();
        Some(&scores.find(|score| score.text == text)?.record)
    }
}

impl Report {
    /// Rows of quantized checkpoints, each with the number of its mark in figures.
    pub(super) fn branches(&self) -> impl Iterator<Item = (usize, &Row)> {
        let rows = self.rows.iter().filter(|row| !row.is_reference);
        rows.enumerate()
    }

    /// The score that others on this text are relative to.
    pub(super) fn reference(&self, text: usize) -> Option<&EvalRecord> {
        let name = self.texts.get(text)?.reference.as_ref()?;
        self.rows.iter().find(|row| row.name == *name)?.score(text)
    }

    /// A title: the models by their last names.
    pub(super) fn title(&self) -> String {
        let names: Vec<&str> = self.models.iter().map(|m| super::labels::tail(m)).collect();
        match names.is_empty() {
            true => "Checkpoints".to_string(),
            false => names.join(", "),
        }
    }
}
