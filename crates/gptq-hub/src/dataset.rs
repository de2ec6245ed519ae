//! Finds the files of a dataset repository that hold the rows of one split.
//!
//! The hub keeps a Parquet copy of most datasets on a separate branch, in folders `CONFIG/SPLIT`,
//! which is tried first. Otherwise the repository's own files are searched, whose names follow a few
//! conventions: `data/train-00000-of-00003.parquet`, `en/train.jsonl`, `my_train_set.jsonl`, or a
//! single file without a split in its name, taken as the training split.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use gptq_types::outside_name::{relative_path, shown};

use crate::HubError;
use crate::cache::{CachedRepo, RepoKind};
use crate::reference::{ModelRef, is_repo};
use crate::resolve::{ResolveOptions, Settings, list_dataset};

/// The hub's own copy, and the repository's own files.
const REVISIONS: [&str; 2] = ["refs/convert/parquet", "main"];

/// Names by which repositories call their splits; a file with none of them is of no split.
const SPLITS: [&str; 7] = ["train", "test", "validation", "valid", "val", "dev", "eval"];

/// JSON files of a dataset that hold no rows.
const NO_DATA: [&str; 6] = [
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "package.json",
    "state.json",
];

/// Names that an error repeats.
const SHOWN_NAMES: usize = 5;
const SHOWN_CHARACTERS: usize = 40;

/// Folders deeper than this hold no data.
const MAX_DEPTH: usize = 8;

/// Files with the rows of one split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundDataset {
    /// The branch that they were found on.
    pub revision: String,
    /// Its commit.
    pub commit: String,
    /// Paths in the repository, in the order of their names; at least one.
    pub files: Vec<String>,
}

/// Finds the files of `split` in the dataset `repo` (`owner/name`); `has_rows` tells by its name
/// whether a file can be read.
///
/// Fails when the hub cannot be asked, when the repository does not exist, when no file or the files
/// of several configurations fit; offline when the cache has none of it.
pub fn find_dataset(
    repo: &str,
    config: Option<&str>,
    split: &str,
    has_rows: &dyn Fn(&str) -> bool,
    options: &ResolveOptions,
) -> Result<FoundDataset, HubError> {
    if !is_repo(repo) {
        return Err(HubError::Reference(shown(repo, SHOWN_CHARACTERS)));
    }
    let settings = Settings::new(options, &|name| std::env::var(name).ok())?;
    let mut why = None;
    for revision in REVISIONS {
        let dataset = ModelRef {
            repo: repo.to_string(),
            revision: revision.to_string(),
        };
        let Some((commit, names)) = list(&dataset, &settings)? else {
            continue;
        };
        match choose(&names, config, split, has_rows) {
            Ok(files) => {
                return Ok(FoundDataset {
                    revision: revision.to_string(),
                    commit,
                    files,
                });
            }
            Err(reason) => why = Some((dataset, reason)),
        }
    }
    Err(match why {
        Some((dataset, reason)) => HubError::NoSplit {
            repo: dataset.repo,
            revision: dataset.revision,
            reason,
        },
        None => HubError::NotCached {
            repo: repo.to_string(),
            revision: "main".to_string(),
            missing: "file".to_string(),
        },
    })
}

/// Commit and files; nothing where the branch is not there, or offline not in the cache.
fn list(
    dataset: &ModelRef,
    settings: &Settings,
) -> Result<Option<(String, Vec<String>)>, HubError> {
    if settings.offline {
        let cached = CachedRepo::new(&settings.cache, RepoKind::Dataset, &dataset.repo);
        return Ok(cached.snapshot(&dataset.revision).map(|snapshot| {
            let commit = snapshot.file_name().unwrap_or_default();
            let mut names = Vec::new();
            files_below(&snapshot, "", MAX_DEPTH, &mut names);
            (commit.to_string_lossy().into_owned(), names)
        }));
    }
    match list_dataset(dataset, settings) {
        Ok(listed) => Ok(Some(listed)),
        Err(HubError::NotFound { .. }) if dataset.revision != "main" => Ok(None),
        Err(error) => Err(error),
    }
}

fn files_below(folder: &Path, before: &str, depth: usize, names: &mut Vec<String>) {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in entries {
        let name = format!("{before}{}", entry.file_name().to_string_lossy());
        match entry.path() {
            path if path.is_dir() && depth > 0 => {
                files_below(&path, &format!("{name}/"), depth - 1, names);
            }
            path if path.is_file() => names.push(name),
            _ => {}
        }
    }
}

/// The files of a split among all files of a repository; the error is a reason.
fn choose(
    names: &[String],
    config: Option<&str>,
    split: &str,
    has_rows: &dyn Fn(&str) -> bool,
) -> Result<Vec<String>, String> {
    let all: Vec<DataFile<'_>> = (names.iter())
        .filter(|name| relative_path(name).is_ok() && has_rows(name))
        .map(|name| DataFile::of(name))
        .filter(|file| !NO_DATA.contains(&file.file) && !file.name.starts_with('.'))
        .collect();
    if all.is_empty() {
        return Err("it has no file of rows that can be read".to_string());
    }
    let of_config: Vec<&DataFile<'_>> = (all.iter())
        .filter(|file| config.is_none_or(|config| file.is_of_config(config)))
        .collect();
    if of_config.is_empty() {
        let config = shown(config.unwrap_or_default(), SHOWN_CHARACTERS);
        let found = several(all.iter().map(|file| file.name));
        return Err(format!(
            "no file is of configuration `{config}`; it has {found}"
        ));
    }
    let has_splits = of_config
        .iter()
        .any(|file| SPLITS.iter().any(|split| file.mentions(split)));
    let wanted = [
        of_config
            .iter()
            .filter(|file| file.is_of_split(split))
            .collect::<Vec<_>>(),
        of_config
            .iter()
            .filter(|file| file.mentions(split))
            .collect(),
        // one file, or pieces of it, without a split in its name
        of_config
            .iter()
            .filter(|_| !has_splits && split == "train")
            .collect(),
    ];
    let Some(wanted) = wanted.into_iter().find(|files| !files.is_empty()) else {
        let found = several(of_config.iter().map(|file| file.name));
        let split = shown(split, SHOWN_CHARACTERS);
        return Err(format!("no file is of split `{split}`; it has {found}"));
    };
    let configs: BTreeSet<String> = wanted.iter().map(|file| file.config(split)).collect();
    let only = match config {
        None if configs.len() > 1 => match ["", "default"]
            .into_iter()
            .find(|name| configs.contains(*name))
        {
            Some(name) => Some(name.to_string()),
            None => {
                let found = several(configs.iter().map(String::as_str));
                return Err(format!(
                    "it has several configurations, {found}: one must be named"
                ));
            }
        },
        _ => None,
    };
    let is_only =
        |file: &&&&DataFile<'_>| only.as_ref().is_none_or(|only| file.config(split) == *only);
    let mut files: Vec<String> = (wanted.iter())
        .filter(is_only)
        .map(|file| file.name.to_string())
        .collect();
    // the same rows once more in another format
    for kind in [".parquet", ".arrow"] {
        if files.iter().any(|name| name.ends_with(kind)) {
            files.retain(|name| name.ends_with(kind));
        }
    }
    files.sort();
    Ok(files)
}

fn several<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    let shown_names = names.iter().take(SHOWN_NAMES);
    let mut words: Vec<String> = shown_names
        .map(|name| format!("`{}`", shown(name, SHOWN_CHARACTERS)))
        .collect();
    if names.len() > SHOWN_NAMES {
        words.push(format!("{} more", names.len() - SHOWN_NAMES));
    }
    words.join(", ")
}

/// The name of a file, taken apart.
struct DataFile<'a> {
    name: &'a str,
    folders: Vec<&'a str>,
    file: &'a str,
    /// Without extensions and the number of a shard.
    stem: &'a str,
}

impl<'a> DataFile<'a> {
    fn of(name: &'a str) -> Self {
        let mut folders: Vec<&str> = name.split('/').collect();
        let file = folders.pop().unwrap_or(name);
        let stem = file.split_once('.').map_or(file, |(stem, _)| stem);
        DataFile {
            name,
            folders,
            file,
            stem: without_shard(stem),
        }
    }

    fn is_of_config(&self, config: &str) -> bool {
        let rest = self.stem.strip_prefix(config);
        self.folders.contains(&config)
            || rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['-', '_', '.']))
    }

    fn is_of_split(&self, split: &str) -> bool {
        self.stem == split
            || self
                .folders
                .iter()
                .any(|folder| is_folder_of(folder, split))
    }

    /// Whether the split is a word of the name.
    fn mentions(&self, split: &str) -> bool {
        self.is_of_split(split) || self.stem.split(['-', '_', ' ']).any(|word| word == split)
    }

    /// The folders, but for those of the split and the one that all data lies in.
    fn config(&self, split: &str) -> String {
        let is_config = |folder: &&&str| **folder != "data" && !is_folder_of(folder, split);
        let folders: Vec<&str> = self.folders.iter().filter(is_config).copied().collect();
        folders.join("/")
    }
}

/// The hub's copy of a large split is a part of it.
fn is_folder_of(folder: &str, split: &str) -> bool {
    folder.strip_prefix("partial-").unwrap_or(folder) == split
}

/// `train` of `train-00000-of-00003` and of `train-00000-of-00003-a3ecf92756993583`.
fn without_shard(stem: &str) -> &str {
    let is_number = |text: &str| text.len() >= 3 && text.bytes().all(|byte| byte.is_ascii_digit());
    let shard = stem.match_indices("-of-").find_map(|(at, _)| {
        let (before, number) = stem[..at].rsplit_once(['-', '_'])?;
        let total = stem[at + 4..].split('-').next()?;
        (is_number(number) && is_number(total)).then_some(before)
    });
    shard.unwrap_or(stem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(names: &[&str], config: Option<&str>, split: &str) -> Result<Vec<String>, String> {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let has_rows = |name: &str| {
            [".parquet", ".jsonl", ".json"]
                .iter()
                .any(|end| name.ends_with(end))
        };
        choose(&names, config, split, &has_rows)
    }

    #[test]
    fn the_hubs_copy_has_folders_of_configurations_and_splits() {
        let names = [
            "default/test/0000.parquet",
            "default/train/0001.parquet",
            "default/train/0000.parquet",
            "en/partial-train/0000.parquet",
        ];
        let train = ["default/train/0000.parquet", "default/train/0001.parquet"];
        assert_eq!(chosen(&names, None, "train").unwrap(), train);
        assert_eq!(chosen(&names, Some("en"), "train").unwrap(), names[3..]);
        assert_eq!(chosen(&names, None, "test").unwrap(), names[..1]);
        let error = chosen(&names, Some("de"), "train").unwrap_err();
        assert!(error.contains("configuration `de`"), "{error}");
        let error = chosen(&names[2..], Some("en"), "test").unwrap_err();
        assert!(error.contains("split `test`"), "{error}");
        let error = chosen(&["a/train/0.parquet", "b/train/0.parquet"], None, "train").unwrap_err();
        assert!(error.contains("`a`, `b`"), "{error}");
    }

    #[test]
    fn own_files_are_chosen_by_their_names() {
        let one = |names: &[&str], split| chosen(names, None, split).unwrap();
        let shards = [
            "data/train_sft-00001-of-00002-a3ec.parquet",
            "data/train_sft-00000-of-00002-b1.parquet",
            "data/train_gen-00000-of-00001.parquet",
        ];
        assert_eq!(one(&shards, "train_sft"), [shards[1], shards[0]]);
        assert_eq!(
            one(
                &["README.md", "alpaca_data.json", "dataset_infos.json"],
                "train"
            ),
            ["alpaca_data.json"]
        );
        assert_eq!(
            one(&["my_train_set.jsonl", "my_test_set.jsonl"], "train"),
            ["my_train_set.jsonl"]
        );
        assert_eq!(
            one(&["train.jsonl", "en/train.jsonl"], "train"),
            ["train.jsonl"]
        );
        assert_eq!(
            one(
                &["data/train.jsonl", "data/train-00000-of-00001.parquet"],
                "train"
            ),
            ["data/train-00000-of-00001.parquet"]
        );
        let error = chosen(&["test.jsonl"], None, "train").unwrap_err();
        assert!(error.contains("`test.jsonl`"), "{error}");
        assert!(chosen(&["../train.jsonl", "train.py"], None, "train").is_err());
    }
}
