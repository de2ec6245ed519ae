//! A matrix of permutations: what is asked for, and what a branch of it turned out to be.

use serde::{Deserialize, Serialize};

use crate::{
    ColumnOrder, ContentHash, Effort, EvalRecord, Forecast, GroupSize, Method, QuantSpec, RunRecord,
};

/// The calibration tokens of a permutation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationRequest {
    /// A registered name, a dataset of the hub or a file, as `--dataset` takes it.
    pub dataset: String,
    /// Column of its rows; the first known one where it is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// Windows.
    pub samples: usize,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Seed of the draw.
    pub seed: u64,
    /// Whether each window begins with the beginning-of-sequence token; where it is absent, as the model's
    /// family needs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window_bos: Option<bool>,
}

/// One branch that is asked for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Permutation {
    /// Name of the branch.
    pub branch: String,
    /// Settings.
    pub spec: QuantSpec,
    /// Its tokens; not used by `method rtn`.
    pub calibration: CalibrationRequest,
    /// A sentence for the table of files.
    pub desc: String,
}

/// The name under which such a branch is published: `gptq-4bit-32g-actorder_True`, with
/// `-1g` where there are no groups (the seeds' spelling), and `actorder_static` where the order leaves
/// `g_idx` trivial. Nothing says more than these three.
pub fn branch_name(spec: &QuantSpec) -> String {
    let order = match spec.order {
        ColumnOrder::Natural | ColumnOrder::GroupAware => "False",
        ColumnOrder::ActOrder => "True",
        ColumnOrder::ActOrderStaticGroups => "static",
        ColumnOrder::Folded => "folded",
        ColumnOrder::Auto => "auto",
    };
    let method = match spec.method {
        Method::Gptq => "gptq",
        Method::Rtn => "rtn",
    };
    let group = i64::from(spec.group_size);
    format!("{method}-{}bit-{group}g-actorder_{order}", spec.bits)
}

/// The name of a branch of a plan that gives it none: [`branch_name`], and after it what else makes
/// other codes of the same file: an effort that is not the `usual` one, `-fast`, or the parts of no
/// effort, `-mismatch_0.25-descent_1`; `-unsigned`. Published tables have unsigned scales under the bare
/// name; in a plan they are the exception.
pub fn plan_branch_name(spec: &QuantSpec, usual: Effort) -> String {
    let mut name = branch_name(spec);
    match spec.effort() {
        _ if spec.method == Method::Rtn => {}
        Some(effort) if effort == usual => {}
        Some(effort) => name += &format!("-{}", effort.name()),
        None => {
            let (aim, passes) = (spec.input_mismatch, spec.descent_passes);
            name += &format!("-mismatch_{aim}-descent_{passes}");
            if spec.trains() {
                name += &format!("-epochs_{}", spec.training_epochs);
            }
        }
    }
    if spec.scale_search && !spec.full_range {
        name += "-unsigned";
    }
    name
}

/// Describes the settings for someone who chooses a branch.
pub fn describe(spec: &QuantSpec) -> String {
    let order = match spec.order {
        ColumnOrder::Natural => "without act-order",
        ColumnOrder::ActOrder if !spec.permutes_g_idx() => "with act-order: g_idx stays trivial",
        ColumnOrder::ActOrder => "with act-order: g_idx is a permutation, slower in some runtimes",
        ColumnOrder::ActOrderStaticGroups => "act-order with static groups: g_idx stays trivial",
        ColumnOrder::GroupAware => "channels reordered inside groups: g_idx stays trivial",
        ColumnOrder::Folded => "act-order folded into the linears before: g_idx stays trivial",
        ColumnOrder::Auto => "order chosen by layer: g_idx stays trivial",
    };
    let group = match spec.group_size {
        GroupSize::None => "one group a row".to_string(),
        GroupSize::Channels(size) => format!("groups of {size}"),
    };
    let aim = match spec.input_mismatch == 0.0 {
        true => "",
        false => ", aimed at the float model's outputs",
    };
    let descent = match spec.descent_passes {
        0 => "",
        _ => ", codes reconsidered by coordinate descent",
    };
    let trained = match spec.trains() {
        false => "",
        true => ", blocks trained towards the float model's",
    };
    format!(
        "{}-bit, {group}, {order}{aim}{descent}{trained}.",
        spec.bits
    )
}

/// Whether a given runtime loads a branch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reading {
    /// The runtime.
    pub reader: String,
    /// Why it does not; absent where it does.
    pub refusal: Option<String>,
    /// The version that was run on files of this tool; absent where its source alone was read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
}

/// Scores of a branch and of the model that it was made from, on the same tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BranchEvaluation {
    /// The float model.
    pub reference: EvalRecord,
    /// The branch.
    pub branch: EvalRecord,
}

/// The contents of a branch; a card is made from it and the run record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BranchRecord {
    /// The settings that were asked for.
    pub permutation: Permutation,
    /// [`crate::model_identity`] of the float weights; absent in older records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights_sha256: Option<ContentHash>,
    /// Bytes of its weight files.
    pub weight_bytes: u64,
    /// Bits for each weight of the quantized linears, grids and g_idx included.
    pub bits_per_weight: f64,
    /// Runtimes, in a fixed order.
    pub readings: Vec<Reading>,
    /// Absent where no evaluation was asked for.
    pub evaluation: Option<BranchEvaluation>,
}

/// A finished branch: its record and that of its run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Branch {
    /// The contents of the branch.
    pub record: BranchRecord,
    /// The run that made it.
    pub run: RunRecord,
}

/// A branch before it is made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlannedBranch {
    /// The settings that are asked for.
    pub permutation: Permutation,
    /// Why it cannot be made; the numbers below are zero then.
    pub refusal: Option<String>,
    /// Bytes of its weight files.
    pub weight_bytes: u64,
    /// Bits for each weight of the quantized linears, grids and g_idx included.
    pub bits_per_weight: f64,
    /// Runtimes.
    pub readings: Vec<Reading>,
    /// Floating-point operations, about.
    pub flop: f64,
    /// Bytes of host memory on a run without a GPU, about.
    pub memory: u64,
    /// What it will take on the machine at hand, where that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub forecast: Option<Forecast>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bits;

    #[test]
    fn branches_are_named_as_published() {
        let mut spec = QuantSpec {
            order: ColumnOrder::ActOrder,
            group_size: GroupSize::Channels(32),
            ..QuantSpec::published()
        };
        assert_eq!(branch_name(&spec), "gptq-4bit-32g-actorder_True");
        spec.bits = Bits::Eight;
        spec.group_size = GroupSize::None;
        assert_eq!(branch_name(&spec), "gptq-8bit--1g-actorder_True");
        spec.order = ColumnOrder::ActOrderStaticGroups;
        assert_eq!(branch_name(&spec), "gptq-8bit--1g-actorder_static");
        spec.order = ColumnOrder::Natural;
        assert_eq!(branch_name(&spec), "gptq-8bit--1g-actorder_False");
    }

    /// The card once called a g_idx of zeros a permutation.
    #[test]
    fn only_several_groups_can_be_permuted() {
        let mut spec = QuantSpec {
            order: ColumnOrder::ActOrder,
            ..QuantSpec::published()
        };
        assert!(describe(&spec).contains("is a permutation"));
        spec.group_size = GroupSize::None;
        assert!(!spec.permutes_g_idx());
        assert!(describe(&spec).contains("trivial"), "{}", describe(&spec));
    }
}
