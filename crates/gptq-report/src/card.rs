//! The model card of a repository of branches, or of a single checkpoint.

use gptq_types::outside_name::shown;
use gptq_types::{
    Branch, ColumnOrder, Divergence, EvalRecord, GroupSize, Method, QuantSpec, Reading,
};
use minijinja::{Environment, ErrorKind, UndefinedBehavior, context};
use serde::{Deserialize, Serialize};

use crate::markup::{code, plain, prose};
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
    /// A link that a browser would not open as a page, or run.
    #[error("card: `{0}` is not an address of http or https")]
    Link(String),
    /// No name of a repository on the hub.
    #[error("card: repo `{0}` is not `owner/name`")]
    Repo(String),
    /// A mistake in the template.
    #[error("card template, line {line}: {reason}")]
    Template {
        /// Line of the template.
        line: usize,
        /// The mistake.
        reason: String,
    },
}

/// Facts that no record holds: the model's creator, licence and prompt template.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CardInfo {
    /// Name for people.
    pub model_name: String,
    /// Who made it.
    pub model_creator: Option<String>,
    /// Link to the creator.
    pub model_creator_link: Option<String>,
    /// `owner/name` of the float model.
    pub base_model: Option<String>,
    /// Licence, as the hub spells it.
    pub license: Option<String>,
    /// Languages, as the hub spells them.
    pub language: Vec<String>,
    /// Tags in addition to `gptq`.
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
    scales: &'static str,
    effort: String,
    exllama: String,
    desc: String,
    readings: Vec<Reading>,
    made: String,
    compared: Vec<Compared>,
}

/// Divergence of a branch from the float model, measured when it was made.
#[derive(Serialize)]
struct Compared {
    text: String,
    held_out: bool,
    windows: usize,
    tokens: usize,
    kl: String,
    perplexity: String,
    float_perplexity: String,
}

/// Machete, which optimum picks on Hopper for any shape, refuses widths that are no multiple of these
/// (GPTQModel 7.7, `machete.py`).
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
    let creator_link = info
        .model_creator_link
        .as_deref()
        .map(address)
        .transpose()?;
    let endpoint = address(endpoint)?;
    if let Some(repo) = info.repo.as_ref().filter(|repo| !is_repo(repo)) {
        return Err(CardError::Repo(shown(repo, 80)));
    }
    let link = |id: &String| format!("{endpoint}/{}", in_address(id));
    let reference = (branches.iter()).find_map(|b| Some(&b.record.evaluation.as_ref()?.reference));
    let last = branches.last().unwrap_or(first);
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_trim_blocks(false);
    environment.set_fuel(Some(MAX_STEPS));
    environment.add_filter("plain", |text: String| plain(&text));
    environment.add_filter("code", |text: String| code(&text));
    environment.add_filter("prose", |text: String| prose(&text));
    let rendered = environment.render_str(
        template.unwrap_or(TEMPLATE),
        context! {
            info,
            model_type,
            branches => rows(branches, info.repo.as_ref().map(link)),
            readers => readers(first),
            were_run => were_run(first),
            compared => branches.iter().any(|branch| !branch.run.divergence.is_empty()),
            creator_link,
            prompt_fence => prompt_fence(info),
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
            link: repo_link.map(|link| format!("{link}/tree/{}", in_address(&permutation.branch))),
            bits: spec.bits.width(),
            group_size: match spec.group_size {
                GroupSize::None => "None".to_string(),
                GroupSize::Channels(size) => size.to_string(),
            },
            act_order: match spec.order {
                ColumnOrder::ActOrder => "Yes",
                ColumnOrder::ActOrderStaticGroups => "Yes, static groups",
                ColumnOrder::GroupAware => "Inside groups",
                ColumnOrder::Folded => "Folded",
                ColumnOrder::Auto => "By layer",
                ColumnOrder::Natural => "No",
            },
            damp: spec.damp_percent,
            dataset: calibration.map_or("none".to_string(), |c| dataset_name(&c.dataset)),
            seq_len: calibration.map_or(String::new(), |c| c.seq_len.to_string()),
            size: size(record.weight_bytes),
            bits_per_weight: format!("{:.2}", record.bits_per_weight),
            perplexity: scores.map_or(String::new(), perplexity),
            kl: (scores.and_then(|scores| scores.kl))
                .map_or(String::new(), |kl| format!("{:.4}", gptq_types::kl(kl))),
            scales: match spec.sym && spec.full_range {
                true => "either sign",
                false => "positive",
            },
            effort: effort(spec),
            exllama: match exllama.and_then(|reading| reading.refusal.as_ref()) {
                None => "Yes".to_string(),
                Some(_) => "No".to_string(),
            },
            desc: permutation.desc.clone(),
            readings: record.readings.clone(),
            made: made(branch),
            compared: branch.run.divergence.iter().map(Compared::of).collect(),
        }
    }
}

impl Compared {
    fn of(divergence: &Divergence) -> Self {
        Compared {
            text: divergence.text.clone(),
            held_out: divergence.held_out,
            windows: divergence.windows,
            tokens: divergence.tokens,
            kl: format!("{:.4}", gptq_types::kl(divergence.kl)),
            perplexity: format!("{:.3}", divergence.perplexity),
            float_perplexity: format!("{:.3}", divergence.float_perplexity),
        }
    }
}

/// The flag in a word, or its parts where there is none.
fn effort(spec: &QuantSpec) -> String {
    match (spec.method, spec.effort()) {
        (Method::Rtn, _) => "none".to_string(),
        (_, Some(effort)) => effort.name().to_string(),
        (_, None) => {
            let (share, passes) = (spec.input_mismatch, spec.descent_passes);
            let mut text = format!("mismatch {share}, descent {passes}");
            if spec.trains() {
                text += &format!(", {} epochs", spec.training_epochs);
            }
            text
        }
    }
}

/// A sentence on tokens, what GPTQ gained, and what degraded.
fn made(branch: &Branch) -> String {
    let run = &branch.run;
    let mut text = match &run.calibration {
        Some(c) => format!(
            "{} windows of {} tokens of {} (seed {}){}, on {}",
            c.samples,
            c.seq_len,
            dataset_name(&c.dataset),
            c.seed,
            match c.window_bos {
                Some(true) => ", each beginning with BOS",
                _ => "",
            },
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
            "; output error {:.1} % of rounding to nearest{}",
            100.0 * error / rtn,
            crate::measured(run)
        );
    }
    if let Some(gained) = crate::trained(run) {
        text += &format!("; {gained}");
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

/// Runtimes that read files of these settings here, with their versions; those of the others are
/// known from their source.
fn were_run(branch: &Branch) -> Vec<String> {
    let readings = branch.record.readings.iter();
    readings.filter_map(|reading| reading.run.clone()).collect()
}

/// Checks a name that becomes part of shell commands, which readers copy.
fn is_repo(repo: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    repo.chars().all(known) && repo.matches('/').count() == 1
}

/// An address that may stand in a link.
fn address(text: &str) -> Result<String, CardError> {
    match text.starts_with("https://") || text.starts_with("http://") {
        true => Ok(in_address(text)),
        false => Err(CardError::Link(shown(text, 80))),
    }
}

/// A text as part of an address: what ends a link in Markdown or an attribute in HTML is spelled out.
fn in_address(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_control() || c.is_whitespace() || "()<>[]\"'`\\|".contains(c) {
            true => out.extend(c.to_string().bytes().map(|byte| format!("%{byte:02X}"))),
            false => out.push(c),
        }
    }
    out
}

/// A fence that the prompt's own backticks do not end.
fn prompt_fence(info: &CardInfo) -> String {
    let template = info.prompt_template.as_deref().unwrap_or_default();
    let runs = template.split(|c| c != '`').map(str::len);
    "`".repeat(runs.max().unwrap_or(0).max(2) + 1)
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

#[cfg(test)]
mod tests {
    use super::*;

    fn branch(text: &str) -> Branch {
        let quoted = serde_json::to_string(text).unwrap();
        let spec = serde_json::to_string(&gptq_types::QuantSpec::published()).unwrap();
        let record = format!(
            r#"{{"permutation": {{"branch": "main", "spec": {spec}, "desc": {quoted}, "calibration":
            {{"dataset": {quoted}, "samples": 1, "seq_len": 1, "seed": 0}}}}, "weight_bytes": 1,
            "bits_per_weight": 4.5, "readings": [{{"reader": {quoted}, "refusal": {quoted}}}],
            "evaluation": null}}"#
        );
        let run = format!(
            r#"{{"schema": 1, "tool": {quoted}, "model": {quoted}, "spec": {spec}, "calibration": null,
            "device": {quoted}, "layers": [], "warnings": []}}"#
        );
        Branch {
            record: serde_json::from_str(&record).unwrap(),
            run: serde_json::from_str(&run).unwrap(),
        }
    }

    /// A description, a dataset or a device of a record was printed as it was: a row of the table
    /// ended there, and tags became HTML.
    #[test]
    fn texts_of_records_and_cards_cannot_become_markup() {
        let evil = "x | y\n<script>`[a](javascript:b)";
        let info = CardInfo {
            model_name: evil.to_string(),
            model_creator: Some(evil.to_string()),
            base_model: Some(format!("a/{evil}")),
            prompt_template: Some("```\n{prompt}".to_string()),
            ..CardInfo::default()
        };
        let whole = card(&info, evil, &[branch(evil)], None).unwrap();
        assert!(!whole.contains("<script>"), "{whole}");
        // Before it, texts are quoted as JSON.
        let (_, text) = whole.split_once("\n---\n").unwrap();
        assert!(!text.replace("\\]", "").contains("](javascript:"), "{text}");
        assert!(text.contains("````\n```\n{prompt}\n````"), "{text}");
        let row = text.lines().find(|line| line.starts_with("| main | 4 "));
        let cells = row.unwrap().replace("\\|", "").matches('|').count();
        assert_eq!(cells, 16, "{text}");
        let linked = CardInfo {
            model_creator_link: Some("javascript:alert(1)".to_string()),
            ..CardInfo::default()
        };
        let error = card(&linked, "llama", &[branch("x")], None).unwrap_err();
        assert!(matches!(error, CardError::Link(_)), "{error}");
    }

    fn settings_row(branch: Branch) -> Vec<String> {
        let whole = card(&CardInfo::default(), "llama", &[branch], None).unwrap();
        let row = whole.lines().find(|line| line.starts_with("| main | 4 "));
        row.unwrap().split(" | ").map(str::to_string).collect()
    }

    #[test]
    fn the_table_says_which_signs_scales_have_and_what_the_aim_was() {
        let row = |change: fn(&mut QuantSpec)| {
            let mut branch = branch("x");
            change(&mut branch.record.permutation.spec);
            let row = settings_row(branch);
            (row[5].clone(), row[6].clone())
        };
        let is = |scales: &str, effort: &str| (scales.to_string(), effort.to_string());
        assert_eq!(row(|_| ()), is("positive", "fast"));
        assert_eq!(
            row(|spec| spec.full_range = true),
            is("either sign", "fast")
        );
        let asym = row(|spec| (spec.full_range, spec.sym) = (true, false));
        assert_eq!(asym, is("positive", "fast"));
        let whole = row(|spec| (spec.input_mismatch, spec.descent_passes) = (0.5, 2));
        assert_eq!(whole, is("positive", "balanced"));
        let part = row(|spec| spec.input_mismatch = 0.25);
        assert_eq!(part, is("positive", "mismatch 0.25, descent 0"));
        let rtn = row(|spec| spec.method = Method::Rtn);
        assert_eq!(rtn, is("positive", "none"));
    }

    #[test]
    fn what_a_branch_was_compared_on_is_shown_where_it_was() {
        let of = |branch: Branch| card(&CardInfo::default(), "llama", &[branch], None).unwrap();
        let without = of(branch("x"));
        assert!(without.contains("Perplexity and KL were not measured."));
        assert!(!without.contains("when it was made"), "{without}");
        let mut compared = branch("x");
        compared.run.divergence = vec![
            Divergence {
                text: "a|b.txt".to_string(),
                held_out: true,
                windows: 8,
                tokens: 4096,
                float_perplexity: 20.0,
                perplexity: 21.5,
                kl: 0.0625,
                ..Divergence::default()
            },
            Divergence {
                text: "wikitext2".to_string(),
                windows: 16,
                ..Divergence::default()
            },
        ];
        let with = of(compared);
        assert!(!with.contains("were not measured"), "{with}");
        for row in [
            "| main | a\\|b.txt, beside the calibration windows | 8 | 4096 | 0.0625 | 21.500 | 20.000 |",
            "| main | wikitext2 | 16 | 0 | 0.0000 | 0.000 | 0.000 |",
        ] {
            assert!(with.contains(row), "{row}: {with}");
        }
    }

    #[test]
    fn a_template_without_an_end_is_stopped() {
        let endless =
            "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}";
        let error = card(&CardInfo::default(), "llama", &[branch("x")], Some(endless)).unwrap_err();
        assert!(matches!(error, CardError::Template { .. }), "{error}");
    }
}
