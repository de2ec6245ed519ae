//! Checkpoints side by side.

use gptq_types::EvalRecord;

use crate::size;

/// A Markdown table, a row a checkpoint, with the protocol above it. The first row is what KL
/// divergence and agreement are relative to.
pub fn comparison(records: &[EvalRecord]) -> String {
    let Some(first) = records.first() else {
        return String::new();
    };
    let mut out = format!("{}\n\n", first.protocol);
    out += "| checkpoint | kind | size | perplexity | vs first | KL, nats | same top token |\n";
    out += "|---|---|---|---|---|---|---|\n";
    for record in records {
        // One standard error of the mean log-likelihood, carried over to the perplexity.
        let spread = record.perplexity * record.nll_stderr;
        let change = match std::ptr::eq(record, first) {
            true => "".to_string(),
            false => format!(
                "{:+.2} %",
                100.0 * (record.perplexity / first.perplexity - 1.0)
            ),
        };
        out += &format!(
            "| {} | {} | {} | {:.3} ± {spread:.3} | {change} | {} | {} |\n",
            record.model,
            record.kind,
            size(record.weight_bytes),
            record.perplexity,
            record.kl.map_or(String::new(), |kl| format!("{kl:.4}")),
            (record.top1_agreement)
                .map_or(String::new(), |share| format!("{:.1} %", 100.0 * share)),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(model: &str, perplexity: f64, kl: Option<f64>) -> EvalRecord {
        EvalRecord {
            model: model.into(),
            kind: "k".into(),
            protocol: "text, 2 windows of 8".into(),
            token_sha256: "0".into(),
            windows: 2,
            seq_len: 8,
            nll: perplexity.ln(),
            nll_stderr: 0.01,
            perplexity,
            kl,
            top1_agreement: kl.map(|_| 0.875),
            weight_bytes: 123_456_789,
            seconds: 1.0,
            ..EvalRecord::default()
        }
    }

    #[test]
    fn rows_are_relative_to_the_first() {
        let table = comparison(&[record("a", 20.0, None), record("b", 21.0, Some(0.0512))]);
        let want = "text, 2 windows of 8\n\n\
            | checkpoint | kind | size | perplexity | vs first | KL, nats | same top token |\n\
            |---|---|---|---|---|---|---|\n\
            | a | k | 123 MB | 20.000 ± 0.200 |  |  |  |\n\
            | b | k | 123 MB | 21.000 ± 0.210 | +5.00 % | 0.0512 | 87.5 % |\n";
        assert_eq!(table, want);
    }
}
