//! What a run will take is told before its first block.

use serde_json::Value;

use crate::support::{Family, TinyModel, gptq, quantize, run, write_text};

const PLAN: &str = r#"
[[branch]]
name = "main"
bits = 4
group_size = 32
effort = "best"
"#;

/// The number before a unit in a line, `12` of `12 MB of host memory`.
fn number_before(line: &str, unit: &str) -> f64 {
    let before = line.split(unit).next().unwrap();
    let number = before.rsplit([' ', ',']).find(|word| !word.is_empty());
    number.unwrap().parse().unwrap()
}

#[test]
fn a_run_and_each_branch_of_a_matrix_tell_their_time_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = TinyModel::new(Family::Llama);
    shapes.write(&model);
    write_text(&text, shapes.vocab, 2_000);
    let windows = ["--samples", "4", "--seq-len", "32", "--device", "cpu"];
    let mut command = quantize(&model, &folder.path().join("out"), &text);
    command.args(["--group-size", "32", "--effort", "best"]);
    let told = run(command.args(windows)).done();
    let told = told
        .stderr
        .lines()
        .find(|line| line.starts_with("forecast: about "));
    let line = told.expect("a line with the forecast");
    assert!(line.ends_with(" of host memory"), "{line}");
    assert!(!line.contains("GPU"), "{line}");
    assert!((1.0..60.0).contains(&number_before(line, " s, ")), "{line}");
    assert!(
        (10.0..999.0).contains(&number_before(line, " MB of host")),
        "{line}"
    );

    let plan = folder.path().join("plan.toml");
    std::fs::write(&plan, PLAN).unwrap();
    let matrix = |more: &[&str]| {
        let mut command = gptq("matrix");
        command
            .arg(&model)
            .arg("--plan")
            .arg(&plan)
            .arg("--dataset")
            .arg(&text);
        run(command.args(windows).args(more)).done()
    };
    let planned: Value = serde_json::from_str(&matrix(&["--dry-run", "--json"]).stdout).unwrap();
    let forecast = &planned[0]["forecast"];
    let seconds = forecast["seconds"].as_f64().unwrap();
    assert!(seconds.is_finite() && seconds > 0.0, "{forecast}");
    assert_eq!(forecast["host_memory"], planned[0]["memory"]);
    let table = matrix(&["--dry-run"]).stdout;
    assert!(
        table.contains("| main | 4 | 32 |") && table.contains(" MB |"),
        "{table}"
    );
    let out = folder.path().join("repo").display().to_string();
    let made = matrix(&["--out", &out, "--evaluate", "none"]);
    assert!(made.stderr.contains("main: forecast: about "), "{made:#?}");
}
