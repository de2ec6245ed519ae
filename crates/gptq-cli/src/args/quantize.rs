//! `gptq quantize`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use gptq_types::{
    Bits, CalibrationRequest, CheckpointFormat, ColumnOrder, Effort, GroupSize, Method, QuantSpec,
};

use super::{DeviceArgs, HubArgs, StrictArgs, TokenizerArgs, WindowBosArgs};
use crate::failure::Failure;

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

#[derive(Clone, Copy, ValueEnum)]
pub enum EffortArg {
    /// One forward pass
    Fast,
    /// Another one, of the float model, whose outputs each linear is aimed at; codes are reconsidered
    Balanced,
    /// Then each block is trained: the latents and scales of its linears together, towards the output of the
    /// float block
    Best,
}

impl EffortArg {
    fn resolve(self) -> Effort {
        match self {
            EffortArg::Fast => Effort::Fast,
            EffortArg::Balanced => Effort::Balanced,
            EffortArg::Best => Effort::Best,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub enum OrderArg {
    /// As stored
    Natural,
    /// By falling Hessian diagonal, groups formed in that order: --desc-act
    ActOrder,
    /// By falling Hessian diagonal, groups fixed beforehand: --desc-act --static-groups
    Static,
    /// Groups by their largest Hessian diagonal and channels inside them: --act-group-aware
    GroupAware,
    /// By falling Hessian diagonal where the linears before can permute their outputs to fit: down, and o
    /// inside heads that are longer than a group; natural elsewhere
    Folded,
    /// Whichever of natural, static, group-aware and folded has the least error on tokens held out of the
    /// Hessian, for each input; factors and part of the sweeps are made several times
    Auto,
}

impl OrderArg {
    fn resolve(self) -> ColumnOrder {
        match self {
            OrderArg::Natural => ColumnOrder::Natural,
            OrderArg::ActOrder => ColumnOrder::ActOrder,
            OrderArg::Static => ColumnOrder::ActOrderStaticGroups,
            OrderArg::GroupAware => ColumnOrder::GroupAware,
            OrderArg::Folded => ColumnOrder::Folded,
            OrderArg::Auto => ColumnOrder::Auto,
        }
    }
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
    /// In which order input channels are rounded; all but `act-order` leave g_idx trivial, which every
    /// reader loads [default: natural]
    #[arg(
        long,
        value_enum,
        conflicts_with_all = ["desc_act", "static_groups", "act_group_aware"]
    )]
    pub order: Option<OrderArg>,
    /// Act-order: round channels by falling Hessian diagonal; g_idx becomes a permutation where there
    /// are several groups
    #[arg(long)]
    pub desc_act: bool,
    /// With --desc-act: fix all grids beforehand, so that g_idx stays trivial
    #[arg(long, requires = "desc_act", conflicts_with = "act_group_aware")]
    pub static_groups: bool,
    /// Group-aware reordering: act-order inside groups and between them, g_idx stays trivial
    #[arg(long, conflicts_with = "desc_act")]
    pub act_group_aware: bool,
    /// Symmetric grids, zero in the middle [default]
    #[arg(long, conflicts_with = "asym")]
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
    /// Search positive scales alone, and with --asym no zeros: the grids of published checkpoints, for
    /// a reader that takes no negative scale
    #[arg(long, conflicts_with = "no_scale_search")]
    pub unsigned_scales: bool,
    /// How much work the accuracy is worth; `balanced` is --input-mismatch 0.5 --descent-passes 2, `best` has
    /// --training-epochs 6 beside, 12 at 2 bits
    #[arg(long, value_enum, default_value = "balanced")]
    pub effort: EffortArg,
    /// How far each linear is moved towards what comes nearest to the float model's outputs on the inputs
    /// that linears before it have changed, 0 to 1 [default: that of --effort]
    #[arg(long, value_name = "SHARE")]
    pub input_mismatch: Option<f64>,
    /// Passes of coordinate descent that reconsider the codes and scales of each linear, 0 to 16
    /// [default: those of --effort]
    #[arg(long, value_name = "N")]
    pub descent_passes: Option<u32>,
    /// Passes over the calibration windows in which each block is trained, 0 to 64 [default: those of --effort]
    #[arg(long, value_name = "N")]
    pub training_epochs: Option<u32>,
    /// Calibration data: `c4`, `wikitext2`, NAME=FILE for a local copy, a FILE (txt, jsonl, json,
    /// parquet, arrow; .gz and .zst; safetensors with input_ids), OWNER/NAME[:CONFIG[:SPLIT]] on the
    /// hub, or `self`: text that the model writes itself
    #[arg(long, default_value = "c4")]
    pub dataset: String,
    /// Column of its rows that holds the text or the conversations [default: the first known one:
    /// text, content, messages, conversations, instruction and output, prompt and completion, ...]
    #[arg(long, value_name = "NAME")]
    pub column: Option<String>,
    /// Windows of calibration tokens
    #[arg(long, default_value_t = 128)]
    pub samples: usize,
    /// As many windows as hold this many tokens, in place of --samples
    #[arg(long, value_name = "N", conflicts_with = "samples")]
    pub tokens: Option<NonZeroUsize>,
    /// Tokens in a window
    #[arg(long, default_value_t = 2048)]
    pub seq_len: usize,
    /// Seed of the draw of windows
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// With `--dataset self`: divides the logits before sampling
    #[arg(long, default_value_t = 1.0)]
    pub temperature: f32,
    #[command(flatten)]
    pub window_bos: WindowBosArgs,
    #[command(flatten)]
    pub tokenizer: TokenizerArgs,
    /// Zero-point convention of the file
    #[arg(long, value_enum, default_value = "gptq")]
    pub format: FormatArg,
    /// Largest weight file: 4GB, 500MB; a bare number is in GB (10^9 bytes)
    #[arg(
        long,
        default_value = "4GB",
        value_name = "SIZE",
        allow_hyphen_values = true
    )]
    pub max_shard_size: String,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Go on where an interrupted run into the same folder stopped; begin where there is none
    #[arg(long)]
    pub resume: bool,
    /// Before the folder is published, compare it with the float model on this many windows of the
    /// calibration text that calibration does not see: mean KL divergence, and perplexity of both, go into
    /// the summary and the record. 0 compares nothing. It reads both models once more, and costs two
    /// forward passes a window: with 16 a quarter of the forward pass of 128 windows of calibration
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub check_windows: usize,
    /// Compare on a second text too, given as for --dataset, by its evaluation split where it has one: on
    /// as many windows from its start as --check-windows says, or 16, of --seq-len tokens
    #[arg(long, value_name = "TEXT")]
    pub check_dataset: Option<String>,
    /// Print where the time went, against this machine's own sgemm
    #[arg(long)]
    pub profile: bool,
    /// Exit with 1 if more layers than this end above the error of rounding to nearest
    #[arg(long, value_name = "LAYERS")]
    pub max_degraded: Option<usize>,
    #[command(flatten)]
    pub strict: StrictArgs,
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
            column: self.column.clone(),
            samples: match self.tokens {
                Some(tokens) => tokens.get().div_ceil(self.seq_len.max(1)),
                None => self.samples,
            },
            seq_len: self.seq_len,
            seed: self.seed,
            window_bos: self.window_bos.choice(),
        }
    }

    /// Whether the result is to be compared with the float model.
    pub fn checks(&self) -> bool {
        self.check_windows > 0 || self.check_dataset.is_some()
    }

    fn column_order(&self) -> ColumnOrder {
        if let Some(order) = self.order {
            return order.resolve();
        }
        match (self.desc_act, self.static_groups, self.act_group_aware) {
            (true, true, _) => ColumnOrder::ActOrderStaticGroups,
            (true, false, _) => ColumnOrder::ActOrder,
            (_, _, true) => ColumnOrder::GroupAware,
            _ => ColumnOrder::Natural,
        }
    }

    fn searches(&self) -> bool {
        !self.no_scale_search && matches!(self.method, MethodArg::Gptq)
    }

    /// The settings that were typed, checked.
    pub fn spec(&self) -> Result<QuantSpec, Failure> {
        let effort = self.effort.resolve();
        let (input_mismatch, descent_passes, training_epochs) = match self.method {
            MethodArg::Gptq => (
                self.input_mismatch.unwrap_or(effort.input_mismatch()),
                self.descent_passes.unwrap_or(effort.descent_passes()),
                self.training_epochs
                    .unwrap_or(effort.training_epochs(self.bits)),
            ),
            MethodArg::Rtn => (0.0, 0, 0),
        };
        let spec = QuantSpec {
            bits: self.bits,
            group_size: self.group_size,
            sym: !self.asym,
            order: self.column_order(),
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
            scale_search: self.searches(),
            full_range: self.searches() && !self.unsigned_scales,
            input_mismatch,
            descent_passes,
            training_epochs,
        };
        spec.validate()?;
        Ok(spec)
    }
}
