//! Users' calibration data, and what the command reports about it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::{Family, Run, TinyModel, gptq, quantize, run, write_text};

/// Writes every turn's role and words; `<s>` is none of the words.
const TEMPLATE: &str = "{% for m in messages %}w1 {{ m.role }} {{ m.content }} {% endfor %}";

struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        TinyModel::new(Family::Llama).write(&model);
        Place { folder, model }
    }

    fn with_template(self) -> Self {
        fs::write(self.model.join("chat_template.jinja"), TEMPLATE).unwrap();
        self
    }

    fn rows(&self, name: &str, row: impl Fn(usize) -> Value) -> PathBuf {
        let rows: Vec<String> = (0..60).map(|index| row(index).to_string()).collect();
        self.file(name, &rows.join("\n"))
    }

    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    fn quantize(&self, data: &Path, flags: &[&str]) -> Run {
        let out = self.folder.path().join("out");
        let _ = fs::remove_dir_all(&out);
        let mut command = quantize(&self.model, &out, data);
        command.args(["--group-size", "32", "--samples", "16", "--seq-len", "32"]);
        run(command.args(flags))
    }

    fn record(&self) -> Value {
        let text = fs::read_to_string(self.folder.path().join("out/gptq_run.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn rule(&self, data: &Path, flags: &[&str]) -> String {
        self.quantize(data, flags).done();
        let rule = self.record()["calibration"]["rule"].clone();
        rule.as_str().unwrap().to_string()
    }
}

/// Words that differ from row to row.
fn words(index: usize) -> String {
    let words: Vec<String> = (0..20)
        .map(|word| format!("w{}", (index * 37 + word * word) % 120))
        .collect();
    words.join(" ")
}

/// 33 words drawn 16 times passed as 512 tokens, and their error of a few per cent as success.
#[test]
fn a_text_that_is_too_short_or_repeats_is_said_to_be() {
    let place = Place::new();
    let short = place.file("short.txt", &words(1).repeat(2));
    let said = place.quantize(&short, &[]).done().stderr;
    assert!(
        said.contains("distinct positions of the calibration text"),
        "{said}"
    );
    assert!(!said.contains("% of rounding to nearest"), "{said}");
    let record = place.record();
    let counted = &record["calibration"];
    assert_eq!(counted["widest_input"], 96);
    assert!(
        counted["distinct_positions"].as_u64().unwrap() < 64,
        "{counted}"
    );
    assert!(counted["overlap"].as_f64().unwrap() > 0.9, "{counted}");
    assert!(
        record["warnings"][0]["text"]
            .as_str()
            .unwrap()
            .contains("distinct positions")
    );

    let same = place.file("same.txt", &"w7 ".repeat(3000));
    let said = place.quantize(&same, &[]).done().stderr;
    assert!(
        said.contains("the calibration text repeats itself: 1 distinct"),
        "{said}"
    );

    let long = place.folder.path().join("long.txt");
    write_text(&long, 128, 3000);
    let said = place.quantize(&long, &[]).done().stderr;
    assert!(said.contains("% of rounding to nearest"), "{said}");
    assert!(!said.contains("distinct"), "{said}");
}

#[test]
fn conversations_are_rendered_with_the_models_template() {
    let messages = |index| {
        json!({"messages": [
        {"role": "user", "content": words(index)}, {"role": "assistant", "content": words(index + 7)}]})
    };
    let shared = |index| {
        json!({"conversations": [
        {"from": "human", "value": words(index)}, {"from": "gpt", "value": words(index + 7)}]})
    };
    let without = Place::new();
    let refused = without
        .quantize(&without.rows("m.jsonl", messages), &[])
        .ended_with(2);
    assert!(
        refused
            .error_line()
            .contains("the model has no chat template")
    );
    let place = Place::new().with_template();
    let mut tokens = Vec::new();
    for data in [
        place.rows("m.jsonl", messages),
        place.rows("c.jsonl", shared),
    ] {
        let rule = place.rule(&data, &[]);
        assert!(
            rule.contains("rendered with the model's chat template"),
            "{rule}"
        );
        tokens.push(place.record()["calibration"]["token_sha256"].clone());
    }
    assert_eq!(tokens[0], tokens[1]);
    let turns =
        |index| json!({"instruction": words(index), "input": "", "output": words(index + 7)});
    place.rule(&place.rows("i.jsonl", turns), &[]);
    assert_eq!(place.record()["calibration"]["token_sha256"], tokens[0]);
}

#[test]
fn other_columns_are_read_by_rule_or_by_name() {
    let place = Place::new();
    let asked = place.rows(
        "p.jsonl",
        |index| json!({"prompt": words(index), "completion": words(index + 7)}),
    );
    assert!(
        place
            .rule(&asked, &[])
            .starts_with("columns `prompt`, `completion` joined")
    );
    let both = place.rows(
        "b.jsonl",
        |index| json!({"text": words(index), "body": words(index + 7)}),
    );
    let plain = place.rule(&both, &[]);
    assert!(plain.starts_with("rows joined"), "{plain}");
    assert!(
        place
            .rule(&both, &["--column", "body"])
            .starts_with("column `body`; rows joined")
    );
    let strings = place.rows("s.jsonl", |index| json!(words(index)));
    assert_eq!(place.rule(&strings, &[]), plain);
    let wrong = place.quantize(&both, &["--column", "bodi"]).ended_with(2);
    assert!(wrong.error_line().contains("row 1 of"), "{wrong:?}");
    let text = place.file("t.txt", &words(1).repeat(20));
    let wrong = place.quantize(&text, &["--column", "body"]).ended_with(2);
    assert!(
        wrong.error_line().contains("`--column body` chooses"),
        "{wrong:?}"
    );

    let mut eval = gptq("eval");
    eval.arg(&place.model).arg("--dataset").arg(&both);
    eval.args([
        "--column",
        "body",
        "--seq-len",
        "64",
        "--max-windows",
        "2",
        "--json",
    ]);
    let said = run(&mut eval).done().stdout;
    assert!(
        said.contains("`b.jsonl`, column `body`; rows joined"),
        "{said}"
    );
}

/// 10 MB of one row were 10 MB of stderr; the row without the column was any of them.
#[test]
fn an_error_names_the_row_and_repeats_little_of_it() {
    let place = Place::new();
    let late = |what: &str| {
        let row = json!({"text": words(1)}).to_string() + "\n";
        place.file(
            "late.jsonl",
            &(row.repeat(150) + what + "\n" + &row.repeat(50)),
        )
    };
    let long = format!("{{\"text\": \"a\", \"{}\"}}", "word ".repeat(100_000));
    for wrong in [
        r#"{"prompt": "x"}"#,
        r#"{"text": "cut \ud83d off"}"#,
        r#"{"text": 3}"#,
        "\"x\"",
        &long,
    ] {
        let refused = place.quantize(&late(wrong), &[]).ended_with(2);
        let line = refused.error_line();
        assert!(line.contains("row 151 of") && line.len() < 500, "{line}");
    }
    for read in [
        r#"{"text": "w1", "score": NaN}"#,
        r#"{"text": "w1", "low": -Infinity}"#,
    ] {
        place.quantize(&late(read), &[]).done();
    }
    let marked = place.file(
        "mark.jsonl",
        &format!("\u{feff}{}", fs::read_to_string(late("")).unwrap()),
    );
    place.quantize(&marked, &[]).done();
}

#[test]
fn a_dataset_of_the_hub_is_looked_for_there() {
    let place = Place::new();
    let refused = place
        .quantize(Path::new("acme/chats"), &["--offline"])
        .ended_with(2);
    let line = refused.error_line();
    assert!(
        line.contains("offline") && line.contains("`acme/chats`"),
        "{line}"
    );
    let refused = place.quantize(Path::new("acme"), &[]).ended_with(2);
    assert!(
        refused.error_line().contains("OWNER/NAME on the hub"),
        "{refused:?}"
    );
}
