//! Calibration on text that the model writes itself.

use std::path::Path;

use serde_json::Value;

use crate::support::{Family, TinyModel, hashes, json, quantize};

#[test]
fn the_seed_makes_the_text() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    TinyModel::new(Family::Qwen2).write(&model);
    // No text is read, so no tokenizer is needed.
    std::fs::remove_file(model.join("tokenizer.json")).unwrap();
    let written = |name: &str, flags: &[&str]| -> (Value, _) {
        let out = folder.path().join(name);
        let mut command = quantize(&model, &out, Path::new("self"));
        command.args(["--group-size", "32", "--samples", "4", "--seq-len", "32"]);
        let record = json(command.args(flags));
        (record["calibration"].clone(), hashes(&out))
    };
    let (calibration, files) = written("first", &["--seed", "5"]);
    assert_eq!(calibration["dataset"], "self");
    assert_eq!(calibration["seed"], 5);
    assert_eq!(calibration["tokens"], 4 * 32);
    let (again, same) = written("again", &["--seed", "5", "--threads", "1"]);
    assert_eq!((&calibration, &files), (&again, &same));

    let tokens = |calibration: &Value| calibration["token_sha256"].clone();
    let (other, differing) = written("other", &["--seed", "6"]);
    assert_ne!(tokens(&calibration), tokens(&other));
    assert_ne!(files["model.safetensors"], differing["model.safetensors"]);
    let (cooler, _) = written("cooler", &["--seed", "5", "--temperature", "0.2"]);
    assert_ne!(tokens(&calibration), tokens(&cooler));
}
