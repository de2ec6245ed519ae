//! A model folder of random weights, for measurements of speed and memory, which depend on shapes
//! alone and so need no download.
//!
//! Weights are normal with the standard deviation of the family's initialization, norms are one; those
//! of Gemma, which are added to one, are normal too.
//! Quality cannot be measured on them: the text is noise, channels are alike, and GPTQ gains less over
//! rounding to nearest than on trained weights.

use std::collections::BTreeMap;
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use gptq_packer::{CheckpointLayout, StagedCheckpoint, write_safetensors};
use gptq_types::{Dtype, TensorInfo};
use rayon::prelude::*;

use crate::folder::{add_json, make_folder};
use crate::{HalfType, HubError};

mod normal;
mod shape;

pub use shape::{ModelShape, ShapeFamily};

use normal::{Normal, Stream};

/// A file takes one write at a time, so many threads need many files.
const MAX_SHARD_BYTES: u64 = 1_000_000_000;

/// Elements that a thread makes and writes at a time: 4 MiB, small compared with any page cache, large
/// enough to amortize a write. A multiple of the four that one random word gives.
const PART_ELEMENTS: usize = 1 << 21;

/// Half of the largest file that `--dataset` reads.
const MAX_TOKENS: usize = 1 << 27;

const IDS: &str = "input_ids";

/// The model to make.
#[derive(Clone, Debug, PartialEq)]
pub struct SynthSpec {
    /// The dimensions.
    pub shape: ModelShape,
    /// Blocks, if not those of the shape.
    pub layers: Option<NonZeroU16>,
    /// Decides all weights and tokens.
    pub seed: u64,
    /// Element type of all tensors.
    pub dtype: HalfType,
    /// Token windows to write into its folder.
    pub windows: Option<SynthWindows>,
}

/// Random tokens as calibration data: `input_ids`, i32 `[samples, seq_len]`.
#[derive(Clone, Debug, PartialEq)]
pub struct SynthWindows {
    /// The file to write; ends in `.safetensors`. One that is there is replaced.
    pub path: PathBuf,
    /// Windows.
    pub samples: usize,
    /// Tokens in each.
    pub seq_len: usize,
}

/// The model that was made.
#[derive(Clone, Debug, PartialEq)]
pub struct SynthReport {
    /// The published folder.
    pub folder: PathBuf,
    /// Tensors written.
    pub tensors: usize,
    /// Elements in them.
    pub parameters: u64,
    /// Bytes of all weight files.
    pub weight_bytes: u64,
}

/// Makes the model folder `out`, which must be empty or not exist, and the windows if any are
/// asked for. The bytes depend on `spec` alone, not on the number of threads.
///
/// The weights are not synced to the disk: a killed run leaves no folder, a power cut may leave a
/// damaged one. `progress` is called with the bytes of weights written so far and in all.
///
/// Fails on windows that are no calibration data or too many, and when something cannot be written.
pub fn synth(
    spec: &SynthSpec,
    out: &Path,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<SynthReport, HubError> {
    let shape = ModelShape {
        layers: spec.layers.unwrap_or(spec.shape.layers),
        ..spec.shape.clone()
    };
    if let Some(windows) = &spec.windows {
        windows.check()?;
    }
    let tensors = shape.tensors(spec.dtype);
    let layout = CheckpointLayout::plan(tensors.clone(), MAX_SHARD_BYTES)?;
    let fill = |stage: &StagedCheckpoint| {
        if let Some(windows) = &spec.windows {
            windows.write(&shape, spec.seed)?;
        }
        for (name, json) in shape.texts(spec.dtype) {
            add_json(stage, name, &json)?;
        }
        write_weights(stage, &tensors, spec, progress)
    };
    let folder = make_folder(out, &layout, fill, StagedCheckpoint::publish_unsynced)?;
    Ok(SynthReport {
        folder,
        tensors: tensors.len(),
        parameters: tensors.iter().map(|(_, info)| info.elements() as u64).sum(),
        weight_bytes: layout.file_bytes(),
    })
}

/// A run of elements of one tensor.
struct Part<'a> {
    name: &'a str,
    is_one: bool,
    start: usize,
    elements: usize,
}

/// `ones` says whether norms are one.
fn parts(tensors: &[(String, TensorInfo)], ones: bool) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    for (name, info) in tensors {
        let all = info.elements();
        for start in (0..all).step_by(PART_ELEMENTS) {
            parts.push(Part {
                name,
                is_one: ones && info.shape.len() == 1,
                start,
                elements: PART_ELEMENTS.min(all - start),
            });
        }
    }
    parts
}

fn write_weights(
    stage: &StagedCheckpoint,
    tensors: &[(String, TensorInfo)],
    spec: &SynthSpec,
    progress: &mut (dyn FnMut(u64, u64) + Send),
) -> Result<(), HubError> {
    let normal = Normal::new(shape::DEVIATION, spec.dtype);
    let one = spec.dtype.bits(1.0);
    let total = stage.layout().tensor_bytes();
    let told = Mutex::new((0, progress));
    parts(tensors, spec.shape.norms_are_factors())
        .into_par_iter()
        .try_for_each_init(Vec::new, |buffer, part| {
            buffer.resize(part.elements, one);
            match part.is_one {
                true => buffer.fill(one),
                false => {
                    let stream = Stream::new(spec.seed, part.name);
                    normal.fill(stream, part.start, buffer);
                }
            }
            let bytes: &[u8] = bytemuck::cast_slice(buffer);
            let offset = (part.start * size_of::<u16>()) as u64;
            stage.write_part(part.name, offset, bytes)?;
            // a callback that panicked ends the run by itself
            if let Ok(mut told) = told.lock() {
                told.0 += bytes.len() as u64;
                let done = told.0;
                (told.1)(done, total);
            }
            Ok::<(), HubError>(())
        })?;
    for (name, _) in tensors {
        stage.mark_written(name)?;
    }
    Ok(())
}

impl SynthWindows {
    fn check(&self) -> Result<(), HubError> {
        let extension = self.path.extension().and_then(|end| end.to_str());
        if !extension.is_some_and(|end| end.eq_ignore_ascii_case("safetensors")) {
            return Err(HubError::WindowFileName(self.path.clone()));
        }
        match self.samples.checked_mul(self.seq_len) {
            Some(1..=MAX_TOKENS) => Ok(()),
            _ => Err(HubError::WindowCount {
                samples: self.samples,
                seq_len: self.seq_len,
                most: MAX_TOKENS,
            }),
        }
    }

    /// Every token is an ordinary word, all alike likely.
    fn write(&self, shape: &ModelShape, seed: u64) -> Result<(), HubError> {
        let stream = Stream::new(seed, IDS);
        let (first, words) = (shape.first_word() as i32, shape.words() as u32);
        let ids: Vec<i32> = (0..(self.samples * self.seq_len) as u64)
            .map(|number| first + stream.below(number, words) as i32)
            .collect();
        let info = TensorInfo {
            dtype: Dtype::I32,
            shape: vec![self.samples, self.seq_len],
        };
        let tensors = [(IDS, info, bytemuck::cast_slice(&ids))];
        Ok(write_safetensors(&self.path, &tensors, &BTreeMap::new())?)
    }
}

#[cfg(test)]
mod tests;
