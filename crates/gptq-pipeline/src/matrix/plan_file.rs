//! A plan file: any permutations, in TOML.

use std::collections::BTreeSet;

use gptq_types::{
    Bits, CalibrationRequest, CheckpointFormat, ColumnOrder, GroupSize, Method, Permutation,
    QuantSpec, SpecError, branch_name, describe,
};
use serde::Deserialize;

/// A plan that cannot be read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum PlanError {
    #[error("{0}")]
    Toml(String),
    #[error("no [[branch]]")]
    Empty,
    #[error("branch `{0}` is listed twice")]
    Twice(String),
    #[error("branch `{branch}`: {source}")]
    Spec { branch: String, source: SpecError },
    #[error("branch `{branch}`: {reason}")]
    Branch { branch: String, reason: String },
}

/// What a branch has where the plan says nothing: as `gptq quantize`.
struct Defaults {
    calibration: CalibrationRequest,
    damp_percent: f64,
}

impl Defaults {
    fn of_quantize() -> Self {
        Defaults {
            calibration: CalibrationRequest {
                dataset: "c4".to_string(),
                samples: 128,
                seq_len: 2048,
                seed: 0,
            },
            damp_percent: 0.1,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PlanFile {
    #[serde(flatten)]
    tokens: Tokens,
    damp: Option<f64>,
    #[serde(default)]
    branch: Vec<BranchEntry>,
}

#[derive(Deserialize)]
struct Tokens {
    dataset: Option<String>,
    samples: Option<usize>,
    seq_len: Option<usize>,
    seed: Option<u64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Group {
    Size(i64),
    Word(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BranchEntry {
    name: Option<String>,
    bits: u8,
    group_size: Group,
    #[serde(default)]
    desc_act: bool,
    #[serde(default)]
    static_groups: bool,
    #[serde(default)]
    act_group_aware: bool,
    #[serde(default)]
    asym: bool,
    #[serde(default)]
    no_scale_search: bool,
    #[serde(default)]
    method: MethodName,
    #[serde(default)]
    format: FormatName,
    damp: Option<f64>,
    dataset: Option<String>,
    samples: Option<usize>,
    seq_len: Option<usize>,
    seed: Option<u64>,
    desc: Option<String>,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum MethodName {
    #[default]
    Gptq,
    Rtn,
}

#[derive(Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FormatName {
    #[default]
    Gptq,
    GptqV2,
}

/// Reads a plan. Top-level `dataset`, `samples`, `seq_len`, `seed` and `damp` are for all branches;
/// a `[[branch]]` has `bits`, `group_size`, and any flag of `gptq quantize` by its long name.
pub fn read_plan(text: &str) -> Result<Vec<Permutation>, PlanError> {
    let plan: PlanFile = toml::from_str(text).map_err(|error| {
        let place = error.span().map_or(String::new(), |span| {
            let line = 1 + text[..span.start].matches('\n').count();
            format!("line {line}: ")
        });
        PlanError::Toml(format!("{place}{}", error.message()))
    })?;
    if plan.branch.is_empty() {
        return Err(PlanError::Empty);
    }
    let mut defaults = Defaults::of_quantize();
    defaults.calibration = plan.tokens.over(&defaults.calibration);
    defaults.damp_percent = plan.damp.unwrap_or(defaults.damp_percent);
    let mut names = BTreeSet::new();
    (plan.branch.into_iter())
        .map(|entry| {
            let permutation = entry.permutation(&defaults)?;
            match names.insert(permutation.branch.clone()) {
                true => Ok(permutation),
                false => Err(PlanError::Twice(permutation.branch)),
            }
        })
        .collect()
}

impl Tokens {
    fn over(self, defaults: &CalibrationRequest) -> CalibrationRequest {
        CalibrationRequest {
            dataset: self.dataset.unwrap_or_else(|| defaults.dataset.clone()),
            samples: self.samples.unwrap_or(defaults.samples),
            seq_len: self.seq_len.unwrap_or(defaults.seq_len),
            seed: self.seed.unwrap_or(defaults.seed),
        }
    }
}

impl BranchEntry {
    fn permutation(self, defaults: &Defaults) -> Result<Permutation, PlanError> {
        let place = self.name.clone().unwrap_or_else(|| {
            let group = match &self.group_size {
                Group::Size(size) => size.to_string(),
                Group::Word(word) => word.clone(),
            };
            format!("{} bits, group {group}", self.bits)
        });
        let wrong = |source| PlanError::Spec {
            branch: place.clone(),
            source,
        };
        let order = self.order().map_err(|reason| PlanError::Branch {
            branch: place.clone(),
            reason,
        })?;
        let method = match self.method {
            MethodName::Gptq => Method::Gptq,
            MethodName::Rtn => Method::Rtn,
        };
        let spec = QuantSpec {
            bits: Bits::try_from(self.bits).map_err(wrong)?,
            group_size: match &self.group_size {
                Group::Size(size) => GroupSize::try_from(*size),
                Group::Word(word) => word.parse(),
            }
            .map_err(wrong)?,
            sym: !self.asym,
            order,
            damp_percent: self.damp.unwrap_or(defaults.damp_percent),
            method,
            format: match self.format {
                FormatName::Gptq => CheckpointFormat::Gptq,
                FormatName::GptqV2 => CheckpointFormat::GptqV2,
            },
            scale_search: !self.no_scale_search && method == Method::Gptq,
        };
        spec.validate().map_err(wrong)?;
        let tokens = Tokens {
            dataset: self.dataset,
            samples: self.samples,
            seq_len: self.seq_len,
            seed: self.seed,
        };
        Ok(Permutation {
            branch: self.name.unwrap_or_else(|| branch_name(&spec)),
            desc: self.desc.unwrap_or_else(|| describe(&spec)),
            spec,
            calibration: tokens.over(&defaults.calibration),
        })
    }

    fn order(&self) -> Result<ColumnOrder, String> {
        match (self.desc_act, self.static_groups, self.act_group_aware) {
            (true, true, false) => Ok(ColumnOrder::ActOrderStaticGroups),
            (true, false, false) => Ok(ColumnOrder::ActOrder),
            (false, false, true) => Ok(ColumnOrder::GroupAware),
            (false, false, false) => Ok(ColumnOrder::Natural),
            (true, _, true) => Err("desc_act and act_group_aware exclude each other".to_string()),
            (false, true, _) => Err("static_groups is for desc_act".to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Permutation>, String> {
        read_plan(text).map_err(|error| error.to_string())
    }

    #[test]
    fn branches_inherit_and_override() {
        let plan = "
            dataset = 'text.txt'
            seq_len = 512
            [[branch]]
            name = 'main'
            bits = 4
            group_size = 64
            [[branch]]
            bits = 8
            group_size = 'none'
            desc_act = true
            damp = 0.01
            samples = 16
        ";
        let [main, eight] = read(plan).unwrap().try_into().unwrap();
        assert_eq!(main.branch, "main");
        assert_eq!(main.calibration.dataset, "text.txt");
        assert_eq!(
            (main.calibration.samples, main.calibration.seq_len),
            (128, 512)
        );
        assert_eq!(main.spec.damp_percent, 0.1);
        assert_eq!(eight.branch, "gptq-8bit--1g-actorder_True");
        assert_eq!(
            (eight.calibration.samples, eight.calibration.seq_len),
            (16, 512)
        );
        assert_eq!(eight.spec.damp_percent, 0.01);
    }

    #[test]
    fn what_a_plan_gets_wrong_is_named() {
        let entry = |rest: &str| format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}");
        for (plan, named) in [
            (String::new(), "no [[branch]]"),
            (entry("bit = 4"), "unknown field `bit`"),
            (
                entry("[[branch]]\nbits = 4\ngroup_size = 64"),
                "listed twice",
            ),
            (entry("").replace("64", "63"), "group size `63`"),
            (entry("").replace('4', "5"), "bits `5`"),
            (
                entry("static_groups = true"),
                "static_groups is for desc_act",
            ),
            (entry("damp = 1.5"), "damp percent `1.5`"),
            (format!("datset = 'c4'\n{}", entry("")), "datset"),
        ] {
            let error = read(&plan).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
