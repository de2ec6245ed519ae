//! Texts of a dataset, one buffer for all of them.

use std::path::Path;

use crate::CalibrationError;

/// More text than this in one file is refused; the largest file of the registry holds 0.8 GB.
const MAX_FILE_TEXT_BYTES: usize = 1 << 32;

/// What the papers put between rows.
const SEPARATOR: &str = "\n\n";

/// Rows of text in file order. One buffer and the row ends: a C4 file has 356,317 rows, and a
/// `String` each would double its memory.
#[derive(Default)]
pub(crate) struct Rows {
    text: String,
    ends: Vec<usize>,
}

impl Rows {
    pub(crate) fn push(&mut self, row: &str, path: &Path) -> Result<(), CalibrationError> {
        self.text.push_str(row);
        self.ends.push(self.text.len());
        limit(path, self.text.len(), MAX_FILE_TEXT_BYTES)
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
        let separators = SEPARATOR.len() * self.len().saturating_sub(1);
        let mut joined = String::with_capacity(self.text.len() + separators);
        for index in 0..self.len() {
            if index > 0 {
                joined.push_str(SEPARATOR);
            }
            joined.push_str(self.get(index));
        }
        joined
    }

    /// The rows that the hub makes of `wiki.*.raw`: a row per line with its line feed, and an
    /// empty row for a blank line (which in these files is one space).
    pub(crate) fn of_raw_wikitext(text: &str, path: &Path) -> Result<Self, CalibrationError> {
        let mut rows = Self::default();
        for line in text.split_inclusive('\n') {
            let row = if line.trim().is_empty() { "" } else { line };
            rows.push(row, path)?;
        }
        Ok(rows)
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
            rows.push(row, Path::new("t")).unwrap();
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
    fn raw_wikitext_lines_become_the_rows_of_the_hub() {
        let raw = " \n = Robert Boulter = \n \n Text . \n";
        let rows = Rows::of_raw_wikitext(raw, Path::new("t")).unwrap();
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
