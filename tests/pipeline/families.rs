//! Checkpoints of each family in several settings give the logits that transformers gives, and go
//! the whole way from weights to text.

use std::path::{Path, PathBuf};

use gptq_types::RunRecord;
use serde_json::{Value, json};

use super::resume::{Place, killed_and_resumed};
use crate::support::{edit_json, fixture, gptq, json, quantize, random_decoder, run};

/// Every folder of `tests/fixtures/arch` named after a family, or after it and what is special.
fn gives_the_logits(family: &str) {
    let folders = std::fs::read_dir(fixture("arch")).unwrap();
    let is_of_family = |name: &str| {
        name.strip_prefix(family)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    let mut count = 0;
    for folder in folders.map(|folder| folder.unwrap()) {
        let name = folder.file_name();
        if !is_of_family(&name.to_string_lossy()) {
            continue;
        }
        let mut verify = gptq("verify");
        verify.arg(folder.path()).arg("--expect");
        verify.arg(folder.path().join("expected.safetensors"));
        let found = run(verify.args(["--tolerance", "1e-3", "--device", "cpu"]));
        assert_eq!(
            found.code,
            Some(0),
            "{name:?}: {}{}",
            found.stdout,
            found.stderr
        );
        count += 1;
    }
    assert!(count > 0, "no checkpoint of {family}");
}

#[test]
fn cohere() {
    gives_the_logits("cohere");
    gives_the_logits("cohere2");
}

#[test]
fn exaone4() {
    gives_the_logits("exaone4");
}

#[test]
fn gemma() {
    gives_the_logits("gemma");
    gives_the_logits("gemma2");
    gives_the_logits("gemma3");
    gives_the_logits("gemma4");
}

#[test]
fn glm4() {
    gives_the_logits("glm4");
}

#[test]
fn granite() {
    gives_the_logits("granite");
}

#[test]
fn hunyuan() {
    gives_the_logits("hunyuan");
}

#[test]
fn ministral3() {
    gives_the_logits("ministral3");
}

#[test]
fn olmo() {
    gives_the_logits("olmo2");
    gives_the_logits("olmo3");
}

#[test]
fn phi3() {
    gives_the_logits("phi3");
}

#[test]
fn seed_oss() {
    gives_the_logits("seed_oss");
}

#[test]
fn smollm3() {
    gives_the_logits("smollm3");
}

#[test]
fn starcoder2() {
    gives_the_logits("starcoder2");
}

const ORDERS: [&str; 3] = ["natural", "act-order", "folded"];
const EFFORTS: [&str; 3] = ["fast", "balanced", "best"];
/// No width of a fixture is a multiple of more.
const SETTINGS: [&str; 4] = ["--group-size", "16", "--device", "cpu"];

/// Quantizes the fixture `name` in each order and effort. The results diverge from the float model
/// by less than `bound`, twice what was measured, and the first block's linears that a folded run
/// permutes are `folded`.
#[track_caller]
fn goes_the_whole_way(name: &str, change: impl FnOnce(&mut Value), bound: f64, folded: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = random_decoder(folder.path(), name);
    edit_json(&model.join("config.json"), change);
    let mut made: Vec<PathBuf> = Vec::new();
    for (order, effort) in ORDERS.iter().flat_map(|&o| EFFORTS.map(|e| (o, e))) {
        let out = folder.path().join(format!("{order}-{effort}"));
        let mut command = quantize(&model, &out, &text);
        command.args(["--samples", "32", "--seq-len", "64"]);
        run(command
            .args(["--order", order, "--effort", effort])
            .args(SETTINGS))
        .done();
        run(gptq("verify").arg(&out)).done();
        assert_eq!(permuted(&out), if order == "folded" { folded } else { &[] });
        the_cache_changes_nothing(&out, 20);
        made.push(out);
    }
    let mut eval = gptq("eval");
    eval.arg(&model).args(&made).arg("--dataset").arg(&text);
    eval.args(["--seq-len", "64", "--max-windows", "8", "--device", "cpu"]);
    let records = json(&mut eval);
    for (out, record) in made.iter().zip(&records.as_array().unwrap()[1..]) {
        let kl = record["kl"].as_f64().unwrap();
        assert!((0.0..bound).contains(&kl), "{out:?}: {kl}");
        assert!(record["perplexity"].as_f64().unwrap().is_finite());
    }
    let flags: Vec<&str> = [&SETTINGS[..], &["--order", "folded"]].concat();
    killed_and_resumed(&Place::of(folder, model, text), 1, &flags);
}

/// Linears of the first block whose input channels lie in another order on disk.
fn permuted(checkpoint: &Path) -> Vec<String> {
    let record = std::fs::read(checkpoint.join("gptq_run.json")).unwrap();
    let record: RunRecord = serde_json::from_slice(&record).unwrap();
    let first = |name: &str| name.strip_prefix("model.layers.0.").map(str::to_string);
    let folded = record.layers.iter().filter(|layer| layer.folded.is_some());
    folded.filter_map(|layer| first(&layer.layer.0)).collect()
}

/// The likeliest tokens after a prompt that is longer than the fixtures' windows of attention. The
/// penalty keeps a random decoder from saying one token for ever.
#[track_caller]
fn the_cache_changes_nothing(model: &Path, count: usize) {
    let prompt: Vec<String> = (0..12).map(|at| format!("w{}", at * 29 % 63)).collect();
    let tokens = |flags: &[&str]| {
        let mut command = gptq("generate");
        command.arg(model).args(["--prompt", &prompt.join(" ")]);
        command.args(["--max-new-tokens", &count.to_string(), "--device", "cpu"]);
        command.args(["--repetition-penalty", "5"]);
        json(command.args(flags))["tokens"].take()
    };
    let cached = tokens(&[]);
    assert_eq!(cached.as_array().unwrap().len(), count);
    assert_eq!(cached, tokens(&["--no-cache"]), "{model:?}");
}

#[test]
fn norms_behind_and_two_rotary_tables() {
    goes_the_whole_way("gemma3", |_| {}, 0.012, &["mlp.down_proj"]);
}

#[test]
fn inputs_of_each_layer_and_shared_keys() {
    goes_the_whole_way("gemma4-shared", |_| {}, 0.13, &["mlp.down_proj"]);
}

#[test]
fn attention_beside_the_feed_forward() {
    goes_the_whole_way("cohere2", |_| {}, 0.0025, &["mlp.down_proj"]);
}

/// Heads are longer than a group: o is folded too, and the outputs of v, the last in `qkv_proj`, are
/// permuted.
#[test]
fn linears_in_one() {
    let fewer_heads = |config: &mut Value| {
        config["num_attention_heads"] = json!(2);
        config["num_key_value_heads"] = json!(2);
        config["head_dim"] = json!(24);
    };
    let folded = ["self_attn.o_proj", "mlp.down_proj"];
    goes_the_whole_way("phi3", fewer_heads, 0.4, &folded);
}

#[test]
fn no_norm_before() {
    goes_the_whole_way("olmo2", |_| {}, 0.25, &["mlp.down_proj"]);
}

#[test]
fn a_plain_feed_forward() {
    goes_the_whole_way("starcoder2", |_| {}, 0.035, &["mlp.c_proj"]);
}

/// Rotary factors that follow from the capacity: the same with and without a cache.
#[test]
fn rotary_factors_of_a_capacity() {
    let folder = tempfile::tempdir().unwrap();
    let (model, _) = random_decoder(folder.path(), "phi3-su");
    for count in [4, 60] {
        the_cache_changes_nothing(&model, count);
    }
}
