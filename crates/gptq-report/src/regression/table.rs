//! A verdict for people.

use super::verdict::{Case, Finding, Standing, Verdict, change, digits, limit};

/// Markdown: what got worse, what got better, how many linears have other bytes, and the scores.
pub fn regression(verdict: &Verdict) -> String {
    let mut out = format!(
        "{} against {}: {}\n",
        verdict.judged,
        verdict.baseline,
        if verdict.is_red() { "worse" } else { "as good" }
    );
    out += &table(verdict, true, "Got worse by more than its tolerance:");
    out += &table(
        verdict,
        false,
        "Got better by more than its tolerance (--update keeps it):",
    );
    out.push('\n');
    out += &bytes(verdict);
    let stopped = verdict.count(Standing::NotRun);
    if stopped > 0 {
        out += &format!("{stopped} figures were not measured: the run stopped before them\n");
    }
    if let Some(now) = &verdict.overall {
        let was = &verdict.baseline_overall;
        out += &format!(
            "perplexity {:.4} (baseline {:.4}, float model {:.4}), KL {} nats ({}), same top token \
             {:.2} % ({:.2} %)\n",
            now.perplexity,
            was.perplexity,
            now.reference_nll.exp(),
            digits(gptq_types::kl(now.kl)),
            digits(gptq_types::kl(was.kl)),
            100.0 * now.top1_agreement,
            100.0 * was.top1_agreement,
        );
    }
    out
}

fn table(verdict: &Verdict, worse: bool, title: &str) -> String {
    let rows = |case: &Case| -> Vec<String> {
        let wanted = case
            .findings
            .iter()
            .filter(|finding| finding.worse == worse);
        wanted.map(|finding| row(case, finding)).collect()
    };
    let rows: Vec<String> = verdict.cases.iter().flat_map(rows).collect();
    if rows.is_empty() {
        return String::new();
    }
    let head = "| where | what | baseline | now | change | tolerance |\n|---|---|---|---|---|---|";
    format!("\n{title}\n\n{head}\n{}\n", rows.join("\n"))
}

fn row(case: &Case, finding: &Finding) -> String {
    let (measure, is_layer) = (finding.measure, case.same_bytes.is_some());
    let place = match is_layer || finding.tolerance.is_none() {
        true => case.subject.as_str(),
        false => "whole model",
    };
    let cells = match (finding.baseline, finding.found, finding.tolerance) {
        (Some(was), Some(now), Some(tolerance)) => format!(
            "{} | {} | {} | {} | {}",
            measure.name(),
            digits(was),
            digits(now),
            change(measure, was, now),
            limit(measure, tolerance)
        ),
        // Settings and counts: no digit of them is noise.
        (Some(was), Some(now), None) => format!("{} | {was} | {now} |  | none", measure.name()),
        _ => format!("{}: {} |  |  |  | none", measure.name(), finding.text),
    };
    format!("| {place} | {cells} |")
}

/// Lists linears with other bytes, and whether that is expected.
fn bytes(verdict: &Verdict) -> String {
    let linears = || {
        verdict
            .cases
            .iter()
            .filter_map(|case| Some((case, case.same_bytes?)))
    };
    let (all, mut others) = (linears().count(), linears().filter(|(_, same)| !same));
    let Some((first, _)) = others.next() else {
        return match all {
            0 => String::new(),
            _ => format!("all {all} linears have the baseline's bytes\n"),
        };
    };
    let why = match verdict.processor == verdict.baseline_processor {
        true => format!("made on the same kind of processor ({})", verdict.processor),
        false => format!(
            "made on {}, this is {}, which may round otherwise",
            verdict.baseline_processor, verdict.processor
        ),
    };
    format!(
        "{} of {all} linears have other bytes than the baseline ({why}); the first is {}\n",
        1 + others.count(),
        first.subject
    )
}
