//! A plan file: any permutations, in TOML.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use gptq_types::{
    Bits, CalibrationRequest, CheckpointFormat, ColumnOrder, Effort, GroupSize, Method,
    Permutation, QuantSpec, SpecError, describe, outside_name::shown, plan_branch_name,
};
use serde::Deserialize;

/// Most branches of a matrix; published ones have six.
const MAX_BRANCHES: usize = 256;
/// Most windows, and most tokens in one: their product and what is estimated from it stay exact.
const MAX_SAMPLES: usize = 1 << 20;
const MAX_SEQ_LEN: usize = 1 << 24;
/// Bytes of a plan file, of a dataset's name or path, and of a description.
const MAX_PLAN_BYTES: usize = 1 << 20;
const MAX_DATASET_BYTES: usize = 4096;
const MAX_DESC_BYTES: usize = 1000;
/// Characters of a plan that an error repeats.
const SHOWN: usize = 80;
const SHOWN_REASON: usize = 200;

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
    #[error(
        "branches {first} and {second} would both be `{branch}`, a name that says nothing of what they differ in: give one of them a `name`"
    )]
    Unnamed {
        branch: String,
        first: usize,
        second: usize,
    },
    #[error("tokens stands for samples: give one of them")]
    SamplesAndTokens,
    #[error("branch `{branch}`: {reason}")]
    Branch { branch: String, reason: String },
}

/// Settings of a branch where the plan names none: the defaults of `gptq quantize`.
struct Defaults {
    tokens: Tokens,
    damp_percent: f64,
    effort: Effort,
}

impl Defaults {
    fn of_quantize() -> Self {
        Defaults {
            tokens: Tokens {
                dataset: Some("c4".to_string()),
                samples: Some(128),
                seq_len: Some(2048),
                seed: Some(0),
                ..Tokens::default()
            },
            damp_percent: 0.1,
            effort: Effort::default(),
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

#[derive(Clone, Default, Deserialize)]
struct Tokens {
    dataset: Option<String>,
    column: Option<String>,
    samples: Option<usize>,
    tokens: Option<NonZeroUsize>,
    seq_len: Option<usize>,
    seed: Option<u64>,
    window_bos: Option<bool>,
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
    order: Option<OrderName>,
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
    unsigned_scales: bool,
    #[serde(default)]
    effort: Option<Effort>,
    input_mismatch: Option<f64>,
    descent_passes: Option<u32>,
    training_epochs: Option<u32>,
    #[serde(default)]
    method: MethodName,
    #[serde(default)]
    format: FormatName,
    damp: Option<f64>,
    dataset: Option<String>,
    column: Option<String>,
    samples: Option<usize>,
    tokens: Option<NonZeroUsize>,
    seq_len: Option<usize>,
    seed: Option<u64>,
    window_bos: Option<bool>,
    desc: Option<String>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum OrderName {
    Natural,
    ActOrder,
    Static,
    GroupAware,
    Folded,
    Auto,
}

impl OrderName {
    fn resolve(self) -> ColumnOrder {
        match self {
            OrderName::Natural => ColumnOrder::Natural,
            OrderName::ActOrder => ColumnOrder::ActOrder,
            OrderName::Static => ColumnOrder::ActOrderStaticGroups,
            OrderName::GroupAware => ColumnOrder::GroupAware,
            OrderName::Folded => ColumnOrder::Folded,
            OrderName::Auto => ColumnOrder::Auto,
        }
    }
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

/// Reads a plan. Top-level `dataset`, `column`, `samples` or `tokens`, `seq_len`, `seed`, `window_bos` and
/// `damp` are for all branches; a `[[branch]]` has `bits`, `group_size`, and any flag of `gptq quantize` by its
/// long name. `seq_len` stands for what the plan says of it, so that `tokens` are counted in such windows;
/// `effort` is that of branches that name none.
pub fn read_plan(
    text: &str,
    seq_len: Option<usize>,
    effort: Effort,
) -> Result<Vec<Permutation>, PlanError> {
    if text.len() > MAX_PLAN_BYTES {
        let bytes = text.len();
        return Err(PlanError::Toml(format!(
            "it has {bytes} bytes; a plan has {MAX_PLAN_BYTES} at most"
        )));
    }
    let plan: PlanFile = toml::from_str(text).map_err(|error| {
        let place = error.span().map_or(String::new(), |span| {
            let line = 1 + text[..span.start].matches('\n').count();
            format!("line {line}: ")
        });
        PlanError::Toml(format!("{place}{}", shown(error.message(), SHOWN_REASON)))
    })?;
    if plan.branch.is_empty() {
        return Err(PlanError::Empty);
    }
    if plan.tokens.contradict() {
        return Err(PlanError::SamplesAndTokens);
    }
    let mut defaults = Defaults::of_quantize();
    defaults.tokens = plan.tokens.over(&defaults.tokens);
    defaults.damp_percent = plan.damp.unwrap_or(defaults.damp_percent);
    defaults.effort = effort;
    let mut names: BTreeMap<String, (usize, bool)> = BTreeMap::new();
    (plan.branch.into_iter().zip(1..))
        .map(|(entry, second)| {
            let is_named = entry.name.is_some();
            let permutation = entry.permutation(&defaults, seq_len)?;
            let branch = shown(&permutation.branch, SHOWN);
            match names.insert(permutation.branch.clone(), (second, is_named)) {
                None => Ok(permutation),
                Some((_, true)) if is_named => Err(PlanError::Twice(branch)),
                Some((first, _)) => Err(PlanError::Unnamed {
                    branch,
                    first,
                    second,
                }),
            }
        })
        .collect()
}

/// Refuses what no matrix can be, wherever it comes from: a preset, a plan, flags, or what a
/// repository remembers.
pub fn check_permutations(permutations: &[Permutation]) -> Result<(), PlanError> {
    if permutations.len() > MAX_BRANCHES {
        let count = permutations.len();
        let text = format!("{count} branches; a matrix has {MAX_BRANCHES} at most");
        return Err(PlanError::Toml(text));
    }
    for permutation in permutations {
        check(permutation).map_err(|reason| PlanError::Branch {
            branch: shown(&permutation.branch, SHOWN),
            reason,
        })?;
    }
    Ok(())
}

fn check(permutation: &Permutation) -> Result<(), String> {
    (permutation.spec.validate()).map_err(|error| shown(&error.to_string(), SHOWN_REASON))?;
    let tokens = &permutation.calibration;
    for (what, value, most) in [
        ("samples", tokens.samples, MAX_SAMPLES),
        ("seq_len", tokens.seq_len, MAX_SEQ_LEN),
    ] {
        // A record of rounding to nearest has no tokens.
        let least = usize::from(permutation.spec.method == Method::Gptq);
        if !(least..=most).contains(&value) {
            return Err(format!("{what} `{value}` is not between 1 and {most}"));
        }
    }
    for (what, text, most) in [
        ("dataset", &tokens.dataset, MAX_DATASET_BYTES),
        ("desc", &permutation.desc, MAX_DESC_BYTES),
    ] {
        if text.len() > most {
            return Err(format!("{what} has {} bytes, {most} at most", text.len()));
        }
        // The text becomes part of a commit message, a table, a path.
        if text.chars().any(char::is_control) {
            let text = shown(text, SHOWN);
            return Err(format!("{what} `{text}` holds a control character"));
        }
    }
    Ok(())
}

impl Tokens {
    /// Whether both exclusive settings are given, as with the flags of `quantize`.
    fn contradict(&self) -> bool {
        self.samples.is_some() && self.tokens.is_some()
    }

    fn over(self, defaults: &Tokens) -> Tokens {
        // Either one sets the amount, so the defaults' other one must not apply.
        let says_how_much = self.samples.is_some() || self.tokens.is_some();
        let (samples, tokens) = match says_how_much {
            true => (self.samples, self.tokens),
            false => (defaults.samples, defaults.tokens),
        };
        Tokens {
            // a column belongs to its data
            column: match self.dataset {
                Some(_) => self.column,
                None => self.column.or_else(|| defaults.column.clone()),
            },
            dataset: self.dataset.or_else(|| defaults.dataset.clone()),
            samples,
            tokens,
            seq_len: self.seq_len.or(defaults.seq_len),
            seed: self.seed.or(defaults.seed),
            window_bos: self.window_bos.or(defaults.window_bos),
        }
    }

    /// In windows; `seq_len` stands for its own.
    fn request(self, seq_len: Option<usize>) -> CalibrationRequest {
        let seq_len = seq_len.or(self.seq_len).unwrap_or_default();
        CalibrationRequest {
            dataset: self.dataset.unwrap_or_default(),
            column: self.column,
            samples: match self.tokens {
                Some(tokens) => tokens.get().div_ceil(seq_len.max(1)),
                None => self.samples.unwrap_or_default(),
            },
            seq_len,
            seed: self.seed.unwrap_or_default(),
            window_bos: self.window_bos,
        }
    }
}

impl BranchEntry {
    fn permutation(
        self,
        defaults: &Defaults,
        seq_len: Option<usize>,
    ) -> Result<Permutation, PlanError> {
        let place = self.name.clone().unwrap_or_else(|| {
            let group = match &self.group_size {
                Group::Size(size) => size.to_string(),
                Group::Word(word) => word.clone(),
            };
            format!("{} bits, group {group}", self.bits)
        });
        let place = shown(&place, SHOWN);
        let branch_wrong = |reason: String| PlanError::Branch {
            branch: place.clone(),
            reason,
        };
        let wrong = |error: SpecError| branch_wrong(shown(&error.to_string(), SHOWN_REASON));
        let order = self.order().map_err(branch_wrong)?;
        let method = match self.method {
            MethodName::Gptq => Method::Gptq,
            MethodName::Rtn => Method::Rtn,
        };
        if self.unsigned_scales && self.no_scale_search {
            let text = "unsigned_scales and no_scale_search exclude each other";
            return Err(branch_wrong(text.to_string()));
        }
        let works = self.effort.is_some()
            || self.input_mismatch.is_some()
            || self.descent_passes.is_some()
            || self.training_epochs.is_some();
        if method == Method::Rtn && (works || self.unsigned_scales) {
            let text = "method rtn looks at no data: effort, input_mismatch, descent_passes, training_epochs and unsigned_scales are for gptq";
            return Err(branch_wrong(text.to_string()));
        }
        let effort = match method {
            Method::Gptq => self.effort.unwrap_or(defaults.effort),
            Method::Rtn => Effort::Fast,
        };
        let searches = !self.no_scale_search && method == Method::Gptq;
        let bits = Bits::try_from(self.bits).map_err(wrong)?;
        let spec = QuantSpec {
            bits,
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
            scale_search: searches,
            full_range: searches && !self.unsigned_scales,
            input_mismatch: (self.input_mismatch).unwrap_or(effort.input_mismatch()),
            descent_passes: (self.descent_passes).unwrap_or(effort.descent_passes()),
            training_epochs: (self.training_epochs).unwrap_or(effort.training_epochs(bits)),
        };
        spec.validate().map_err(wrong)?;
        let tokens = Tokens {
            dataset: self.dataset,
            column: self.column,
            samples: self.samples,
            tokens: self.tokens,
            seq_len: self.seq_len,
            seed: self.seed,
            window_bos: self.window_bos,
        };
        if tokens.contradict() {
            return Err(branch_wrong(PlanError::SamplesAndTokens.to_string()));
        }
        Ok(Permutation {
            branch: self
                .name
                .unwrap_or_else(|| plan_branch_name(&spec, defaults.effort)),
            desc: self.desc.unwrap_or_else(|| describe(&spec)),
            spec,
            calibration: tokens.over(&defaults.tokens).request(seq_len),
        })
    }

    fn order(&self) -> Result<ColumnOrder, String> {
        if let Some(order) = self.order {
            return match self.desc_act || self.static_groups || self.act_group_aware {
                true => Err("order stands for desc_act, static_groups and act_group_aware".into()),
                false => Ok(order.resolve()),
            };
        }
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
mod tests;
