//! `gptq import` and `gptq synth`: commands that make a model folder.

use std::num::NonZeroU16;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use gptq_hub::{HalfType, ModelShape};

#[derive(Args)]
pub struct ImportArgs {
    /// The GGUF file
    pub file: PathBuf,
    /// The folder to write; must not exist or be empty
    #[arg(short, long)]
    pub out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum HalfArg {
    F16,
    Bf16,
}

impl HalfArg {
    pub fn resolve(self) -> HalfType {
        match self {
            HalfArg::F16 => HalfType::F16,
            HalfArg::Bf16 => HalfType::Bf16,
        }
    }
}

#[derive(Args)]
pub struct SynthArgs {
    /// `llama-2-7b`, `llama-2-7b-32k`, `llama-2-70b`, `llama-3-8b`, `gemma-3-27b` or `tiny`
    #[arg(long)]
    pub shape: ModelShape,
    /// The folder to write; must not exist or be empty
    #[arg(short, long)]
    pub out: PathBuf,
    /// Blocks [default: those of the shape]
    #[arg(long)]
    pub layers: Option<NonZeroU16>,
    /// Seed of weights and tokens
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Element type of the weights
    #[arg(long, value_enum, default_value = "f16")]
    pub dtype: HalfArg,
    /// Also write windows of random tokens, as `quantize` takes for its dataset
    #[arg(long, value_name = "FILE.safetensors")]
    pub calibration: Option<PathBuf>,
    /// With --calibration: windows
    #[arg(long, default_value_t = 128, requires = "calibration")]
    pub samples: usize,
    /// With --calibration: tokens in a window
    #[arg(long, default_value_t = 2048, requires = "calibration")]
    pub seq_len: usize,
}
