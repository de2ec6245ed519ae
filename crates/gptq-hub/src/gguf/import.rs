//! A GGUF file turned into a model folder: safetensors of f16 (of bf16 for Gemma 3, which overflows
//! f16), `config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`.
//!
//! Tensors go through one at a time. Nothing is published unless everything was written, and
//! nothing is left behind after an error.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gptq_packer::{CheckpointLayout, StagedCheckpoint};
use gptq_types::TensorInfo;

use crate::folder::{add_json, make_folder};
use crate::gguf::config::{Dimensions, config_json, generation_json};
use crate::gguf::names::{Move, plan_moves};
use crate::gguf::narrow::{Narrowing, to_half_bytes};
use crate::gguf::read::GgufFile;
use crate::gguf::rope::{RopeTensors, unrope};
use crate::gguf::tokenizer;
use crate::{HalfType, HubError};

/// The default of the hub's libraries.
const MAX_SHARD_BYTES: u64 = 5_000_000_000;
const HALF_BYTES: usize = 2;

/// The result of an import.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportReport {
    /// The published folder.
    pub folder: PathBuf,
    /// `llama`, `qwen2`, `qwen3`, `gemma3`, `phi3` or `glm4`.
    pub architecture: String,
    /// The type that all tensors have now.
    pub dtype: HalfType,
    /// Tensors written.
    pub tensors: usize,
    /// Elements in them.
    pub parameters: u64,
    /// Bytes of all weight files.
    pub weight_bytes: u64,
    /// Tensors per storage type of the source, such as `Q4_K`.
    pub source_types: BTreeMap<String, usize>,
    /// Losses of rounding to it, by storage type of the source.
    pub narrowed: BTreeMap<String, Narrowing>,
    /// Assumptions and omissions.
    pub notes: Vec<String>,
}

/// Turns the GGUF file `src` into the model folder `out`, which must be empty or not exist.
///
/// `progress` is called with a tensor's name, the bytes of weights written so far and in all.
///
/// Fails on architectures, tokenizers, keys, tensors and storage types that are not known, each by
/// name; on values that the half cannot hold; and when `out` cannot be written.
///
/// Not exact: values are decoded in f32 and rounded to f16 or, for Gemma 3, bf16;
/// [`ImportReport::narrowed`] counts what changes by that.
pub fn import_gguf(
    src: &Path,
    out: &Path,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<ImportReport, HubError> {
    let file = GgufFile::open(src)?;
    let dims = Dimensions::read(&file)?;
    let (moves, presence) = plan_moves(&file, &dims)?;
    let tokens = tokenizer::rebuild(&file, dims.vocab, dims.context)?;
    let rope = RopeTensors::read(&file, dims.architecture, dims.rotary / 2)?;
    let config = config_json(&file, &dims, presence, &rope, tokens.ids)?;
    let half = dims.architecture.half();
    let layout = CheckpointLayout::plan(described(&moves, half), MAX_SHARD_BYTES)?;
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
                half,
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
        dtype: half,
        tensors: moves.len(),
        parameters: moves.iter().map(|m| m.source.elements() as u64).sum(),
        weight_bytes: layout.file_bytes(),
        source_types,
        narrowed,
        notes: tokens.notes,
    })
}

fn described(moves: &[Move], half: HalfType) -> Vec<(String, TensorInfo)> {
    moves
        .iter()
        .map(|step| {
            let info = TensorInfo {
                dtype: half.dtype(),
                shape: step.source.shape.clone(),
            };
            (step.target.clone(), info)
        })
        .collect()
}

/// Source and destination of tensors.
struct Filling<'a> {
    stage: &'a StagedCheckpoint,
    file: &'a GgufFile,
    head_dim: usize,
    half: HalfType,
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

    /// The tensor as halves in the order of its new name.
    fn converted(&self, step: &Move) -> Result<(Vec<u8>, Narrowing), HubError> {
        let source = step.source;
        let stored = self.file.read(source)?;
        let rounded = to_half_bytes(source.block_type, &stored, self.half, step.shift);
        let (bytes, narrowing) = rounded.map_err(|unfit| {
            let half = self.half.name();
            let reason = format!(
                "holds {} at element {}, which {half} cannot hold",
                unfit.value, unfit.element
            );
            self.file.tensor_error(&source.name, reason)
        })?;
        if !step.unrope {
            return Ok((bytes, narrowing));
        }
        let row_elements: usize = source.shape[1..].iter().product();
        let bytes = unrope(&bytes, self.head_dim, row_elements * HALF_BYTES);
        Ok((bytes, narrowing))
    }
}

#[cfg(test)]
mod tests;
