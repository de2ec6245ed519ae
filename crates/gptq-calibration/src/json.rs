//! Rows from JSON: a row per line, or one array of them; a row is an object or a string.

use std::io::{BufRead, Cursor, Read};
use std::path::Path;

use crate::CalibrationError;
use crate::document::MAX_TEXT_BYTES;
use crate::json_row::{Outline, cells, outline};
use crate::row_sink::RowSink;
use crate::rows::{Reading, RowReader, Rows, limit};

/// Editors of one system put it in front of every file.
pub(crate) const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Reads the text of every row.
pub(crate) fn read_rows(
    reader: impl BufRead,
    path: &Path,
    reading: Reading<'_>,
) -> Result<Rows, CalibrationError> {
    let mut rows = RowReader::new(path, reading);
    hand_rows(reader, path, &mut rows)?;
    Ok(rows.finish())
}

/// Hands every row to `rows`. Blank lines are no rows; rows count from 1 in errors.
pub(crate) fn hand_rows(
    mut reader: impl BufRead,
    path: &Path,
    rows: &mut dyn RowSink,
) -> Result<(), CalibrationError> {
    let (mut line, mut number) = (Vec::new(), 0);
    while !rows.is_full() && read_line(&mut reader, &mut line, path)? {
        number += 1;
        let start = match number {
            1 if line.starts_with(BYTE_ORDER_MARK) => BYTE_ORDER_MARK.len(),
            _ => 0,
        };
        let row = line[start..].trim_ascii();
        match row.first() {
            None => continue,
            Some(b'[') if rows.is_empty() => {
                let rest = Cursor::new(row[1..].to_vec()).chain(Cursor::new(b"\n").chain(reader));
                return read_array(rest, rows, path);
            }
            Some(_) => {
                rows.set_line(number);
                push(rows, row)?;
            }
        }
    }
    Ok(())
}

/// Adds a row; the first one determines the layout of all.
fn push(rows: &mut dyn RowSink, row: &[u8]) -> Result<(), CalibrationError> {
    if rows.is_empty() {
        match outline(row).map_err(|reason| rows.wrong(reason))? {
            Outline::Text(_) => rows.begin_strings()?,
            Outline::Fields(fields) => {
                let names: Vec<&str> = fields.iter().map(|(name, _)| name.as_str()).collect();
                let is_list = |name: &str| fields.contains(&(name.to_string(), true));
                rows.begin(rows.place(), &names, &is_list)?;
            }
        }
    }
    if rows.are_strings() {
        return match outline(row).map_err(|reason| rows.wrong(reason))? {
            Outline::Text(text) => rows.push_text(&text),
            Outline::Fields(_) => {
                Err(rows.wrong("is an object, where the first row is a string".to_string()))
            }
        };
    }
    let cells = cells(row, &rows.columns()).map_err(|reason| rows.wrong(reason))?;
    rows.push(cells)
}

fn read_line(
    reader: &mut impl BufRead,
    line: &mut Vec<u8>,
    path: &Path,
) -> Result<bool, CalibrationError> {
    line.clear();
    let read = reader
        .by_ref()
        .take(MAX_TEXT_BYTES as u64 + 1)
        .read_until(b'\n', line)
        .map_err(|source| CalibrationError::read(path, source))?;
    limit(path, read, MAX_TEXT_BYTES)?;
    Ok(read > 0)
}

/// The rows of an array, one at a time: the array may be as long as the file.
fn read_array(
    mut reader: impl BufRead,
    rows: &mut dyn RowSink,
    path: &Path,
) -> Result<(), CalibrationError> {
    let (mut row, mut is_last) = (Vec::new(), false);
    while !is_last && !rows.is_full() {
        is_last = match read_element(&mut reader, &mut row, path)? {
            Some(end) => end == b']',
            None => return Err(rows.wrong("breaks off: the array has no end".to_string())),
        };
        match row.trim_ascii() {
            [] if is_last && rows.is_empty() => {}
            [] => return Err(rows.wrong("is empty: a comma too many".to_string())),
            row => push(rows, row)?,
        }
    }
    if is_last {
        let mut rest = Vec::new();
        while read_line(&mut reader, &mut rest, path)? {
            if !rest.trim_ascii().is_empty() {
                return Err(CalibrationError::malformed(
                    path,
                    "more follows after the array",
                ));
            }
        }
    }
    Ok(())
}

/// Fills `element` with the bytes up to the comma or bracket that ends it, and returns which;
/// `None` where the file ends first.
fn read_element(
    reader: &mut impl BufRead,
    element: &mut Vec<u8>,
    path: &Path,
) -> Result<Option<u8>, CalibrationError> {
    element.clear();
    let (mut depth, mut in_string, mut is_escaped) = (0usize, false, false);
    loop {
        let wrong = |source| CalibrationError::read(path, source);
        let piece = reader.fill_buf().map_err(wrong)?;
        if piece.is_empty() {
            return Ok(None);
        }
        let end = piece.iter().position(|&byte| {
            if in_string {
                (in_string, is_escaped) = match byte {
                    _ if is_escaped => (true, false),
                    b'\\' => (true, true),
                    byte => (byte != b'"', false),
                };
                return false;
            }
            match byte {
                b'"' => in_string = true,
                b'[' | b'{' => depth += 1,
                b',' | b']' if depth == 0 => return true,
                b']' | b'}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            false
        });
        element.extend_from_slice(&piece[..end.unwrap_or(piece.len())]);
        limit(path, element.len(), MAX_TEXT_BYTES)?;
        let found = end.map(|end| piece[end]);
        let used = end.map_or(piece.len(), |end| end + 1);
        reader.consume(used);
        if found.is_some() {
            return Ok(found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(json: impl AsRef<[u8]>) -> Result<Vec<String>, CalibrationError> {
        let rows = read_rows(json.as_ref(), Path::new("t.jsonl"), Reading::plain())?;
        Ok((0..rows.len()).map(|i| rows.get(i).to_string()).collect())
    }

    fn error(json: impl AsRef<[u8]>) -> String {
        let error = rows(json).unwrap_err().to_string();
        assert!(error.len() < 300 && !error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn lines_and_arrays_give_the_same_rows() {
        let lines = "{\"text\": \"a\\nb\", \"id\": {\"x\": [1]}}\n\n{\"content\": \"\"}\r\n{\"content\": 1, \"text\": \"c\"}";
        let expected = ["a\nb", "", "c"];
        assert_eq!(rows(lines).unwrap(), expected);
        let array = "\n [\n{\"text\": \"a\\nb\"},\n {\"content\": \"\"}, {\"text\": \"c\", \"content\": \"d\"}]\n";
        assert_eq!(rows(array).unwrap(), expected);
        assert!(rows("").unwrap().is_empty());
        assert!(rows("[]").unwrap().is_empty());
        assert!(rows("[ \n ]\n").unwrap().is_empty());
    }

    #[test]
    fn rows_may_be_strings() {
        let expected = ["a, [\"b\"]", "c"];
        assert_eq!(rows("[\"a, [\\\"b\\\"]\",\n\"c\"]").unwrap(), expected);
        assert_eq!(rows("\"a, [\\\"b\\\"]\"\n\"c\"\n").unwrap(), expected);
        assert!(error("\"a\"\n{\"text\": \"b\"}").contains("row 2 of t.jsonl is an object"));
        assert!(
            error("{\"text\": \"b\"}\n\"a\"").contains("row 2 of t.jsonl cannot be read: a string")
        );
        assert!(error("3").contains("row 1 of t.jsonl cannot be read"));
    }

    #[test]
    fn a_missing_column_names_its_row() {
        for json in [
            "{\"url\": 1, \"body\": \"x\"}",
            "[{\"url\": 1, \"body\": \"x\"}]",
        ] {
            assert_eq!(
                error(json),
                "row 1 of t.jsonl has no column of text that is known (`text`, `content`, conversations, questions), it has `url`, `body`"
            );
        }
        assert!(error("{}").ends_with("it has no columns"));
        let rows = ["{\"text\": \"a\"}"; 150].join("\n");
        let late = error(format!("{rows}\n\n{{\"prompt\": \"x\"}}\n{rows}"));
        assert_eq!(
            late,
            "row 151 (line 152) of t.jsonl has no column `text` or `content`"
        );
    }

    #[test]
    fn null_and_numbers_are_no_text() {
        for json in [
            "{\"text\": \"a\"}\n{\"text\": null}",
            "[{\"text\": \"a\"}, {\"text\": null}]",
        ] {
            assert_eq!(
                error(json),
                "row 2 of t.jsonl holds no text in column `text`"
            );
        }
        assert_eq!(
            error("{\"text\": \"a\"}\n{\"text\": 3}"),
            "row 2 of t.jsonl holds a number in column `text`, expected a string"
        );
    }

    #[test]
    fn broken_json_names_its_row_and_repeats_little() {
        assert!(
            error("{\"text\": \"a\"}\n{\"text\": ").starts_with("row 2 of t.jsonl cannot be read")
        );
        assert!(error("[{\"text\": \"a\"}, {").starts_with("row 2 of t.jsonl breaks off"));
        assert!(error("[{\"text\": \"a\"},]").starts_with("row 2 of t.jsonl is empty"));
        assert!(error("[{\"text\": \"a\"}] x").contains("more follows"));
        assert!(error(b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}").starts_with("row 2 of"));
        assert!(error("{\"text\": \"a\"}\n{\"text\": \"\\ud83d\"}").starts_with("row 2 of"));
        let long = format!(
            "{{\"text\": \"a\"}}\n{{\"{}\": 3}}",
            "word ".repeat(100_000)
        );
        assert!(error(long).starts_with("row 2 of"));
        let long = format!("{{\"{}\": 3}}", "word ".repeat(100_000));
        assert!(error(long).starts_with("row 1 of"));
    }

    #[test]
    fn a_byte_order_mark_and_nan_are_read_over() {
        let lines = "\u{feff}{\"text\": \"a\"}\n{\"text\": \"b\", \"score\": NaN}";
        assert_eq!(rows(lines).unwrap(), ["a", "b"]);
        assert_eq!(rows("\u{feff}[\"a\"]").unwrap(), ["a"]);
    }
}
