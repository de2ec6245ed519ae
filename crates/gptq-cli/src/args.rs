//! What can be typed.

use std::num::{NonZeroU16, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use gptq_hub::{HalfType, ModelShape};
use gptq_types::{
    Bits, CalibrationRequest, CheckpointFormat, ColumnOrder, GroupSize, Method, QuantSpec,
};

use crate::failure::Failure;

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
    /// Upload the branches of a repository to the hub
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
    /// Compare a checkpoint's logits with stored ones, or store them
    Verify(VerifyArgs),
    /// Run the recipe of a baseline again and say what got worse
    Regress(RegressArgs),
    /// Say what a checkpoint holds
    Inspect(InspectArgs),
    /// Say which devices and libraries this machine has, and what a missing one costs
    Doctor,
}

/// Where models come from.
#[derive(Args, Clone)]
pub struct HubArgs {
    /// Never touch the network; also set by HF_HUB_OFFLINE=1
    #[arg(long)]
    pub offline: bool,
}

/// Where to compute.
#[derive(Args, Clone)]
pub struct DeviceArgs {
    /// `auto` takes the first GPU if there is one and says what it took; `cpu`; `cuda:N`
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceArg,
    /// GPU memory that the run may take; activations beyond it wait in host memory
    #[arg(long, default_value = "10GB", value_name = "SIZE", value_parser = parse_size)]
    pub gpu_memory: usize,
}

/// Where to keep all weights.
#[derive(Args, Clone)]
pub struct WholeDeviceArgs {
    /// `auto` takes the first GPU if there is one and says what it took; `cpu`; `cuda:N`
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub device: DeviceArg,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceArg {
    Auto,
    Cpu,
    Cuda(usize),
}

impl FromStr for DeviceArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(DeviceArg::Auto),
            "cpu" => Ok(DeviceArg::Cpu),
            "cuda" => Ok(DeviceArg::Cuda(0)),
            _ => (text.strip_prefix("cuda:"))
                .and_then(|ordinal| ordinal.parse().ok())
                .map(DeviceArg::Cuda)
                .ok_or_else(|| "expected auto, cpu or cuda:N".to_string()),
        }
    }
}

/// `8GB`, `6000MB`, `8GiB` or a number of bytes.
fn parse_size(text: &str) -> Result<usize, String> {
    let units = [
        ("GiB", (1u64 << 30) as f64),
        ("MiB", (1u64 << 20) as f64),
        ("GB", 1e9),
        ("MB", 1e6),
        ("", 1.0),
    ];
    let (number, unit) = (units.iter())
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))
        .expect("the last suffix is empty");
    match number.trim().parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok((number * unit) as usize),
        _ => Err("expected a size such as 8GB".to_string()),
    }
}

/// A file of 1 MB: smaller limits come from a wrong unit.
const MIN_SHARD_GB: f64 = 1e-3;

/// Bytes of the largest weight file.
pub fn shard_bytes(gb: f64) -> Result<u64, Failure> {
    match gb >= MIN_SHARD_GB {
        true => Ok((gb * 1e9) as u64),
        false => Err(Failure::new(format!(
            "--max-shard-size {gb} is not {MIN_SHARD_GB} GB or more"
        ))),
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum MethodArg {
    /// Error-compensated rounding
    Gptq,
    /// Round to nearest, without calibration: the baseline
    Rtn,
}

#[derive(Clone, Copy, ValueEnum)]
pub enum FormatArg {
    /// v1, stores zero - 1: every reader knows it
    Gptq,
    /// v2, stores zero: GPTQModel, vLLM, ExLlamaV2
    #[value(name = "gptq_v2")]
    GptqV2,
}

#[derive(Args)]
pub struct QuantizeArgs {
    /// A folder, or `owner/name[:branch]` on the hub; f16, bf16 or f32 safetensors
    pub model: String,
    /// The folder to write; must not exist or be empty
    #[arg(short, long)]
    pub out: PathBuf,
    /// Width of a code: 2, 3, 4 or 8
    #[arg(long, default_value = "4")]
    pub bits: Bits,
    /// Input channels that share one scale, 16 to 1024, or `none` for one group a row
    #[arg(long, default_value = "128", allow_hyphen_values = true)]
    pub group_size: GroupSize,
    /// Act-order: round channels by falling Hessian diagonal; g_idx becomes a permutation
    #[arg(long)]
    pub desc_act: bool,
    /// With --desc-act: fix all grids beforehand, so that g_idx stays trivial
    #[arg(long, requires = "desc_act")]
    pub static_groups: bool,
    /// Group-aware reordering: act-order inside groups and between them, g_idx stays trivial
    #[arg(long, conflicts_with = "desc_act")]
    pub act_group_aware: bool,
    /// Symmetric grids, zero in the middle [default]
    #[arg(long, overrides_with = "asym")]
    pub sym: bool,
    /// Asymmetric grids with a zero of their own
    #[arg(long)]
    pub asym: bool,
    /// Share of the mean Hessian diagonal that is added to it, between 0 and 1
    #[arg(long = "damp", default_value_t = 0.1, value_name = "SHARE")]
    pub damp_percent: f64,
    #[arg(long, value_enum, default_value = "gptq")]
    pub method: MethodArg,
    /// Fit each scale to the largest weight of its group instead of searching for the least error
    #[arg(long)]
    pub no_scale_search: bool,
    /// Calibration data: `c4`, `wikitext2`, NAME=FILE for a local copy, a FILE (txt, jsonl, json,
    /// parquet, arrow; .gz and .zst; safetensors with input_ids), or `self`: text that the model
    /// writes itself
    #[arg(long, default_value = "c4")]
    pub dataset: String,
    /// Windows of calibration tokens
    #[arg(long, default_value_t = 128)]
    pub samples: usize,
    /// Tokens in a window
    #[arg(long, default_value_t = 2048)]
    pub seq_len: usize,
    /// Seed of the draw of windows
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// With `--dataset self`: divides the logits before sampling
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    /// Zero-point convention of the file
    #[arg(long, value_enum, default_value = "gptq")]
    pub format: FormatArg,
    /// Largest weight file, in GB (10^9 bytes); 0.001 at least
    #[arg(long, default_value_t = 4.0, value_name = "GB")]
    pub max_shard_size: f64,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Go on where an interrupted run into the same folder stopped
    #[arg(long)]
    pub resume: bool,
    /// Print where the time went, against this machine's own sgemm
    #[arg(long)]
    pub profile: bool,
    /// Exit with 1 if more layers than this end above the error of rounding to nearest
    #[arg(long, value_name = "LAYERS")]
    pub max_degraded: Option<usize>,
    /// Print the run record as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

impl QuantizeArgs {
    /// The tokens that were asked for.
    pub fn calibration(&self) -> CalibrationRequest {
        CalibrationRequest {
            dataset: self.dataset.clone(),
            samples: self.samples,
            seq_len: self.seq_len,
            seed: self.seed,
        }
    }

    /// The settings that were typed, checked.
    pub fn spec(&self) -> Result<QuantSpec, Failure> {
        let spec = QuantSpec {
            bits: self.bits,
            group_size: self.group_size,
            sym: !self.asym,
            order: match (self.desc_act, self.static_groups, self.act_group_aware) {
                (true, true, _) => ColumnOrder::ActOrderStaticGroups,
                (true, false, _) => ColumnOrder::ActOrder,
                (_, _, true) => ColumnOrder::GroupAware,
                _ => ColumnOrder::Natural,
            },
            damp_percent: self.damp_percent,
            method: match self.method {
                MethodArg::Gptq => Method::Gptq,
                MethodArg::Rtn => Method::Rtn,
            },
            format: match self.format {
                FormatArg::Gptq => CheckpointFormat::Gptq,
                FormatArg::GptqV2 => CheckpointFormat::GptqV2,
            },
            // The baseline looks at no data, so nothing says which error weighs more.
            scale_search: !self.no_scale_search && matches!(self.method, MethodArg::Gptq),
        };
        spec.validate()?;
        Ok(spec)
    }
}

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
    /// `llama-2-7b`, `llama-2-7b-32k`, `llama-3-8b` or `tiny`
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

/// How tokens are chosen and when a text ends.
#[derive(Args)]
pub struct TextArgs {
    /// Divides the logits; 0 takes the likeliest token [default: generation_config.json's, or 0]
    #[arg(long, allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Draw among the likeliest tokens that together have this probability [default:
    /// generation_config.json's, or 1: all]
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Draw among so many likeliest tokens [default: generation_config.json's, or 0: all]
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Makes tokens that occurred less likely, above 1 [default: generation_config.json's, or 1]
    #[arg(long, allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Tokens to write at most
    #[arg(long, default_value_t = 512)]
    pub max_new_tokens: usize,
    /// Seed of the draw: the same seed gives the same text
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// End before this string; can be repeated. Tokens that end a text always end it
    #[arg(long, value_name = "STRING")]
    pub stop: Vec<String>,
}

#[derive(Args)]
pub struct GenerateArgs {
    /// A folder, or `owner/name[:branch]` on the hub, packed or not
    pub model: String,
    /// The text to write on from [default: stdin]
    #[arg(long)]
    pub prompt: Option<String>,
    /// Put the prompt into the place of `{prompt}` in this text; `\n` is a line's end
    #[arg(long, value_name = "TEMPLATE")]
    pub prompt_template: Option<String>,
    /// Put the prompt into the checkpoint's chat template
    #[arg(long, conflicts_with = "prompt_template")]
    pub chat: bool,
    /// With --chat: what the model is told beforehand
    #[arg(long, requires = "chat")]
    pub system: Option<String>,
    #[command(flatten)]
    pub text: TextArgs,
    #[command(flatten)]
    pub device: WholeDeviceArgs,
    /// Print the text with its tokens, its end and the speed as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct ChatArgs {
    /// A folder, or `owner/name[:branch]` on the hub, packed or not
    pub model: String,
    /// What the model is told beforehand
    #[arg(long, conflicts_with = "prompt_template")]
    pub system: Option<String>,
    /// Put each line into the place of `{prompt}` in this text, instead of the checkpoint's chat
    /// template; `\n` is a line's end
    #[arg(long, value_name = "TEMPLATE")]
    pub prompt_template: Option<String>,
    /// Tokens that the conversation may have [default: what the model was trained for, at most
    /// 4096]
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    #[command(flatten)]
    pub text: TextArgs,
    #[command(flatten)]
    pub device: WholeDeviceArgs,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct EvalArgs {
    /// Checkpoints: folders or `owner/name[:branch]`, packed or not; the first is the reference
    #[arg(required = true)]
    pub models: Vec<String>,
    /// Text: `wikitext2` by the papers' protocol, `c4`, NAME=FILE for a local copy, or a FILE
    #[arg(long, default_value = "wikitext2")]
    pub dataset: String,
    /// Tokens in a window
    #[arg(long, default_value_t = 2048)]
    pub seq_len: usize,
    /// Score only this many windows from the start
    #[arg(long)]
    pub max_windows: Option<usize>,
    /// Also guess the last words of passages: `lambada`, or a FILE with a passage in each row
    #[arg(long, value_name = "FILE")]
    pub lambada: Option<String>,
    /// With --lambada: only this many passages from the start
    #[arg(long, value_name = "N", requires = "lambada")]
    pub lambada_examples: Option<usize>,
    /// Keep scores in FILE as they come; the same command goes on with it after a kill
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Tokens that go through a checkpoint together, 32768 on a processor and 196608 on a GPU:
    /// memory grows with them, and so does what a kill costs; each group reads all weights once
    #[arg(long, value_name = "TOKENS")]
    pub group_tokens: Option<NonZeroUsize>,
    #[command(flatten)]
    pub speed: SpeedArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Print the records as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct SpeedArgs {
    /// Also measure how fast each reads a prompt and writes tokens with all its weights on the device,
    /// and the memory that takes
    #[arg(long)]
    pub speed: bool,
    /// With --speed: tokens of the prompt, at most what the model was trained on
    #[arg(long, value_name = "TOKENS", requires = "speed", default_value = "512")]
    pub speed_prompt: NonZeroUsize,
    /// With --speed: tokens that are written after it, to each sequence
    #[arg(long, value_name = "TOKENS", requires = "speed", default_value = "64")]
    pub speed_tokens: NonZeroUsize,
    /// With --speed: sequences side by side
    #[arg(long, value_name = "N", requires = "speed", default_value = "1")]
    pub speed_batch: NonZeroUsize,
}

#[derive(Args)]
pub struct ReportArgs {
    /// Checkpoint folders with a run record, repositories that `matrix` made, JSON files of `eval`,
    /// JSON files of one run record. A score belongs to the run whose path `eval` was given, else
    /// to the one whose folder or branch has its last name
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// The folder to write, index.html and report.md; must not exist or be empty
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// Print all that the report is made from as JSON too
    #[arg(long)]
    pub json: bool,
}

#[derive(Args)]
#[group(id = "mode", required = true, multiple = false, args = ["expect", "write"])]
pub struct VerifyArgs {
    /// The checkpoint
    pub model: String,
    /// Compare with this file: input_ids i32 [t], logits f32 [t, vocab]; exit 1 if they differ
    #[arg(long, value_name = "FILE")]
    pub expect: Option<PathBuf>,
    /// Write such a file
    #[arg(long, value_name = "FILE", requires = "ids")]
    pub write: Option<PathBuf>,
    /// Token ids for --write, separated by commas
    #[arg(long, value_delimiter = ',', conflicts_with = "expect")]
    pub ids: Vec<u32>,
    /// Largest absolute difference of a logit
    #[arg(long, default_value_t = 1e-3)]
    pub tolerance: f32,
    /// `cpu` computes in f32; `cuda:N` in the model's sixteen-bit type, which needs another tolerance
    #[arg(long, default_value = "cpu", value_name = "DEVICE")]
    pub device: DeviceArg,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct RegressArgs {
    /// A recipe with the figures that it once gave; exit 1 if one got worse by more than its
    /// tolerance, 2 if model or text are other ones. Runs on the processor, in $TMPDIR
    #[arg(long, value_name = "FILE")]
    pub baseline: PathBuf,
    /// Run the recipe twice and write its figures, hashes and tolerances into the file
    #[arg(long)]
    pub update: bool,
    /// Judge this packed folder instead of a run
    #[arg(long, value_name = "DIR", conflicts_with = "update")]
    pub checkpoint: Option<PathBuf>,
    /// Also write JUnit XML, a test case a linear
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Also print annotations of GitHub Actions [default: where GITHUB_ACTIONS is true, but for
    /// --json]
    #[arg(long, conflicts_with = "json")]
    pub github: bool,
    /// Print the verdict as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct InspectArgs {
    /// The checkpoint
    pub model: String,
    /// List every packed linear
    #[arg(long)]
    pub layers: bool,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

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
    /// Windows of calibration tokens [default: the preset's or plan's]
    #[arg(long)]
    pub samples: Option<usize>,
    /// Tokens in a window [default: the preset's or plan's]
    #[arg(long)]
    pub seq_len: Option<usize>,
    /// Seed of the draw of windows [default: the plan's, or 0]
    #[arg(long)]
    pub seed: Option<u64>,
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
    /// Largest weight file, in GB (10^9 bytes); 0.001 at least
    #[arg(long, default_value_t = 4.0, value_name = "GB")]
    pub max_shard_size: f64,
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

#[derive(Args)]
pub struct PullArgs {
    /// `REPO[:branch]`, a repository that `matrix` made, or `owner/name[:branch]` on the hub
    pub source: String,
    /// The folder to write; must not exist or be empty
    #[arg(short, long)]
    pub out: PathBuf,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct PushArgs {
    /// A repository that `matrix` made
    pub repository: PathBuf,
    /// `owner/name` on the hub; made where it does not exist. HF_TOKEN must be allowed to write
    pub target: String,
    /// Push this branch alone; can be repeated [default: all]
    #[arg(long, value_name = "BRANCH")]
    pub branch: Vec<String>,
    /// A repository that is made now is for its owner alone
    #[arg(long)]
    pub private: bool,
    /// Replace the files of branches that hold others
    #[arg(long)]
    pub update: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}
