//! A new repository, also where several processes make it at the same time.
//!
//! It is made whole in a folder of its own inside the target, then moved to its place entry by
//! entry: that works where the target is a mount point, and all processes move the same things.
//! `HEAD`, without which git sees no repository, comes last; a start that was cut short is completed
//! by the next one.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use git2::{Repository as Git, RepositoryInitOptions};

use crate::RepositoryError;
use crate::repository::failed;

const BEGUN: &str = ".making-";
const HEAD: &str = "HEAD";
/// Entries that git creates in a new repository.
const OWN: [&str; 7] = [
    "branches",
    "config",
    "description",
    "hooks",
    "info",
    "objects",
    "refs",
];

/// Whether a repository may be made there: the path is free, an empty folder, or a repository that another
/// process has begun.
pub(crate) fn is_vacant(path: &Path) -> bool {
    match fs::read_dir(path) {
        Ok(mut entries) => entries.all(|entry| {
            entry.is_ok_and(|entry| {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                name.starts_with(BEGUN) || name == HEAD || OWN.contains(&&*name)
            })
        }),
        // A link to nowhere is not vacant; a folder that another process has just made is.
        Err(error) => {
            let link = fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink());
            error.kind() == ErrorKind::NotFound && !link
        }
    }
}

pub(crate) fn make(path: &Path, head: &str) -> Result<(), RepositoryError> {
    fs::create_dir_all(path).map_err(RepositoryError::io("create", path))?;
    let own = tempfile::Builder::new()
        .prefix(BEGUN)
        .tempdir_in(path)
        .map_err(RepositoryError::io("write into", path))?;
    let whole = own.path().join("repository");
    let mut options = RepositoryInitOptions::new();
    options
        .bare(true)
        .initial_head(head)
        .external_template(false);
    Git::init_opts(&whole, &options).map_err(failed("make a repository", path))?;
    let mut names = Vec::new();
    for entry in fs::read_dir(&whole).map_err(RepositoryError::io("read", &whole))? {
        names.push((entry.map_err(RepositoryError::io("read", &whole))?).file_name());
    }
    names.sort_by_key(|name| name == HEAD);
    for name in names {
        let target = path.join(&name);
        match fs::rename(whole.join(&name), &target) {
            Ok(()) => {}
            // Another process was faster with this folder, and may have filled it.
            Err(_) if target.is_dir() => {}
            Err(error) => return Err(RepositoryError::io("write", &target)(error)),
        }
    }
    let synced = File::open(path).and_then(|folder| folder.sync_all());
    synced.map_err(RepositoryError::io("write", path))
}
