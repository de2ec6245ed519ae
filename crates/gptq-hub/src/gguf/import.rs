//! A GGUF file turned into a model folder: f16 safetensors, `config.json`,
//! `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`.
//!
//! Tensors go through one at a time. Nothing is published unless everything was written, and
//! nothing is left behind after an error.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gptq_packer::{CheckpointLayout, StagedCheckpoint};
use gptq_types::{Dtype, TensorInfo};

use crate::HubError;
use crate::folder::{add_json, make_folder};
use crate::gguf::config::{Dimensions, config_json, generation_json};
use crate::gguf::dequant::dequantise;
use crate::gguf::names::{Move, ROPE_DIVISORS, plan_moves};
use crate::gguf::narrow::{Narrowing, to_f16_bytes};
use crate::gguf::read::GgufFile;
use crate::gguf::rope::unrope;
use crate::gguf::tokenizer;

/// What the hub and its libraries write by default.
const MAX_SHARD_BYTES: u64 = 5_000_000_000;
const F16_BYTES: usize = 2;

/// What an import did.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportReport {
    /// The published folder.
    pub folder: PathBuf,
    /// `llama`, `qwen2` or `qwen3`.
    pub architecture: String,
    /// Tensors written.
    pub tensors: usize,
    /// Elements in them.
    pub parameters: u64,
    /// Bytes of all weight files.
    pub weight_bytes: u64,
    /// Tensors per storage type of the source, such as `Q4_K`.
    pub source_types: BTreeMap<String, usize>,
    /// What rounding to f16 lost, by storage type of the source.
    pub narrowed: BTreeMap<String, Narrowing>,
    /// What had to be assumed or left out.
    pub notes: Vec<String>,
}

/// Turns the GGUF file `src` into the model folder `out`, which must be empty or not exist.
///
/// `progress` is called with a tensor's name, the bytes of f16 written so far and in all.
///
/// Fails on architectures, tokenizers, keys, tensors and storage types that are not known, each by
/// name; on values that f16 cannot hold; and when `out` cannot be written.
///
/// Not exact: values are decoded in f32 and rounded to f16; [`ImportReport::narrowed`] counts what
/// changes by that.
pub fn import_gguf(
    src: &Path,
    out: &Path,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<ImportReport, HubError> {
    let file = GgufFile::open(src)?;
    let dims = Dimensions::read(&file)?;
    let (moves, presence) = plan_moves(&file, &dims)?;
    let tokens = tokenizer::rebuild(&file, dims.vocab, dims.context)?;
    let divisors = rope_divisors(&file, dims.head_dim / 2)?;
    let config = config_json(&file, &dims, presence, divisors.as_deref(), tokens.ids)?;
    let layout = CheckpointLayout::plan(described(&moves), MAX_SHARD_BYTES)?;
    let texts = [
        ("config.json", config),
        ("generation_config.json", generation_json(tokens.ids)),
        ("tokenizer.json", tokens.tokenizer),
        ("tokenizer_config.json", tokens.config),
    ];
    let mut narrowed = BTreeMap::new();
    let folder = make_folder(
        out,
        &layout,
        |stage| {
            let filling = Filling {
                stage,
                file: &file,
                head_dim: dims.head_dim,
            };
            narrowed = filling.tensors(&moves, progress)?;
            let mut texts = texts.iter();
            texts.try_for_each(|(name, json)| add_json(stage, name, json))
        },
        StagedCheckpoint::publish,
    )?;
    let mut source_types = BTreeMap::new();
    for step in &moves {
        *source_types
            .entry(step.source.block_type.to_string())
            .or_default() += 1;
    }
    Ok(ImportReport {
        folder,
        architecture: dims.architecture.name().to_string(),
        tensors: moves.len(),
        parameters: moves.iter().map(|m| m.source.elements() as u64).sum(),
        weight_bytes: layout.file_bytes(),
        source_types,
        narrowed,
        notes: tokens.notes,
    })
}

fn described(moves: &[Move]) -> Vec<(String, TensorInfo)> {
    moves
        .iter()
        .map(|step| {
            let info = TensorInfo {
                dtype: Dtype::F16,
                shape: step.source.shape.clone(),
            };
            (step.target.clone(), info)
        })
        .collect()
}

/// The values of `rope_freqs.weight`, `[head_dim / 2]`, if the file has it.
fn rope_divisors(file: &GgufFile, count: usize) -> Result<Option<Vec<f32>>, HubError> {
    let Some(tensor) = file.tensors().iter().find(|t| t.name == ROPE_DIVISORS) else {
        return Ok(None);
    };
    if tensor.shape != [count] {
        let reason = format!("has shape {:?}, expected [{count}]", tensor.shape);
        return Err(file.tensor_error(&tensor.name, reason));
    }
    let mut values = vec![0.0; count];
    dequantise(tensor.block_type, &file.read(tensor)?, &mut values);
    Ok(Some(values))
}

/// Where tensors come from and go to.
struct Filling<'a> {
    stage: &'a StagedCheckpoint,
    file: &'a GgufFile,
    head_dim: usize,
}

impl Filling<'_> {
    fn tensors(
        &self,
        moves: &[Move],
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<BTreeMap<String, Narrowing>, HubError> {
        let total = self.stage.layout().tensor_bytes();
        let mut done = 0;
        let mut narrowed: BTreeMap<String, Narrowing> = BTreeMap::new();
        for step in moves {
            let (bytes, narrowing) = self.converted(step)?;
            let kind = step.source.block_type.to_string();
            *narrowed.entry(kind).or_default() += narrowing;
            self.stage.write(&step.target, &bytes)?;
            done += bytes.len() as u64;
            progress(&step.target, done, total);
        }
        Ok(narrowed)
    }

    /// The tensor as f16 in the order of its new name.
    fn converted(&self, step: &Move) -> Result<(Vec<u8>, Narrowing), HubError> {
        let source = step.source;
        let stored = self.file.read(source)?;
        let (bytes, narrowing) = to_f16_bytes(source.block_type, &stored).map_err(|unfit| {
            let reason = format!(
                "holds {} at element {}, which f16 cannot hold",
                unfit.value, unfit.element
            );
            self.file.tensor_error(&source.name, reason)
        })?;
        if !step.unrope {
            return Ok((bytes, narrowing));
        }
        let row_elements: usize = source.shape[1..].iter().product();
        let bytes = unrope(&bytes, self.head_dim, row_elements * F16_BYTES);
        Ok((bytes, narrowing))
    }
}

#[cfg(test)]
mod tests;
