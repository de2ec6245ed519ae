//! The hub's cache on disk, as every Hugging Face library lays it out:
//!
//! ```text
//! models--owner--name/refs/main                the commit that `main` was when last fetched
//! models--owner--name/snapshots/COMMIT/file -> ../../blobs/ETAG
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use gptq_types::outside_name::file_name;

use crate::reference::is_commit;
use crate::weight_files::indexed_shards;

/// A repository's folder in the cache.
#[derive(Debug)]
pub(crate) struct CachedRepo {
    folder: PathBuf,
}

/// The hub's type of a repository, part of the folder's name in the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) enum RepoKind {
    Model,
    Dataset,
}

impl CachedRepo {
    pub(crate) fn new(cache: &Path, kind: RepoKind, repo: &str) -> Self {
        let prefix = match kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        let folder = cache.join(format!("{prefix}--{}", repo.replace('/', "--")));
        CachedRepo { folder }
    }

    /// The snapshot of a branch, tag or commit, if the cache knows it.
    pub(crate) fn snapshot(&self, revision: &str) -> Option<PathBuf> {
        let reference = fs::read_to_string(self.folder.join("refs").join(revision));
        let commit = match reference {
            Ok(text) => text.trim().to_string(),
            Err(_) if is_commit(revision) => revision.to_string(),
            Err(_) => return None,
        };
        let snapshot = self.folder.join("snapshots").join(&commit);
        (file_name(&commit).is_ok() && snapshot.is_dir()).then_some(snapshot)
    }

    /// A file of a snapshot, if it is there in full (a dangling link is not).
    pub(crate) fn file(&self, revision: &str, file: &str) -> Option<PathBuf> {
        let path = self.snapshot(revision)?.join(file);
        path.is_file().then_some(path)
    }
}

/// Files that a snapshot lacks.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Missing {
    /// Files without which there is no model: `config.json`, weights.
    pub needed: Vec<String>,
    /// Whether the tokenizer is missing; some repositories have none.
    pub tokenizer: bool,
}

impl Missing {
    pub(crate) fn everything() -> Self {
        Missing {
            needed: vec!["file".into()],
            tokenizer: true,
        }
    }

    /// The needed files in words: "`config.json`, `model.safetensors`".
    pub(crate) fn in_words(&self) -> String {
        self.needed.join(", ")
    }
}

/// Looks for what a model folder needs.
pub(crate) fn missing_in(snapshot: &Path) -> Missing {
    let mut needed = Vec::new();
    if !snapshot.join("config.json").is_file() {
        needed.push("`config.json`".to_string());
    }
    needed.extend(missing_weights(snapshot));
    let tokenizer = !["tokenizer.json", "tokenizer.model"]
        .iter()
        .any(|name| snapshot.join(name).is_file());
    Missing { needed, tokenizer }
}

fn missing_weights(snapshot: &Path) -> Vec<String> {
    let names: Vec<String> = fs::read_dir(snapshot)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let index = names
        .iter()
        .find(|name| name.ends_with(".safetensors.index.json"));
    if let Some(index) = index {
        // a damaged index is reported when the folder is opened, with its reason
        let shards = indexed_shards(&snapshot.join(index)).unwrap_or_default();
        return shards
            .iter()
            .filter(|shard| !snapshot.join(shard).is_file())
            .map(|shard| format!("`{shard}`"))
            .collect();
    }
    let whole = names
        .iter()
        .any(|name| name.ends_with(".safetensors") && snapshot.join(name).is_file());
    if whole {
        Vec::new()
    } else {
        vec!["`*.safetensors`".into()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repo_with(files: &[(&str, &str)]) -> (tempfile::TempDir, CachedRepo) {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--o--n");
        for (name, text) in files {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let repo = CachedRepo::new(cache.path(), RepoKind::Model, "o/n");
        (cache, repo)
    }

    #[test]
    fn a_branch_is_followed_to_its_commit() {
        let (_cache, repo) = repo_with(&[
            ("refs/refs/pr/1", "abc\n"),
            ("refs/evil", "../../.."),
            ("snapshots/abc/config.json", "{}"),
        ]);
        assert!(repo.file("refs/pr/1", "config.json").is_some());
        assert!(repo.file("refs/pr/1", "other").is_none());
        assert!(repo.snapshot("evil").is_none());
        assert!(repo.snapshot("main").is_none());
    }

    #[test]
    fn an_interrupted_download_is_named_by_its_missing_shards() {
        let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
        let (_cache, repo) = repo_with(&[
            ("refs/main", "abc"),
            ("snapshots/abc/config.json", "{}"),
            ("snapshots/abc/model.safetensors.index.json", index),
            ("snapshots/abc/model-1.safetensors", ""),
        ]);
        let missing = missing_in(&repo.snapshot("main").unwrap());
        assert_eq!(missing.in_words(), "`model-2.safetensors`");
        assert!(missing.tokenizer);
    }
}
