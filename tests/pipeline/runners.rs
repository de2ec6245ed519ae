//! Runners on every family, width of code and rotary scaling, against the pass that streams blocks.

use std::path::Path;
use std::sync::Arc;

use gptq_hub::Checkpoint;
use gptq_inference::{OpenedModel, compare, logits, open};
use gptq_model::DeviceContext;
use gptq_types::Dtype;
use serde_json::json;

use crate::support::{Family, TinyModel, edit_json, gptq, quantize, run, write_text};

/// Logits of two f32 passes that sum in other orders; they are around 1.
const TOLERANCE: f32 = 1e-4;

fn opened(folder: &Path) -> OpenedModel {
    let checkpoint = Arc::new(Checkpoint::open(folder).unwrap());
    let config = checkpoint.config_json().unwrap();
    let settings = std::fs::read_to_string(folder.join("quantize_config.json")).ok();
    open(checkpoint, &config, settings.as_deref()).unwrap()
}

/// A prompt of `ids` but the last five, which come one by one.
#[track_caller]
fn agrees(folder: &Path, ids: &[u32]) {
    let model = opened(folder);
    let vocab = model.spec.vocab_size;
    let want = logits(model.decoder(&DeviceContext::Cpu).unwrap().as_mut(), ids).unwrap();
    let mut runner = model.runner(&DeviceContext::Cpu).unwrap();
    runner.reset(1, ids.len()).unwrap();
    let (prompt, steps) = ids.split_at(ids.len() - 5);
    let mut got = runner.prefill(0, prompt).unwrap();
    for token in steps {
        got.extend_from_slice(runner.step(&[*token]).unwrap());
    }
    let found = compare(&got, &want[(prompt.len() - 1) * vocab..], vocab);
    assert!(found.max_difference < TOLERANCE, "{folder:?}: {found:?}");
}

fn logits_of(folder: &Path, ids: &[u32]) -> Vec<f32> {
    let mut decoder = opened(folder).decoder(&DeviceContext::Cpu).unwrap();
    logits(decoder.as_mut(), ids).unwrap()
}

fn ids(count: u32) -> Vec<u32> {
    (0..count).map(|at| at * 37 % 127).collect()
}

/// Outputs that fill no tile, except in 3 bits, where a file must fill its runs of 32 codes.
fn ffn(bits: &str) -> usize {
    if bits == "3" { 96 } else { 88 }
}

#[test]
fn every_family_packed_and_not() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: String| folder.path().join(name);
    let kinds = [
        (Family::Llama, Dtype::F16, true),
        (Family::Mistral, Dtype::F32, false),
        (Family::Qwen2, Dtype::BF16, false),
        (Family::Qwen3, Dtype::BF16, true),
    ];
    for (family, dtype, tied) in kinds {
        for (bits, symmetry) in [
            ("2", "--asym"),
            ("3", "--sym"),
            ("4", "--sym"),
            ("8", "--asym"),
        ] {
            let model = place(format!("{}-{bits}", family.model_type()));
            let out = model.with_extension("packed");
            let shapes = TinyModel {
                ffn: ffn(bits),
                dtype,
                tied,
                ..TinyModel::new(family)
            };
            shapes.write(&model);
            agrees(&model, &ids(40));
            let mut rtn = gptq("quantize");
            rtn.arg(&model).arg("--out").arg(&out).arg(symmetry);
            run(rtn.args(["--method", "rtn", "--group-size", "24", "--bits", bits])).done();
            agrees(&out, &ids(40));
        }
    }
}

#[test]
fn act_order_in_every_width() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("text.txt");
    for (bits, group) in [("2", "16"), ("3", "40"), ("4", "32"), ("8", "none")] {
        let (model, out) = (folder.path().join("model"), folder.path().join(bits));
        let shapes = TinyModel {
            ffn: ffn(bits),
            ..TinyModel::new(Family::Llama)
        };
        shapes.write(&model);
        write_text(&text, shapes.vocab, 3_000);
        let mut command = quantize(&model, &out, &text);
        command.args(["--samples", "8", "--seq-len", "64", "--desc-act"]);
        run(command.args(["--bits", bits, "--group-size", group])).done();
        agrees(&out, &ids(40));
    }
}

#[test]
fn every_rotary_scaling() {
    let folder = tempfile::tempdir().unwrap();
    let original = json!(16);
    let scalings = [
        json!({"rope_type": "linear", "factor": 4.0}),
        json!({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": original}),
        json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": original}),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": original}),
    ];
    for scaling in scalings {
        let model = folder.path().join(scaling["rope_type"].as_str().unwrap());
        TinyModel::new(Family::Llama).write(&model);
        edit_json(&model.join("config.json"), |config| {
            config["rope_scaling"] = scaling;
        });
        agrees(&model, &ids(40));
    }
}

/// Texts longer than the window, in one piece and token by token: attention looks back no further.
#[test]
fn texts_longer_than_a_sliding_window() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    TinyModel::new(Family::Mistral).write(&model);
    agrees(&model, &ids(40));
    let all = logits_of(&model, &ids(40));
    edit_json(&model.join("config.json"), |config| {
        config["sliding_window"] = json!(16);
    });
    agrees(&model, &ids(40));
    let windowed = logits_of(&model, &ids(40));
    let vocab = all.len() / 40;
    assert_eq!(
        all[..16 * vocab],
        windowed[..16 * vocab],
        "inside the window"
    );
    assert_ne!(all[39 * vocab..], windowed[39 * vocab..], "beyond it");
}
