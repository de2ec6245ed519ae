//! A model folder as a source of tensors: `model.safetensors`, or an index and its shards, or one
//! other `*.safetensors` file (AutoGPTQ's `gptq_model-4bit-128g.safetensors`).
//!
//! All headers are read and checked on opening; tensor bytes are read by position on demand. The
//! index is never trusted alone: the shards' own headers list the tensors, and the index must
//! agree. Files may be symbolic links, as in the hub cache, where `snapshots/*/file` points into
//! `blobs`; names in an index may not leave the folder.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use gptq_packer::{SafetensorsError, SafetensorsFile, declared_settings};
use gptq_types::outside_name::shown;
use gptq_types::{SourceError, TensorInfo, TensorSource};
use rayon::prelude::*;
use serde_json::Value;

use crate::HubError;
use crate::companions::is_companion;
use crate::eight_bit::{Widening, widen};
use crate::tensor_names::canonical;
use crate::text_file::{MAX_CONFIG_BYTES, read_text, refuse_stand_in};
use crate::weight_files::{Index, WeightFiles, choose_weights, list_files};

const CONFIG: &str = "config.json";

/// An opened model folder.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    shards: Vec<SafetensorsFile>,
    tensors: BTreeMap<String, Stored>,
    companions: Vec<PathBuf>,
    weight_bytes: u64,
    notes: Vec<String>,
}

/// A tensor's shard, its stored name, and the type it is read as.
#[derive(Debug)]
pub(crate) struct Stored {
    pub shard: usize,
    /// In the file.
    pub name: String,
    /// Type and shape after reading.
    pub info: TensorInfo,
    pub widening: Option<Widening>,
}

impl Checkpoint {
    /// Opens a folder and checks every header in it, the file lengths and the index.
    ///
    /// Tensors under other names are renamed to `model.*` and `lm_head.*`, unless `config.json` has a
    /// `text_config` and so describes more than a decoder: then all keep their names. FP8 weights are
    /// dequantized to floats on reading, with a note in [`Checkpoint::notes`].
    ///
    /// Fails when the folder or its weights are missing, when only pickles, a GGUF file or an
    /// adapter are there, when index and shards disagree, when a header is damaged or its file cut
    /// short, and when a git-LFS pointer or a web page lies in place of a file.
    pub fn open(dir: &Path) -> Result<Self, HubError> {
        let listing = list_files(dir)?;
        let WeightFiles { files, index } = choose_weights(dir, &listing)?;
        let companions = companions(dir, &listing)?;
        let shards = files
            .par_iter()
            .map(|path| SafetensorsFile::open(path).map_err(HubError::from))
            .collect::<Result<Vec<_>, _>>()?;
        let tensors = collect_tensors(&shards)?;
        if let Some((index_path, index)) = index {
            check_index(&index_path, &index, &shards, &tensors)?;
        }
        let mut checkpoint = Checkpoint {
            dir: dir.to_path_buf(),
            shards,
            tensors,
            companions,
            weight_bytes: bytes_of(&files)?,
            notes: left_out(dir, &listing),
        };
        checkpoint.read_as_floats()?;
        Ok(checkpoint)
    }

    /// Brings names and FP8 weights into the form that the rest of the program knows.
    fn read_as_floats(&mut self) -> Result<(), HubError> {
        // A folder of weights alone is one, and what is wrong with a config its readers say.
        let config: Value = match self.dir.join(CONFIG).is_file() {
            true => serde_json::from_str(&self.config_json()?).unwrap_or_default(),
            false => Value::Null,
        };
        let multimodal = config.get("text_config").is_some_and(Value::is_object);
        let renamed = canonical(std::mem::take(&mut self.tensors), multimodal);
        let renamed = renamed.map_err(|reason| HubError::Names {
            folder: self.dir.clone(),
            reason,
        })?;
        self.tensors = renamed.tensors;
        self.notes.extend(renamed.note);
        match widen(&mut self.tensors, &self.shards, &config)? {
            0 => self.notes.extend(stale_settings(&config, &self.tensors)),
            count => self.notes.push(format!(
                "{count} tensors of F8_E4M3 are read as floats, each value times its scale"
            )),
        }
        Ok(())
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

    /// The files that accompany the weights ([`crate::is_companion`]), sorted by name.
    pub fn companions(&self) -> &[PathBuf] {
        &self.companions
    }

    /// Bytes of all weight files, headers included.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// The text of `config.json`; an error if the file is missing or not UTF-8.
    pub fn config_json(&self) -> Result<String, HubError> {
        read_text(&self.dir.join(CONFIG), MAX_CONFIG_BYTES)
    }

    fn stored(&self, name: &str) -> Result<&Stored, SourceError> {
        self.tensors.get(name).ok_or_else(|| SourceError::Missing {
            name: name.to_string(),
            place: self.place(),
        })
    }
}

impl TensorSource for Checkpoint {
    fn place(&self) -> String {
        format!("`{}`", self.dir.display())
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(self.tensors.get(name)?.info.clone())
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, SourceError> {
        let stored = self.stored(name)?;
        let bytes = self.shards[stored.shard].read(&stored.name);
        let bytes = bytes.map_err(|error| invalid(name, &error))?;
        Ok(match &stored.widening {
            None => bytes,
            Some(widening) => widening.decode(&bytes, 0),
        })
    }

    fn read_at(&self, name: &str, offset: usize, out: &mut [u8]) -> Result<(), SourceError> {
        let stored = self.stored(name)?;
        let file = &self.shards[stored.shard];
        let Some(widening) = &stored.widening else {
            let read = file.read_at(&stored.name, offset, out);
            return read.map_err(|error| invalid(name, &error));
        };
        // one byte an element in the file; a part may begin inside an element
        let size = widening.dtype.size();
        let first = offset / size;
        let mut codes = vec![0; (offset % size + out.len()).div_ceil(size)];
        let read = file.read_at(&stored.name, first, &mut codes);
        read.map_err(|error| invalid(name, &error))?;
        let bytes = widening.decode(&codes, first);
        out.copy_from_slice(&bytes[offset % size..][..out.len()]);
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }
}

fn invalid(name: &str, error: &SafetensorsError) -> SourceError {
    SourceError::Invalid {
        name: name.to_string(),
        reason: error.to_string(),
    }
}

fn companions(dir: &Path, listing: &[String]) -> Result<Vec<PathBuf>, HubError> {
    let names = listing.iter().filter(|name| is_companion(name));
    let files: Vec<PathBuf> = names.map(|name| dir.join(name)).collect();
    let files: Vec<PathBuf> = files.into_iter().filter(|file| file.is_file()).collect();
    let settings = Some(dir.join("quantize_config.json")).filter(|file| file.is_file());
    let mut read = files.iter().chain(&settings);
    read.try_for_each(|file| refuse_stand_in(file))?;
    Ok(files)
}

/// A sentence on each that has the name of such a file and is none: some models keep their licences
/// in a folder called LICENSE.
fn left_out(dir: &Path, listing: &[String]) -> Vec<String> {
    (listing.iter())
        .filter(|name| is_companion(name) && !dir.join(name).is_file())
        .map(|name| {
            format!(
                "`{}` is not a file and does not travel along",
                shown(name, 80)
            )
        })
        .collect()
}

fn bytes_of(files: &[PathBuf]) -> Result<u64, HubError> {
    let length = |path: &PathBuf| {
        let metadata = fs::metadata(path).map_err(|source| HubError::io("read", path, source))?;
        Ok(metadata.len())
    };
    files.iter().map(length).sum()
}

/// A note on a stale `quantization_config`, left with float tensors by merging a quantized model.
fn stale_settings(config: &Value, tensors: &BTreeMap<String, Stored>) -> Option<String> {
    let declared = declared_settings(config);
    let settings = declared.into_iter().find_map(Value::as_object)?;
    let floats = tensors.values().all(|stored| stored.info.dtype.is_weight());
    let method = settings.get("quant_method").and_then(Value::as_str);
    let method = shown(method.unwrap_or("of no name"), 40);
    floats.then(|| {
        format!(
            "config.json declares the quantization `{method}`, but all weights are float: they are \
             read as such, and the declaration is not copied"
        )
    })
}

fn collect_tensors(shards: &[SafetensorsFile]) -> Result<BTreeMap<String, Stored>, HubError> {
    let mut tensors: BTreeMap<String, Stored> = BTreeMap::new();
    for (position, shard) in shards.iter().enumerate() {
        for (name, info) in shard.tensors() {
            let stored = Stored {
                shard: position,
                name: name.clone(),
                info: info.clone(),
                widening: None,
            };
            if let Some(first) = tensors.insert(name.clone(), stored) {
                return Err(HubError::Twice {
                    tensor: shown(name, 96),
                    first: shards[first.shard].path().to_path_buf(),
                    second: shard.path().to_path_buf(),
                });
            }
        }
    }
    Ok(tensors)
}

fn check_index(
    path: &Path,
    index: &Index,
    shards: &[SafetensorsFile],
    tensors: &BTreeMap<String, Stored>,
) -> Result<(), HubError> {
    for (tensor, shard) in &index.weight_map {
        let found = tensors
            .get(tensor)
            .map(|stored| shards[stored.shard].path());
        if found.and_then(|path| path.file_name()) != Some(shard.as_ref()) {
            return Err(HubError::NotInShard {
                tensor: shown(tensor, 96),
                shard: path.with_file_name(shard),
                index: path.to_path_buf(),
            });
        }
    }
    Ok(())
}
