//! Results of evaluations, also after a kill, and on models with known answers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gptq_packer::SafetensorsFile;
use serde_json::Value;

use crate::support::{
    Family, TinyModel, gptq, json, quantize, refused, run, small_model, write_text,
};

/// A text, a float model and two packed ones of it.
struct Place {
    folder: tempfile::TempDir,
    models: [PathBuf; 3],
    text: PathBuf,
    state: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = small_model(folder.path());
        let at = |name: &str| folder.path().join(name);
        for (name, bits) in [("four", "4"), ("two", "2")] {
            let mut command = gptq("quantize");
            command.arg(&model).arg("--out").arg(at(name));
            command.args(["--method", "rtn", "--group-size", "32", "--bits", bits]);
            run(&mut command).done();
        }
        Place {
            models: [model, at("four"), at("two")],
            state: at("state.jsonl"),
            text,
            folder,
        }
    }

    /// Six groups of four windows.
    fn eval(&self) -> Command {
        let mut command = gptq("eval");
        command.args(&self.models).arg("--dataset").arg(&self.text);
        command.args(["--seq-len", "256", "--max-windows", "24"]);
        command.args(["--group-tokens", "1024"]);
        command
    }

    fn kept(&self) -> Command {
        let mut command = self.eval();
        command.arg("--state").arg(&self.state);
        command
    }

    /// Starts an evaluation and kills it once `groups` scored groups are in its state.
    fn kill_after(&self, groups: usize) {
        let mut command = self.kept();
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        self.wait_for_lines(&mut child, 1 + groups);
        child.kill().unwrap();
        child.wait().unwrap();
        let lines = fs::read_to_string(&self.state).unwrap().lines().count();
        assert!(
            lines < 1 + 3 * 6,
            "the evaluation ended before it was killed"
        );
    }

    fn wait_for_lines(&self, child: &mut Child, lines: usize) {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            let text = fs::read(&self.state).unwrap_or_default();
            if text.iter().filter(|&&byte| byte == b'\n').count() >= lines {
                return;
            }
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the evaluation ended by itself: {status}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no {lines} lines in the state after a minute");
    }
}

/// All but the times, which no two runs share.
fn timeless(mut records: Value) -> Value {
    for record in records.as_array_mut().unwrap() {
        let record = record.as_object_mut().unwrap();
        assert!(record.remove("seconds").unwrap().as_f64().unwrap() > 0.0);
    }
    records
}

/// The reference's first group, the first packed model's, and one in the middle.
#[test]
fn killed_and_resumed_it_prints_the_same_numbers() {
    let place = Place::new();
    let whole = timeless(json(&mut place.eval()));
    for groups in [1, 2, 7] {
        place.kill_after(groups);
        let told = run(place.kept().arg("--json")).done();
        // the reference alone saves nothing: its states are needed for the others
        let saved = told.stderr.contains("passes are done already");
        assert_eq!(saved, groups > 1, "{told:#?}");
        let resumed: Value = serde_json::from_str(&told.stdout).unwrap();
        assert_eq!(timeless(resumed), whole, "after {groups} groups");
        // all there: nothing is scored again
        let again: Value = json(&mut place.kept());
        assert_eq!(timeless(again), whole);
        fs::remove_file(&place.state).unwrap();
    }
}

#[test]
fn what_the_record_says_of_a_packed_model() {
    let place = Place::new();
    let records = json(&mut place.eval());
    let first = &records[0];
    for absent in ["kl_p999", "kl_by_position", "nll_difference", "accuracy"] {
        assert!(first.get(absent).is_none(), "{first:#}");
    }
    let number = |model: usize, path: &str| records[model].pointer(path).unwrap().as_f64().unwrap();
    for model in [1, 2] {
        let difference = number(model, "/nll") - number(0, "/nll");
        assert!((number(model, "/nll_difference/mean") - difference).abs() < 1e-9);
        let (low, high) = (
            number(model, "/nll_difference/low"),
            number(model, "/nll_difference/high"),
        );
        assert!(low < difference && difference < high);
        if model == 1 {
            // paired, a small difference is known far better than each likelihood
            assert!(high - low < 2.0 * number(0, "/nll_stderr"));
        }
        let parts = records[model]["kl_by_position"].as_array().unwrap();
        assert_eq!(parts.len(), 32);
        let sum: f64 = parts.iter().map(|part| part.as_f64().unwrap()).sum();
        // 255 positions: parts are nearly, not quite, equally long
        assert!((sum / 32.0 / number(model, "/kl") - 1.0).abs() < 0.02);
        assert!(number(model, "/kl_p999") > 3.0 * number(model, "/kl"));
    }
    assert!(number(1, "/kl_p999") < number(2, "/kl_p999"));
    let table = run(&mut place.eval()).done().stdout;
    for head in [
        "KL 99.9 %",
        "ln ppl less first (95 %)",
        "noise floor",
        "to 256 |",
    ] {
        assert!(table.contains(head), "{head}: {table}");
    }
    let mut two = gptq("eval");
    two.args(&place.models[..2])
        .arg("--dataset")
        .arg(&place.text);
    let records = json(two.args(["--seq-len", "256", "--max-windows", "2"]));
    assert!(records[1].get("nll_difference").is_none(), "{records:#}");
    assert!(records[1]["kl_p999"].is_number());
}

#[test]
fn the_state_of_another_evaluation_is_refused_by_name() {
    let place = Place::new();
    place.kill_after(2);
    let before = fs::read(&place.state).unwrap();
    let state = ["--state", place.state.to_str().unwrap()];
    let eval = |models: &[PathBuf], flags: &[&str]| {
        let mut command = gptq("eval");
        command.args(models).arg("--dataset").arg(&place.text);
        command.args(flags).args(state);
        command
    };
    let usual = ["--seq-len", "256", "--max-windows", "24", "--group-tokens"];
    let sized = |tokens: &'static str| [&usual[..], &[tokens]].concat();
    let swapped = [0, 2, 1].map(|index: usize| place.models[index].clone());
    let fewer = [
        "--seq-len",
        "256",
        "--max-windows",
        "23",
        "--group-tokens",
        "1024",
    ];
    let cases = [
        (eval(&place.models, &fewer), "another text:"),
        (
            eval(&place.models, &sized("2048")),
            "another group size: 1024, here 2048",
        ),
        (eval(&swapped, &sized("1024")), "another checkpoint 2:"),
        (
            eval(&place.models[..2], &sized("1024")),
            "another number of checkpoints: 3, here 2",
        ),
    ];
    for (mut command, named) in cases {
        let told = refused(&mut command, place.folder.path(), &["state.jsonl", named]);
        assert!(told.hint().is_some(), "{told:#?}");
        assert_eq!(fs::read(&place.state).unwrap(), before);
    }
    // one bit of one weight, in a file of the same length and time
    let weights = place.models[1].join("model.safetensors");
    let time = fs::metadata(&weights).unwrap().modified().unwrap();
    let mut content = fs::read(&weights).unwrap();
    let low = content.len() - 2;
    content[low] ^= 1;
    fs::write(&weights, content).unwrap();
    let file = fs::File::options().write(true).open(&weights).unwrap();
    file.set_modified(time).unwrap();
    refused(
        &mut place.kept(),
        place.folder.path(),
        &["another checkpoint 2:"],
    );

    let notes = place.folder.path().join("notes.txt");
    fs::write(&notes, "buy milk\n").unwrap();
    let mut command = place.eval();
    command.arg("--state").arg(&notes);
    refused(
        &mut command,
        place.folder.path(),
        &["notes.txt", "not the state of an evaluation"],
    );
    assert_eq!(fs::read_to_string(&notes).unwrap(), "buy milk\n");
}

/// The model's likeliest token after `ids`, by the logits that another command writes.
fn greedy(model: &Path, ids: &[u32], vocab: usize) -> u32 {
    let file = model.join("logits.safetensors");
    let list: Vec<String> = ids.iter().map(u32::to_string).collect();
    let mut command = gptq("verify");
    command.arg(model).arg("--write").arg(&file);
    run(command.args(["--ids", &list.join(",")])).done();
    let bytes = SafetensorsFile::open(&file)
        .unwrap()
        .read("logits")
        .unwrap();
    fs::remove_file(&file).unwrap();
    let logits: Vec<f32> = (bytes.chunks_exact(4))
        .map(|word| f32::from_le_bytes(word.try_into().unwrap()))
        .collect();
    let last = &logits[logits.len() - vocab..];
    (0..vocab)
        .max_by(|&a, &b| last[a].total_cmp(&last[b]))
        .unwrap() as u32
}

#[test]
fn last_words_of_the_models_own_are_all_right() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (model, text) = (at("model"), at("text.txt"));
    let shapes = TinyModel::new(Family::Qwen3);
    shapes.write(&model);
    write_text(&text, shapes.vocab, 300);
    // the last id is `<unk>`, which is no word
    let unknown = shapes.vocab as u32 - 1;
    let passages: Vec<(Vec<u32>, u32)> = (0..40u32)
        .map(|index| {
            let length = 2 + index % 5;
            (0..length)
                .map(|at| (index * 31 + at * 17) % unknown)
                .collect()
        })
        .map(|ids: Vec<u32>| {
            let next = greedy(&model, &ids, shapes.vocab);
            (ids, next)
        })
        .filter(|(_, next)| *next != unknown)
        .take(20)
        .collect();
    assert_eq!(passages.len(), 20);
    let write = |name: &str, wrong: usize| {
        let lines: String = (passages.iter().enumerate())
            .map(|(index, (ids, next))| {
                let last = if index < wrong {
                    (next + 1) % unknown
                } else {
                    *next
                };
                let words: Vec<String> = ids
                    .iter()
                    .chain([&last])
                    .map(|id| format!("w{id}"))
                    .collect();
                format!("{{\"text\": \"{}\"}}\n", words.join(" "))
            })
            .collect();
        fs::write(at(name), lines).unwrap();
    };
    let eval = |name: &str| {
        let mut command = gptq("eval");
        command.arg(&model).arg("--dataset").arg(&text);
        command.args(["--seq-len", "32", "--group-tokens", "40"]);
        command.arg("--lambada").arg(at(name));
        command
    };
    for (name, wrong, share) in [
        ("all.jsonl", 0, 1.0),
        ("half.jsonl", 10, 0.5),
        ("none.jsonl", 20, 0.0),
    ] {
        write(name, wrong);
        let accuracy = json(&mut eval(name))[0]["accuracy"].clone();
        assert_eq!(accuracy["task"], "lambada");
        assert_eq!(accuracy["examples"], 20);
        assert_eq!(accuracy["share"], share, "{name}");
        let error = accuracy["stderr"].as_f64().unwrap();
        let share: f64 = share;
        assert!((error - (share * (1.0 - share) / 19.0).sqrt()).abs() < 1e-12);
    }
    // the first ten of the half are the wrong ones; kept and read again they stay so
    let state = at("state.jsonl");
    for _ in 0..2 {
        let mut command = eval("half.jsonl");
        command
            .args(["--lambada-examples", "10"])
            .arg("--state")
            .arg(&state);
        let record = json(&mut command)[0].clone();
        assert_eq!(record["accuracy"]["share"], 0.0);
        let protocol = record["protocol"].as_str().unwrap();
        assert!(
            protocol.contains("`half.jsonl`, the first 10 of 20 passages"),
            "{protocol}"
        );
    }
    refused(
        eval("half.jsonl").arg("--state").arg(&state),
        folder.path(),
        &["another set of passages:"],
    );
    refused(
        eval("text.txt").args(["--lambada-examples", "3"]),
        folder.path(),
        &["a row per passage", "text.txt"],
    );
    let table = run(&mut eval("half.jsonl")).done().stdout;
    assert!(
        table.contains("| lambada |") && table.contains("50.0 ± 11.5 %"),
        "{table}"
    );
}

/// Windows of one length share batches with their neighbours, and groups cut batches: scores must not
/// change with the size of a group.
#[test]
fn numbers_do_not_depend_on_the_size_of_a_group() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = small_model(folder.path());
    let packed = folder.path().join("packed");
    let mut command = quantize(&model, &packed, &text);
    run(command.args(["--method", "rtn", "--group-size", "32"])).done();
    let of = |tokens: &str| {
        let mut command = gptq("eval");
        command.arg(&model).arg(&packed).arg("--dataset").arg(&text);
        command.args(["--seq-len", "100", "--max-windows", "23"]);
        timeless(json(command.args(["--group-tokens", tokens])))
    };
    let whole = of("100000");
    for tokens in ["100", "700", "2000"] {
        assert_eq!(of(tokens), whole, "groups of {tokens} tokens");
    }
}
