//! Opening files that may be packed, and reading one as a single text.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;

use crate::CalibrationError;
use crate::json::BYTE_ORDER_MARK;
use crate::rows::limit;
use crate::source::Packing;

/// A single text is tokenized whole: measured 80 to 150 bytes of memory per byte of text (Llama's
/// BPE, byte-level BPE) and 1 to 2 seconds per megabyte, so that this one needs up to 10 GB.
pub(crate) const MAX_TEXT_BYTES: usize = 1 << 26;

const BUFFER_BYTES: usize = 1 << 20;

/// Text shrinks to a third or a sixth; what unpacks to more than a hundred times its bytes, and to
/// more than this, is no text but a trap for whoever reads it.
const MAX_EXPANSION: u64 = 100;
const MIN_UNPACKED_LIMIT: u64 = 1 << 28;

/// The unpacked bytes of a file.
pub(crate) fn open(path: &Path, packing: Packing) -> Result<Box<dyn BufRead>, CalibrationError> {
    let wrong = |source| CalibrationError::read(path, source);
    let file = File::open(path).map_err(wrong)?;
    let packed = file.metadata().map_err(wrong)?.len();
    let file = BufReader::with_capacity(BUFFER_BYTES, file);
    let unpacked: Box<dyn Read> = match packing {
        Packing::Plain => return Ok(Box::new(file)),
        // several members in a row are one file: so are the gzip files of the hub
        Packing::Gzip => Box::new(MultiGzDecoder::new(file)),
        Packing::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(file).map_err(wrong)?),
    };
    let bounded = Bounded {
        inner: unpacked,
        left: packed.saturating_mul(MAX_EXPANSION).max(MIN_UNPACKED_LIMIT),
    };
    Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, bounded)))
}

/// Fails, instead of ending, where more comes than was left.
struct Bounded<R> {
    inner: R,
    left: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        match self.left.checked_sub(read as u64) {
            Some(left) => self.left = left,
            None => {
                let text = format!("unpacks to more than {MAX_EXPANSION} times its size");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
        }
        Ok(read)
    }
}

/// The whole file as one UTF-8 text, line ends untouched.
pub(crate) fn read_text(path: &Path, packing: Packing) -> Result<String, CalibrationError> {
    let mut bytes = Vec::new();
    open(path, packing)?
        .take(MAX_TEXT_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| CalibrationError::read(path, source))?;
    limit(path, bytes.len(), MAX_TEXT_BYTES)?;
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    String::from_utf8(bytes).map_err(|error| {
        let offset = error.utf8_error().valid_up_to();
        let before = &error.as_bytes()[..offset];
        CalibrationError::NotUtf8 {
            path: path.display().to_string(),
            offset,
            line: 1 + before.iter().filter(|&&byte| byte == b'\n').count(),
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn packed_texts_read_like_plain_ones() {
        let folder = tempfile::tempdir().unwrap();
        let text = "först\r\nsedan\n";
        let path = folder.path().join("t");
        std::fs::write(&path, text).unwrap();
        assert_eq!(read_text(&path, Packing::Plain).unwrap(), text);
        let mut gzip = Vec::new();
        for half in ["först\r\n", "sedan\n"] {
            let mut member = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            member.write_all(half.as_bytes()).unwrap();
            gzip.extend(member.finish().unwrap());
        }
        std::fs::write(&path, gzip).unwrap();
        assert_eq!(read_text(&path, Packing::Gzip).unwrap(), text);
        std::fs::write(&path, zstd::encode_all(text.as_bytes(), 3).unwrap()).unwrap();
        assert_eq!(read_text(&path, Packing::Zstd).unwrap(), text);
    }

    /// Line ends without end: none of them is a row, so no other limit is reached.
    #[test]
    fn a_file_that_unpacks_without_end_is_refused() {
        let mut bounded = Bounded {
            inner: io::repeat(b'\n'),
            left: 1000,
        };
        let read = io::copy(&mut bounded, &mut io::sink());
        assert!(read.unwrap_err().to_string().contains("100 times"));
        let mut bounded = Bounded {
            inner: io::repeat(b'\n').take(1000),
            left: 1000,
        };
        assert_eq!(io::copy(&mut bounded, &mut io::sink()).unwrap(), 1000);
    }

    #[test]
    fn a_byte_order_mark_is_no_text() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t");
        std::fs::write(&path, "\u{feff}a").unwrap();
        assert_eq!(read_text(&path, Packing::Plain).unwrap(), "a");
    }

    #[test]
    fn what_is_not_a_text_is_refused_with_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t");
        let error = read_text(&path, Packing::Plain).unwrap_err();
        assert!(matches!(error, CalibrationError::Read { .. }));
        std::fs::write(&path, b"ab\nc\xff").unwrap();
        let error = read_text(&path, Packing::Plain).unwrap_err();
        assert!(matches!(
            error,
            CalibrationError::NotUtf8 {
                offset: 4,
                line: 2,
                ..
            }
        ));
        for packing in [Packing::Gzip, Packing::Zstd] {
            let error = read_text(&path, packing).unwrap_err();
            assert!(matches!(error, CalibrationError::Read { .. }), "{error}");
        }
    }
}
