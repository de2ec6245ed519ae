//! The model card of a repository of branches, or of a single checkpoint.

use gptq_types::outside_name::shown;
use gptq_types::{Branch, ColumnOrder, EvalRecord, GroupSize, Reading};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, context};
use serde::{Deserialize, Serialize};

use crate::size;

/// The template that is used where no other is given.
const TEMPLATE: &str = include_str!("../templates/card.md.jinja");
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Instructions of minijinja that a card may take; the built-in one takes some thousands.
const MAX_STEPS: u64 = 5_000_000;
/// Characters of an error of a template that are repeated.
const SHOWN_CHARACTERS: usize = 160;

/// A card that could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum CardError {
    /// No finished branch.
    #[error("a card needs at least one finished branch")]
    Empty,
    /// A mistake in the template.
    #[error("card template, line {line}: {reason}")]
    Template {
        /// Where.
        line: usize,
        /// What.
        reason: String,
    },
}

/// What no record can know: whose model it is and how it is to be spoken to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CardInfo {
    /// Name for people.
    pub model_name: String,
    /// Who made it.
    pub model_creator: Option<String>,
    /// Where they are found.
    pub model_creator_link: Option<String>,
    /// `owner/name` of the float model.
    pub base_model: Option<String>,
    /// Licence, as the hub spells it.
    pub license: Option<String>,
    /// Languages, as the hub spells them.
    pub language: Vec<String>,
    /// Tags beside `gptq`.
    pub tags: Vec<String>,
    /// With `{prompt}` where the text goes.
    pub prompt_template: Option<String>,
    /// Who publishes the checkpoints.
    pub quantized_by: Option<String>,
    /// `owner/name` under which they are published.
    pub repo: Option<String>,
    /// Address of the hub; that of Hugging Face where absent.
    pub endpoint: Option<String>,
    /// The float model's own card, without its front matter.
    pub original_card: Option<String>,
}

/// A row of the tables, ready to be printed.
#[derive(Serialize)]
struct Row {
    name: String,
    link: Option<String>,
    bits: u32,
    group_size: String,
    act_order: &'static str,
    damp: f64,
    dataset: String,
    seq_len: String,
    size: String,
    bits_per_weight: String,
    perplexity: String,
    kl: String,
    exllama: String,
    desc: String,
    readings: Vec<Reading>,
    made: String,
}

/// What widths are a multiple of for Machete, the kernel that optimum chooses on Hopper whatever a model's shapes
/// are: it refuses others (GPTQModel 7.7, `machete.py`).
const MACHETE_OUTPUTS: usize = 128;
const MACHETE_INPUTS: usize = 64;

/// Renders the card of `branches`; `template` in place of the built-in one. Every number comes
/// from records.
pub fn card(
    info: &CardInfo,
    model_type: &str,
    branches: &[Branch],
    template: Option<&str>,
) -> Result<String, CardError> {
    let first = branches.first().ok_or(CardError::Empty)?;
    let endpoint = info.endpoint.as_deref().unwrap_or(DEFAULT_ENDPOINT);
    let link = |id: &String| format!("{endpoint}/{id}");
    let reference = (branches.iter()).find_map(|b| Some(&b.record.evaluation.as_ref()?.reference));
    let last = branches.last().unwrap_or(first);
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_trim_blocks(false);
    environment.set_fuel(Some(MAX_STEPS));
    let rendered = environment.render_str(
        template.unwrap_or(TEMPLATE),
        context! {
            info,
            model_type,
            branches => rows(branches, info.repo.as_ref().map(link)),
            readers => readers(first),
            bit_widths => bit_widths(branches),
            tool => &first.run.tool,
            reference => reference.map(|record| context! {
                perplexity => perplexity(record),
                protocol => &record.protocol,
            }),
            base_link => info.base_model.as_ref().filter(|id| id.contains('/')).map(link),
            repo => &info.repo,
            repo_link => info.repo.as_ref().map(link),
            example => &last.record.permutation.branch,
            folder => folder(info),
            python_prompt => python_prompt(info),
            plain_kernel => (last.run.layers.iter())
                .any(|layer| !layer.out_features.is_multiple_of(MACHETE_OUTPUTS)
                    || !layer.in_features.is_multiple_of(MACHETE_INPUTS)),
            example_bits => u32::from(u8::from(last.record.permutation.spec.bits)),
        },
    );
    rendered.map_err(|error| CardError::Template {
        line: error.line().unwrap_or(0),
        reason: match error.detail() {
            _ if error.kind() == ErrorKind::OutOfFuel => {
                format!("it takes more than {MAX_STEPS} steps")
            }
            Some(detail) => shown(detail, SHOWN_CHARACTERS),
            None => shown(&error.to_string(), SHOWN_CHARACTERS),
        },
    })
}

fn rows(branches: &[Branch], repo_link: Option<String>) -> Vec<Row> {
    (branches.iter())
        .map(|branch| Row::of(branch, repo_link.as_deref()))
        .collect()
}

impl Row {
    fn of(branch: &Branch, repo_link: Option<&str>) -> Self {
        let record = &branch.record;
        let (permutation, spec) = (&record.permutation, &record.permutation.spec);
        let calibration = branch.run.calibration.as_ref();
        let scores = record.evaluation.as_ref().map(|both| &both.branch);
        let exllama = record.readings.iter().find(|r| r.reader == "ExLlama");
        Row {
            name: permutation.branch.clone(),
            link: repo_link.map(|link| format!("{link}/tree/{}", permutation.branch)),
            bits: spec.bits.width(),
            group_size: match spec.group_size {
                GroupSize::None => "None".to_string(),
                GroupSize::Channels(size) => size.to_string(),
            },
            act_order: match spec.order {
                ColumnOrder::ActOrder => "Yes",
                ColumnOrder::ActOrderStaticGroups => "Yes, static groups",
                ColumnOrder::GroupAware => "Inside groups",
                ColumnOrder::Natural => "No",
            },
            damp: spec.damp_percent,
            dataset: calibration.map_or("none".to_string(), |c| dataset_name(&c.dataset)),
            seq_len: calibration.map_or(String::new(), |c| c.seq_len.to_string()),
            size: size(record.weight_bytes),
            bits_per_weight: format!("{:.2}", record.bits_per_weight),
            perplexity: scores.map_or(String::new(), perplexity),
            kl: (scores.and_then(|scores| scores.kl))
                .map_or(String::new(), |kl| format!("{kl:.4}")),
            exllama: match exllama.and_then(|reading| reading.refusal.as_ref()) {
                None => "Yes".to_string(),
                Some(_) => "No".to_string(),
            },
            desc: permutation.desc.clone(),
            readings: record.readings.clone(),
            made: made(branch),
        }
    }
}

/// A sentence on tokens, what GPTQ gained, and what degraded.
fn made(branch: &Branch) -> String {
    let run = &branch.run;
    let mut text = match &run.calibration {
        Some(c) => format!(
            "{} windows of {} tokens of {} (seed {}), on {}",
            c.samples,
            c.seq_len,
            dataset_name(&c.dataset),
            c.seed,
            run.device
        ),
        None => "rounded to nearest, without calibration".to_string(),
    };
    if run.shared_hessian {
        text += "; Hessians of one pass of the float model, shared by the branches, so that no \
                 layer made up for the errors before it";
    }
    let losses = || run.layers.iter().filter_map(|layer| layer.loss.as_ref());
    let error: f64 = losses().map(|loss| loss.error).sum();
    let rtn: f64 = losses().map(|loss| loss.rtn_error).sum();
    if rtn > 0.0 {
        text += &format!(
            "; output error {:.1} % of rounding to nearest",
            100.0 * error / rtn
        );
    }
    let worse = run
        .layers
        .iter()
        .filter(|layer| layer.is_worse_than_rtn())
        .count();
    let damped = losses().filter(|loss| loss.damp_escalations > 0).count();
    let dead: usize = losses().map(|loss| loss.dead_channels).sum();
    for (count, what) in [
        (worse, "layers above it"),
        (damped, "layers damped further than asked"),
        (dead, "input channels that no token used"),
    ] {
        if count > 0 {
            text += &format!("; {count} {what}");
        }
    }
    text + "."
}

fn perplexity(record: &EvalRecord) -> String {
    let spread = record.perplexity * record.nll_stderr;
    format!("{:.3} ± {spread:.3}", record.perplexity)
}

/// A file by its name alone: where it lay is nobody's business.
fn dataset_name(dataset: &str) -> String {
    let (name, file) = dataset.split_once('=').unwrap_or((dataset, ""));
    match file {
        "" => name.rsplit('/').next().unwrap_or(name).to_string(),
        _ => name.to_string(),
    }
}

fn readers(branch: &Branch) -> Vec<String> {
    let readings = branch.record.readings.iter();
    readings.map(|reading| reading.reader.clone()).collect()
}

fn bit_widths(branches: &[Branch]) -> String {
    let mut widths: Vec<u32> = (branches.iter())
        .map(|branch| branch.record.permutation.spec.bits.width())
        .collect();
    widths.sort();
    widths.dedup();
    let words: Vec<String> = widths.iter().map(u32::to_string).collect();
    words.join(" or ")
}

fn folder(info: &CardInfo) -> String {
    match &info.repo {
        Some(repo) => repo.rsplit('/').next().unwrap_or(repo).to_string(),
        None => {
            let plain = |c: char| c.is_alphanumeric() || "._-".contains(c);
            let words = info
                .model_name
                .split(|c| !plain(c))
                .filter(|word| !word.is_empty());
            format!("{}-GPTQ", words.collect::<Vec<_>>().join("-"))
        }
    }
}

/// A Python expression for the text of a prompt.
fn python_prompt(info: &CardInfo) -> String {
    match &info.prompt_template {
        None => "prompt".to_string(),
        Some(template) => {
            let quoted = serde_json::to_string(template).unwrap_or_default();
            format!("{quoted}.replace(\"{{prompt}}\", prompt)")
        }
    }
}
