//! Files that are either the old ones or the new ones, also after a power cut.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// The folder that holds `path`; `.` for a bare name.
pub(crate) fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    }
}

/// Makes `folder` and its missing parents; returns the new folders, the deepest first.
///
/// After an error none of the new folders is left.
pub(crate) fn make_folders(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let absent = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
    let made: Vec<PathBuf> = (folder.ancestors().take_while(absent))
        .map(Path::to_path_buf)
        .collect();
    if let Err(error) = fs::create_dir_all(folder) {
        remove_empty(&made);
        return Err(error);
    }
    Ok(made)
}

/// Removes folders that hold nothing, the deepest first, up to one that holds something.
///
/// There is an error to report already wherever this is called, so its own are not.
pub(crate) fn remove_empty(folders: &[PathBuf]) {
    for folder in folders {
        match fs::remove_dir(folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return,
            _ => {}
        }
    }
}

/// Makes renames and new names in a folder durable.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

const LEFTOVER_SUFFIX: &str = ".partial";

/// Whether the name is that of a temporary file left by a killed [`replace_file`].
pub(crate) fn is_leftover(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(LEFTOVER_SUFFIX)
}

/// Writes a temporary file next to `path`, syncs, then renames it over `path`.
pub(crate) fn replace_file(
    path: &Path,
    fill: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, "the path does not name a file")
    })?;
    let mut beside_name = std::ffi::OsString::from(".");
    beside_name.push(name);
    beside_name.push(LEFTOVER_SUFFIX);
    let beside = path.with_file_name(beside_name);
    let written = write_synced(&beside, fill).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // The first error is the one to report; a leftover here is only untidy.
        let _ = fs::remove_file(&beside);
        return written;
    }
    sync_folder(&parent_of(path))
}

fn write_synced(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let mut file = File::create(path)?;
    fill(&mut file)?;
    file.flush()?;
    file.sync_all()
}
