//! Opening files that may be packed, and reading one as a single text.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use flate2::read::MultiGzDecoder;

use crate::CalibrationError;
use crate::rows::limit;
use crate::source::Packing;

/// A single text is tokenised whole: measured 80 to 150 bytes of memory per byte of text (Llama's
/// BPE, byte-level BPE) and 1 to 2 seconds per megabyte, so that this one needs up to 10 GB.
pub(crate) const MAX_TEXT_BYTES: usize = 1 << 26;

const BUFFER_BYTES: usize = 1 << 20;

/// The unpacked bytes of a file.
pub(crate) fn open(path: &Path, packing: Packing) -> Result<Box<dyn BufRead>, CalibrationError> {
    let wrong = |source| CalibrationError::read(path, source);
    let file = BufReader::with_capacity(BUFFER_BYTES, File::open(path).map_err(wrong)?);
    Ok(match packing {
        Packing::Plain => Box::new(file),
        // several members in a row are one file: so are the gzip files of the hub
        Packing::Gzip => Box::new(BufReader::with_capacity(
            BUFFER_BYTES,
            MultiGzDecoder::new(file),
        )),
        Packing::Zstd => {
            let decoder = zstd::stream::read::Decoder::with_buffer(file).map_err(wrong)?;
            Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
        }
    })
}

/// The whole file as one UTF-8 text, line ends untouched.
pub(crate) fn read_text(path: &Path, packing: Packing) -> Result<String, CalibrationError> {
    let mut bytes = Vec::new();
    open(path, packing)?
        .take(MAX_TEXT_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| CalibrationError::read(path, source))?;
    limit(path, bytes.len(), MAX_TEXT_BYTES)?;
    String::from_utf8(bytes).map_err(|error| CalibrationError::NotUtf8 {
        path: path.display().to_string(),
        offset: error.utf8_error().valid_up_to(),
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

    #[test]
    fn what_is_not_a_text_is_refused_with_its_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t");
        let error = read_text(&path, Packing::Plain).unwrap_err();
        assert!(matches!(error, CalibrationError::Read { .. }));
        std::fs::write(&path, b"ab\xff").unwrap();
        let error = read_text(&path, Packing::Plain).unwrap_err();
        assert!(matches!(error, CalibrationError::NotUtf8 { offset: 2, .. }));
        for packing in [Packing::Gzip, Packing::Zstd] {
            let error = read_text(&path, packing).unwrap_err();
            assert!(matches!(error, CalibrationError::Read { .. }), "{error}");
        }
    }
}
