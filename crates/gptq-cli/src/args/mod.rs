//! What can be typed, by command.

mod check;
mod device;
mod effect;
mod eval;
mod hub;
mod make;
mod matrix;
mod quantize;
mod size;
mod text;
mod windows;

use clap::{Parser, Subcommand};

pub use check::{InspectArgs, RegressArgs, ReportArgs, VerifyArgs};
pub use device::{DeviceArg, DeviceArgs, WholeDeviceArgs};
pub use effect::{check, idle_flags};
pub use eval::{EvalArgs, SpeedArgs};
pub use hub::{HubArgs, PullArgs, PushArgs, StrictArgs, TokenizerArgs};
pub use make::{ImportArgs, SynthArgs};
pub use matrix::{CardArgs, MatrixArgs, PresetArg};
pub use quantize::QuantizeArgs;
pub use size::shard_bytes;
pub use text::{ChatArgs, GenerateArgs, TextArgs};
pub use windows::WindowBosArgs;

/// Quantize language models with GPTQ, and say what the result is worth.
#[derive(Parser)]
#[command(name = "gptq", version, max_term_width = 100)]
pub struct Cli {
    /// Threads to compute with [default: all processors]; the result does not depend on it
    #[arg(long, global = true, value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// Quantize a model into a checkpoint folder
    Quantize(QuantizeArgs),
    /// Make every permutation of a model as branches of a git repository, with a model card
    Matrix(MatrixArgs),
    /// Render the model card of a repository or of a checkpoint
    Card(CardArgs),
    /// Write a branch of a repository into a folder
    Pull(PullArgs),
    /// Upload the branches of a repository, or one checkpoint, to the hub
    Push(PushArgs),
    /// Turn a GGUF file into a model folder that `quantize` takes
    Import(ImportArgs),
    /// Make a model folder of random weights, for measurements of speed and memory
    Synth(SynthArgs),
    /// Write on from a prompt
    Generate(GenerateArgs),
    /// Talk with a checkpoint, line by line
    Chat(ChatArgs),
    /// Perplexity of checkpoints, and divergence from the first
    Eval(EvalArgs),
    /// Write one page on finished checkpoints, with tables and figures, from their records alone
    Report(ReportArgs),
    /// Compare a checkpoint's files with its record, or its logits with stored ones, or store these
    Verify(VerifyArgs),
    /// Run the recipe of a baseline again and say what got worse
    Regress(RegressArgs),
    /// Say what a checkpoint holds
    Inspect(InspectArgs),
    /// Say which devices and libraries this machine has, and what a missing one costs
    Doctor,
    /// Render templates for another process of this program, within its limits
    #[command(hide = true, name = crate::isolation::SUBCOMMAND)]
    RenderTemplates,
}
