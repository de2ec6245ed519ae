//! Loose objects of git, before libgit2 reads them: of one that was cut short, as a full disk leaves
//! it, libgit2 waits for the rest forever.

use std::fs;
use std::io::{Error, ErrorKind, Result};
use std::path::Path;

use flate2::{Decompress, FlushDecompress, Status};
use git2::Oid;

/// Largest file of an object that is looked at, and what is inflated of it: larger ones are refused by
/// their header, which is at the start.
const MOST_BYTES: u64 = 300 << 20;

/// Fails where the object lies in a file of its own that ends early or is no zlib stream.
pub(crate) fn check_loose(objects: &Path, id: Oid) -> Result<()> {
    let name = id.to_string();
    let path = objects.join(&name[..2]).join(&name[2..]);
    let bytes = match fs::metadata(&path) {
        Ok(found) if found.len() <= MOST_BYTES => fs::read(&path)?,
        Ok(_) => return Err(Error::new(ErrorKind::FileTooLarge, "it is too large")),
        // In a pack, or nowhere: libgit2 finds out which.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut inflater = Decompress::new(true);
    let mut out = vec![0; 64 << 10];
    while inflater.total_out() < MOST_BYTES {
        let before = (inflater.total_in(), inflater.total_out());
        let rest = &bytes[before.0 as usize..];
        let status = inflater.decompress(rest, &mut out, FlushDecompress::None)?;
        if status == Status::StreamEnd {
            return Ok(());
        }
        if before == (inflater.total_in(), inflater.total_out()) {
            return Err(Error::new(ErrorKind::UnexpectedEof, "it ends early"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::ZlibEncoder;

    use super::*;

    /// `pull` of a repository with such a commit never ended.
    #[test]
    fn an_object_that_is_cut_short_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let id = Oid::from_str("0123456789012345678901234567890123456789").unwrap();
        let place = folder.path().join("01");
        fs::create_dir(&place).unwrap();
        let place = place.join("23456789012345678901234567890123456789");
        check_loose(folder.path(), id).expect("what is not there is not cut short");

        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(b"commit 40\0").unwrap();
        encoder.write_all(&[7; 200_000]).unwrap();
        let whole = encoder.finish().unwrap();
        fs::write(&place, &whole).unwrap();
        check_loose(folder.path(), id).unwrap();
        for length in [0, 1, 2, 15, whole.len() / 2, whole.len() - 5] {
            fs::write(&place, &whole[..length]).unwrap();
            let error = check_loose(folder.path(), id).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{length}");
        }
        fs::write(&place, b"not zlib at all").unwrap();
        check_loose(folder.path(), id).unwrap_err();
    }
}
