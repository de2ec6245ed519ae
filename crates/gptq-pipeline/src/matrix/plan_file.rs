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

/// What a branch has where the plan says nothing: as `gptq quantize`.
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

/// Reads a plan. Top-level `dataset`, `column`, `samples` or `tokens`, `seq_len`, `seed` and `damp` are for
/// all branches; a `[[branch]]` has `bits`, `group_size`, and any flag of `gptq quantize` by its long name.
/// `seq_len` stands for what the plan says of it, so that `tokens` are counted in such windows; `effort` is
/// that of branches that name none.
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
        // It becomes part of a commit's message, a table, a path.
        if text.chars().any(char::is_control) {
            let text = shown(text, SHOWN);
            return Err(format!("{what} `{text}` holds a control character"));
        }
    }
    Ok(())
}

impl Tokens {
    /// As the flags of `quantize`.
    fn contradict(&self) -> bool {
        self.samples.is_some() && self.tokens.is_some()
    }

    fn over(self, defaults: &Tokens) -> Tokens {
        // Either says how much, so the other one of the defaults is no longer meant.
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
        let works =
            self.effort.is_some() || self.input_mismatch.is_some() || self.descent_passes.is_some();
        if method == Method::Rtn && (works || self.unsigned_scales) {
            let text = "method rtn looks at no data: effort, input_mismatch, descent_passes and unsigned_scales are for gptq";
            return Err(branch_wrong(text.to_string()));
        }
        let effort = match method {
            Method::Gptq => self.effort.unwrap_or(defaults.effort),
            Method::Rtn => Effort::Fast,
        };
        let searches = !self.no_scale_search && method == Method::Gptq;
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
            scale_search: searches,
            full_range: searches && !self.unsigned_scales,
            input_mismatch: (self.input_mismatch).unwrap_or(effort.input_mismatch()),
            descent_passes: (self.descent_passes).unwrap_or(effort.descent_passes()),
        };
        spec.validate().map_err(wrong)?;
        let tokens = Tokens {
            dataset: self.dataset,
            column: self.column,
            samples: self.samples,
            tokens: self.tokens,
            seq_len: self.seq_len,
            seed: self.seed,
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
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<Permutation>, String> {
        read_plan(text, None, Effort::default()).map_err(|error| error.to_string())
    }

    #[test]
    fn branches_inherit_and_override() {
        let plan = "
            dataset = 'rows.jsonl'
            column = 'body'
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
            [[branch]]
            bits = 3
            group_size = 64
            dataset = 'c4'
        ";
        let [main, eight, three] = read(plan).unwrap().try_into().unwrap();
        assert_eq!(main.branch, "main");
        assert_eq!(main.calibration.dataset, "rows.jsonl");
        let columns = [&main, &eight, &three].map(|branch| branch.calibration.column.as_deref());
        assert_eq!(columns, [Some("body"), Some("body"), None]);
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

    /// As many windows as hold the tokens, of the length that the branch ends up with.
    #[test]
    fn tokens_are_counted_in_windows_of_the_branch() {
        let plan = "
            tokens = 5000
            [[branch]]
            name = 'all'
            bits = 4
            group_size = 64
            [[branch]]
            name = 'short'
            bits = 4
            group_size = 64
            seq_len = 512
            [[branch]]
            name = 'counted'
            bits = 4
            group_size = 64
            samples = 7
            [[branch]]
            name = 'own'
            bits = 4
            group_size = 64
            tokens = 2048
        ";
        let samples = |seq_len| -> Vec<usize> {
            let branches = read_plan(plan, seq_len, Effort::default()).unwrap();
            (branches.iter())
                .map(|branch| branch.calibration.samples)
                .collect()
        };
        assert_eq!(samples(None), [3, 10, 7, 1]);
        assert_eq!(samples(Some(100)), [50, 50, 7, 21]);
        let counted = plan.replace("tokens = 5000", "samples = 9");
        let branches = read(&counted).unwrap();
        assert_eq!(branches[0].calibration.samples, 9);
        assert_eq!(branches[3].calibration.samples, 1);
    }

    /// All of these had one name, and a plan with two of them was refused.
    #[test]
    fn what_makes_other_codes_has_another_name() {
        let plan = [
            "",
            "effort = 'fast'",
            "input_mismatch = 0.25",
            "unsigned_scales = true",
            "unsigned_scales = true\neffort = 'fast'",
        ]
        .map(|rest| format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}\n"))
        .concat();
        let branches = read(&plan).unwrap();
        let names: Vec<&str> = (branches.iter())
            .map(|branch| {
                let name = branch.branch.strip_prefix("gptq-4bit-64g-actorder_False");
                name.unwrap()
            })
            .collect();
        let wanted = [
            "",
            "-fast",
            "-mismatch_0.25-descent_2",
            "-unsigned",
            "-fast-unsigned",
        ];
        assert_eq!(names, wanted);
    }

    /// `samples = 4611686018427387904` wrapped: the plan said `0 s | 158 MB`.
    #[test]
    fn what_no_run_can_have_is_refused_before_any_is_estimated() {
        let checked = |rest: &str| {
            let plan = format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}");
            let asked = read_plan(&plan, None, Effort::default())?;
            check_permutations(&asked)
        };
        checked("samples = 1048576").unwrap();
        let long = format!("desc = '{}'", "x".repeat(1001));
        for (rest, named) in [
            (
                "samples = 4611686018427387904",
                "samples `4611686018427387904`",
            ),
            ("samples = 0", "samples `0`"),
            ("samples = -1", "line 4"),
            ("samples = 99999999999999999999", "line"),
            (
                "seq_len = 9223372036854775807",
                "seq_len `9223372036854775807`",
            ),
            ("seq_len = 0", "seq_len `0`"),
            ("damp = nan", "damp"),
            ("damp = inf", "damp"),
            ("dataset = \"a\\u0000b\"", "holds a control character"),
            ("desc = \"a\\nb\"", "holds a control character"),
            (&long, "desc has 1001 bytes"),
            ("unknown = 1", "unknown field `unknown`"),
            ("samples = 1\nsamples = 2", "duplicate"),
        ] {
            let error = checked(rest).expect_err(rest).to_string();
            assert!(error.contains(named), "{error}");
            assert!(!error.contains('\n') && error.len() < 400, "{error}");
        }
        let many = "[[branch]]\nbits = 4\ngroup_size = 64\nname = 'X'\n";
        let many: String = (0..300)
            .map(|index| many.replace('X', &format!("b{index}")))
            .collect();
        let error =
            check_permutations(&read_plan(&many, None, Effort::default()).unwrap()).unwrap_err();
        assert!(error.to_string().contains("300 branches"), "{error}");
        assert!(read_plan(&"#".repeat(MAX_PLAN_BYTES + 1), None, Effort::default()).is_err());
    }

    #[test]
    fn orders_have_names_of_their_own() {
        let made = |rest: &str| {
            let text = format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}");
            let made = read(&text).unwrap().remove(0);
            (made.spec.order, made.branch)
        };
        for (short, flags) in [
            ("natural", ""),
            ("act-order", "desc_act = true"),
            ("static", "desc_act = true\nstatic_groups = true"),
            ("group-aware", "act_group_aware = true"),
        ] {
            assert_eq!(made(&format!("order = '{short}'")), made(flags), "{short}");
        }
        for order in [ColumnOrder::Folded, ColumnOrder::Auto] {
            let made = made(&format!("order = '{}'", order.name()));
            let branch = format!("gptq-4bit-64g-actorder_{}", order.name());
            assert_eq!(made, (order, branch));
        }
        assert_eq!(made("order = 'static'").1, "gptq-4bit-64g-actorder_static");
    }

    #[test]
    fn grids_and_the_aim_are_those_of_quantize() {
        let spec = |rest: &str| {
            let text = format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}");
            let spec = read(&text).unwrap()[0].spec.clone();
            let grids = (spec.scale_search, spec.full_range);
            (grids, spec.input_mismatch, spec.descent_passes)
        };
        let searched = (true, true);
        assert_eq!(spec(""), (searched, 0.5, 2));
        assert_eq!(spec("effort = 'fast'"), (searched, 0.0, 0));
        assert_eq!(spec("effort = 'balanced'"), (searched, 0.5, 2));
        assert_eq!(spec("input_mismatch = 0.25"), (searched, 0.25, 2));
        assert_eq!(spec("descent_passes = 3"), (searched, 0.5, 3));
        let part = "effort = 'balanced'\ndescent_passes = 0";
        assert_eq!(spec(part), (searched, 0.5, 0), "a part of an effort");
        assert_eq!(spec("unsigned_scales = true"), ((true, false), 0.5, 2));
        assert_eq!(spec("no_scale_search = true"), ((false, false), 0.5, 2));
        assert_eq!(spec("method = 'rtn'"), ((false, false), 0.0, 0));
    }

    #[test]
    fn what_a_plan_gets_wrong_is_named() {
        let entry = |rest: &str| format!("[[branch]]\nbits = 4\ngroup_size = 64\n{rest}");
        for (plan, named) in [
            (String::new(), "no [[branch]]"),
            (entry("bit = 4"), "unknown field `bit`"),
            (
                entry("[[branch]]\nbits = 4\ngroup_size = 64\ndamp = 0.2"),
                "branches 1 and 2 would both be `gptq-4bit-64g-actorder_False`",
            ),
            (
                entry("name = 'a'\n[[branch]]\nbits = 8\ngroup_size = 64\nname = 'a'"),
                "branch `a` is listed twice",
            ),
            (
                entry("samples = 8\ntokens = 4096"),
                "tokens stands for samples",
            ),
            (
                format!("samples = 8\ntokens = 4096\n{}", entry("")),
                "tokens stands for samples",
            ),
            (entry("tokens = 0"), "nonzero"),
            (entry("").replace("64", "63"), "group size `63`"),
            (entry("").replace('4', "5"), "bits `5`"),
            (
                entry("static_groups = true"),
                "static_groups is for desc_act",
            ),
            (entry("damp = 1.5"), "damp percent `1.5`"),
            (
                entry("order = 'static'\ndesc_act = true"),
                "order stands for",
            ),
            (entry("order = 'sorted'"), "unknown variant `sorted`"),
            (entry("input_mismatch = 1.5"), "input mismatch `1.5`"),
            (entry("effort = 'best'"), "unknown variant `best`"),
            (
                entry("method = 'rtn'\neffort = 'balanced'"),
                "method rtn looks at no data",
            ),
            (entry("descent_passes = 17"), "descent passes `17`"),
            (
                entry("method = 'rtn'\ndescent_passes = 1"),
                "method rtn looks at no data",
            ),
            (
                entry("method = 'rtn'\nunsigned_scales = true"),
                "method rtn looks at no data",
            ),
            (
                entry("unsigned_scales = true\nno_scale_search = true"),
                "exclude each other",
            ),
            (format!("datset = 'c4'\n{}", entry("")), "datset"),
        ] {
            let error = read(&plan).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
