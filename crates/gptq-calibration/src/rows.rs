//! Texts of a dataset, one buffer for all of them.

use std::path::Path;

use gptq_types::outside_name::shown;
use serde_json::Value;

use crate::CalibrationError;
use crate::conversation::{ChatTemplate, NoTemplate};
use crate::layout::{Chosen, Layout};
use crate::row_sink::{RowPlace, RowSink, SHOWN_NAME, shown_columns};

/// More text than this in one file is refused; the largest file of the registry holds 0.8 GB.
pub(crate) const MAX_FILE_TEXT_BYTES: usize = 1 << 32;

/// The papers' separator between rows. Rendered conversations have their own markers.
const SEPARATOR: &str = "\n\n";

/// Columns that an error repeats.
const SHOWN_COLUMNS: usize = 5;

/// The amount of a source to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Amount {
    /// All of it; more text than this is refused.
    All(usize),
    /// Rows from the start until there is so much text.
    Start(usize),
}

impl Amount {
    /// The amount left after `bytes` of text.
    pub(crate) fn after(self, bytes: usize) -> Self {
        match self {
            Amount::All(most) => Amount::All(most.saturating_sub(bytes)),
            Amount::Start(most) => Amount::Start(most.saturating_sub(bytes)),
        }
    }
}

/// Options for turning rows into texts.
#[derive(Clone, Copy)]
pub(crate) struct Reading<'a> {
    /// The column that was asked for.
    pub(crate) column: Option<&'a str>,
    pub(crate) chat: &'a dyn ChatTemplate,
    pub(crate) amount: Amount,
}

impl Reading<'_> {
    /// Text columns by their usual names, and all of them.
    pub(crate) fn plain() -> Self {
        Reading {
            column: None,
            chat: &NoTemplate,
            amount: Amount::All(MAX_FILE_TEXT_BYTES),
        }
    }
}

/// Rows as texts.
pub(crate) struct RowReader<'a> {
    at: RowPlace<'a>,
    reading: Reading<'a>,
    chosen: Option<Chosen>,
    rows: Rows,
}

impl<'a> RowReader<'a> {
    pub(crate) fn new(path: &'a Path, reading: Reading<'a>) -> Self {
        RowReader {
            at: RowPlace { path, line: None },
            reading,
            chosen: None,
            rows: Rows::default(),
        }
    }

    fn no_column(&self, names: &[&str]) -> String {
        let found = shown_columns(names, SHOWN_COLUMNS);
        match self.reading.column {
            Some(column) => format!(
                "has no column `{}`, it has {found}",
                shown(column, SHOWN_NAME)
            ),
            None => format!(
                "has no column of text that is known (`text`, `content`, conversations, questions), it has {found}"
            ),
        }
    }

    pub(crate) fn finish(mut self) -> Rows {
        self.rows.is_start = self.is_full();
        if let Some(chosen) = &self.chosen {
            self.rows.words = chosen.words();
            self.rows.is_rendered = chosen.is_rendered();
            self.rows.is_plain = matches!(chosen.layout, Layout::Text(_) | Layout::Strings);
        }
        self.rows
    }
}

impl RowSink for RowReader<'_> {
    fn begin(
        &mut self,
        place: String,
        names: &[&str],
        is_list: &dyn Fn(&str) -> bool,
    ) -> Result<(), CalibrationError> {
        let chosen = Chosen::among(names, is_list, self.reading.column).ok_or_else(|| {
            CalibrationError::NoColumn {
                place,
                reason: self.no_column(names),
            }
        })?;
        self.chosen = Some(chosen.settle(self.reading.chat)?);
        Ok(())
    }

    fn begin_strings(&mut self) -> Result<(), CalibrationError> {
        self.chosen = Some(Chosen::strings());
        Ok(())
    }

    fn is_empty(&self) -> bool {
        self.chosen.is_none()
    }

    fn is_full(&self) -> bool {
        matches!(self.reading.amount, Amount::Start(most) if self.rows.text.len() >= most)
    }

    fn columns(&self) -> Vec<&str> {
        self.chosen
            .as_ref()
            .map(Chosen::columns)
            .unwrap_or_default()
    }

    fn wants_strings(&self) -> bool {
        true
    }

    fn push(&mut self, cells: Vec<Option<Value>>) -> Result<(), CalibrationError> {
        let Some(chosen) = &self.chosen else {
            return Err(self.wrong("comes before its columns are known".to_string()));
        };
        let text = chosen.text(cells, self.reading.chat);
        let text = text.map_err(|reason| self.wrong(reason))?;
        self.push_text(&text)
    }

    fn are_strings(&self) -> bool {
        let layout = self.chosen.as_ref().map(|chosen| &chosen.layout);
        layout == Some(&Layout::Strings)
    }

    fn are_texts(&self) -> bool {
        matches!(&self.chosen, Some(chosen) if matches!(chosen.layout, Layout::Text(_)))
    }

    fn push_text(&mut self, text: &str) -> Result<(), CalibrationError> {
        self.rows.push(text);
        match self.reading.amount {
            Amount::All(most) => limit(self.at.path, self.rows.text.len(), most),
            Amount::Start(_) => Ok(()),
        }
    }

    fn set_line(&mut self, line: usize) {
        self.at.line = Some(line);
    }

    fn place(&self) -> String {
        self.at.words(self.rows.len() + 1)
    }

    fn wrong(&self, reason: String) -> CalibrationError {
        self.at.wrong(self.rows.len() + 1, reason)
    }
}

/// Rows of text in file order. One buffer and the row ends: a C4 file has 356,317 rows, and a
/// `String` each would double its memory.
#[derive(Default)]
pub(crate) struct Rows {
    text: String,
    ends: Vec<usize>,
    /// Their columns, for records, where not obvious.
    words: Option<String>,
    /// They come from a chat template.
    is_rendered: bool,
    /// Each is an unchanged text of the file.
    is_plain: bool,
    /// The source has more of them.
    is_start: bool,
}

impl Rows {
    pub(crate) fn push(&mut self, row: &str) {
        self.text.push_str(row);
        self.ends.push(self.text.len());
    }

    /// Takes the rows of another file after those of this one.
    pub(crate) fn append(&mut self, other: Rows) {
        let before = self.text.len();
        self.text.push_str(&other.text);
        self.ends.extend(other.ends.iter().map(|end| before + end));
        let ends = std::mem::take(&mut self.ends);
        let text = std::mem::take(&mut self.text);
        *self = Rows {
            text,
            ends,
            ..other
        };
    }

    /// Bytes of all texts.
    pub(crate) fn bytes(&self) -> usize {
        self.text.len()
    }

    /// The columns of the texts and the number of rows read, where not obvious.
    pub(crate) fn words(&self) -> Option<String> {
        let start = self
            .is_start
            .then(|| format!("the first {} rows", self.len()));
        let words: Vec<String> = [start, self.words.clone()].into_iter().flatten().collect();
        (!words.is_empty()).then(|| words.join(", "))
    }

    /// Whether the source has more rows than requested.
    pub(crate) fn is_start(&self) -> bool {
        self.is_start
    }

    /// Whether the texts contain their own special tokens.
    pub(crate) fn is_rendered(&self) -> bool {
        self.is_rendered
    }

    /// Whether each row is an unchanged text of the file.
    pub(crate) fn is_plain(&self) -> bool {
        self.is_plain
    }

    fn separator(&self) -> &'static str {
        match self.is_rendered {
            true => "",
            false => SEPARATOR,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    /// `index` is below [`Rows::len`].
    pub(crate) fn get(&self, index: usize) -> &str {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.text[start..self.ends[index]]
    }

    /// Whether no row holds a character.
    pub(crate) fn hold_nothing(&self) -> bool {
        self.text.is_empty()
    }

    /// All rows as one text.
    pub(crate) fn joined(&self) -> String {
        let separator = self.separator();
        let separators = separator.len() * self.len().saturating_sub(1);
        let mut joined = String::with_capacity(self.text.len() + separators);
        for index in 0..self.len() {
            if index > 0 {
                joined.push_str(separator);
            }
            joined.push_str(self.get(index));
        }
        joined
    }

    /// The rows that the hub makes of `wiki.*.raw`: a row per line with its line feed, and an
    /// empty row for a blank line (which in these files is one space).
    pub(crate) fn of_raw_wikitext(text: &str) -> Self {
        let mut rows = Rows {
            is_plain: true,
            ..Rows::default()
        };
        for line in text.split_inclusive('\n') {
            let row = if line.trim().is_empty() { "" } else { line };
            rows.push(row);
        }
        rows
    }
}

/// Refuses more than `most` bytes.
pub(crate) fn limit(path: &Path, bytes: usize, most: usize) -> Result<(), CalibrationError> {
    if bytes <= most {
        return Ok(());
    }
    Err(CalibrationError::TooLarge {
        path: path.display().to_string(),
        bytes: bytes as u64,
        limit: most as u64,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_their_borders_and_join_with_a_blank_line() {
        let mut rows = Rows::default();
        for row in ["one", "", "three"] {
            rows.push(row);
        }
        assert_eq!(rows.len(), 3);
        assert_eq!(
            [rows.get(0), rows.get(1), rows.get(2)],
            ["one", "", "three"]
        );
        assert_eq!(rows.joined(), "one\n\n\n\nthree");
        assert_eq!(Rows::default().joined(), "");
    }

    #[test]
    fn rendered_rows_join_without_a_blank_line_and_a_start_says_so() {
        let mut reader = RowReader::new(
            Path::new("t"),
            Reading {
                amount: Amount::Start(5),
                ..Reading::plain()
            },
        );
        reader.begin_strings().unwrap();
        for row in ["abc", "def"] {
            assert!(!reader.is_full());
            reader.push_text(row).unwrap();
        }
        assert!(reader.is_full());
        let mut rows = reader.finish();
        assert_eq!(rows.words().unwrap(), "the first 2 rows");
        rows.is_rendered = true;
        assert_eq!(rows.joined(), "abcdef");
    }

    #[test]
    fn raw_wikitext_lines_become_the_rows_of_the_hub() {
        let raw = " \n = Robert Boulter = \n \n Text . \n";
        let rows = Rows::of_raw_wikitext(raw);
        let all: Vec<&str> = (0..rows.len()).map(|i| rows.get(i)).collect();
        assert_eq!(all, ["", " = Robert Boulter = \n", "", " Text . \n"]);
    }

    #[test]
    fn the_limit_names_both_sizes() {
        assert!(limit(Path::new("t"), 8, 8).is_ok());
        let error = limit(Path::new("t"), 9, 8).unwrap_err();
        assert_eq!(
            error.to_string(),
            "t holds 9 bytes or more of text, the limit is 8"
        );
    }
}
