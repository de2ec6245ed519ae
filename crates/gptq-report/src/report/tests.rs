//! Reports of made-up records.

mod drawn;
mod joined;
mod told;

use gptq_types::{
    CalibrationRecord, EvalRecord, GroupSize, LayerLoss, LayerName, LayerRecord, QuantSpec,
    RunRecord,
};

use super::{Found, FoundRun, Made, Report};

fn made() -> Made {
    Made {
        tool: "gptq-rs:test".into(),
        seconds: 1_700_000_000,
    }
}

fn loss(error: f64, rtn_error: f64, signal: f64) -> LayerLoss {
    LayerLoss {
        measure: gptq_types::LossMeasure::default(),
        error,
        rtn_error,
        signal,
        damp_used: 0.1,
        damp_escalations: 0,
        dead_channels: 0,
    }
}

fn layer(block: usize, path: &str, loss: Option<LayerLoss>) -> LayerRecord {
    LayerRecord {
        order: None,
        folded: None,
        layer: LayerName(format!("model.layers.{block}.{path}")),
        in_features: 64,
        out_features: 64,
        tokens: 8192,
        token_share: 1.0,
        loss,
        solve_seconds: 0.0,
    }
}

/// Two blocks, two modules: errors of 0.5 and 0.25 of rounding, of 10 and 5 % of the output.
fn run(group: usize) -> RunRecord {
    let layers = (0..2).flat_map(|block| {
        [
            layer(block, "self_attn.q_proj", Some(loss(1.0, 2.0, 100.0))),
            layer(block, "mlp.down_proj", Some(loss(0.25, 1.0, 100.0))),
        ]
    });
    RunRecord {
        schema: 1,
        tool: "gptq-rs:test".into(),
        model: "owner/tiny".into(),
        weights_sha256: None,
        tokenizer: None,
        spec: QuantSpec {
            group_size: GroupSize::Channels(group),
            ..QuantSpec::published()
        },
        calibration: Some(CalibrationRecord {
            dataset: "texts/book.txt".into(),
            rule: "drawn at random".into(),
            seed: 3,
            samples: 32,
            seq_len: 256,
            tokens: 8192,
            token_sha256: "ca11b".into(),
            ..CalibrationRecord::default()
        }),
        device: "cpu".into(),
        gpu_memory_peak: None,
        layers: layers.collect(),
        warnings: Vec::new(),
        training: Vec::new(),
        shared_hessian: false,
        divergence: Vec::new(),
        seconds: 12.5,
        phases: Default::default(),
        files: Default::default(),
    }
}

fn found(place: &str, run: RunRecord) -> FoundRun {
    FoundRun {
        place: place.into(),
        name: place.rsplit('/').next().unwrap_or(place).into(),
        run,
        record: None,
    }
}

fn score(model: &str, perplexity: f64, kl: Option<f64>) -> EvalRecord {
    EvalRecord {
        model: model.into(),
        kind: if kl.is_some() {
            "4-bit g64 sym"
        } else {
            "unquantised"
        }
        .into(),
        protocol: "`held.txt`, 8 windows of 64".into(),
        token_sha256: "0e1d".into(),
        windows: 8,
        seq_len: 64,
        nll: perplexity.ln(),
        nll_stderr: 0.01,
        perplexity,
        kl,
        top1_agreement: kl.map(|_| 0.875),
        weight_bytes: if kl.is_some() {
            4_000_000_000
        } else {
            14_000_000_000
        },
        ..EvalRecord::default()
    }
}

fn report(runs: Vec<FoundRun>, evaluations: Vec<Vec<EvalRecord>>) -> Report {
    Report::of(Found { runs, evaluations }, &made()).unwrap()
}

fn two_branches() -> Report {
    report(
        vec![found("out/main", run(128)), found("out/fine", run(32))],
        vec![vec![
            score("models/tiny", 20.0, None),
            score("out/main", 25.0, Some(0.2)),
            score("./out/fine/", 22.0, Some(0.1)),
        ]],
    )
}

/// Cells of the row whose name is `name`, in a Markdown report.
fn cells(markdown: &str, name: &str) -> Vec<String> {
    let begin = format!("| `{name}` |");
    let line = markdown.lines().find(|line| line.starts_with(&begin));
    let line = line.unwrap_or_else(|| panic!("no row {name}: {markdown}"));
    let cells = line.trim_matches('|').split(" | ");
    cells.map(|cell| cell.trim().to_string()).collect()
}

fn after(text: &str, heading: &str) -> String {
    let (_, rest) = text.split_once(heading).unwrap();
    rest.to_string()
}
