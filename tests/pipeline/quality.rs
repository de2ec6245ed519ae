//! GPTQ is worth more than rounding.

use std::path::Path;

use crate::support::{fixture, gptq, json, quantize, run};

/// Evaluated on text that was not calibrated on.
#[test]
fn gptq_beats_rounding_to_nearest_in_2_bits() {
    gptq_beats_rounding_to_nearest("2");
}

#[test]
fn gptq_beats_rounding_to_nearest_in_4_bits() {
    gptq_beats_rounding_to_nearest("4");
}

fn gptq_beats_rounding_to_nearest(bits: &str) {
    let kind = ["--bits", bits, "--group-size", "32"];
    let (model, calibration) = (fixture("verne"), fixture("verne-calibration.txt"));
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    let (solved, rounded) = (place("gptq"), place("rtn"));
    let mut command = quantize(&model, &solved, &calibration);
    command
        .args(kind)
        .args(["--samples", "32", "--seq-len", "256"]);
    let record = json(&mut command);
    let mut command = gptq("quantize");
    command.arg(&model).arg("--out").arg(&rounded);
    run(command.args(kind).args(["--method", "rtn"])).done();

    let layers = record["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 5 * 7);
    for layer in layers {
        let (error, rounding) = (&layer["loss"]["error"], &layer["loss"]["rtn_error"]);
        assert!(error.as_f64() <= rounding.as_f64(), "{layer:#}");
        assert_eq!(layer["tokens"], 32 * 256);
    }

    let records = evaluate(&[&model, &solved, &rounded], &fixture("verne-held-out.txt"));
    let of = |index: usize, key: &str| records[index][key].as_f64().unwrap();
    let (float, gptq, rtn) = (
        of(0, "perplexity"),
        of(1, "perplexity"),
        of(2, "perplexity"),
    );
    assert!(float < gptq && gptq < rtn, "{records:#}");
    assert!(of(1, "kl") < of(2, "kl"), "{records:#}");
    assert!(
        of(1, "top1_agreement") > of(2, "top1_agreement"),
        "{records:#}"
    );
    assert!(records[0]["kl"].is_null());
}

/// Each setting is compared with the run without it, on text outside of calibration: scales of either sign,
/// then linears aimed at the float model's outputs, then blocks that are trained; with zeros searched along with
/// scales likewise.
#[test]
fn signed_scales_the_aim_and_training_each_lower_the_divergence() {
    let (model, calibration) = (fixture("verne"), fixture("verne-calibration.txt"));
    let folder = tempfile::tempdir().unwrap();
    let made = |name: &str, flags: &[&str]| {
        let out = folder.path().join(name);
        let mut command = quantize(&model, &out, &calibration);
        command.args(["--bits", "3", "--group-size", "32"]);
        command.args(["--samples", "32", "--seq-len", "256"]);
        let record = json(command.args(flags));
        let measure = record["layers"][0]["loss"]["measure"].clone();
        assert_eq!(measure == "float_outputs", !flags.contains(&"fast"));
        match flags.contains(&"best") {
            true => blocks_were_trained(&record),
            false => assert!(record["training"].is_null()),
        }
        out
    };
    for grid in ["--sym", "--asym"] {
        let places = [
            made(
                &format!("{grid}-unsigned"),
                &[grid, "--effort", "fast", "--unsigned-scales"],
            ),
            made(&format!("{grid}-fast"), &[grid, "--effort", "fast"]),
            made(&format!("{grid}-balanced"), &[grid, "--effort", "balanced"]),
            made(&format!("{grid}-best"), &[grid, "--effort", "best"]),
        ];
        let models: Vec<&Path> = std::iter::once(model.as_path())
            .chain(places.iter().map(|place| place.as_path()))
            .collect();
        let records = evaluate(&models, &fixture("verne-held-out.txt"));
        let kl = |index: usize| records[index]["kl"].as_f64().unwrap();
        let falls = (1..4).all(|at| kl(at) > kl(at + 1));
        assert!(falls && kl(4) < 0.9 * kl(3), "{grid}: {records:#}");
    }
}

/// All 32 windows of 256 tokens are steps of four, one of them held out. A block keeps the epoch with the least
/// error.
fn blocks_were_trained(record: &serde_json::Value) {
    let training = record["training"].as_array().unwrap();
    assert_eq!(training.len(), 5);
    let mut improved = 0;
    for block in training {
        let errors = block["errors"].as_array().unwrap();
        let error = |at: usize| errors[at].as_f64().unwrap();
        let kept = block["kept"].as_u64().unwrap() as usize;
        assert_eq!(errors.len(), 7, "{block:#}");
        assert!((0..7).all(|at| error(kept) <= error(at)), "{block:#}");
        assert_eq!(block["tokens"], 28 * 256);
        assert_eq!(block["held_out"], 4 * 256);
        improved += usize::from(kept > 0);
    }
    assert!(improved >= 4, "{training:#?}");
}

fn evaluate(models: &[&Path], text: &Path) -> serde_json::Value {
    let mut eval = gptq("eval");
    eval.args(models).arg("--dataset").arg(text);
    json(eval.args(["--seq-len", "256", "--max-windows", "16"]))
}
