//! Checks the declared sizes of the messages of an Arrow stream before anything is unpacked.
//!
//! A compressed buffer begins with its unpacked size, which the library allocates: a wrong size
//! aborts the program. So the messages are walked first.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

use arrow_ipc::{RecordBatch, root_as_message};

/// Before the length of a message, in streams written since 2019.
const CONTINUATION: [u8; 4] = [0xff; 4];

/// A column of one batch; `datasets` writes a thousand rows to a batch.
const MAX_BUFFER_BYTES: i64 = 1 << 28;

/// Descriptions of messages have a few kilobytes.
const MAX_DESCRIPTION_BYTES: u64 = 1 << 26;

/// Refuses messages that reach beyond the file and buffers that unpack to too much; the error is a
/// reason. The stream begins at `start`.
pub(crate) fn check(file: &File, start: u64) -> Result<(), String> {
    let length = file.metadata().map_err(|error| error.to_string())?.len();
    let mut reader = BufReader::new(file);
    let in_words = |error: io::Error| error.to_string();
    reader.seek(SeekFrom::Start(start)).map_err(in_words)?;
    let mut at = start;
    for message in 1.. {
        let wrong = |reason: String| format!("message {message} {reason}");
        let Some(bytes) = description_bytes(&mut reader, &mut at).map_err(in_words)? else {
            break;
        };
        if bytes > MAX_DESCRIPTION_BYTES || at.saturating_add(bytes) > length {
            return Err(wrong("reaches beyond the end of the file".to_string()));
        }
        let mut description = vec![0; bytes as usize];
        reader.read_exact(&mut description).map_err(in_words)?;
        at += bytes;
        let found = root_as_message(&description)
            .map_err(|error| wrong(format!("cannot be read: {error}")))?;
        let body = u64::try_from(found.bodyLength()).unwrap_or(u64::MAX);
        if at.checked_add(body).is_none_or(|end| end > length) {
            return Err(wrong("reaches beyond the end of the file".to_string()));
        }
        let batch = found.header_as_record_batch();
        let dictionary = found.header_as_dictionary_batch();
        if let Some(batch) = batch.or_else(|| dictionary?.data()) {
            check_buffers(&mut reader, at, body, &batch).map_err(wrong)?;
        }
        at += body;
        reader.seek(SeekFrom::Start(at)).map_err(in_words)?;
    }
    Ok(())
}

/// Bytes of the next description; nothing at the end of the stream.
fn description_bytes(reader: &mut impl Read, at: &mut u64) -> io::Result<Option<u64>> {
    let mut word = [0; 4];
    loop {
        match reader.read_exact(&mut word) {
            Ok(()) => *at += word.len() as u64,
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        }
        if word != CONTINUATION {
            let bytes = u32::from_le_bytes(word);
            return Ok((bytes > 0).then_some(u64::from(bytes)));
        }
    }
}

fn check_buffers(
    reader: &mut (impl Read + Seek),
    start: u64,
    body: u64,
    batch: &RecordBatch<'_>,
) -> Result<(), String> {
    if batch.compression().is_none() {
        return Ok(());
    }
    for buffer in batch.buffers().iter().flatten() {
        let (offset, bytes) = (buffer.offset(), buffer.length());
        if bytes < 8 {
            continue;
        }
        let offset = u64::try_from(offset).ok().filter(|offset| {
            let end = offset.checked_add(bytes as u64);
            end.is_some_and(|end| end <= body)
        });
        let offset = offset.ok_or("has a buffer outside it")?;
        let mut unpacked = [0; 8];
        reader
            .seek(SeekFrom::Start(start + offset))
            .and_then(|_| reader.read_exact(&mut unpacked))
            .map_err(|error| error.to_string())?;
        let unpacked = i64::from_le_bytes(unpacked);
        if unpacked > MAX_BUFFER_BYTES {
            return Err(format!(
                "has a buffer of {unpacked} bytes, the limit is {MAX_BUFFER_BYTES}"
            ));
        }
    }
    Ok(())
}
