//! Models from users: other tensor names, other types, stale settings.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::{Family, Run, TinyModel, edit_json, gptq, hashes, refused, run, tensor_names};

fn rounded(model: &Path, out: &Path) -> Run {
    let mut command = gptq("quantize");
    command.arg(model).arg("--out").arg(out);
    let settings = ["--method", "rtn", "--group-size", "32"];
    run(command.args(settings)).done()
}

fn warnings(folder: &Path) -> String {
    let record = fs::read(folder.join("gptq_run.json")).unwrap();
    let record: Value = serde_json::from_slice(&record).unwrap();
    record["warnings"].to_string()
}

#[test]
fn names_with_another_prefix_make_the_same_checkpoint() {
    // the error was once only "tensor `model.embed_tokens.weight` is missing"
    let place = tempfile::tempdir().unwrap();
    let (plain, other) = (place.path().join("plain"), place.path().join("other"));
    let shapes = TinyModel::new(Family::Llama);
    shapes.write(&plain);
    shapes.write_changed(&other, |tensors| {
        for tensor in tensors {
            tensor.name = format!("language_model.{}", tensor.name);
        }
    });
    let (first, second) = (place.path().join("first"), place.path().join("second"));
    rounded(&plain, &first);
    let said = rounded(&other, &second);
    assert!(
        said.stderr
            .contains("note: tensors are named as `language_model."),
        "{said:#?}"
    );
    assert!(warnings(&second).contains("language_model.model.embed_tokens.weight"));
    let weights = "model.safetensors";
    assert_eq!(hashes(&first)[weights], hashes(&second)[weights]);
    assert_eq!(tensor_names(&first), tensor_names(&second));

    // beside a part that is no decoder's, the prefix and the part are named
    let tower = place.path().join("tower");
    shapes.write_changed(&tower, |tensors| {
        for tensor in tensors.iter_mut() {
            tensor.name = format!("language_model.{}", tensor.name);
        }
        tensors[0].name = "vision_tower.patch.weight".into();
        tensors[1].name = "language_model.model.embed_tokens.weight".into();
    });
    let mut command = gptq("inspect");
    let names = ["`language_model.model.*`", "`vision_tower.patch.weight`"];
    refused(command.arg(&tower), place.path(), &names);
}

#[test]
fn settings_left_beside_floats_are_said_and_not_copied() {
    // `quantize` refused what `eval` called unquantized
    let place = tempfile::tempdir().unwrap();
    let (model, out) = (place.path().join("model"), place.path().join("out"));
    TinyModel::new(Family::Qwen3).write(&model);
    let left = json!({"quant_method": "bitsandbytes", "load_in_4bit": true});
    edit_json(&model.join("config.json"), |config| {
        config["quantization_config"] = left
    });
    let said = rounded(&model, &out);
    assert!(
        said.stderr
            .contains("note: config.json declares the quantization `bitsandbytes`")
    );
    assert!(warnings(&out).contains("bitsandbytes"));
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    assert!(
        !config.contains("bitsandbytes") && config.contains("gptq"),
        "{config}"
    );
    run(gptq("inspect").arg(&model)).done();
}

#[test]
fn terms_travel_with_a_model() {
    let place = tempfile::tempdir().unwrap();
    let (model, out) = (place.path().join("model"), place.path().join("out"));
    TinyModel::new(Family::Mistral).write(&model);
    for name in ["NOTICE", "LICENSE-MIT", "USE_POLICY.md"] {
        fs::write(model.join(name), name).unwrap();
    }
    // one of that name that is no file once ended a finished run
    fs::create_dir(model.join("LICENSE")).unwrap();
    rounded(&model, &out);
    for name in ["NOTICE", "LICENSE-MIT", "USE_POLICY.md"] {
        assert_eq!(fs::read_to_string(out.join(name)).unwrap(), name);
    }
}

#[test]
fn a_password_in_the_address_of_the_hub_is_in_no_line() {
    let place = tempfile::tempdir().unwrap();
    let mut command = gptq("inspect");
    command.arg("owner/name").env_remove("HF_HUB_OFFLINE");
    command.env("HF_HOME", place.path().join("cache"));
    command.env("HF_ENDPOINT", "http://user:hunter2@127.0.0.1:9");
    command.env("HF_TOKEN", "hf_secret");
    let run = run(&mut command).ended_with(2);
    let error = run.error_line();
    for secret in ["hunter2", "user:", "hf_secret"] {
        assert!(!run.stderr.contains(secret), "{run:#?}");
    }
    assert!(error.contains("owner/name"), "{error}");
}
