//! Several texts in one evaluation: each has the same scores as alone.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::support::{fixture, gptq, json, refused, run, small_model};

/// A float model, a packed one of it, and two texts.
struct Place {
    folder: tempfile::TempDir,
    models: [PathBuf; 2],
    texts: [PathBuf; 2],
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = small_model(folder.path());
        let at = |name: &str| folder.path().join(name);
        fs::write(
            at("held.txt"),
            fs::read(fixture("verne-held-out.txt")).unwrap(),
        )
        .unwrap();
        let mut command = gptq("quantize");
        command.arg(&model).arg("--out").arg(at("packed"));
        run(command.args(["--method", "rtn", "--group-size", "32"])).done();
        Place {
            models: [model, at("packed")],
            texts: [text, at("held.txt")],
            folder,
        }
    }

    fn eval(&self, texts: &[usize]) -> Command {
        let mut command = gptq("eval");
        command.args(&self.models);
        command.args([
            "--seq-len",
            "100",
            "--max-windows",
            "5",
            "--group-tokens",
            "300",
        ]);
        for &text in texts {
            command.arg("--dataset").arg(&self.texts[text]);
        }
        command
    }
}

/// All of a record but its times and the name of its text.
fn plain(record: &Value) -> Value {
    let mut record = record.clone();
    let fields = record.as_object_mut().unwrap();
    fields.remove("seconds");
    fields.remove("text");
    record
}

#[test]
fn each_text_says_what_it_says_alone() {
    let place = Place::new();
    let both = json(&mut place.eval(&[0, 1]));
    let both = both.as_array().unwrap();
    assert_eq!(both.len(), 4);
    for (text, name) in ["text.txt", "held.txt"].into_iter().enumerate() {
        let alone = json(&mut place.eval(&[text]));
        for (model, alone) in alone.as_array().unwrap().iter().enumerate() {
            assert!(alone.get("text").is_none(), "{alone:#}");
            let found = &both[2 * text + model];
            assert_eq!(plain(found), plain(alone));
            assert_eq!(found["text"], name);
        }
    }
    let told = run(&mut place.eval(&[0, 1])).done().stdout;
    for head in [
        "| text.txt: perplexity |",
        "| held.txt: perplexity |",
        "| held.txt: KL, nats |",
        "\nheld.txt: KL, nats, by token of the window:\n",
    ] {
        assert!(told.contains(head), "{head}: {told}");
    }
    assert!(
        told.starts_with("text.txt: `text.txt`, as one string"),
        "{told}"
    );
}

#[test]
fn a_state_is_that_of_its_texts() {
    let place = Place::new();
    let state = place.folder.path().join("state.jsonl");
    let kept = |texts: &[usize]| {
        let mut command = place.eval(texts);
        command.arg("--state").arg(&state);
        command
    };
    let plain_all =
        |records: Value| -> Vec<Value> { records.as_array().unwrap().iter().map(plain).collect() };
    let whole = plain_all(json(&mut kept(&[0, 1])));
    let lines = fs::read_to_string(&state).unwrap();
    let cut: Vec<&str> = lines.lines().take(4).collect();
    fs::write(&state, cut.join("\n") + "\n").unwrap();
    assert_eq!(plain_all(json(&mut kept(&[0, 1]))), whole);
    for texts in [&[1, 0][..], &[0]] {
        refused(&mut kept(texts), place.folder.path(), &["another text:"]);
    }
    let twice = "the texts `text.txt` and `text.txt` have the same tokens";
    let twice = twice.replace("text.txt", &place.texts[0].display().to_string());
    refused(&mut place.eval(&[0, 0]), place.folder.path(), &[&twice]);
}

/// A report takes each text as a table of its own.
#[test]
fn a_report_of_several_texts_has_a_table_for_each() {
    let place = Place::new();
    let at = |name: &str| place.folder.path().join(name);
    let scores = run(place.eval(&[0, 1]).arg("--json")).done().stdout;
    fs::write(at("scores.json"), scores).unwrap();
    let mut report = gptq("report");
    report.arg(&place.models[1]).arg(at("scores.json"));
    run(report.arg("--out").arg(at("page"))).done();
    let page = fs::read_to_string(at("page/report.md")).unwrap();
    assert_eq!(page.matches("| perplexity |").count(), 2, "{page}");
    assert!(page.contains("held.txt"), "{page}");
}
