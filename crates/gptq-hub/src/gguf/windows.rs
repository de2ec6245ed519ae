//! Sliding-window blocks of Gemma 3 and their RoPE base.

use serde_json::{Value as Json, json};

use crate::HubError;
use crate::gguf::Value;
use crate::gguf::read::GgufFile;

/// The default of llama.cpp for an absent key.
const PERIOD: u64 = 6;
const LOCAL_ROPE_THETA: f64 = 10_000.0;

/// Windows of a model, as its configuration has them.
#[derive(Debug, PartialEq)]
pub(crate) struct Windows {
    /// Tokens that a block with a window sees; `None` where no block has one.
    pub width: Option<u64>,
    /// Whether each block has a sliding window.
    pub blocks: Vec<bool>,
    /// The last of every `period` blocks has no window; `None` where the file lists the blocks.
    pub period: Option<u64>,
    /// Rotary base of blocks with a window.
    pub rope_theta: f64,
}

impl Windows {
    /// Reads them below the name `arch`, for a model of `layers` blocks.
    ///
    /// Fails on a list of another length and on what is neither a number nor a list.
    pub(crate) fn read(file: &GgufFile, arch: &str, layers: usize) -> Result<Self, HubError> {
        let width = file.optional_u64(&format!("{arch}.attention.sliding_window"))?;
        let width = width.filter(|&width| width > 0);
        let theta = file.optional_f64(&format!("{arch}.rope.freq_base_swa"))?;
        let (blocks, period) = match width {
            None => (vec![false; layers], None),
            Some(_) => pattern(file, arch, layers)?,
        };
        Ok(Windows {
            width,
            blocks,
            period,
            rope_theta: theta.unwrap_or(LOCAL_ROPE_THETA),
        })
    }

    /// `layer_types` of config.json.
    pub(crate) fn layer_types(&self) -> Json {
        let name = |&windowed: &bool| match windowed {
            true => "sliding_attention",
            false => "full_attention",
        };
        json!(self.blocks.iter().map(name).collect::<Vec<_>>())
    }
}

fn pattern(
    file: &GgufFile,
    arch: &str,
    layers: usize,
) -> Result<(Vec<bool>, Option<u64>), HubError> {
    let key = format!("{arch}.attention.sliding_window_pattern");
    let periodic = |period: u64| {
        // 0 means a window everywhere
        let windowed = |block: u64| period == 0 || block % period < period - 1;
        let blocks = (0..layers as u64).map(windowed).collect();
        (blocks, (period > 1).then_some(period))
    };
    let Some(value) = file.metadata().get(&key) else {
        return Ok(periodic(PERIOD));
    };
    if let Some(period) = value.as_u64() {
        return Ok(periodic(period));
    }
    let flag = |value: &Value| value.as_bool().or(value.as_u64().map(|number| number != 0));
    let blocks = value.as_array().map(|values| values.iter().map(flag));
    match blocks.and_then(Iterator::collect::<Option<Vec<bool>>>) {
        Some(blocks) if blocks.len() == layers => Ok((blocks, None)),
        Some(blocks) => {
            let reason = format!("has {} values for {layers} blocks", blocks.len());
            Err(file.metadata_error(&key, reason))
        }
        None => Err(file.metadata_error(&key, "is no number and no list of flags")),
    }
}
