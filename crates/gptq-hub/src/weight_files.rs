//! Finds the weight files of a folder: `model.safetensors`, or an index and its shards, or the file
//! that `quantize_config.json` names, or the only other `*.safetensors` file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_types::outside_name::{file_name, shown};
use serde::Deserialize;
use serde_json::Value;

use crate::HubError;
use crate::text_file::{MAX_CONFIG_BYTES, read_text};

/// The index of a 10,000-tensor model takes less than 1 MiB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// Characters of a stored name shown in an error.
const SHOWN_CHARACTERS: usize = 96;

#[derive(Deserialize)]
pub(crate) struct Index {
    pub weight_map: BTreeMap<String, String>,
}

/// The weight files of a folder and, where one names them, the index.
pub(crate) struct WeightFiles {
    pub files: Vec<PathBuf>,
    pub index: Option<(PathBuf, Index)>,
}

/// Names of the files and links directly in the folder, sorted.
pub(crate) fn list_files(dir: &Path) -> Result<Vec<String>, HubError> {
    match fs::metadata(dir) {
        Err(_) => return Err(HubError::FolderMissing(dir.to_path_buf())),
        Ok(meta) if !meta.is_dir() => return Err(HubError::NotAFolder(dir.to_path_buf())),
        Ok(_) => {}
    }
    let read = |source| HubError::io("list", dir, source);
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        if let Some(name) = entry.file_name().to_str() {
            names.push(name.to_string());
        }
    }
    names.sort();
    Ok(names)
}

/// Chooses among the files of a folder; fails where none, several or contradicting ones are there.
pub(crate) fn choose_weights(dir: &Path, listing: &[String]) -> Result<WeightFiles, HubError> {
    let weights: Vec<&String> = names_ending(listing, ".safetensors");
    let is_adapter = listing.iter().any(|name| name == ADAPTER_CONFIG);
    if is_adapter && weights.iter().all(|name| name.starts_with("adapter_")) {
        return Err(adapter(dir)?);
    }
    let single = weights.iter().any(|name| *name == SINGLE);
    if let Some(index_name) = choose_index(dir, listing)? {
        return indexed(dir, &index_name, single);
    }
    let chosen = match weights[..] {
        [] => return Err(no_weights(dir.display().to_string(), listing)),
        [only] => only,
        _ => match (declared_file(dir, &weights)?, single) {
            (Some(declared), _) => declared,
            (None, true) => SINGLE,
            (None, false) => {
                return Err(HubError::Ambiguous {
                    folder: dir.to_path_buf(),
                    files: quote_all(&weights),
                });
            }
        },
    };
    Ok(WeightFiles {
        files: vec![dir.join(chosen)],
        index: None,
    })
}

fn indexed(dir: &Path, index_name: &str, single: bool) -> Result<WeightFiles, HubError> {
    let path = dir.join(index_name);
    let index = read_index(&path)?;
    let shards = shard_names(&path, &index)?;
    if single && let Some(other) = shards.iter().find(|shard| *shard != SINGLE) {
        return Err(HubError::Contradiction {
            index: path,
            shard: other.clone(),
            single: SINGLE.into(),
        });
    }
    if let Some(absent) = shards.iter().find(|shard| !dir.join(shard).is_file()) {
        return Err(HubError::ShardMissing {
            index: path,
            shard: absent.clone(),
        });
    }
    Ok(WeightFiles {
        files: shards.iter().map(|shard| dir.join(shard)).collect(),
        index: Some((path, index)),
    })
}

/// The file that AutoGPTQ's `model_file_base_name` chooses among several.
fn declared_file<'a>(dir: &Path, weights: &[&'a String]) -> Result<Option<&'a str>, HubError> {
    let path = dir.join("quantize_config.json");
    if !path.is_file() {
        return Ok(None);
    }
    let text = read_text(&path, MAX_CONFIG_BYTES)?;
    // other errors in it are reported by the readers of its settings
    let settings: Value = serde_json::from_str(&text).unwrap_or_default();
    let Some(base) = settings["model_file_base_name"].as_str() else {
        return Ok(None);
    };
    let wanted = format!("{base}.safetensors");
    let found = weights.iter().find(|name| ***name == wanted);
    Ok(found.map(|name| name.as_str()))
}

/// `model.safetensors.index.json`, or the only other index: AutoGPTQ names it after its weights.
fn choose_index(dir: &Path, listing: &[String]) -> Result<Option<String>, HubError> {
    if listing.iter().any(|name| name == INDEX) {
        return Ok(Some(INDEX.into()));
    }
    if listing.iter().any(|name| name == SINGLE) {
        return Ok(None);
    }
    let others = names_ending(listing, ".safetensors.index.json");
    match others[..] {
        [] => Ok(None),
        [only] => Ok(Some(only.clone())),
        _ => Err(HubError::Ambiguous {
            folder: dir.to_path_buf(),
            files: quote_all(&others),
        }),
    }
}

fn names_ending<'a>(listing: &'a [String], suffix: &str) -> Vec<&'a String> {
    let found = listing.iter().filter(|name| name.ends_with(suffix));
    found.collect()
}

/// The first few of many.
fn quote_all(names: &[&String]) -> String {
    const MOST: usize = 4;
    let quoted = names.iter().take(MOST);
    let mut quoted: Vec<String> = quoted.map(|name| format!("`{name}`")).collect();
    if names.len() > MOST {
        quoted.push(format!("{} more", names.len() - MOST));
    }
    quoted.join(", ")
}

/// The error for a place without safetensors; it mentions pickles found instead.
pub(crate) fn no_weights(place: String, listing: &[String]) -> HubError {
    let ends = [".bin", ".pt", ".pth", ".ckpt"];
    let named = |name: &&String| ends.iter().any(|end| name.ends_with(end));
    if let Some(file) = listing.iter().find(named) {
        let file = shown(file, SHOWN_CHARACTERS);
        return HubError::OnlyPickles { place, file };
    }
    match listing.iter().find(|name| name.ends_with(".gguf")) {
        Some(file) => HubError::OnlyGguf {
            place,
            file: shown(file, SHOWN_CHARACTERS),
        },
        None => HubError::NoWeights(place),
    }
}

/// The error for a folder with an adapter and no model.
fn adapter(dir: &Path) -> Result<HubError, HubError> {
    let text = read_text(&dir.join(ADAPTER_CONFIG), MAX_CONFIG_BYTES)?;
    Ok(adapter_of(dir.display().to_string(), &text))
}

/// The error for an adapter, from the text of its `adapter_config.json`.
pub(crate) fn adapter_of(place: String, config: &str) -> HubError {
    let config: Value = serde_json::from_str(config).unwrap_or_default();
    let base = config["base_model_name_or_path"].as_str();
    HubError::Adapter {
        place,
        base: shown(base.unwrap_or("another model"), SHOWN_CHARACTERS),
    }
}

fn read_index(path: &Path) -> Result<Index, HubError> {
    let text = read_text(path, MAX_INDEX_BYTES)?;
    serde_json::from_str(&text).map_err(|error| HubError::BadFile {
        path: path.to_path_buf(),
        reason: shown(&format!("not a safetensors index: {error}"), 200),
    })
}

/// The files an index names, each once, sorted; refuses names that are not a plain file's.
fn shard_names(path: &Path, index: &Index) -> Result<Vec<String>, HubError> {
    let mut shards: Vec<String> = index.weight_map.values().cloned().collect();
    shards.sort();
    shards.dedup();
    if shards.is_empty() {
        return Err(HubError::BadFile {
            path: path.to_path_buf(),
            reason: "the index names no tensor".into(),
        });
    }
    let plain = |shard: &&String| shard.ends_with(".safetensors") && file_name(shard).is_ok();
    match shards.iter().find(|shard| !plain(shard)) {
        Some(shard) => Err(HubError::ShardName {
            index: path.to_path_buf(),
            shard: shown(shard, SHOWN_CHARACTERS),
        }),
        None => Ok(shards),
    }
}

/// The files that an index in this folder names, for telling whether all of them are there.
pub(crate) fn indexed_shards(path: &Path) -> Result<Vec<String>, HubError> {
    shard_names(path, &read_index(path)?)
}
