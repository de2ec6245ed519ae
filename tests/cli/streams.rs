//! Data on stdout, the rest on stderr; 0 and 1 as answers.

use std::process::Stdio;

use crate::support::{
    Family, TinyModel, edit_json, gptq, json, quantize, refused, run, write_text,
};

#[test]
fn stdout_holds_the_record_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = TinyModel::new(Family::Llama);
    shapes.write(&model);
    write_text(&text, shapes.vocab, 2_000);
    let small = ["--group-size", "32", "--samples", "4", "--seq-len", "32"];

    let quiet = folder.path().join("quiet");
    let told = run(quantize(&model, &quiet, &text).args(small)).done();
    assert_eq!(told.stdout, "");
    assert!(told.stderr.contains("blocks: 2/2"), "{told:#?}");

    let out = folder.path().join("out");
    let record = json(quantize(&model, &out, &text).args(small));
    let stored = std::fs::read(out.join("gptq_run.json")).unwrap();
    let stored: serde_json::Value = serde_json::from_slice(&stored).unwrap();
    assert_eq!(
        record, stored,
        "the record that is printed is the one that is stored"
    );
    assert_eq!(record["schema"], 1);
    assert_eq!(record["calibration"]["tokens"], 4 * 32);
    assert_eq!(record["layers"].as_array().unwrap().len(), 2 * 7);

    let profile = folder.path().join("profile");
    let told = run(quantize(&model, &profile, &text)
        .args(small)
        .arg("--profile"))
    .done();
    assert!(
        told.stdout.contains("products of this machine"),
        "{told:#?}"
    );
}

#[test]
fn inspect_says_no_when_the_zeros_contradict_the_settings() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    TinyModel::new(Family::Llama).write(&model);
    let mut rtn = gptq("quantize");
    rtn.arg(&model).arg("--out").arg(&out);
    run(rtn.args(["--method", "rtn", "--group-size", "32"])).done();
    run(gptq("inspect").arg(&out)).ended_with(0);

    edit_json(&out.join("quantize_config.json"), |config| {
        config["checkpoint_format"] = "gptq_v2".into();
    });
    edit_json(&out.join("config.json"), |config| {
        config["quantization_config"]["checkpoint_format"] = "gptq_v2".into();
    });
    let told = run(gptq("inspect").arg(&out)).ended_with(1);
    assert!(told.stdout.contains("contradict"), "{told:#?}");
}

#[test]
fn a_reader_that_goes_away_is_no_crash() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let many_blocks = TinyModel {
        hidden: 32,
        ffn: 32,
        heads: 2,
        layers: 8,
        ..TinyModel::new(Family::Llama)
    };
    many_blocks.write(&model);
    let out = folder.path().join("out");
    let mut rtn = gptq("quantize");
    rtn.arg(&model).arg("--out").arg(&out);
    run(rtn.args(["--method", "rtn", "--group-size", "32"])).done();

    let mut reader = std::process::Command::new("true")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let pipe = reader.stdin.take().unwrap();
    reader.wait().unwrap();
    let told = run(gptq("inspect").arg(&out).arg("--json").stdout(pipe));
    assert!(!told.stderr.contains("panicked"), "{told:#?}");
}

#[test]
fn degraded_layers_are_counted_against_the_limit() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = TinyModel::new(Family::Llama);
    shapes.write(&model);
    write_text(&text, shapes.vocab, 2_000);
    let out = folder.path().join("out");
    let small = ["--group-size", "32", "--samples", "8", "--seq-len", "64"];
    let record = json(quantize(&model, &out, &text).args(small).args([
        "--bits",
        "3",
        "--max-degraded",
        "0",
    ]));
    for layer in record["layers"].as_array().unwrap() {
        assert!(layer["loss"]["error"].as_f64() <= layer["loss"]["rtn_error"].as_f64());
    }
}

#[test]
fn nothing_is_fetched_when_offline() {
    let folder = tempfile::tempdir().unwrap();
    let (model, out) = (folder.path().join("model"), folder.path().join("out"));
    TinyModel::new(Family::Llama).write(&model);
    let mut command = gptq("quantize");
    command.arg(&model).arg("--out").arg(&out);
    command.args(["--group-size", "32"]);
    refused(&mut command, folder.path(), &["allenai/c4", "offline"]);
    let mut command = gptq("inspect");
    command
        .arg("owner/name:branch")
        .env_remove("HF_HUB_OFFLINE");
    refused(
        command.arg("--offline"),
        folder.path(),
        &["owner/name", "branch", "offline"],
    );
}
