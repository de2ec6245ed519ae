//! Rows from columnar files: Parquet, and Arrow IPC as a file or as a stream.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_schema::{ArrowError, Schema};
use gptq_types::quietly;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::CalibrationError;
use crate::json::TEXT_COLUMNS;
use crate::rows::Rows;

/// First bytes of an Arrow IPC file; a stream, which `datasets` caches, begins with a length.
const ARROW_FILE_MAGIC: &[u8] = b"ARROW1";

const BATCH_ROWS: usize = 8192;

/// The text column of a Parquet file; other columns are not read.
pub(crate) fn read_parquet(path: &Path) -> Result<Rows, CalibrationError> {
    without_panic(path, || parquet_rows(path))
}

/// The text column of an Arrow IPC file or stream.
pub(crate) fn read_arrow(path: &Path) -> Result<Rows, CalibrationError> {
    without_panic(path, || arrow_rows(path))
}

/// The readers of both formats assert on some damaged metadata (`parquet` 60: a negative length
/// of a column chunk); a damaged file is an error here.
fn without_panic(
    path: &Path,
    read: impl FnOnce() -> Result<Rows, CalibrationError>,
) -> Result<Rows, CalibrationError> {
    let damaged = |said| {
        Err(CalibrationError::malformed(
            path,
            format!("damaged: {said}"),
        ))
    };
    quietly(read).unwrap_or_else(damaged)
}

fn parquet_rows(path: &Path) -> Result<Rows, CalibrationError> {
    let wrong = |error| CalibrationError::malformed(path, error);
    let builder = ParquetRecordBatchReaderBuilder::try_new(open(path)?).map_err(wrong)?;
    let column = text_column(builder.schema(), path)?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
    let batches = builder
        .with_projection(mask)
        .with_batch_size(BATCH_ROWS)
        .build()
        .map_err(wrong)?;
    collect(batches, path)
}

fn arrow_rows(path: &Path) -> Result<Rows, CalibrationError> {
    let wrong = |error| CalibrationError::malformed(path, error);
    let file = BufReader::new(open(path)?);
    if is_arrow_file(path)? {
        let reader = FileReader::try_new(file, None).map_err(wrong)?;
        text_column(&reader.schema(), path)?;
        collect(reader, path)
    } else {
        let reader = StreamReader::try_new(file, None).map_err(wrong)?;
        text_column(&reader.schema(), path)?;
        collect(reader, path)
    }
}

fn open(path: &Path) -> Result<File, CalibrationError> {
    File::open(path).map_err(|source| CalibrationError::read(path, source))
}

fn is_arrow_file(path: &Path) -> Result<bool, CalibrationError> {
    let mut start = Vec::new();
    open(path)?
        .take(ARROW_FILE_MAGIC.len() as u64)
        .read_to_end(&mut start)
        .map_err(|source| CalibrationError::read(path, source))?;
    Ok(start == ARROW_FILE_MAGIC)
}

fn text_column(schema: &Schema, path: &Path) -> Result<usize, CalibrationError> {
    TEXT_COLUMNS
        .iter()
        .find_map(|name| schema.index_of(name).ok())
        .ok_or_else(|| CalibrationError::column(path, schema.fields().iter().map(|f| f.name())))
}

fn collect(
    batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
    path: &Path,
) -> Result<Rows, CalibrationError> {
    let mut rows = Rows::default();
    for batch in batches {
        let batch = batch.map_err(|error| CalibrationError::malformed(path, error))?;
        let column = text_column(&batch.schema(), path)?;
        push_column(&mut rows, &batch, column, path)?;
    }
    Ok(rows)
}

fn push_column(
    rows: &mut Rows,
    batch: &RecordBatch,
    column: usize,
    path: &Path,
) -> Result<(), CalibrationError> {
    let name = batch.schema().field(column).name().clone();
    let cells = text_cells(batch.column(column)).ok_or_else(|| CalibrationError::ColumnType {
        path: path.display().to_string(),
        column: name.clone(),
        found: batch.column(column).data_type().to_string(),
    })?;
    for cell in cells {
        let text = cell.ok_or_else(|| CalibrationError::null_text(path, rows.len() + 1, &name))?;
        rows.push(text, path)?;
    }
    Ok(())
}

/// The cells of a column of strings, whichever of Arrow's layouts it has.
fn text_cells(array: &ArrayRef) -> Option<Vec<Option<&str>>> {
    if let Some(strings) = array.as_string_opt::<i32>() {
        return Some(strings.iter().collect());
    }
    if let Some(strings) = array.as_string_opt::<i64>() {
        return Some(strings.iter().collect());
    }
    if let Some(strings) = array.as_string_view_opt() {
        return Some(strings.iter().collect());
    }
    let dictionary = array.as_any_dictionary_opt()?;
    let values = text_cells(dictionary.values())?;
    if values.is_empty() {
        return Some(vec![None; array.len()]);
    }
    let keys = dictionary.normalized_keys().into_iter().enumerate();
    Some(
        keys.map(|(row, key)| {
            if array.is_null(row) {
                None
            } else {
                values[key]
            }
        })
        .collect(),
    )
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use arrow_array::types::Int8Type;
    use arrow_array::{
        DictionaryArray, Int32Array, LargeStringArray, StringArray, StringViewArray,
    };
    use parquet::arrow::ArrowWriter;

    use super::*;

    const TEXTS: [&str; 3] = ["one", "", "a\nb"];

    fn batch(columns: &[(&str, ArrayRef)]) -> RecordBatch {
        RecordBatch::try_from_iter(columns.iter().map(|(n, a)| (*n, a.clone()))).unwrap()
    }

    fn parquet_file(folder: &Path, batch: &RecordBatch) -> PathBuf {
        let path = folder.join("t.parquet");
        let file = File::create(&path).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), None).unwrap();
        writer.write(batch).unwrap();
        writer.close().unwrap();
        path
    }

    fn arrow_files(folder: &Path, batch: &RecordBatch) -> [PathBuf; 2] {
        let (file, stream) = (folder.join("file.arrow"), folder.join("stream.arrow"));
        let mut writer =
            arrow_ipc::writer::FileWriter::try_new(File::create(&file).unwrap(), &batch.schema())
                .unwrap();
        writer.write(batch).unwrap();
        writer.finish().unwrap();
        let mut writer = arrow_ipc::writer::StreamWriter::try_new(
            File::create(&stream).unwrap(),
            &batch.schema(),
        )
        .unwrap();
        writer.write(batch).unwrap();
        writer.write(batch).unwrap();
        writer.finish().unwrap();
        [file, stream]
    }

    fn texts(rows: &Rows) -> Vec<&str> {
        (0..rows.len()).map(|i| rows.get(i)).collect()
    }

    #[test]
    fn every_layout_of_strings_is_read_from_every_container() {
        let layouts: [ArrayRef; 4] = [
            Arc::new(StringArray::from(TEXTS.to_vec())),
            Arc::new(LargeStringArray::from(TEXTS.to_vec())),
            Arc::new(StringViewArray::from(TEXTS.to_vec())),
            Arc::new(TEXTS.into_iter().collect::<DictionaryArray<Int8Type>>()),
        ];
        let folder = tempfile::tempdir().unwrap();
        for layout in layouts {
            let ids: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3]));
            let batch = batch(&[("id", ids), ("text", layout)]);
            let path = parquet_file(folder.path(), &batch);
            assert_eq!(texts(&read_parquet(&path).unwrap()), TEXTS);
            let [file, stream] = arrow_files(folder.path(), &batch);
            assert_eq!(texts(&read_arrow(&file).unwrap()), TEXTS);
            assert_eq!(
                texts(&read_arrow(&stream).unwrap()),
                [TEXTS, TEXTS].concat()
            );
        }
    }

    #[test]
    fn text_goes_before_content_and_either_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let text: ArrayRef = Arc::new(StringArray::from(vec!["t"]));
        let content: ArrayRef = Arc::new(StringArray::from(vec!["c"]));
        let both = batch(&[("content", content.clone()), ("text", text.clone())]);
        let path = parquet_file(folder.path(), &both);
        assert_eq!(texts(&read_parquet(&path).unwrap()), ["t"]);
        let one = batch(&[("content", content)]);
        let path = parquet_file(folder.path(), &one);
        assert_eq!(texts(&read_parquet(&path).unwrap()), ["c"]);
        let none = batch(&[("id", text.clone()), ("body", text)]);
        let path = parquet_file(folder.path(), &none);
        let error = read_parquet(&path).err().unwrap();
        assert!(
            error.to_string().ends_with("which has `id`, `body`"),
            "{error}"
        );
        for path in arrow_files(folder.path(), &none) {
            let error = read_arrow(&path).err().unwrap();
            assert!(matches!(error, CalibrationError::Column { .. }), "{error}");
        }
    }

    #[test]
    fn nulls_and_numbers_are_no_text() {
        let folder = tempfile::tempdir().unwrap();
        let strings: ArrayRef = Arc::new(StringArray::from(vec![Some("a"), None]));
        let coded: ArrayRef = Arc::new(
            [Some("a"), None]
                .into_iter()
                .collect::<DictionaryArray<Int8Type>>(),
        );
        let empty: ArrayRef = Arc::new(
            [None, None::<&str>]
                .into_iter()
                .collect::<DictionaryArray<Int8Type>>(),
        );
        for (array, row) in [(strings, 2), (coded, 2), (empty, 1)] {
            let path = parquet_file(folder.path(), &batch(&[("text", array)]));
            let error = read_parquet(&path).err().unwrap();
            assert!(
                matches!(error, CalibrationError::NullText { row: r, .. } if r == row),
                "{error}"
            );
        }
        let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1]));
        let path = parquet_file(folder.path(), &batch(&[("text", numbers)]));
        let error = read_parquet(&path).err().unwrap();
        assert!(
            error
                .to_string()
                .ends_with("has type Int32, expected strings"),
            "{error}"
        );
    }

    /// Cut anywhere or with a byte flipped, a small file ends in an answer or an error. Not every
    /// byte: each panic that is caught costs a backtrace.
    #[test]
    fn damaged_files_never_panic() {
        let folder = tempfile::tempdir().unwrap();
        let strings: ArrayRef = Arc::new(StringArray::from(TEXTS.to_vec()));
        let batch = batch(&[("text", strings)]);
        let whole = parquet_file(folder.path(), &batch);
        let [file, stream] = arrow_files(folder.path(), &batch);
        let damaged = folder.path().join("damaged");
        type Read = fn(&Path) -> Result<Rows, CalibrationError>;
        let cases: [(PathBuf, Read); 3] = [
            (whole, read_parquet),
            (file, read_arrow),
            (stream, read_arrow),
        ];
        for (path, read) in cases {
            let bytes = std::fs::read(&path).unwrap();
            for at in (0..bytes.len()).step_by(5) {
                std::fs::write(&damaged, &bytes[..at]).unwrap();
                let _ = read(&damaged);
                for flip in [0x01, 0x80] {
                    let mut bytes = bytes.clone();
                    bytes[at] ^= flip;
                    std::fs::write(&damaged, &bytes).unwrap();
                    let _ = read(&damaged);
                }
            }
        }
    }
}
