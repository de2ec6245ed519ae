//! The same settings give the same bytes; how they are cut into files changes nothing.

use std::fs;
use std::path::Path;

use crate::support::{
    Family, TinyModel, gptq, quantize, run, same_files, small_model, tensor, tensor_names,
    write_text,
};

const SETTINGS: [&str; 7] = [
    "--group-size",
    "32",
    "--samples",
    "8",
    "--seq-len",
    "64",
    "--desc-act",
];

#[test]
fn two_runs_and_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = small_model(folder.path());
    let out = |name: &str| folder.path().join(name);
    for effort in ["balanced", "best"] {
        let out = |name: &str| out(&format!("{effort}-{name}"));
        for (name, threads) in [("first", "2"), ("second", "2"), ("one", "1"), ("five", "5")] {
            let mut command = quantize(&model, &out(name), &text);
            command.args(["--effort", effort, "--threads", threads]);
            run(command.args(SETTINGS)).done();
        }
        for name in ["second", "one", "five"] {
            same_files(&out("first"), &out(name));
        }
    }
}

#[test]
fn an_order_by_its_name_and_windows_by_their_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = small_model(folder.path());
    let out = |name: &str| folder.path().join(name);
    run(quantize(&model, &out("flags"), &text).args(SETTINGS)).done();
    let mut named = quantize(&model, &out("named"), &text);
    named.args(["--group-size", "32", "--seq-len", "64"]);
    // Eight windows hold 512 tokens, seven do not hold 449.
    run(named.args(["--tokens", "449", "--order", "act-order"])).done();
    same_files(&out("flags"), &out("named"));
}

#[test]
fn one_file_or_many() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    // The least limit is 1 MB: embedding and head have that each.
    let shapes = TinyModel {
        vocab: 8192,
        ..TinyModel::new(Family::Llama)
    };
    shapes.write(&model);
    write_text(&text, shapes.vocab, 12_000);
    let (one, many) = (folder.path().join("one"), folder.path().join("many"));
    run(quantize(&model, &one, &text).args(SETTINGS)).done();
    let mut sharded = quantize(&model, &many, &text);
    run(sharded.args(SETTINGS).args(["--max-shard-size", "0.001"])).done();

    assert!(one.join("model.safetensors").exists());
    assert!(!many.join("model.safetensors").exists());
    let shards = weight_files(&many);
    assert!(shards.len() >= 2, "{shards:?}");
    let index = fs::read(many.join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let map = index["weight_map"].as_object().unwrap();
    let mut names = tensor_names(&many);
    names.sort();
    let mut mapped: Vec<String> = map.keys().cloned().collect();
    mapped.sort();
    assert_eq!(names, mapped);
    for name in names {
        assert_eq!(tensor(&one, &name), tensor(&many, &name), "{name}");
    }

    let logits = folder.path().join("logits.safetensors");
    let mut write = gptq("verify");
    write.arg(&one).arg("--write").arg(&logits);
    run(write.args(["--ids", "1,5,20,300"])).done();
    let mut expect = gptq("verify");
    expect.arg(&many).arg("--expect").arg(&logits);
    run(expect.args(["--tolerance", "0"])).done();
}

fn weight_files(folder: &Path) -> Vec<String> {
    let names = fs::read_dir(folder).unwrap();
    names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".safetensors"))
        .collect()
}
