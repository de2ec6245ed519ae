//! `gptq matrix` and `gptq card`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::size::parse_size;
use super::{DeviceArg, HubArgs, StrictArgs, TokenizerArgs, WindowBosArgs};

#[derive(Clone, Copy, ValueEnum)]
pub enum PresetArg {
    /// 4 bits: g128, and 32g, 64g, 128g with act-order; damp 0.01, wikitext2, 2048 tokens
    #[value(name = "llama-2")]
    Llama2,
    /// The same with damp 0.1, c4, 32768 tokens; and 8 bits with act-order, no group and 128g
    LongContext,
}

#[derive(Args)]
#[group(id = "branches", required = true, multiple = false, args = ["preset", "plan"])]
pub struct MatrixArgs {
    /// A folder, or `owner/name[:branch]` on the hub; f16, bf16 or f32 safetensors
    pub model: String,
    /// The repository: a folder that does not exist yet, or one that an earlier run began
    #[arg(short, long, value_name = "REPO", required_unless_present = "dry_run")]
    pub out: Option<PathBuf>,
    /// A published table of branches
    #[arg(long, value_enum)]
    pub preset: Option<PresetArg>,
    /// A TOML file of branches: `[[branch]]` with bits, group_size, desc_act and so on
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Say what each branch will be, how large and how long, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Leave out branches that this model cannot have, instead of refusing the whole matrix
    #[arg(long)]
    pub skip_impossible: bool,
    /// Make this branch alone, and no cards; can be repeated. For several machines on one folder
    #[arg(long, value_name = "BRANCH")]
    pub only: Vec<String>,
    /// Make no branch, only the cards of those that are there
    #[arg(long, conflicts_with = "only")]
    pub assemble: bool,
    /// One forward pass of the float model serves all branches with the same tokens: faster, and
    /// less accurate, since no layer makes up for the errors before it. Begins anew after a kill
    #[arg(long)]
    pub shared_hessian: bool,
    /// Calibration data, as `quantize` takes it [default: the preset's or plan's]
    #[arg(long)]
    pub dataset: Option<String>,
    /// Column of its rows, as `quantize` takes it [default: the plan's, or the first known one]
    #[arg(long, value_name = "NAME")]
    pub column: Option<String>,
    /// Windows of calibration tokens [default: the preset's or plan's]
    #[arg(long)]
    pub samples: Option<usize>,
    /// Tokens in a window [default: the preset's or plan's]
    #[arg(long)]
    pub seq_len: Option<usize>,
    /// Seed of the draw of windows [default: the plan's, or 0]
    #[arg(long)]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub window_bos: WindowBosArgs,
    #[command(flatten)]
    pub tokenizer: TokenizerArgs,
    /// Text for perplexity and KL, as `eval` takes it, or `none`
    #[arg(long, default_value = "wikitext2", value_name = "TEXT")]
    pub evaluate: String,
    /// Tokens in a window of that text
    #[arg(long, default_value_t = 2048, value_name = "TOKENS")]
    pub eval_seq_len: usize,
    /// Score only this many windows of it
    #[arg(long, value_name = "WINDOWS")]
    pub eval_windows: Option<usize>,
    /// A TOML file of what the card cannot know: model_name, license, prompt_template, repo, ...
    #[arg(long, value_name = "FILE")]
    pub card: Option<PathBuf>,
    /// A minijinja template in place of the built-in card
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Largest weight file: 4GB, 500MB; a bare number is in GB (10^9 bytes)
    #[arg(
        long,
        default_value = "4GB",
        value_name = "SIZE",
        allow_hyphen_values = true
    )]
    pub max_shard_size: String,
    /// Devices, separated by commas: each takes the next branch; `auto` is one. A GPU named twice
    /// works on two branches abreast, a fifth faster, with memory for two
    #[arg(
        long,
        default_value = "auto",
        value_delimiter = ',',
        value_name = "DEVICE"
    )]
    pub device: Vec<DeviceArg>,
    /// GPU memory that each branch at work may take
    #[arg(long, default_value = "10GB", value_name = "SIZE", value_parser = parse_size)]
    pub gpu_memory: usize,
    #[command(flatten)]
    pub strict: StrictArgs,
    /// Print the plan, or the records of all branches, as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct CardArgs {
    /// A repository that `matrix` made, or a checkpoint folder with a run record
    pub place: PathBuf,
    /// What the card cannot know, as for `matrix` [default: what `matrix` was given]
    #[arg(long, value_name = "FILE")]
    pub card: Option<PathBuf>,
    /// A minijinja template in place of the built-in card
    #[arg(long, value_name = "FILE")]
    pub template: Option<PathBuf>,
    /// Commit the card to every branch of the repository instead of printing it
    #[arg(long)]
    pub commit: bool,
}
