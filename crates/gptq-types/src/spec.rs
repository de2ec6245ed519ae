//! Quantization settings, under the names of `quantize_config.json`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::LossMeasure;

/// Settings that cannot be met.
#[derive(Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)]
pub enum SpecError {
    #[error("bits `{0}` is not one of 2, 3, 4, 8")]
    Bits(String),
    #[error("group size `{0}` is not `none`, -1 or a multiple of 8 from 16 to 1024")]
    GroupSize(String),
    #[error("damp percent `{0}` is not between 0 and 1")]
    Damp(f64),
    #[error("input mismatch `{0}` is not between 0 and 1")]
    Mismatch(f64),
    #[error("descent passes `{0}` are more than {MAX_DESCENT_PASSES}")]
    Passes(u32),
    #[error("training epochs `{0}` are more than {MAX_TRAINING_EPOCHS}")]
    Epochs(u32),
    #[error("`{0}` and `{1}` exclude each other")]
    Conflict(&'static str, &'static str),
    #[error("`{0}` is not one of {1}")]
    Unknown(String, &'static str),
}

/// Width of a stored code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
#[allow(missing_docs)]
pub enum Bits {
    Two,
    Three,
    Four,
    Eight,
}

impl Bits {
    /// Every supported width, narrow to wide.
    pub const ALL: [Bits; 4] = [Bits::Two, Bits::Three, Bits::Four, Bits::Eight];

    /// The width as a number of bits.
    pub fn width(self) -> u32 {
        match self {
            Bits::Two => 2,
            Bits::Three => 3,
            Bits::Four => 4,
            Bits::Eight => 8,
        }
    }

    /// Largest code, `2^bits - 1`.
    pub fn max_code(self) -> u32 {
        (1 << self.width()) - 1
    }
}

impl TryFrom<u8> for Bits {
    type Error = SpecError;
    fn try_from(width: u8) -> Result<Self, SpecError> {
        Bits::ALL
            .into_iter()
            .find(|bits| bits.width() == u32::from(width))
            .ok_or_else(|| SpecError::Bits(width.to_string()))
    }
}

impl From<Bits> for u8 {
    fn from(bits: Bits) -> u8 {
        bits.width() as u8
    }
}

impl FromStr for Bits {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        text.parse::<u8>()
            .map_err(|_| SpecError::Bits(text.to_string()))?
            .try_into()
    }
}

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.width())
    }
}

/// Input channels that share one scale and zero; `-1` in files means one group per output row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "i64", try_from = "i64")]
pub enum GroupSize {
    /// One group spans all of `in_features`.
    None,
    /// This many consecutive channels; the last group may be short.
    Channels(usize),
}

impl GroupSize {
    /// The size for a layer of `in_features` channels, at least 1.
    pub fn resolve(self, in_features: usize) -> usize {
        match self {
            GroupSize::None => in_features.max(1),
            GroupSize::Channels(size) => size,
        }
    }

    /// Number of groups of `in_features` channels, including a short last one.
    pub fn count(self, in_features: usize) -> usize {
        in_features.div_ceil(self.resolve(in_features))
    }
}

impl TryFrom<i64> for GroupSize {
    type Error = SpecError;
    fn try_from(size: i64) -> Result<Self, SpecError> {
        match size {
            -1 => Ok(GroupSize::None),
            16..=1024 if size % 8 == 0 => Ok(GroupSize::Channels(size as usize)),
            _ => Err(SpecError::GroupSize(size.to_string())),
        }
    }
}

impl From<GroupSize> for i64 {
    fn from(size: GroupSize) -> i64 {
        match size {
            GroupSize::None => -1,
            GroupSize::Channels(size) => size as i64,
        }
    }
}

impl FromStr for GroupSize {
    type Err = SpecError;
    fn from_str(text: &str) -> Result<Self, SpecError> {
        if text == "none" {
            return Ok(GroupSize::None);
        }
        text.parse::<i64>()
            .map_err(|_| SpecError::GroupSize(text.to_string()))?
            .try_into()
    }
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GroupSize::None => f.write_str("none"),
            GroupSize::Channels(size) => write!(f, "{size}"),
        }
    }
}

/// The method that chooses codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Error-compensated rounding (Frantar et al. 2022, algorithm 1).
    Gptq,
    /// Round to nearest: the baseline that needs no calibration.
    Rtn,
}

/// The zero-point convention of a file; other names for it are v1 and v2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckpointFormat {
    /// v1: stores `zero - 1`; every reader knows it.
    Gptq,
    /// v2: stores `zero`; GPTQModel and vLLM know it.
    GptqV2,
}

impl fmt::Display for CheckpointFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CheckpointFormat::Gptq => "gptq",
            CheckpointFormat::GptqV2 => "gptq_v2",
        })
    }
}

/// In which order the solver rounds the input channels, and what that does to `g_idx`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnOrder {
    /// The stored order; `g_idx` is trivial.
    Natural,
    /// By falling Hessian diagonal, groups formed in that order; `g_idx` is a real permutation where
    /// there are several groups.
    ActOrder,
    /// By falling Hessian diagonal over grids fixed beforehand in natural order; `g_idx` is trivial.
    ActOrderStaticGroups,
    /// Groups by their largest Hessian diagonal and channels sorted inside; `g_idx` is trivial.
    GroupAware,
    /// Act-order where the file can hold it as the order of its channels: the linears whose outputs are
    /// the channels (gate and up for down; v for o, inside heads) have their output rows permuted, so that
    /// `g_idx` is trivial. Natural everywhere else.
    Folded,
    /// For each stage the one of the orders with a trivial `g_idx` that has the least error on tokens held
    /// out of the Hessian.
    Auto,
}

impl ColumnOrder {
    /// Its name on the command line and in plans.
    pub fn name(self) -> &'static str {
        match self {
            ColumnOrder::Natural => "natural",
            ColumnOrder::ActOrder => "act-order",
            ColumnOrder::ActOrderStaticGroups => "static",
            ColumnOrder::GroupAware => "group-aware",
            ColumnOrder::Folded => "folded",
            ColumnOrder::Auto => "auto",
        }
    }

    /// Whether files of this order may hold permuted channels.
    pub fn may_fold(self) -> bool {
        matches!(self, ColumnOrder::Folded | ColumnOrder::Auto)
    }
}

/// The amount of work spent on a quantization.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    /// One forward pass, that of the quantized model.
    Fast,
    /// Another one, of the float model, whose outputs each linear is aimed at; and coordinate descent
    /// over its codes.
    #[default]
    Balanced,
    /// Then each block is trained: latents and scales of its linears together, towards the output of the float
    /// block.
    Best,
}

impl Effort {
    /// Every one, by the work it takes.
    pub const ALL: [Effort; 3] = [Effort::Fast, Effort::Balanced, Effort::Best];

    /// Its name on the command line and in plans.
    pub fn name(self) -> &'static str {
        match self {
            Effort::Fast => "fast",
            Effort::Balanced => "balanced",
            Effort::Best => "best",
        }
    }

    /// [`QuantSpec::input_mismatch`]. Half of the way was better than all of it at every width, and kept
    /// 3 bits from fitting the domain of the calibration text.
    pub fn input_mismatch(self) -> f64 {
        match self {
            Effort::Fast => 0.0,
            Effort::Balanced | Effort::Best => 0.5,
        }
    }

    /// [`QuantSpec::descent_passes`]. The first pass gains most, those after the second little.
    pub fn descent_passes(self) -> u32 {
        match self {
            Effort::Fast => 0,
            Effort::Balanced | Effort::Best => 2,
        }
    }

    /// [`QuantSpec::training_epochs`]. At 2 bits smaller steps and more of them are better; at 4 more epochs fit
    /// the calibration text and not others.
    pub fn training_epochs(self, bits: Bits) -> u32 {
        match (self, bits) {
            (Effort::Fast | Effort::Balanced, _) => 0,
            (Effort::Best, Bits::Two) => 12,
            (Effort::Best, Bits::Three | Bits::Four | Bits::Eight) => 6,
        }
    }
}

/// Most passes of coordinate descent that a spec may ask for; it has long settled by then.
pub const MAX_DESCENT_PASSES: u32 = 16;

/// Most epochs of training that a spec may ask for.
pub const MAX_TRAINING_EPOCHS: u32 = 64;

/// Everything that decides the codes of a layer, apart from its weights and inputs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct QuantSpec {
    /// Width of a code.
    pub bits: Bits,
    /// Channels that share a scale.
    pub group_size: GroupSize,
    /// Symmetric grid: zero is the middle code.
    pub sym: bool,
    /// Column order of the solver.
    pub order: ColumnOrder,
    /// Share of the mean Hessian diagonal that is added to the diagonal, between 0 and 1.
    pub damp_percent: f64,
    /// Rounding method.
    pub method: Method,
    /// Zero-point convention of the file; decides which zeros may be chosen.
    pub format: CheckpointFormat,
    /// Tries smaller grids for each group and keeps the one with the least error, each weight
    /// counted by its share in the solver's own loss, instead of reaching to the largest weight.
    /// After the authors' later solver (IST-DASLab/marlin, `gptq/quant.py`). False in records
    /// from before there was a choice.
    #[serde(default)]
    pub scale_search: bool,
    /// The search may choose any grid that the file can hold: symmetric, a scale of either sign, so that the
    /// larger side of a group gets the extra code; asymmetric, zeros other than the one that follows from the
    /// scale. False in records that predate the setting.
    #[serde(default)]
    pub full_range: bool,
    /// Share, 0 to 1, of the way from the float weight to the one that comes nearest to the float
    /// outputs on quantized inputs; the sweep rounds what lies there. 0 in records from before there was
    /// a choice.
    #[serde(default)]
    pub input_mismatch: f64,
    /// Passes of coordinate descent over the codes of the sweep, each with a refit of the scales. 0 in
    /// records from before there was a choice.
    #[serde(default)]
    pub descent_passes: u32,
    /// Passes over the calibration windows in which the latents and scales of each block are trained towards
    /// the output of the float block. Absent where there is none.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub training_epochs: u32,
}

fn is_zero(count: &u32) -> bool {
    *count == 0
}

impl QuantSpec {
    /// The settings of the published reference checkpoints: 4-bit, group 128, symmetric, damp 0.1;
    /// scales are searched, and none is negative.
    pub fn published() -> Self {
        QuantSpec {
            bits: Bits::Four,
            group_size: GroupSize::Channels(128),
            sym: true,
            order: ColumnOrder::Natural,
            damp_percent: 0.1,
            method: Method::Gptq,
            format: CheckpointFormat::Gptq,
            scale_search: true,
            full_range: false,
            input_mismatch: 0.0,
            descent_passes: 0,
            training_epochs: 0,
        }
    }

    /// Refuses values outside their range.
    pub fn validate(&self) -> Result<(), SpecError> {
        if !(self.damp_percent > 0.0 && self.damp_percent < 1.0) {
            return Err(SpecError::Damp(self.damp_percent));
        }
        if self.method == Method::Rtn && self.order != ColumnOrder::Natural {
            return Err(SpecError::Conflict("method rtn", "a column order"));
        }
        if self.method == Method::Rtn && self.scale_search {
            return Err(SpecError::Conflict("method rtn", "a scale search"));
        }
        if self.full_range && !self.scale_search {
            return Err(SpecError::Conflict("full_range", "no scale search"));
        }
        if !(0.0..=1.0).contains(&self.input_mismatch) {
            return Err(SpecError::Mismatch(self.input_mismatch));
        }
        if self.method == Method::Rtn && self.input_mismatch != 0.0 {
            return Err(SpecError::Conflict("method rtn", "an input mismatch"));
        }
        if self.descent_passes > MAX_DESCENT_PASSES {
            return Err(SpecError::Passes(self.descent_passes));
        }
        if self.method == Method::Rtn && self.descent_passes != 0 {
            return Err(SpecError::Conflict("method rtn", "descent passes"));
        }
        if self.training_epochs > MAX_TRAINING_EPOCHS {
            return Err(SpecError::Epochs(self.training_epochs));
        }
        if self.method == Method::Rtn && self.training_epochs != 0 {
            return Err(SpecError::Conflict("method rtn", "training epochs"));
        }
        if self.training_epochs != 0 && self.input_mismatch == 0.0 {
            return Err(SpecError::Conflict(
                "training epochs",
                "an input mismatch of 0",
            ));
        }
        Ok(())
    }

    /// The effort whose parts these are, if they are those of one.
    pub fn effort(&self) -> Option<Effort> {
        let is_of = |effort: &Effort| {
            self.input_mismatch == effort.input_mismatch()
                && self.descent_passes == effort.descent_passes()
                && self.training_epochs == effort.training_epochs(self.bits)
        };
        Effort::ALL.into_iter().find(is_of)
    }

    /// The reference of the errors of its layers.
    pub fn measure(&self) -> LossMeasure {
        match self.input_mismatch == 0.0 {
            true => LossMeasure::QuantizedInputs,
            false => LossMeasure::FloatOutputs,
        }
    }

    /// Whether blocks are trained after their linears are rounded.
    pub fn trains(&self) -> bool {
        self.training_epochs != 0
    }

    /// Whether `g_idx` of the result is a real permutation: with one group per row it is all 0 in any
    /// order.
    pub fn permutes_g_idx(&self) -> bool {
        self.order == ColumnOrder::ActOrder && self.group_size != GroupSize::None
    }

    /// The smallest zero a file of this format can hold without touching its neighbours.
    ///
    /// v1 stores `zero - 1`, so a zero of 0 would borrow from the next field of the word.
    pub fn min_zero(&self) -> u32 {
        match self.format {
            CheckpointFormat::Gptq => 1,
            CheckpointFormat::GptqV2 => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_size_counts_the_short_last_group() {
        assert_eq!(GroupSize::Channels(64).count(172), 3);
        assert_eq!(GroupSize::None.count(172), 1);
    }

    #[test]
    fn numbers_outside_the_field_are_refused() {
        assert_eq!("5".parse::<Bits>(), Err(SpecError::Bits("5".into())));
        assert_eq!(
            "12".parse::<GroupSize>(),
            Err(SpecError::GroupSize("12".into()))
        );
        assert_eq!("-1".parse::<GroupSize>(), Ok(GroupSize::None));
        let spec = QuantSpec {
            damp_percent: 1.0,
            ..QuantSpec::published()
        };
        assert_eq!(spec.validate(), Err(SpecError::Damp(1.0)));
    }

    #[test]
    fn rounding_to_nearest_weighs_no_scales() {
        let mut spec = QuantSpec {
            method: Method::Rtn,
            ..QuantSpec::published()
        };
        let conflict = SpecError::Conflict("method rtn", "a scale search");
        assert_eq!(spec.validate(), Err(conflict));
        spec.scale_search = false;
        assert_eq!(spec.validate(), Ok(()));
    }
}
