//! Texts of both renderings: degradations, settings of a branch, scored texts.

use gptq_types::{CheckpointFormat, Phase, RunRecord};

use super::data::{Report, Row, Text};
use super::degraded::Degraded;
use super::format::{duration, perplexity_with_error, thousands};
use crate::{divergence, size, trained};

/// Names under one heading, each with a remark.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Listed {
    pub(super) heading: String,
    pub(super) items: Vec<(String, String)>,
}

/// Degradations of a run, by kind; empty if there are none.
pub(super) fn degradations(found: &Degraded) -> Vec<Listed> {
    let mut lists = vec![
        Listed {
            heading: counted(found.worse.len(), "layer is", "layers are")
                + " worse than rounding to nearest",
            items: (found.worse.iter())
                .map(|w| (w.layer.clone(), format!("{:.3} times its error", w.ratio)))
                .collect(),
        },
        Listed {
            heading: counted(found.damped.len(), "layer was", "layers were")
                + " damped further than asked",
            items: (found.damped.iter())
                .map(|d| {
                    let grown = counted(d.escalations as usize, "step", "steps");
                    let text = format!("{} instead of {}, in {grown}", d.used, d.asked);
                    (d.layer.clone(), text)
                })
                .collect(),
        },
        Listed {
            heading: counted(found.dead.len(), "layer has", "layers have")
                + " input channels that no token used",
            items: (found.dead.iter())
                .map(|d| (d.layer.clone(), format!("{} of {}", d.channels, d.of)))
                .collect(),
        },
    ];
    lists.extend(found.warnings.iter().map(|warning| {
        Listed {
            heading: format!("Warning: {}", warning.text),
            items: (warning.modules.iter())
                .map(|module| (module.clone(), String::new()))
                .collect(),
        }
    }));
    let told = |list: &Listed| !list.items.is_empty() || list.heading.starts_with("Warning");
    lists.retain(told);
    lists
}

/// A line on a run's degradations, shown alone or with their list.
pub(super) fn verdict(row: &Row) -> String {
    let Some(found) = &row.degraded else {
        return "No run record, so nothing is known of its layers.".to_string();
    };
    let nothing = match (found.is_nothing(), found.no_layer()) {
        (true, _) => "Nothing.",
        (false, true) if found.unmeasured < found.layers => "No layer.",
        _ => "",
    };
    let measured = match (found.unmeasured, found.layers) {
        (0, layers) => format!("{} measured.", counted(layers, "layer was", "layers were")),
        (some, layers) if some == layers => {
            "Errors of layers were not measured: rounding to nearest sees no inputs.".to_string()
        }
        (some, layers) => format!("The errors of {some} of {layers} layers were not measured."),
    };
    format!("{nothing} {measured}").trim().to_string()
}

/// A label and its text.
pub(super) type Fact = (String, String);

/// Facts shared by all runs, if there are several.
pub(super) fn shared_facts(report: &Report) -> Vec<Fact> {
    let mut runs = report.rows.iter().filter(|row| row.run.is_some());
    let Some(first) = runs.next().map(|row| facts(report, row)) else {
        return Vec::new();
    };
    let others: Vec<Vec<Fact>> = runs.map(|row| facts(report, row)).collect();
    let of_all = |fact: &Fact| others.iter().all(|facts| facts.contains(fact));
    match others.is_empty() {
        true => Vec::new(),
        false => first.into_iter().filter(of_all).collect(),
    }
}

/// Facts of a row that are not shared.
pub(super) fn own_facts(report: &Report, row: &Row) -> Vec<Fact> {
    let shared = shared_facts(report);
    let mut facts = facts(report, row);
    facts.retain(|fact| row.run.is_none() || !shared.contains(fact));
    facts
}

/// Facts on how a branch was made.
fn facts(report: &Report, row: &Row) -> Vec<Fact> {
    let mut facts: Vec<(&str, String)> = Vec::new();
    if let Some(run) = &row.run {
        facts.extend(run_facts(run));
    }
    for score in &row.scores {
        let seconds = score.record.seconds;
        if seconds > 0.0 {
            let which = match report.texts.len() {
                1 => String::new(),
                _ => format!(" on text {}", score.text + 1),
            };
            facts.push(("Scored", format!("in {}{which}", duration(seconds))));
        }
    }
    (facts.into_iter())
        .map(|(label, value)| (label.to_string(), value))
        .collect()
}

fn run_facts(run: &RunRecord) -> Vec<(&'static str, String)> {
    let mut facts = vec![("Model", run.model.clone())];
    match &run.calibration {
        Some(c) => {
            let tokens = thousands(c.tokens as u64);
            let windows = format!("{} windows of {}", c.samples, c.seq_len);
            let drawn = format!("{tokens} in {windows} of {}, seed {}", c.dataset, c.seed);
            facts.push(("Tokens", drawn));
            facts.push(("Drawn", c.rule.clone()));
            facts.push(("Token hash", c.token_sha256.clone()));
        }
        None => facts.push(("Tokens", "none: rounded to nearest".to_string())),
    }
    if run.shared_hessian {
        let text = "of one pass of the float model, shared with other branches by `gptq matrix \
                    --shared-hessian`; the command above has its own pass and gives other codes";
        facts.push(("Hessians", text.to_string()));
    }
    if let Some(tokenizer) = &run.tokenizer {
        facts.push(("Tokenizer", format!("of another folder, {tokenizer}")));
    }
    if let Some(gained) = trained(run) {
        facts.push(("Training", gained));
    }
    for compared in &run.divergence {
        facts.push(("Against the float model", divergence(compared)));
    }
    facts.push((
        "Zeros",
        match run.spec.format {
            CheckpointFormat::Gptq => "v1, stored as zero - 1".to_string(),
            CheckpointFormat::GptqV2 => "v2, stored as they are".to_string(),
        },
    ));
    if !run.device.is_empty() {
        let peak = run.gpu_memory_peak.filter(|&peak| peak > 0);
        let peak = peak.map_or(String::new(), |peak| {
            format!(", at most {} of its memory", size(peak))
        });
        facts.push(("Device", format!("{}{peak}", run.device)));
    }
    if run.seconds > 0.0 {
        facts.push(("Time", duration(run.seconds) + &phases(run)));
    }
    facts.push(("Made by", run.tool.clone()));
    facts
}

fn phases(run: &RunRecord) -> String {
    let mut phases: Vec<(&Phase, &f64)> = run.phases.seconds.iter().collect();
    phases.sort_by(|one, other| other.1.total_cmp(one.1));
    let words: Vec<String> = (phases.into_iter())
        .map(|(phase, seconds)| {
            let name = serde_json::to_value(phase).unwrap_or_default();
            let name = name.as_str().unwrap_or_default().to_string();
            format!("{name} {}", duration(*seconds))
        })
        .collect();
    match words.is_empty() {
        true => String::new(),
        false => format!(", of it {}", words.join(", ")),
    }
}

/// Facts about a scored text.
pub(super) fn text_facts(report: &Report, index: usize, text: &Text) -> Vec<Fact> {
    let mut facts = vec![
        ("Text", text.protocol.clone()),
        (
            "Windows",
            format!(
                "{} of {} tokens",
                thousands(text.windows as u64),
                text.seq_len
            ),
        ),
        ("Token hash", text.token_sha256.clone()),
    ];
    let reference = match (report.reference(index), &text.reference) {
        (Some(record), Some(name)) => format!(
            "{} ({name}, {})",
            perplexity_with_error(record.perplexity, record.nll_stderr),
            record.kind
        ),
        _ => "none was scored".to_string(),
    };
    facts.push(("Reference perplexity", reference));
    (facts.into_iter())
        .map(|(label, value)| (label.to_string(), value))
        .collect()
}

fn counted(count: usize, one: &str, several: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { several })
}
