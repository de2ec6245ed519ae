//! Rows from columnar files: Parquet, and Arrow IPC as a file or as a stream.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use arrow_array::cast::AsArray;
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_ipc::reader::StreamReader;
use arrow_schema::{ArrowError, DataType, Schema};
use gptq_types::quietly;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::CalibrationError;
use crate::error::one_line;
use crate::nested::value_at;
use crate::row_sink::RowSink;
use crate::rows::{Reading, RowReader, Rows};
use crate::{message_sizes, page_sizes};

/// First bytes of an Arrow IPC file, padded with zeros to 8 or 64; a stream follows, and a footer that
/// streams do not need. The `datasets` library caches bare streams.
const ARROW_FILE_MAGIC: &[u8] = b"ARROW1\0\0";
const MAX_PADDED_MAGIC: u64 = 64;

const BATCH_ROWS: u64 = 8192;
/// A dictionary holds a text once and each row takes a copy, so rows are read in batches that stay
/// below this even where each is as long as the largest page.
const BATCH_BYTES: u64 = 1 << 27;

/// The texts of a Parquet file; other columns are not read.
pub(crate) fn read_parquet(path: &Path, reading: Reading<'_>) -> Result<Rows, CalibrationError> {
    let mut rows = RowReader::new(path, reading);
    hand_parquet(path, &mut rows)?;
    Ok(rows.finish())
}

/// The texts of an Arrow IPC file or stream.
pub(crate) fn read_arrow(path: &Path, reading: Reading<'_>) -> Result<Rows, CalibrationError> {
    let mut rows = RowReader::new(path, reading);
    hand_arrow(path, &mut rows)?;
    Ok(rows.finish())
}

/// Hands the rows of a Parquet file to `rows`.
pub(crate) fn hand_parquet(path: &Path, rows: &mut dyn RowSink) -> Result<(), CalibrationError> {
    without_panic(path, || parquet_rows(path, rows))
}

/// Hands the rows of an Arrow IPC file or stream to `rows`.
pub(crate) fn hand_arrow(path: &Path, rows: &mut dyn RowSink) -> Result<(), CalibrationError> {
    without_panic(path, || arrow_rows(path, rows))
}

/// The readers of both formats assert on some damaged metadata (`parquet` 60: a negative length
/// of a column chunk); a damaged file is an error here.
fn without_panic(
    path: &Path,
    read: impl FnOnce() -> Result<(), CalibrationError>,
) -> Result<(), CalibrationError> {
    let damaged = |said| {
        Err(CalibrationError::malformed(
            path,
            format!("damaged: {said}"),
        ))
    };
    quietly(read).unwrap_or_else(damaged)
}

fn parquet_rows(path: &Path, rows: &mut dyn RowSink) -> Result<(), CalibrationError> {
    let wrong = |error| CalibrationError::malformed(path, error);
    let file = open(path)?;
    let sizes = file.try_clone();
    let sizes = sizes.map_err(|source| CalibrationError::read(path, source))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(wrong)?;
    let columns = begin(rows, builder.schema(), path)?;
    let largest_page = page_sizes::check(&sizes, builder.metadata(), |column| {
        columns.contains(&column)
    })
    .map_err(|reason| CalibrationError::malformed(path, reason))?;
    let batch_rows = (BATCH_BYTES / largest_page.max(1)).clamp(1, BATCH_ROWS);
    let mask = ProjectionMask::roots(builder.parquet_schema(), columns);
    let batches = builder
        .with_projection(mask)
        .with_batch_size(batch_rows as usize)
        .build()
        .map_err(wrong)?;
    collect(batches, rows)
}

fn arrow_rows(path: &Path, rows: &mut dyn RowSink) -> Result<(), CalibrationError> {
    let wrong = |error| CalibrationError::malformed(path, error);
    let start = stream_start(path)?;
    message_sizes::check(&open(path)?, start)
        .map_err(|reason| CalibrationError::malformed(path, reason))?;
    let stream = || {
        let mut file = open(path)?;
        file.seek(SeekFrom::Start(start))
            .map_err(|source| CalibrationError::read(path, source))?;
        Ok(BufReader::new(file))
    };
    let whole = StreamReader::try_new(stream()?, None).map_err(wrong)?;
    let columns = begin(rows, &whole.schema(), path)?;
    let reader = StreamReader::try_new(stream()?, Some(columns)).map_err(wrong)?;
    collect(reader, rows)
}

fn open(path: &Path) -> Result<File, CalibrationError> {
    File::open(path).map_err(|source| CalibrationError::read(path, source))
}

fn stream_start(path: &Path) -> Result<u64, CalibrationError> {
    let mut start = Vec::new();
    open(path)?
        .take(MAX_PADDED_MAGIC)
        .read_to_end(&mut start)
        .map_err(|source| CalibrationError::read(path, source))?;
    let Some(behind) = start.strip_prefix(ARROW_FILE_MAGIC) else {
        return Ok(0);
    };
    let padding = behind.iter().take_while(|&&byte| byte == 0).count() / 8 * 8;
    Ok((ARROW_FILE_MAGIC.len() + padding) as u64)
}

/// Chooses the columns by their names and types, and returns their places, rising.
fn begin(
    rows: &mut dyn RowSink,
    schema: &Schema,
    path: &Path,
) -> Result<Vec<usize>, CalibrationError> {
    let place = path.display().to_string();
    let names: Vec<&str> = schema
        .fields()
        .iter()
        .map(|field| field.name().as_str())
        .collect();
    let type_of = |name: &str| Some(schema.field(schema.index_of(name).ok()?).data_type());
    rows.begin(place, &names, &|name| type_of(name).is_some_and(is_list))?;
    for name in rows.columns() {
        let is_other = |found: &&DataType| !is_list(found) && !is_text(found);
        let found = type_of(name).filter(|found| rows.wants_strings() && is_other(found));
        if let Some(found) = found {
            return Err(CalibrationError::ColumnType {
                path: path.display().to_string(),
                column: name.to_string(),
                found: one_line(found),
            });
        }
    }
    let mut places: Vec<usize> = (rows.columns().iter())
        .filter_map(|name| schema.index_of(name).ok())
        .collect();
    places.sort_unstable();
    Ok(places)
}

fn is_list(found: &DataType) -> bool {
    matches!(
        found,
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(_, _)
    )
}

fn is_text(found: &DataType) -> bool {
    match found {
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
        DataType::Dictionary(_, values) => is_text(values),
        _ => false,
    }
}

fn collect(
    batches: impl Iterator<Item = Result<RecordBatch, ArrowError>>,
    rows: &mut dyn RowSink,
) -> Result<(), CalibrationError> {
    for batch in batches {
        let batch = batch.map_err(|error| {
            rows.wrong(format!(
                "or one soon after it is damaged: {}",
                one_line(error)
            ))
        })?;
        push_batch(rows, &batch)?;
        if rows.is_full() {
            break;
        }
    }
    Ok(())
}

fn push_batch(rows: &mut dyn RowSink, batch: &RecordBatch) -> Result<(), CalibrationError> {
    let columns: Vec<Option<ArrayRef>> = (rows.columns().iter())
        .map(|name| batch.column_by_name(name).cloned())
        .collect();
    let texts = columns.iter().flatten().next().filter(|_| rows.are_texts());
    if let Some(texts) = texts.and_then(text_cells) {
        // the usual file: no cell is copied before it is among the rows
        for cell in texts {
            match cell {
                Some(text) => rows.push_text(text)?,
                None => {
                    let column = rows.columns().first().copied().unwrap_or_default();
                    return Err(rows.wrong(format!("holds no text in column `{column}`")));
                }
            }
        }
        return Ok(());
    }
    for row in 0..batch.num_rows() {
        let cell = |column: &Option<ArrayRef>| Some(value_at(column.as_ref()?, row));
        rows.push(columns.iter().map(cell).collect())?;
        if rows.is_full() {
            break;
        }
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

    use arrow_array::types::{Int8Type, Int32Type};
    use arrow_array::{
        DictionaryArray, Int32Array, LargeStringArray, ListArray, StringArray, StringViewArray,
        StructArray,
    };
    use arrow_ipc::CompressionType;
    use arrow_ipc::writer::IpcWriteOptions;
    use arrow_schema::Field;
    use parquet::arrow::ArrowWriter;
    use parquet::basic::Compression;
    use parquet::file::properties::{EnabledStatistics, WriterProperties};

    use super::*;
    use crate::conversation::{ChatTemplate, Turn};

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

    fn parquet(path: &Path) -> Result<Rows, CalibrationError> {
        read_parquet(path, Reading::plain())
    }

    fn arrow(path: &Path) -> Result<Rows, CalibrationError> {
        read_arrow(path, Reading::plain())
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
            assert_eq!(texts(&parquet(&path).unwrap()), TEXTS);
            let [file, stream] = arrow_files(folder.path(), &batch);
            assert_eq!(texts(&arrow(&file).unwrap()), TEXTS);
            assert_eq!(texts(&arrow(&stream).unwrap()), [TEXTS, TEXTS].concat());
        }
    }

    #[test]
    fn text_goes_before_content_and_either_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let text: ArrayRef = Arc::new(StringArray::from(vec!["t"]));
        let content: ArrayRef = Arc::new(StringArray::from(vec!["c"]));
        let both = batch(&[("content", content.clone()), ("text", text.clone())]);
        let path = parquet_file(folder.path(), &both);
        assert_eq!(texts(&parquet(&path).unwrap()), ["t"]);
        let one = batch(&[("content", content)]);
        let path = parquet_file(folder.path(), &one);
        assert_eq!(texts(&parquet(&path).unwrap()), ["c"]);
        let none = batch(&[("id", text.clone()), ("body", text)]);
        let path = parquet_file(folder.path(), &none);
        let error = parquet(&path).err().unwrap();
        assert!(
            error.to_string().ends_with("it has `id`, `body`"),
            "{error}"
        );
        for path in arrow_files(folder.path(), &none) {
            let error = arrow(&path).err().unwrap();
            assert!(
                matches!(error, CalibrationError::NoColumn { .. }),
                "{error}"
            );
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
            let error = parquet(&path).err().unwrap();
            assert!(
                matches!(error, CalibrationError::Row { row: r, .. } if r == row),
                "{error}"
            );
        }
        let numbers: ArrayRef = Arc::new(Int32Array::from(vec![1]));
        let path = parquet_file(folder.path(), &batch(&[("text", numbers)]));
        let error = parquet(&path).err().unwrap();
        assert!(
            error
                .to_string()
                .ends_with("has type Int32, expected strings"),
            "{error}"
        );
    }

    /// Conversations and questions, as the files of the hub hold them.
    #[test]
    fn lists_of_structs_are_conversations() {
        struct Marked;
        impl ChatTemplate for Marked {
            fn is_there(&self) -> Result<bool, String> {
                Ok(true)
            }
            fn render(&self, turns: &[Turn]) -> Result<String, String> {
                Ok((turns.iter())
                    .map(|turn| format!("<{}>{}", turn.role, turn.content))
                    .collect())
            }
        }
        let text = |texts: [&str; 3]| Arc::new(StringArray::from(texts.to_vec())) as ArrayRef;
        let fields = |name: &str, nullable| Arc::new(Field::new(name, DataType::Utf8, nullable));
        let weights: ArrayRef = Arc::new(Int32Array::from(vec![0, 1, 1]));
        let turns = StructArray::from(vec![
            (fields("content", true), text(["q", "a", "b"])),
            (fields("role", false), text(["user", "assistant", "user"])),
            (
                Arc::new(Field::new("weight", DataType::Int32, false)),
                weights,
            ),
        ]);
        let item = Arc::new(Field::new("item", turns.data_type().clone(), true));
        let shape = [Some(vec![Some(0), Some(0)]), Some(vec![Some(0)])];
        let shape = ListArray::from_iter_primitive::<Int32Type, _, _>(shape);
        let offsets = shape.offsets().clone();
        let lists: ArrayRef = Arc::new(ListArray::new(item, offsets, Arc::new(turns), None));
        let folder = tempfile::tempdir().unwrap();
        let path = parquet_file(folder.path(), &batch(&[("messages", lists)]));
        let reading = Reading {
            chat: &Marked,
            ..Reading::plain()
        };
        let rows = read_parquet(&path, reading).unwrap();
        assert_eq!(texts(&rows), ["<user>q<assistant>a", "<user>b"]);
        let error = parquet(&path).err().unwrap().to_string();
        assert!(
            error.contains("`messages`") && error.contains("chat template"),
            "{error}"
        );

        let [asked, answer] = [text(["q", "r", "s"]), text(["a", "b", "c"])];
        let path = parquet_file(
            folder.path(),
            &batch(&[("answer", answer), ("question", asked)]),
        );
        assert_eq!(
            texts(&parquet(&path).unwrap()),
            ["q\n\na", "r\n\nb", "s\n\nc"]
        );
        let reading = Reading {
            column: Some("answer"),
            ..Reading::plain()
        };
        assert_eq!(
            texts(&read_parquet(&path, reading).unwrap()),
            ["a", "b", "c"]
        );
    }

    /// Cut anywhere or with a byte flipped, a small file ends in its rows or in an error of one
    /// line; the panics of the libraries, of which there are some, are silent errors.
    #[test]
    fn damaged_files_end_in_rows_or_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let strings: ArrayRef = Arc::new(StringArray::from(TEXTS.to_vec()));
        let batch = batch(&[("text", strings)]);
        let whole = parquet_file(folder.path(), &batch);
        let [file, stream] = arrow_files(folder.path(), &batch);
        let damaged = folder.path().join("damaged");
        type Read = fn(&Path) -> Result<Rows, CalibrationError>;
        let cases: [(PathBuf, Read); 3] = [(whole, parquet), (file, arrow), (stream, arrow)];
        for (path, read) in cases {
            let bytes = std::fs::read(&path).unwrap();
            let mut errors = 0;
            for at in (0..bytes.len()).step_by(5) {
                let mut variants = vec![bytes[..at].to_vec()];
                variants.extend([0x01, 0x80].map(|flip| {
                    let mut flipped = bytes.clone();
                    flipped[at] ^= flip;
                    flipped
                }));
                for bytes in variants {
                    std::fs::write(&damaged, bytes).unwrap();
                    if let Err(error) = read(&damaged) {
                        errors += 1;
                        let error = error.to_string();
                        assert!(error.contains("damaged"), "{error}");
                        assert!(!error.contains('\n') && error.len() < 500, "{error}");
                    }
                }
            }
            // cutting alone makes a third of them
            assert!(
                errors * 4 > bytes.len() / 5 * 3,
                "{errors} of {}",
                bytes.len()
            );
        }
    }

    /// Without a look at the sizes first, one number in a file allocates up to 2 GB (Parquet) or
    /// ends the program (Arrow, LZ4).
    #[test]
    fn a_size_from_the_file_allocates_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let long = "word ".repeat(1000);
        let strings: ArrayRef = Arc::new(StringArray::from(vec![long.as_str()]));
        let batch = batch(&[("text", strings)]);
        let path = folder.path().join("t.arrow");
        let options = IpcWriteOptions::default()
            .try_with_compression(Some(CompressionType::LZ4_FRAME))
            .unwrap();
        let file = File::create(&path).unwrap();
        let mut writer =
            arrow_ipc::writer::StreamWriter::try_new_with_options(file, &batch.schema(), options)
                .unwrap();
        writer.write(&batch).unwrap();
        writer.finish().unwrap();
        assert_eq!(texts(&arrow(&path).unwrap()), [long.as_str()]);
        let mut bytes = std::fs::read(&path).unwrap();
        // the buffer may be padded before it is packed
        let is_size = |found: &[u8]| {
            let size = i64::from_le_bytes(found.try_into().unwrap());
            (long.len() as i64..long.len() as i64 + 64).contains(&size)
        };
        let at = bytes.windows(8).rposition(is_size).unwrap();
        bytes[at..at + 8].copy_from_slice(&(1i64 << 50).to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let error = arrow(&path).err().unwrap().to_string();
        assert!(
            error.contains("has a buffer of 1125899906842624 bytes"),
            "{error}"
        );

        let properties = WriterProperties::builder()
            .set_compression(Compression::SNAPPY)
            .set_dictionary_enabled(false)
            .set_statistics_enabled(EnabledStatistics::None)
            .build();
        let path = folder.path().join("t.parquet");
        let file = File::create(&path).unwrap();
        let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
        assert_eq!(texts(&parquet(&path).unwrap()), [long.as_str()]);
        let mut bytes = std::fs::read(&path).unwrap();
        // behind the magic: field 1 (type of the page), then field 2, the size, of two bytes here
        assert_eq!(bytes[4..7], [0x15, 0x00, 0x15]);
        let length = bytes[7..].iter().position(|byte| byte & 0x80 == 0).unwrap() + 1;
        assert_eq!(length, 2);
        // a size of five bytes moves all that follows by three: the header ends three bytes into
        // the data, which nothing reads
        let huge = [0xfe, 0xff, 0xff, 0xff, 0x0f];
        bytes.splice(7..9, huge);
        let end = 7 + 60;
        bytes.drain(end..end + 3);
        std::fs::write(&path, &bytes).unwrap();
        let error = parquet(&path).err().unwrap().to_string();
        assert!(error.contains("a page of 2147483647 bytes"), "{error}");
    }
}
