//! Between the readers of files and what becomes of their rows.

use std::path::Path;

use gptq_types::outside_name::shown;
use serde_json::Value;

use crate::CalibrationError;

/// Characters of a column's name that an error repeats.
pub(crate) const SHOWN_NAME: usize = 30;

/// Receives the rows of a file from any reader, as texts or as questions.
/// The first row determines the layout of all.
pub(crate) trait RowSink {
    /// Chooses among the columns of the first row, or of a file with a schema; `is_list` is true for
    /// columns of lists. `place` names them in errors.
    fn begin(
        &mut self,
        place: String,
        names: &[&str],
        is_list: &dyn Fn(&str) -> bool,
    ) -> Result<(), CalibrationError>;

    /// Begins where the first row is a string.
    fn begin_strings(&mut self) -> Result<(), CalibrationError>;

    /// Whether no row has arrived yet.
    fn is_empty(&self) -> bool;

    /// Whether the requested amount has been read.
    fn is_full(&self) -> bool;

    /// The columns whose cells [`RowSink::push`] takes; none before the first row.
    fn columns(&self) -> Vec<&str>;

    /// Whether all columns hold strings or lists.
    fn wants_strings(&self) -> bool;

    /// Takes the cells of a row, `None` for a column that it lacks.
    fn push(&mut self, cells: Vec<Option<Value>>) -> Result<(), CalibrationError>;

    /// Whether each row is a string.
    fn are_strings(&self) -> bool {
        false
    }

    /// Whether rows are the unchanged texts of one column.
    fn are_texts(&self) -> bool {
        false
    }

    /// Takes a row that is a text as it stands.
    fn push_text(&mut self, _: &str) -> Result<(), CalibrationError> {
        Err(self.wrong("is a string, expected columns".to_string()))
    }

    /// The next row stands in this line.
    fn set_line(&mut self, line: usize);

    /// The name of the next row in errors.
    fn place(&self) -> String;

    /// An error about the next row.
    fn wrong(&self, reason: String) -> CalibrationError;
}

/// The position of a reader in its file.
pub(crate) struct RowPlace<'a> {
    pub(crate) path: &'a Path,
    /// Line of the next row, in a file of lines.
    pub(crate) line: Option<usize>,
}

impl RowPlace<'_> {
    /// The name of row `row`, from 1, in errors.
    pub(crate) fn words(&self, row: usize) -> String {
        let path = self.path.display();
        match self.line.filter(|line| *line != row) {
            Some(line) => format!("row {row} (line {line}) of {path}"),
            None => format!("row {row} of {path}"),
        }
    }

    /// An error about row `row`.
    pub(crate) fn wrong(&self, row: usize, reason: String) -> CalibrationError {
        CalibrationError::Row {
            place: self.words(row),
            row,
            reason,
        }
    }
}

/// Up to `most` names of columns, and how many more there are.
pub(crate) fn shown_columns(names: &[&str], most: usize) -> String {
    let mut found: Vec<String> = (names.iter().take(most))
        .map(|name| format!("`{}`", shown(name, SHOWN_NAME)))
        .collect();
    match names.len().checked_sub(most) {
        _ if names.is_empty() => found.push("no columns".to_string()),
        Some(more) if more > 0 => found.push(format!("{more} more")),
        _ => {}
    }
    found.join(", ")
}
