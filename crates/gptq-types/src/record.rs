//! Run records: the machine-readable results of a run.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::{ColumnOrder, ContentHash, LayerLoss, LayerName, QuantSpec};

/// Version of [`RunRecord`]; readers refuse a larger one.
pub const RUN_RECORD_SCHEMA: u32 = 1;

/// The calibration tokens of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct CalibrationRecord {
    /// The dataset as given on the command line.
    pub dataset: String,
    /// How windows were drawn.
    pub rule: String,
    /// Seed of the draw.
    pub seed: u64,
    /// Windows.
    pub samples: usize,
    /// Tokens in the longest window.
    pub seq_len: usize,
    /// Tokens in all windows.
    pub tokens: usize,
    /// sha256 of the token ids as little-endian u32, window after window.
    pub token_sha256: String,
    /// Positions of the source that some window covers; windows overlap. For stored and generated windows,
    /// the tokens of distinct windows. Absent in older records, as are the next three.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distinct_positions: Option<usize>,
    /// Distinct runs of a token and the 7 before it, over the first 2^22 tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub distinct_contexts: Option<usize>,
    /// Share of `tokens` that some window drew before, 0 to 1; a BOS in front of each is not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlap: Option<f64>,
    /// The largest `in_features` of the model: with fewer distinct tokens no Hessian of such a
    /// layer has full rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub widest_input: Option<usize>,
    /// The column of its rows, where one was named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// Name of the local copy that a named dataset was read from, without its folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Sampling temperature while the model wrote its own text, if not 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// Each window begins with the beginning-of-sequence token. `false` where that was refused for a
    /// family that needs it, so that the run can be repeated; else absent where it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bos: Option<bool>,
}

impl CalibrationRecord {
    /// Tokens from the start over which contexts are counted, so that the count stays cheap; no
    /// layer is as wide.
    pub const COUNTED_TOKENS: usize = 1 << 22;

    /// The reason why errors measured on these tokens mean nothing, if there is one: too few positions for
    /// the widest layer, or repetitive text.
    pub fn doubt(&self) -> Option<String> {
        let (positions, contexts) = (self.distinct_positions?, self.distinct_contexts?);
        let widest = self.widest_input.unwrap_or(0);
        let singular =
            "no Hessian of that layer has full rank, and errors on this text say nothing of others";
        if positions < widest {
            return Some(format!(
                "{positions} distinct positions of the calibration text (of {} drawn tokens) are fewer \
                 than the {widest} input channels of the widest layer: {singular}",
                self.tokens
            ));
        }
        if contexts < widest {
            return Some(format!(
                "the calibration text repeats itself: {contexts} distinct contexts in {positions} \
                 positions are fewer than the {widest} input channels of the widest layer: {singular}"
            ));
        }
        (contexts < positions.min(Self::COUNTED_TOKENS) / 2).then(|| {
            format!(
                "the calibration text repeats itself: {contexts} distinct contexts in {positions} positions"
            )
        })
    }
}

/// One quantized linear.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerRecord {
    /// Module name.
    pub layer: LayerName,
    /// `K`.
    pub in_features: usize,
    /// `N`.
    pub out_features: usize,
    /// Calibration tokens this layer saw.
    pub tokens: usize,
    /// `tokens` over all calibration tokens, 0 to 1.
    pub token_share: f64,
    /// Quality of the rounding; absent for `method rtn`, which sees no inputs.
    pub loss: Option<LayerLoss>,
    /// Seconds in rounding it and measuring what that cost. The factor, which a stage shares, is
    /// counted under [`Phase::Factor`] alone.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub solve_seconds: f64,
    /// The order that was chosen, where the settings leave it open.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub order: Option<ColumnOrder>,
    /// The float model's input channel for each input channel in the file, if folded; outputs of the
    /// preceding linears are permuted alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub folded: Option<Vec<u32>>,
}

impl LayerRecord {
    /// Whether rounding to nearest would have done better; the layer then counts as degraded.
    pub fn is_worse_than_rtn(&self) -> bool {
        self.loss
            .as_ref()
            .is_some_and(|loss| loss.error > loss.rtn_error * (1.0 + 1e-9))
    }
}

/// The training of a block towards the output of the float block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockTraining {
    /// Index of the block.
    pub block: usize,
    /// Error of the block's output against the float block's: the mean over tokens of `|y - t|^2` over the square
    /// of a typical row, or more where the row is larger (`gptq_kernels::RowScale`); before training, then
    /// after each epoch.
    pub errors: Vec<f64>,
    /// The epoch whose latents and scales are in the file; 0 where none lowered the error.
    pub kept: usize,
    /// The epoch after which the error was no number, where one was: training ended there. 0 is before the
    /// first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub diverged: Option<usize>,
    /// Tokens that gradients were taken of.
    pub tokens: usize,
    /// Tokens held out of training, on which `errors` were measured; 0 where the windows are too few to hold
    /// any out, and `errors` are those of the trained ones.
    pub held_out: usize,
    /// Wall seconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seconds: f64,
}

impl BlockTraining {
    /// The error of what was kept, over that before training.
    pub fn ratio(&self) -> f64 {
        match (self.errors.first(), self.errors.get(self.kept)) {
            (Some(&before), Some(&after)) if before > 0.0 => after / before,
            _ => 1.0,
        }
    }
}

/// Divergence of a checkpoint from the float model on text that calibration did not see.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// The text, as it may be published.
    pub text: String,
    /// Name of the local copy that a named text was read from, without its folder.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// The windows are held-out windows of the calibration text; otherwise they come from a separate text.
    pub held_out: bool,
    /// Text, windows and how they were chosen, in words.
    pub protocol: String,
    /// sha256 of the token ids as little-endian u32, window after window.
    pub token_sha256: String,
    /// Windows.
    pub windows: usize,
    /// Tokens in the longest window.
    pub seq_len: usize,
    /// Tokens in all windows.
    pub tokens: usize,
    /// As in [`CalibrationRecord`], which rounding to nearest lacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bos: Option<bool>,
    /// Perplexity of the float model.
    pub float_perplexity: f64,
    /// Perplexity of the checkpoint, read from its files.
    pub perplexity: f64,
    /// Mean KL divergence of the checkpoint's next-token distributions from the float model's, nats.
    pub kl: f64,
}

/// Something that a reader of the result should know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Warning {
    /// The module it concerns, or empty for the run.
    pub module: String,
    /// The warning, with the value.
    pub text: String,
}

/// The parts of a run that are timed apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Phase {
    Load,
    Forward,
    Hessian,
    Factor,
    Sweep,
    Measure,
    Train,
    Pack,
    Write,
    Verify,
}

/// Seconds and useful operations per phase.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PhaseTimes {
    /// Wall seconds.
    pub seconds: BTreeMap<Phase, f64>,
    /// Floating-point operations that the phase's matrix products need, where counted.
    pub flop: BTreeMap<Phase, f64>,
}

impl PhaseTimes {
    fn is_empty(&self) -> bool {
        self.seconds.is_empty() && self.flop.is_empty()
    }

    /// Adds a measured duration.
    pub fn add(&mut self, phase: Phase, elapsed: Duration) {
        *self.seconds.entry(phase).or_default() += elapsed.as_secs_f64();
    }

    /// Runs `work` and adds the time it took.
    pub fn time<R>(&mut self, phase: Phase, work: impl FnOnce() -> R) -> R {
        let start = Instant::now();
        let result = work();
        self.add(phase, start.elapsed());
        result
    }

    /// Adds useful operations.
    pub fn add_flop(&mut self, phase: Phase, flop: f64) {
        *self.flop.entry(phase).or_default() += flop;
    }
}

/// A whole quantization run; stored as `gptq_run.json` beside the weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// [`RUN_RECORD_SCHEMA`].
    pub schema: u32,
    /// Name and version of the tool.
    pub tool: String,
    /// The model as given.
    pub model: String,
    /// [`crate::model_identity`] of the float weights; absent in older records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_sha256: Option<ContentHash>,
    /// The folder that the tokenizer was taken from, by its name alone, where it was not the model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<String>,
    /// Settings.
    pub spec: QuantSpec,
    /// Tokens; absent for `method rtn`.
    pub calibration: Option<CalibrationRecord>,
    /// The device of the run: `cpu`, or the name of the GPU.
    #[serde(default)]
    pub device: String,
    /// Most bytes of GPU memory that were allocated at a time.
    #[serde(default)]
    pub gpu_memory_peak: Option<u64>,
    /// A row per quantized linear.
    pub layers: Vec<LayerRecord>,
    /// A row per block that was trained.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub training: Vec<BlockTraining>,
    /// Degradations and doubts.
    pub warnings: Vec<Warning>,
    /// The Hessians are those of the float model, one pass for several settings; else of the model
    /// quantized up to the layer.
    #[serde(default, skip_serializing_if = "is_false")]
    pub shared_hessian: bool,
    /// Against the float model, on each text that was asked for: before the folder was published, from
    /// its files. Empty where none was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub divergence: Vec<Divergence>,
    /// Wall seconds of all but the comparison with the float model; left out of a
    /// [`RunRecord::timeless`] record.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seconds: f64,
    /// Seconds per phase; likewise.
    #[serde(default, skip_serializing_if = "PhaseTimes::is_empty")]
    pub phases: PhaseTimes,
    /// Every file that the run wrote beside this record, by name; absent in older records.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, FileRecord>,
}

/// A file as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Length.
    pub bytes: u64,
    /// Hash of all bytes.
    pub sha256: ContentHash,
}

impl FileRecord {
    /// The record of a file that holds `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        FileRecord {
            bytes: bytes.len() as u64,
            sha256: ContentHash::of(bytes),
        }
    }
}

impl RunRecord {
    /// Without times and peaks: two runs of the same settings leave the same record.
    pub fn timeless(mut self) -> Self {
        self.seconds = 0.0;
        self.phases = PhaseTimes::default();
        self.gpu_memory_peak = None;
        for layer in &mut self.layers {
            layer.solve_seconds = 0.0;
        }
        for block in &mut self.training {
            block.seconds = 0.0;
        }
        self
    }
}

fn is_false(value: &bool) -> bool {
    !value
}

fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

/// Rounding makes the KL divergence of equal models a little negative; less than this is no divergence.
pub const LEAST_KL: f64 = -1e-3;

/// A KL divergence without what rounding makes of 0.
///
/// ```
/// assert!(gptq_types::kl(-1e-9).is_sign_positive() && gptq_types::kl(-0.0).is_sign_positive());
/// assert_eq!(gptq_types::kl(0.25), 0.25);
/// ```
pub fn kl(value: f64) -> f64 {
    match (LEAST_KL..=0.0).contains(&value) {
        true => 0.0,
        false => value,
    }
}

/// The perplexity of one checkpoint under one protocol.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// The checkpoint as given.
    pub model: String,
    /// `fp16`, `4-bit g64` and so on.
    pub kind: String,
    /// Name of the text; empty where the run scored one alone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
    /// Text, join, window and count, in words.
    pub protocol: String,
    /// sha256 of the evaluated token ids as little-endian u32.
    pub token_sha256: String,
    /// Windows scored.
    pub windows: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Mean negative log-likelihood per predicted token, nats.
    pub nll: f64,
    /// Standard error of `nll` over windows.
    pub nll_stderr: f64,
    /// `exp(nll)`.
    pub perplexity: f64,
    /// Mean KL divergence from the first checkpoint, nats; absent for the first itself.
    pub kl: Option<f64>,
    /// Share of positions where the likeliest token is the first checkpoint's.
    pub top1_agreement: Option<f64>,
    /// 99.9th percentile of that divergence over positions, nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_p999: Option<f64>,
    /// Mean divergence in equal parts of the window, first to last, nats; empty without a first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kl_by_position: Vec<f64>,
    /// `nll` less that of the first checkpoint; absent for the first itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nll_difference: Option<PairedDifference>,
    /// Share of last words guessed, if passages were given. Fields that do not depend on the text (this one,
    /// tasks, speed, seconds) are only in the record of the first text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accuracy: Option<Accuracy>,
    /// Multiple choice, a score per task.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<Accuracy>,
    /// Speed, where it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speed: Option<Speed>,
    /// Keys of its `config.json` whose meaning is not known: they may change the model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unread_keys: Vec<String>,
    /// Bytes of all weight files.
    pub weight_bytes: u64,
    /// Wall seconds.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub seconds: f64,
}

impl EvalRecord {
    /// Last words and multiple choice.
    pub fn accuracies(&self) -> impl Iterator<Item = &Accuracy> {
        self.accuracy.iter().chain(&self.tasks)
    }
}

/// A mean difference over windows that both models scored.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairedDifference {
    /// Mean over windows, nats.
    pub mean: f64,
    /// 95 % confidence interval of the mean (Student's t over windows).
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

impl PairedDifference {
    /// Half the interval: a smaller difference is indistinguishable from zero on these windows.
    pub fn noise_floor(&self) -> f64 {
        (self.high - self.low) / 2.0
    }
}

/// Answers to a task with one right answer each.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Accuracy {
    /// `lambada`: the last word of a passage, by greedy tokens. Else the name that was given to a
    /// task of multiple choice.
    pub task: String,
    /// Passages or questions.
    pub examples: usize,
    /// Share of them answered right, 0 to 1; of multiple choice, `acc`: the likeliest choice counts.
    pub share: f64,
    /// Standard error of the share.
    pub stderr: f64,
    /// Accuracy with likelihoods divided by the characters of the choice; absent where choices have no length
    /// of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<Share>,
}

/// A share of right answers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// 0 to 1.
    pub share: f64,
    /// Its standard error.
    pub stderr: f64,
}

/// Speed of a checkpoint, run from its packed files on the named device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// `cpu, 2 threads`, or the name of the GPU.
    pub device: String,
    /// Tokens of the prompt that was measured.
    pub prompt_tokens: usize,
    /// Tokens of a prompt a second, one sequence.
    pub prefill_tokens_per_second: f64,
    /// Sequences that were decoded side by side.
    pub batch: usize,
    /// New tokens a second, of all sequences together.
    pub decode_tokens_per_second: f64,
    /// Most bytes that were allocated at a time: GPU memory there, resident memory on a processor.
    pub peak_memory: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A text of 62 tokens, drawn 128 times, passed as 7680 tokens.
    #[test]
    fn too_little_text_is_doubted_however_often_it_is_drawn() {
        let record = |positions, contexts| CalibrationRecord {
            tokens: 7680,
            distinct_positions: Some(positions),
            distinct_contexts: Some(contexts),
            widest_input: Some(172),
            ..CalibrationRecord::default()
        };
        let doubt = |positions, contexts| record(positions, contexts).doubt().unwrap();
        assert!(doubt(62, 11).starts_with("62 distinct positions"));
        assert!(doubt(7000, 1).contains("1 distinct contexts in 7000 positions are fewer"));
        assert!(doubt(7000, 300).ends_with("300 distinct contexts in 7000 positions"));
        assert_eq!(record(7000, 6500).doubt(), None);
        assert_eq!(record(172, 172).doubt(), None);
        assert_eq!(CalibrationRecord::default().doubt(), None);
        let old: CalibrationRecord = serde_json::from_str(
            r#"{"dataset": "c4", "rule": "", "seed": 0, "samples": 1, "seq_len": 2, "tokens": 2, "token_sha256": ""}"#,
        )
        .unwrap();
        assert_eq!(old.doubt(), None);
    }

    /// Without `float_roundtrip` serde_json read the first one back as 1709.7900745221257: a
    /// resumed run left another record than an unbroken one.
    #[test]
    fn numbers_come_back_as_they_were_written() {
        for value in [1709.7900745221255, 0.24574077379516318, 9.642659662355697] {
            let loss = LayerLoss {
                measure: crate::LossMeasure::FloatOutputs,
                error: value,
                rtn_error: value,
                signal: value,
                damp_used: 0.1,
                damp_escalations: 0,
                dead_channels: 0,
            };
            let text = serde_json::to_string(&loss).unwrap();
            assert_eq!(serde_json::from_str::<LayerLoss>(&text).unwrap(), loss);
        }
    }
}
