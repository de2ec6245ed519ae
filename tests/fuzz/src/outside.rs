//! Snapshots of the files around a run's folder, which reveal writes outside of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// A folder with a fixed name, for absolute paths in inputs. It must stay empty.
pub const OUTSIDE: &str = "/tmp/gptq-fuzz-outside";

/// Paths with length and time of the last change; folders have neither.
pub type Snapshot = BTreeMap<PathBuf, Option<(u64, SystemTime)>>;

/// All below `folder`, relative to it, but for what lies in `skipped`.
pub fn snapshot(folder: &Path, skipped: &[&str]) -> Snapshot {
    let mut found = Snapshot::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(next) = open.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            let Ok(relative) = path.strip_prefix(folder).map(Path::to_path_buf) else {
                continue;
            };
            if skipped.iter().any(|skipped| relative.starts_with(skipped)) {
                continue;
            }
            let meta = fs::symlink_metadata(&path)
                .ok()
                .filter(|meta| !meta.is_dir());
            if meta.is_none() {
                open.push(path);
            }
            let file = meta.and_then(|meta| Some((meta.len(), meta.modified().ok()?)));
            found.insert(relative, file);
        }
    }
    found
}

/// Entries that were added, removed or changed.
pub fn differences(before: &Snapshot, after: &Snapshot) -> Vec<String> {
    let changed = after
        .iter()
        .filter(|(path, meta)| before.get(*path) != Some(*meta));
    let gone = before.iter().filter(|(path, _)| !after.contains_key(*path));
    changed
        .chain(gone)
        .map(|(path, _)| path.display().to_string())
        .collect()
}
