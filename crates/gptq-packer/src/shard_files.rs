//! The shard files of a partial folder: made at full length, or found again.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::durable::{is_leftover, replace_file};
use crate::header::{self, LENGTH_BYTES};
use crate::layout::{CheckpointLayout, INDEX_FILE, Shard};
use crate::stage::{StageError, io_error};

static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// Makes every shard of the layout in an empty folder, on a disk with room for `beside_shards` bytes
/// more.
pub(crate) fn fill(
    partial: &Path,
    layout: &CheckpointLayout,
    beside_shards: u64,
) -> Result<Vec<File>, StageError> {
    let needed = layout.file_bytes().saturating_add(beside_shards);
    let free = fs4::available_space(partial).map_err(io_error("measure", partial))?;
    let no_space = || StageError::NoSpace {
        path: partial.to_path_buf(),
        needed,
        free,
    };
    if free < needed {
        return Err(no_space());
    }
    let mut files = Vec::with_capacity(layout.shards().len());
    for shard in layout.shards() {
        let path = partial.join(&shard.file_name);
        let made = make_shard(&path, shard).map_err(|source| match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
                no_space()
            }
            _ => io_error("allocate", &path)(source),
        })?;
        files.push(made);
    }
    write_index(partial, layout)?;
    Ok(files)
}

fn make_shard(path: &Path, shard: &Shard) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    allocate(&file, shard.bytes)?;
    file.write_all_at(&shard.header, 0)?;
    Ok(file)
}

/// Real blocks for the whole file; filesystems without `fallocate` get zeros written.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    match fs4::fs_std::FileExt::allocate(file, bytes) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::Unsupported => write_zeros(file, bytes)?,
        Err(error) => return Err(error),
    }
    file.set_len(bytes)
}

fn write_zeros(file: &File, bytes: u64) -> io::Result<()> {
    let mut position = 0;
    while position < bytes {
        let piece = (bytes - position).min(ZEROS.len() as u64);
        file.write_all_at(&ZEROS[..piece as usize], position)?;
        position += piece;
    }
    Ok(())
}

/// Writes the index that several shards need.
pub(crate) fn write_index(partial: &Path, layout: &CheckpointLayout) -> Result<(), StageError> {
    let Some(index) = layout.index_json() else {
        return Ok(());
    };
    let path = partial.join(INDEX_FILE);
    replace_file(&path, |file| file.write_all(index.as_bytes())).map_err(io_error("write", &path))
}

/// Removes what a killed process left of files that it was replacing.
pub(crate) fn remove_leftovers(partial: &Path) -> Result<(), StageError> {
    for name in file_names(partial)? {
        if is_leftover(&name) {
            let path = partial.join(name);
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}

/// Names of all safetensors files in a partial folder, sorted.
fn shard_names(partial: &Path) -> Result<Vec<String>, StageError> {
    let mut names = file_names(partial)?;
    names.retain(|name| name.ends_with(".safetensors"));
    Ok(names)
}

fn file_names(folder: &Path) -> Result<Vec<String>, StageError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(io_error("read", folder))? {
        let entry = entry.map_err(io_error("read", folder))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// A shard that the layout does not have comes from another layout.
pub(crate) fn refuse_foreign_shards(
    partial: &Path,
    layout: &CheckpointLayout,
) -> Result<(), StageError> {
    let known: HashSet<&str> = layout
        .shards()
        .iter()
        .map(|shard| shard.file_name.as_str())
        .collect();
    match shard_names(partial)?
        .into_iter()
        .find(|name| !known.contains(name.as_str()))
    {
        None => Ok(()),
        Some(name) => Err(differs(
            partial,
            format!("`{name}` is not one of its shards"),
        )),
    }
}

fn differs(path: &Path, difference: String) -> StageError {
    StageError::Differs {
        path: path.to_path_buf(),
        difference,
    }
}

/// Opens a shard whose header and length are those of the layout.
pub(crate) fn reopen_shard(partial: &Path, shard: &Shard) -> Result<File, StageError> {
    let path = partial.join(&shard.file_name);
    let file = match File::options().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(differs(&path, "the shard is absent".to_string()));
        }
        Err(source) => return Err(io_error("open", &path)(source)),
    };
    let found = file.metadata().map_err(io_error("read", &path))?.len();
    let head_length = (shard.header.len() as u64).min(found);
    let mut head = vec![0; head_length as usize];
    file.read_exact_at(&mut head, 0)
        .map_err(io_error("read", &path))?;
    if head != shard.header {
        return Err(differs(&path, header_difference(&file, &shard.header)));
    }
    if found != shard.bytes {
        let difference = format!("{found} bytes instead of {}", shard.bytes);
        return Err(differs(&path, difference));
    }
    Ok(file)
}

/// The first tensor in which the header of a file departs from the expected one.
fn header_difference(file: &File, expected: &[u8]) -> String {
    let unreadable = || "its header is not readable".to_string();
    let mut length = [0; LENGTH_BYTES as usize];
    if file.read_exact_at(&mut length, 0).is_err() {
        return unreadable();
    }
    let length = u64::from_le_bytes(length);
    if length > header::MAX_HEADER_BYTES {
        return unreadable();
    }
    let mut json = vec![0; length as usize];
    if file.read_exact_at(&mut json, LENGTH_BYTES).is_err() {
        return unreadable();
    }
    let parsed = (
        header::parse(&json),
        header::parse(&expected[LENGTH_BYTES as usize..]),
    );
    let (Ok(found), Ok(expected)) = parsed else {
        return unreadable();
    };
    for (found, expected) in found.tensors.iter().zip(&expected.tensors) {
        if found.name != expected.name {
            return format!("tensor `{}` instead of `{}`", found.name, expected.name);
        }
        if found.info != expected.info {
            return format!(
                "tensor `{}` is {} {:?} instead of {} {:?}",
                found.name,
                found.info.dtype,
                found.info.shape,
                expected.info.dtype,
                expected.info.shape
            );
        }
    }
    match found.tensors.len() == expected.tensors.len() {
        true => "its header is written in another way".to_string(),
        false => format!(
            "{} tensors instead of {}",
            found.tensors.len(),
            expected.tensors.len()
        ),
    }
}
