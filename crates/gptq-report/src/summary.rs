//! Summary of a quantization run in a few lines.

use gptq_types::{BlockTraining, Divergence, LossMeasure, RunRecord};

/// The reference of errors where it is not the default: such errors are larger, and only comparable with
/// each other.
pub(crate) fn measured(record: &RunRecord) -> &'static str {
    match record.spec.measure() {
        LossMeasure::QuantizedInputs => "",
        LossMeasure::FloatOutputs => " (both against the float model's outputs)",
    }
}

/// What training gained, where blocks were trained.
pub(crate) fn trained(record: &RunRecord) -> Option<String> {
    let blocks = &record.training;
    let mean =
        |of: fn(&BlockTraining) -> f64| blocks.iter().map(of).sum::<f64>() / blocks.len() as f64;
    let improved = blocks.iter().filter(|block| block.kept > 0).count();
    let tokens = match blocks.iter().all(|block| block.held_out > 0) {
        true => "on windows held out of it",
        false => "on the trained windows, too few to hold any out",
    };
    (!blocks.is_empty()).then(|| {
        format!(
            "{improved} of {} blocks trained: the error of their outputs {tokens} is {:.1} % of that before",
            blocks.len(),
            100.0 * mean(BlockTraining::ratio)
        )
    })
}

/// Counts, quality against rounding to nearest, and every warning.
pub fn summary(record: &RunRecord) -> String {
    let worse = record
        .layers
        .iter()
        .filter(|l| l.is_worse_than_rtn())
        .count();
    let losses = || record.layers.iter().filter_map(|layer| layer.loss.as_ref());
    let mut out = format!("{} linears in {:.1} s", record.layers.len(), record.seconds);
    if let Some(calibration) = &record.calibration {
        out += &format!(", {} tokens of {}", calibration.tokens, calibration.dataset);
    }
    if let Some(peak) = record.gpu_memory_peak {
        out += &format!(", at most {} of {}", crate::size(peak), record.device);
    }
    out.push('\n');
    let (error, rtn): (f64, f64) = (
        losses().map(|loss| loss.error).sum(),
        losses().map(|loss| loss.rtn_error).sum(),
    );
    let doubt = record
        .calibration
        .as_ref()
        .and_then(|tokens| tokens.doubt());
    if rtn > 0.0 && doubt.is_some() {
        out += &format!(
            "too little calibration text: the output error on it says nothing; {worse} layers above \
             rounding to nearest\n"
        );
    } else if rtn > 0.0 {
        out += &format!(
            "output error {:.1} % of rounding to nearest{}; {worse} layers above it\n",
            100.0 * error / rtn,
            crate::measured(record)
        );
    }
    if let Some(text) = trained(record) {
        out += &format!("{text}\n");
    }
    for compared in &record.divergence {
        out += &format!("against the float model: {}\n", divergence(compared));
    }
    let escalated = losses().filter(|loss| loss.damp_escalations > 0).count();
    let dead: usize = losses().map(|loss| loss.dead_channels).sum();
    out += &format!("damped further than asked: {escalated} layers; dead input channels: {dead}\n");
    for (module, text, count) in grouped(record) {
        let times = if count > 1 {
            format!(" ({count} modules)")
        } else {
            String::new()
        };
        match module.is_empty() {
            true => out += &format!("warning: {text}{times}\n"),
            false => out += &format!("warning: {module}: {text}{times}\n"),
        }
    }
    out
}

/// A line on the divergence of a checkpoint from the float model on a text.
pub(crate) fn divergence(compared: &Divergence) -> String {
    let Divergence { text, windows, .. } = compared;
    let which = match compared.held_out {
        true => format!("{windows} windows of {text} that calibration did not see"),
        false => format!("{windows} windows of {text}"),
    };
    format!(
        "KL {:.4} nats, perplexity {:.3} (float {:.3}) on {which}, {} tokens",
        gptq_types::kl(compared.kl),
        compared.perplexity,
        compared.float_perplexity,
        compared.tokens
    )
}

/// Warnings of one text once, with the first module and the count.
fn grouped(record: &RunRecord) -> Vec<(&str, &str, usize)> {
    let mut groups: Vec<(&str, &str, usize)> = Vec::new();
    for warning in &record.warnings {
        match groups.iter_mut().find(|(_, text, _)| *text == warning.text) {
            Some(group) => group.2 += 1,
            None => groups.push((&warning.module, &warning.text, 1)),
        }
    }
    groups
}
