//! A page from the records of real runs, whole or not at all.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

use crate::support::{entries, gptq, quantize, refused, run, small_model};

/// A model, a rounded and a quantized checkpoint, and the scores of all three.
struct Made {
    folder: tempfile::TempDir,
    scores: PathBuf,
}

impl Made {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = small_model(folder.path());
        let path = |name: &str| folder.path().join(name);
        let mut rtn = gptq("quantize");
        rtn.arg(&model).arg("--out").arg(path("rounded"));
        run(rtn.args(["--method", "rtn", "--group-size", "32"])).done();
        let mut gptq_run = quantize(&model, &path("solved"), &text);
        gptq_run.args(["--group-size", "32", "--samples", "4", "--seq-len", "64"]);
        run(gptq_run.args(["--desc-act", "--device", "cpu"])).done();
        let mut eval = gptq("eval");
        eval.arg(&model).arg(path("rounded")).arg(path("solved"));
        eval.arg("--dataset").arg(&text).args(["--device", "cpu"]);
        let told = run(eval.args(["--seq-len", "64", "--max-windows", "4", "--json"])).done();
        let scores = path("scores.json");
        fs::write(&scores, told.stdout).unwrap();
        Made { folder, scores }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn report(&self, runs: &[&str], out: &str) -> Command {
        let mut command = gptq("report");
        command.env("SOURCE_DATE_EPOCH", "1700000000");
        command.args(runs.iter().map(|run| self.path(run)));
        command.arg("--out").arg(self.path(out));
        command
    }
}

#[test]
fn a_report_says_what_the_records_say() {
    let made = Made::new();
    let all = ["rounded", "solved", "scores.json"];
    let told = run(made.report(&all, "page").arg("--json")).done();
    let model: Value = serde_json::from_str(&told.stdout).unwrap();
    assert_eq!(model["date"], "2023-11-14 22:13 UTC");
    let rows = model["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0]["is_reference"], true);
    let names = ["rounded", "solved"];
    let page = fs::read_to_string(made.path("page/index.html")).unwrap();
    let markdown = fs::read_to_string(made.path("page/report.md")).unwrap();
    let scores: Value = serde_json::from_slice(&fs::read(&made.scores).unwrap()).unwrap();
    for (index, name) in names.into_iter().enumerate() {
        let (row, score) = (&rows[index + 1], &scores[index + 1]);
        assert_eq!(row["name"], name);
        assert_eq!(row["scores"][0]["record"], *score);
        // Sizes and runtimes come from the folder.
        assert_eq!(row["weight_bytes"], score["weight_bytes"]);
        assert!(row["bits_per_weight"].as_f64().unwrap() > 4.0);
        assert_eq!(row["readings"].as_array().unwrap().len(), 8);
        let kl = format!("{:.4}", score["kl"].as_f64().unwrap());
        for text in [&page, &markdown] {
            assert!(text.contains(&kl), "{kl}: {text}");
        }
    }
    assert!(markdown.contains("--method rtn"), "{markdown}");
    let command = "--seq-len 64 --seed 0 --device cpu --desc-act\n";
    assert!(markdown.contains(command), "{markdown}");
    // Only the run that saw inputs has errors of layers.
    assert!(page.contains("rtn-mlp-down_proj"), "{page}");
    assert!(
        markdown.contains("rounding to nearest sees no inputs"),
        "{markdown}"
    );

    // The same records and date give the same bytes.
    run(made.report(&all, "again").arg("--json")).done();
    for name in ["index.html", "report.md"] {
        let read = |folder: &str| fs::read(made.path(folder).join(name)).unwrap();
        assert_eq!(read("page"), read("again"), "{name}");
    }
    // Not one run for all, and no scores at all.
    fs::copy(made.path("solved/gptq_run.json"), made.path("alone.json")).unwrap();
    run(&mut made.report(&["alone.json"], "alone")).done();
    let alone = fs::read_to_string(made.path("alone/report.md")).unwrap();
    assert!(alone.contains("Nothing was scored"), "{alone}");
    assert!(alone.contains("| `alone` | 4 | 32 | yes |"), "{alone}");
}

#[test]
fn what_is_no_record_is_refused_and_nothing_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("text.json"), "no record").unwrap();
    fs::write(path("other.json"), "{\"schema\": 1}").unwrap();
    fs::write(path("empty.json"), "[]").unwrap();
    fs::create_dir(path("bare")).unwrap();
    for (name, said) in [
        ("absent", "no such file or folder"),
        ("text.json", "not a record"),
        ("other.json", "missing field"),
        ("empty.json", "holds no score"),
        ("bare", "neither a checkpoint"),
    ] {
        let mut command = gptq("report");
        command.arg(path(name)).arg("--out").arg(path("deep/page"));
        let told = refused(&mut command, folder.path(), &[name, said]);
        assert!(
            told.hint()
                .is_some_and(|hint| hint.contains("gptq eval --json"))
        );
    }
}

#[test]
fn a_folder_that_holds_something_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("page")).unwrap();
    fs::write(path("page/index.html"), "mine").unwrap();
    let mut command = gptq("report");
    command.arg(path("absent")).arg("--out").arg(path("page"));
    refused(
        &mut command,
        folder.path(),
        &["page", "not an empty folder"],
    );
    assert_eq!(fs::read_to_string(path("page/index.html")).unwrap(), "mine");
    assert_eq!(entries(folder.path()).len(), 2);
}

#[test]
fn a_record_of_a_later_version_is_refused() {
    let made = Made::new();
    let text = fs::read_to_string(made.path("solved/gptq_run.json")).unwrap();
    let later = text.replacen("\"schema\": 1", "\"schema\": 2", 1);
    assert_ne!(text, later);
    fs::write(made.path("later.json"), later).unwrap();
    let mut command = made.report(&["later.json"], "page");
    refused(
        &mut command,
        made.folder.path(),
        &["later.json", "version 2"],
    );
}
