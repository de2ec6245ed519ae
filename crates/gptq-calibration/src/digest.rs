//! Hashes of tokens and of files.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use gptq_types::ContentHasher;

use crate::CalibrationError;

const READ_BYTES: usize = 1 << 20;

/// sha256 of the token ids as little-endian u32, window after window, in lower-case hex.
///
/// Window borders are not hashed: the record holds the window length too.
///
/// ```
/// let joined = gptq_calibration::token_sha256(&[vec![1, 2, 3]]);
/// assert_eq!(joined, gptq_calibration::token_sha256(&[vec![1], vec![2, 3]]));
/// ```
pub fn token_sha256(ids: &[Vec<u32>]) -> String {
    let mut hasher = ContentHasher::default();
    for window in ids {
        let bytes: Vec<u8> = window.iter().flat_map(|id| id.to_le_bytes()).collect();
        hasher.update(&bytes);
    }
    hasher.finish().into()
}

/// Refuses a file whose sha256 is not the `expected` lower-case hex.
pub(crate) fn verify_file(path: &Path, expected: &str) -> Result<(), CalibrationError> {
    let found = file_sha256(path).map_err(|source| CalibrationError::read(path, source))?;
    if found == expected {
        return Ok(());
    }
    Err(CalibrationError::Hash {
        path: path.display().to_string(),
        found,
        expected: expected.to_string(),
    })
}

/// sha256 of a file's bytes, in lower-case hexadecimal.
pub fn file_sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = ContentHasher::default();
    let mut piece = vec![0u8; READ_BYTES];
    loop {
        let read = file.read(&mut piece)?;
        if read == 0 {
            return Ok(hasher.finish().into());
        }
        hasher.update(&piece[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `hashlib.sha256(struct.pack("<3I", 1, 2, 65536)).hexdigest()`
    #[test]
    fn tokens_are_hashed_as_little_endian_words() {
        let golden = "b9f5fe6ff037564f7628f61b720ece17b215389c80de1c7c9dc538029eaf63e3";
        assert_eq!(token_sha256(&[vec![1, 2], vec![65536]]), golden);
    }

    #[test]
    fn no_tokens_hash_as_no_bytes() {
        let golden = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(token_sha256(&[]), golden);
    }

    #[test]
    fn a_file_with_another_hash_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("empty");
        std::fs::write(&path, b"").unwrap();
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert!(verify_file(&path, empty).is_ok());
        let error = verify_file(&path, &"0".repeat(64)).unwrap_err();
        assert!(matches!(error, CalibrationError::Hash { found, .. } if found == empty));
    }
}
