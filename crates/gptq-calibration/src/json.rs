//! Rows from JSON: an object per line, or one array of objects.

use std::io::{BufRead, Read};
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::CalibrationError;
use crate::document::MAX_TEXT_BYTES;
use crate::rows::{Rows, limit};

/// The two names under which datasets keep their text, in the order in which they are tried.
pub(crate) const TEXT_COLUMNS: [&str; 2] = ["text", "content"];

/// An array of objects is built in memory as a whole.
const MAX_ARRAY_BYTES: usize = 1 << 28;

/// The usual row; its other fields are skipped without being built.
#[derive(Deserialize)]
struct Row {
    text: Option<String>,
}

/// Reads the text column of every row. Blank lines are no rows; rows count from 1 in errors.
pub(crate) fn read_rows(mut reader: impl BufRead, path: &Path) -> Result<Rows, CalibrationError> {
    let mut rows = Rows::default();
    let mut line = Vec::new();
    let mut number = 0;
    while read_line(&mut reader, &mut line, path)? {
        number += 1;
        let content = line.trim_ascii();
        if content.is_empty() {
            continue;
        }
        if content[0] == b'[' && rows.len() == 0 {
            return read_array(line, reader, path);
        }
        let row = text_of(content, rows.len() + 1, number, path)?;
        rows.push(&row, path)?;
    }
    Ok(rows)
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

fn text_of(json: &[u8], row: usize, line: usize, path: &Path) -> Result<String, CalibrationError> {
    let wrong = |error| CalibrationError::malformed(path, format!("line {line}: {error}"));
    let parsed: Row = serde_json::from_slice(json).map_err(wrong)?;
    if let Some(text) = parsed.text {
        return Ok(text);
    }
    let object = serde_json::from_slice(json).map_err(wrong)?;
    cell(&object, row, path).map(str::to_string)
}

fn cell<'a>(
    object: &'a Map<String, Value>,
    row: usize,
    path: &Path,
) -> Result<&'a str, CalibrationError> {
    TEXT_COLUMNS
        .iter()
        .find_map(|name| object.get(*name)?.as_str())
        .ok_or_else(|| why_no_text(object, row, path))
}

/// An array is read whole: it has no lines at which it could be cut.
fn read_array(start: Vec<u8>, reader: impl BufRead, path: &Path) -> Result<Rows, CalibrationError> {
    let mut bytes = start;
    reader
        .take(MAX_ARRAY_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| CalibrationError::read(path, source))?;
    limit(path, bytes.len(), MAX_ARRAY_BYTES)?;
    let objects: Vec<Map<String, Value>> =
        serde_json::from_slice(&bytes).map_err(|error| CalibrationError::malformed(path, error))?;
    let mut rows = Rows::default();
    for (index, object) in objects.iter().enumerate() {
        rows.push(cell(object, index + 1, path)?, path)?;
    }
    Ok(rows)
}

fn why_no_text(object: &Map<String, Value>, row: usize, path: &Path) -> CalibrationError {
    let column = TEXT_COLUMNS
        .into_iter()
        .find_map(|name| Some((name, object.get(name)?)));
    match column {
        Some((name, Value::Null)) => CalibrationError::null_text(path, row, name),
        Some((name, value)) => CalibrationError::ColumnType {
            path: path.display().to_string(),
            column: name.to_string(),
            found: kind(value).to_string(),
        },
        None => CalibrationError::column(path, object.keys()),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(json: &str) -> Result<Vec<String>, CalibrationError> {
        let rows = read_rows(json.as_bytes(), Path::new("t.jsonl"))?;
        Ok((0..rows.len()).map(|i| rows.get(i).to_string()).collect())
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
    }

    #[test]
    fn a_missing_column_names_those_found() {
        for json in [
            "{\"url\": 1, \"body\": \"x\"}",
            "[{\"url\": 1, \"body\": \"x\"}]",
        ] {
            assert_eq!(
                rows(json).unwrap_err().to_string(),
                "column `text` or `content` is missing from t.jsonl, which has `url`, `body`"
            );
        }
        let error = rows("{}").unwrap_err();
        assert!(
            error.to_string().ends_with("which has no columns"),
            "{error}"
        );
    }

    #[test]
    fn null_and_numbers_are_no_text() {
        let null = "{\"text\": \"a\"}\n{\"text\": null}";
        for json in [null, "[{\"text\": \"a\"}, {\"text\": null}]"] {
            assert_eq!(
                rows(json).unwrap_err().to_string(),
                "row 2 of t.jsonl holds no text in column `text`"
            );
        }
        let error = rows("[{\"text\": 3}]").unwrap_err();
        assert!(
            matches!(error, CalibrationError::ColumnType { .. }),
            "{error}"
        );
        let error = rows("{\"text\": \"a\"}\n{\"text\": 3}").unwrap_err();
        assert!(
            error.to_string().starts_with("t.jsonl: line 2: "),
            "{error}"
        );
    }

    #[test]
    fn broken_json_names_its_line() {
        let error = rows("{\"text\": \"a\"}\n{\"text\": ").unwrap_err();
        assert!(
            error.to_string().starts_with("t.jsonl: line 2: "),
            "{error}"
        );
        assert!(matches!(
            rows("[{").unwrap_err(),
            CalibrationError::Malformed { .. }
        ));
        assert!(matches!(
            rows("\"a\"").unwrap_err(),
            CalibrationError::Malformed { .. }
        ));
    }
}
