//! Chat templates and card templates: programs of strangers, which end, whatever they do.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Family, TinyModel, gptq, json, refused};

fn model(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    TinyModel::new(Family::Llama).write(&model);
    model
}

fn said(model: &Path, template: &str) -> Command {
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
    let mut command = gptq("generate");
    command.arg(model);
    command.args(["--chat", "--prompt", "w1", "--max-new-tokens", "1"]);
    command.args(["--device", "cpu"]);
    command
}

fn prompt_tokens(command: &mut Command) -> Value {
    json(command)["prompt_tokens"].clone()
}

/// A string that doubled 30 times took 2.6 GB, an indent of 10^12 ended the program by a signal, and
/// loops in loops never ended.
#[test]
fn no_template_takes_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let hostile = [
        ("{{ 'a' * 10**7 }}", "bytes"),
        ("{{ messages | tojson(indent=10**12) }}", "bytes"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(50) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "memory",
        ),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
            "steps",
        ),
        (
            "{{ range(99999) | map('string') | join('x' * 99999) | length }}",
            "memory",
        ),
        (
            "{{ 'a'.replace('', 'b' * 9999999) * 99999 }}",
            "chat template",
        ),
    ];
    for (template, named) in hostile {
        let started = Instant::now();
        refused(&mut said(&model, template), folder.path(), &[named]);
        assert!(started.elapsed() < Duration::from_secs(10), "{template}");
    }
}

/// Older repositories name the tokens that begin and end a text in `special_tokens_map.json` alone:
/// they reached no template, in silence.
#[test]
fn tokens_of_the_special_tokens_map_reach_the_template() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let template =
        "{% for i in range(3 if bos_token == 'w7' and eos_token == 'w8' else 9) %}w1 {% endfor %}";
    let tokens = json!({"bos_token": "w7", "eos_token": {"content": "w8"}});
    std::fs::write(model.join("special_tokens_map.json"), tokens.to_string()).unwrap();
    assert_eq!(prompt_tokens(&mut said(&model, template)), 3);
    // tokenizer_config.json takes precedence over special_tokens_map.json.
    let config = json!({"bos_token": "w2", "eos_token": null});
    std::fs::write(model.join("tokenizer_config.json"), config.to_string()).unwrap();
    assert_eq!(prompt_tokens(&mut said(&model, template)), 9);
}

/// transformers tells a template the local time; here it was that of Greenwich.
#[test]
fn the_time_is_local() {
    let folder = tempfile::tempdir().unwrap();
    let model = model(folder.path());
    let template = "{% for i in range((strftime_now('%z') | int) // 100) %}w1 {% endfor %}w1";
    for (zone, tokens) in [("UTC", 1), ("JST-9", 10)] {
        let mut command = said(&model, template);
        assert_eq!(prompt_tokens(command.env("TZ", zone)), tokens, "{zone}");
    }
}
