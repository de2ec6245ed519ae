//! A model folder as a source of tensors: `model.safetensors`, or an index and its shards, or one
//! other `*.safetensors` file (AutoGPTQ's `gptq_model-4bit-128g.safetensors`).
//!
//! All headers are read and checked at once; tensor bytes are read by position when asked for. The
//! index is never trusted alone: the shards' own headers say what there is, and the index must
//! agree. Files may be symbolic links, as in the hub cache, where `snapshots/*/file` points into
//! `blobs`; names in an index may not leave the folder.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use gptq_packer::{SafetensorsError, SafetensorsFile};
use gptq_types::{SourceError, TensorInfo, TensorSource};
use rayon::prelude::*;
use serde::Deserialize;

use crate::HubError;

/// The index of a 10,000-tensor model takes less than 1 MiB.
const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_CONFIG_BYTES: u64 = 16 << 20;
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// An opened model folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<SafetensorsFile>,
    /// Tensor name to position in `shards`.
    homes: BTreeMap<String, usize>,
    weight_bytes: u64,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a folder and checks every header in it, the file lengths and the index.
    ///
    /// Fails when the folder or its weights are missing, when only pickles are there, when index
    /// and shards disagree, or when a header is damaged or its file cut short.
    pub fn open(dir: &Path) -> Result<Self, HubError> {
        let listing = list_files(dir)?;
        let (files, index) = choose_weights(dir, &listing)?;
        let shards = files
            .par_iter()
            .map(|path| SafetensorsFile::open(path).map_err(HubError::from))
            .collect::<Result<Vec<_>, _>>()?;
        let homes = collect_homes(&shards)?;
        if let Some((index_path, index)) = index {
            check_index(&index_path, &index, &shards, &homes)?;
        }
        let weight_bytes = files
            .iter()
            .map(|path| {
                fs::metadata(path)
                    .map(|meta| meta.len())
                    .map_err(|source| HubError::io("read", path, source))
            })
            .sum::<Result<u64, _>>()?;
        Ok(Checkpoint {
            dir: dir.to_path_buf(),
            shards,
            homes,
            weight_bytes,
        })
    }

    /// The folder as given to [`Checkpoint::open`].
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The weight files, in the order of their names.
    pub fn files(&self) -> Vec<PathBuf> {
        self.shards
            .iter()
            .map(|shard| shard.path().to_path_buf())
            .collect()
    }

    /// Bytes of all weight files, headers included.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The text of `config.json`; an error if the file is missing or not UTF-8.
    pub fn config_json(&self) -> Result<String, HubError> {
        read_text(&self.dir.join("config.json"), MAX_CONFIG_BYTES)
    }
}

impl TensorSource for Checkpoint {
    fn place(&self) -> String {
        format!("`{}`", self.dir.display())
    }

    fn names(&self) -> Vec<String> {
        self.homes.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.shards[*self.homes.get(name)?]
            .tensors()
            .get(name)
            .cloned()
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        (self.home(name)?.read(name)).map_err(|error| invalid(name, &error))
    }

    fn read_at(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<(), SourceError> {
        (self.home(name)?.read_at(name, offset, out)).map_err(|error| invalid(name, &error))
    }
}

impl Checkpoint {
    fn home(&self, name: &str) -> Result<&SafetensorsFile, SourceError> {
        match self.homes.get(name) {
            Some(&home) => Ok(&self.shards[home]),
            None => Err(SourceError::Missing {
                name: name.to_string(),
                place: self.place(),
            }),
        }
    }
}

fn invalid(name: &str, error: &SafetensorsError) -> SourceError {
    SourceError::Invalid {
        name: name.to_string(),
        reason: error.to_string(),
    }
}

/// Names of the plain files (or links to files) directly in the folder, sorted.
fn list_files(dir: &Path) -> Result<Vec<String>, HubError> {
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

type Chosen = (Vec<PathBuf>, Option<(PathBuf, Index)>);

fn choose_weights(dir: &Path, listing: &[String]) -> Result<Chosen, HubError> {
    let weights: Vec<&String> = names_ending(listing, ".safetensors");
    let single = weights.iter().any(|name| *name == SINGLE);
    if let Some(index_name) = choose_index(dir, listing)? {
        let index_path = dir.join(&index_name);
        let index = read_index(&index_path)?;
        let shards = shard_names(&index_path, &index)?;
        if single && let Some(other) = shards.iter().find(|shard| *shard != SINGLE) {
            return Err(HubError::Contradiction {
                index: index_path,
                shard: other.clone(),
                single: SINGLE.into(),
            });
        }
        if let Some(absent) = shards.iter().find(|shard| !dir.join(shard).is_file()) {
            return Err(HubError::ShardMissing {
                index: index_path,
                shard: absent.clone(),
            });
        }
        let files = shards.iter().map(|shard| dir.join(shard)).collect();
        return Ok((files, Some((index_path, index))));
    }
    if single {
        return Ok((vec![dir.join(SINGLE)], None));
    }
    match weights[..] {
        [only] => Ok((vec![dir.join(only)], None)),
        [] => Err(no_weights(dir.display().to_string(), listing)),
        _ => Err(HubError::Ambiguous {
            folder: dir.to_path_buf(),
            files: quote_all(&weights),
        }),
    }
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
    listing
        .iter()
        .filter(|name| name.ends_with(suffix))
        .collect()
}

fn quote_all(names: &[&String]) -> String {
    let quoted: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    quoted.join(", ")
}

/// The error for a place without safetensors, which says so when pickles are there instead.
pub(crate) fn no_weights(place: String, listing: &[String]) -> HubError {
    let pickle = listing.iter().find(|name| {
        [".bin", ".pt", ".pth", ".ckpt"]
            .iter()
            .any(|end| name.ends_with(end))
    });
    match pickle {
        Some(file) => HubError::OnlyPickles {
            place,
            file: file.clone(),
        },
        None => HubError::NoWeights(place),
    }
}

fn read_index(path: &Path) -> Result<Index, HubError> {
    let text = read_text(path, MAX_INDEX_BYTES)?;
    serde_json::from_str(&text).map_err(|error| HubError::BadFile {
        path: path.to_path_buf(),
        reason: format!("not a safetensors index: {error}"),
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
    match shards.iter().find(|shard| !is_plain_shard(shard)) {
        Some(shard) => Err(HubError::ShardName {
            index: path.to_path_buf(),
            shard: shard.clone(),
        }),
        None => Ok(shards),
    }
}

fn is_plain_shard(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.contains(['/', '\\', ':', '\0'])
}

/// The files that an index in this folder names, for telling whether all of them are there.
pub(crate) fn indexed_shards(path: &Path) -> Result<Vec<String>, HubError> {
    shard_names(path, &read_index(path)?)
}

fn collect_homes(shards: &[SafetensorsFile]) -> Result<BTreeMap<String, usize>, HubError> {
    let mut homes = BTreeMap::new();
    for (position, shard) in shards.iter().enumerate() {
        for name in shard.tensors().keys() {
            if let Some(first) = homes.insert(name.clone(), position) {
                return Err(HubError::Twice {
                    tensor: name.clone(),
                    first: shards[first].path().to_path_buf(),
                    second: shard.path().to_path_buf(),
                });
            }
        }
    }
    Ok(homes)
}

fn check_index(
    path: &Path,
    index: &Index,
    shards: &[SafetensorsFile],
    homes: &BTreeMap<String, usize>,
) -> Result<(), HubError> {
    for (tensor, shard) in &index.weight_map {
        let found = homes.get(tensor).map(|&home| shards[home].path());
        if found.and_then(|path| path.file_name()) != Some(shard.as_ref()) {
            return Err(HubError::NotInShard {
                tensor: tensor.clone(),
                shard: path.with_file_name(shard),
                index: path.to_path_buf(),
            });
        }
    }
    Ok(())
}

/// Reads a small text file, refusing one larger than `limit` bytes.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, HubError> {
    let file = fs::File::open(path).map_err(|source| HubError::io("read", path, source))?;
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|source| HubError::io("read", path, source))?;
    let bad = |reason: String| HubError::BadFile {
        path: path.to_path_buf(),
        reason,
    };
    if bytes.len() as u64 > limit {
        return Err(bad(format!("larger than {limit} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| bad("not UTF-8 text".into()))
}
