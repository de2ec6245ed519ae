//! The comparison itself.

use gptq_types::{Figures, LayerFigures, Overall, Tolerances};
use serde::Serialize;

use super::{LayerOutcome, Outcome};

/// The result of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// Inside its tolerance, or the same bytes.
    Within,
    /// Better by more than the tolerance.
    Better,
    /// Worse by more than the tolerance.
    Worse,
    /// The run stopped before it.
    NotRun,
}

/// The figure that a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Measure {
    OutputError,
    FileError,
    Packing,
    Layout,
    Presence,
    Damping,
    DampingEscalations,
    DeadChannels,
    ReferenceNll,
    Nll,
    Kl,
    Top1Agreement,
}

impl Measure {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Measure::OutputError => "output error",
            Measure::FileError => "error of the files against the solver's",
            Measure::Packing => "packing",
            Measure::Layout => "layout of the words",
            Measure::Presence => "presence",
            Measure::Damping => "damping",
            Measure::DampingEscalations => "damping escalations",
            Measure::DeadChannels => "dead input channels",
            Measure::ReferenceNll => "float model's log-likelihood, nats",
            Measure::Nll => "log-likelihood, nats",
            Measure::Kl => "KL divergence, nats",
            Measure::Top1Agreement => "share of equal top tokens",
        }
    }

    /// Whether its tolerance is a share of the baseline's figure.
    pub fn is_relative(self) -> bool {
        matches!(
            self,
            Measure::OutputError | Measure::FileError | Measure::Kl
        )
    }
}

/// Something beyond its tolerance.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// Whether the figure got worse; otherwise it got better.
    pub worse: bool,
    /// The figure that was compared.
    pub measure: Measure,
    /// The baseline's value, if there is one.
    pub baseline: Option<f64>,
    /// The current value.
    pub found: Option<f64>,
    /// The tolerance, where there is one.
    pub tolerance: Option<f64>,
    /// A sentence.
    pub text: String,
}

/// A linear, or a figure of the whole model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Case {
    /// The module, or the name of the figure.
    pub subject: String,
    /// The result.
    pub standing: Standing,
    /// Whether a linear has the baseline's bytes; absent for the whole model.
    pub same_bytes: Option<bool>,
    /// The linear's output error, or the figure.
    pub baseline: Option<f64>,
    /// The current value.
    pub found: Option<f64>,
    /// Differences beyond their tolerance.
    pub findings: Vec<Finding>,
}

/// All cases.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// The baseline file as given.
    pub baseline: String,
    /// The judged run or folder, in words.
    pub judged: String,
    /// Instruction set that the baseline was made on.
    pub baseline_processor: String,
    /// Instruction set of the current measurement.
    pub processor: String,
    /// Scores of the baseline.
    pub baseline_overall: Overall,
    /// Current scores.
    pub overall: Option<Overall>,
    /// Linears in the order of the data, then figures of the whole model.
    pub cases: Vec<Case>,
}

impl Verdict {
    /// Whether something got worse by more than its tolerance.
    pub fn is_red(&self) -> bool {
        self.count(Standing::Worse) > 0
    }

    /// Number of cases with this result.
    pub fn count(&self, standing: Standing) -> usize {
        let ended = self.cases.iter().filter(|case| case.standing == standing);
        ended.count()
    }
}

/// Compares an outcome with the figures of `baseline`; `judged` describes the outcome in words.
pub fn judge(baseline: &str, judged: &str, figures: &Figures, found: &Outcome) -> Verdict {
    let mut cases = layers(figures, found);
    cases.extend(overall(figures, found));
    Verdict {
        baseline: baseline.to_string(),
        judged: judged.to_string(),
        baseline_processor: figures.processor.clone(),
        processor: found.processor.clone(),
        baseline_overall: figures.overall,
        overall: found.overall,
        cases,
    }
}

fn layers(figures: &Figures, found: &Outcome) -> Vec<Case> {
    // After a linear that differs from the solver's, inputs differ from those that the solver saw, so
    // its reported losses cannot be compared.
    let mut faithful = true;
    let mut cases: Vec<Case> = (figures.layers.iter())
        .map(|was| {
            let now = found.layers.iter().find(|now| now.layer == was.layer);
            let findings = match (now, &found.unfaithful) {
                (Some(now), _) => compare_layer(was, now, &figures.tolerances, &mut faithful),
                (None, Some((layer, text))) if *layer == was.layer => {
                    vec![plain(Measure::Packing, text.clone())]
                }
                (None, Some(_)) => return not_run(&was.layer.0, Some(was.loss.error)),
                (None, None) => vec![plain(Measure::Presence, "is not there".to_string())],
            };
            Case {
                subject: was.layer.to_string(),
                standing: standing(&findings),
                same_bytes: now.map(|now| now.tensors == was.tensors),
                baseline: Some(was.loss.error),
                found: now.map(|now| now.file_error),
                findings,
            }
        })
        .collect();
    let known = |now: &&LayerOutcome| figures.layers.iter().all(|was| was.layer != now.layer);
    cases.extend(found.layers.iter().filter(known).map(|now| Case {
        subject: now.layer.to_string(),
        standing: Standing::Worse,
        same_bytes: None,
        baseline: None,
        found: Some(now.file_error),
        findings: vec![plain(
            Measure::Presence,
            "is not in the baseline".to_string(),
        )],
    }));
    cases
}

fn compare_layer(
    was: &LayerFigures,
    now: &LayerOutcome,
    tolerances: &Tolerances,
    faithful: &mut bool,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    if now.tensors != was.tensors {
        if now.content == was.content {
            let text = "reads as the baseline does, but its words hold the codes in another layout";
            findings.push(plain(Measure::Layout, text.to_string()));
        }
        if let Some(solver) = now.recorded.as_ref().filter(|_| *faithful) {
            let limit = tolerances.file_error.value;
            let apart = (now.file_error - solver.error).abs();
            if !within(apart, solver.error.abs() * limit) {
                *faithful = false;
                let text = format!(
                    "the files do not hold what the solver chose: their output error is {}, the \
                     solver reported {}",
                    digits(now.file_error),
                    digits(solver.error)
                );
                findings.push(Finding {
                    worse: true,
                    measure: Measure::FileError,
                    baseline: Some(solver.error),
                    found: Some(now.file_error),
                    tolerance: Some(limit),
                    text,
                });
            }
        }
        let limit = tolerances.layer_error.value;
        findings.extend(beyond(
            Measure::OutputError,
            was.loss.error,
            now.file_error,
            limit,
        ));
    }
    if let Some(loss) = &now.recorded {
        findings.extend(changed(
            Measure::Damping,
            was.loss.damp_used,
            loss.damp_used,
            true,
        ));
        let counts = [
            (
                Measure::DampingEscalations,
                was.loss.damp_escalations as f64,
                loss.damp_escalations as f64,
            ),
            (
                Measure::DeadChannels,
                was.loss.dead_channels as f64,
                loss.dead_channels as f64,
            ),
        ];
        for (measure, was, now) in counts {
            findings.extend(changed(measure, was, now, now > was));
        }
    }
    findings
}

/// A figure that has no tolerance.
fn changed(measure: Measure, was: f64, now: f64, worse: bool) -> Option<Finding> {
    (was != now).then(|| Finding {
        worse,
        measure,
        baseline: Some(was),
        found: Some(now),
        tolerance: None,
        text: format!("{} is {now}, was {was}", measure.name()),
    })
}

/// A figure with a tolerance.
fn beyond(measure: Measure, was: f64, now: f64, tolerance: f64) -> Option<Finding> {
    let allowed = match measure.is_relative() {
        true => was.abs() * tolerance,
        false => tolerance,
    };
    let worse_by = match measure {
        Measure::Top1Agreement => was - now,
        _ => now - was,
    };
    // A figure that is not a number is never within.
    let worse = !within(worse_by, allowed);
    let better = -worse_by > allowed;
    (worse || better).then(|| Finding {
        worse,
        measure,
        baseline: Some(was),
        found: Some(now),
        tolerance: Some(tolerance),
        text: format!(
            "{} is {}, was {} ({}, tolerance {})",
            measure.name(),
            digits(now),
            digits(was),
            change(measure, was, now),
            limit(measure, tolerance),
        ),
    })
}

fn within(difference: f64, allowed: f64) -> bool {
    difference <= allowed
}

fn overall(figures: &Figures, found: &Outcome) -> Vec<Case> {
    let tolerances = &figures.tolerances;
    let limits = [
        (Measure::ReferenceNll, tolerances.reference_nll.value),
        (Measure::Nll, tolerances.nll.value),
        (Measure::Kl, tolerances.kl.value),
        (Measure::Top1Agreement, tolerances.top1_agreement.value),
    ];
    let case = |(measure, tolerance): (Measure, f64)| {
        let was = figure(&figures.overall, measure);
        let Some(now) = &found.overall else {
            return not_run(measure.name(), Some(was));
        };
        let now = figure(now, measure);
        let mut finding = beyond(measure, was, now, tolerance);
        if let (Measure::ReferenceNll, Some(finding)) = (measure, &mut finding) {
            // The float model is the same: whichever way it went, it is measured otherwise.
            finding.worse = true;
        }
        let findings = Vec::from_iter(finding);
        Case {
            subject: measure.name().to_string(),
            standing: standing(&findings),
            same_bytes: None,
            baseline: Some(was),
            found: Some(now),
            findings,
        }
    };
    limits.into_iter().map(case).collect()
}

fn figure(overall: &Overall, measure: Measure) -> f64 {
    match measure {
        Measure::ReferenceNll => overall.reference_nll,
        Measure::Nll => overall.nll,
        Measure::Kl => overall.kl,
        Measure::Top1Agreement => overall.top1_agreement,
        _ => unreachable!("{measure:?} is of a linear"),
    }
}

fn standing(findings: &[Finding]) -> Standing {
    match findings {
        [] => Standing::Within,
        _ if findings.iter().any(|finding| finding.worse) => Standing::Worse,
        _ => Standing::Better,
    }
}

fn not_run(subject: &str, baseline: Option<f64>) -> Case {
    Case {
        subject: subject.to_string(),
        standing: Standing::NotRun,
        same_bytes: None,
        baseline,
        found: None,
        findings: Vec::new(),
    }
}

fn plain(measure: Measure, text: String) -> Finding {
    Finding {
        worse: true,
        measure,
        baseline: None,
        found: None,
        tolerance: None,
        text,
    }
}

/// Five significant digits, plainly where that is short.
pub(super) fn digits(value: f64) -> String {
    match value.abs() {
        size if size == 0.0 || !size.is_finite() => format!("{value}"),
        size if (1e-3..1e5).contains(&size) => {
            let places = 4 - size.log10().floor() as i32;
            format!("{value:.*}", places.max(0) as usize)
        }
        _ => format!("{value:.4e}"),
    }
}

/// The change of a figure, in the unit of its tolerance.
pub(super) fn change(measure: Measure, was: f64, now: f64) -> String {
    match measure.is_relative() {
        true => format!("{:+.2} %", 100.0 * (now / was - 1.0)),
        false => format!("{:+.2e}", now - was),
    }
}

/// A tolerance in its unit.
pub(super) fn limit(measure: Measure, tolerance: f64) -> String {
    match measure.is_relative() {
        true => format!("{} %", (100.0 * tolerance * 1e6).round() / 1e6),
        false => format!("{tolerance:.2e}"),
    }
}
