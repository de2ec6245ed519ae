//! The whole command on a GPU against the whole command on the processor. Skipped by name where
//! there is no GPU.

use std::path::{Path, PathBuf};

use gptq_types::Dtype;
use serde_json::Value;

use crate::support::{
    Cause, Family, TinyModel, gptq, hashes, json, quantize, run, same_files, skipped, write_text,
};

/// Sixteen-bit activations against f32 ones.
const PERPLEXITY_TOLERANCE: f64 = 5e-3;
/// Tolerance of a layer's error for linears of 64 channels with sixteen-bit inputs: a few codes on a
/// boundary decide. bf16 has three bits less.
const ERROR_TOLERANCE: [(Dtype, f64); 2] = [(Dtype::F16, 2e-2), (Dtype::BF16, 1e-1)];
const WORK: [&str; 6] = ["--group-size", "32", "--samples", "16", "--seq-len", "128"];

fn has_gpu() -> bool {
    let there = run(&mut gptq("doctor")).stdout.contains("\ncuda:0: ");
    if !there {
        skipped(Cause::Machine, "a GPU");
    }
    there
}

struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
}

impl Place {
    fn of(shapes: &TinyModel) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
        shapes.write(&model);
        write_text(&text, shapes.vocab, 20_000);
        Place {
            folder,
            model,
            text,
        }
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn quantize(&self, name: &str, flags: &[&str]) -> Value {
        let mut command = quantize(&self.model, &self.out(name), &self.text);
        json(command.args(WORK).args(flags))
    }

    fn perplexity(&self, checkpoint: &Path, device: &str) -> f64 {
        let mut eval = gptq("eval");
        eval.arg(checkpoint).arg("--dataset").arg(&self.text);
        eval.args(["--seq-len", "128", "--max-windows", "16"]);
        let records = json(eval.args(["--device", device]));
        records[0]["perplexity"].as_f64().unwrap()
    }
}

fn close(got: f64, want: f64, tolerance: f64, what: &str) {
    let difference = (got / want - 1.0).abs();
    assert!(difference < tolerance, "{what}: {got} against {want}");
}

#[test]
fn every_family_in_f16_and_bf16_is_worth_what_it_is_on_the_processor() {
    if !has_gpu() {
        return;
    }
    for family in Family::ALL {
        for (dtype, tolerance) in ERROR_TOLERANCE {
            let what = format!("{family:?} {dtype:?}");
            let place = Place::of(&TinyModel {
                dtype,
                ..TinyModel::new(family)
            });
            let there = place.quantize("there", &["--device", "cuda:0"]);
            let here = place.quantize("here", &["--device", "cpu"]);
            let layers = |record: &Value| record["layers"].as_array().unwrap().clone();
            for (there, here) in layers(&there).iter().zip(&layers(&here)) {
                let loss = |layer: &Value| layer["loss"]["error"].as_f64().unwrap();
                let what = format!("{what} {}", there["layer"]);
                close(loss(there), loss(here), tolerance, &what);
            }
            for checkpoint in [place.model.clone(), place.out("there")] {
                let [gpu, cpu] = ["cuda:0", "cpu"].map(|d| place.perplexity(&checkpoint, d));
                close(gpu, cpu, PERPLEXITY_TOLERANCE, &what);
            }
        }
    }
}

#[test]
fn the_same_bytes_from_two_runs_and_from_any_budget() {
    if !has_gpu() {
        return;
    }
    // Eight batches; the smaller budget has room for the inner activations of two.
    let place = Place::of(&TinyModel {
        hidden: 1024,
        head_dim: 256,
        ffn: 2816,
        ..TinyModel::new(Family::Llama)
    });
    for (name, memory) in [("first", "10GB"), ("second", "10GB"), ("small", "1.8GB")] {
        let mut command = quantize(&place.model, &place.out(name), &place.text);
        command.args(["--samples", "128", "--seq-len", "512", "--desc-act"]);
        run(command.args(["--device", "cuda:0", "--gpu-memory", memory])).done();
    }
    for name in ["second", "small"] {
        same_files(&place.out("first"), &place.out(name));
    }
}

#[test]
fn a_model_on_a_gpu_writes_its_own_text() {
    if !has_gpu() {
        return;
    }
    let place = Place::of(&TinyModel::new(Family::Qwen3));
    let own = |name: &str| {
        let mut command = quantize(&place.model, &place.out(name), Path::new("self"));
        let record = json(command.args(WORK).args(["--device", "cuda:0"]));
        (record["calibration"].clone(), hashes(&place.out(name)))
    };
    let (first, second) = (own("first"), own("second"));
    assert_eq!(first.0["tokens"], 16 * 128);
    assert_eq!(first, second);
}
