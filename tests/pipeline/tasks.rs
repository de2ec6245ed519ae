//! Multiple choice: the figures follow from the logits, also after a stop, and on a published model
//! they are those of lm-evaluation-harness.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use gptq_calibration::{Questions, Tokenizer};
use gptq_hub::Checkpoint;
use gptq_inference::{Passage, weigh_choices};
use gptq_model::DeviceContext;
use gptq_packer::SafetensorsFile;
use serde_json::{Value, json};

use crate::support::{Family, TinyModel, gptq, json, refused, run, shared, smollm2, write_text};

/// A model of words, `w0` to `w126`, and questions in them.
struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
}

/// The `<unk>` of [`TinyModel`], for anything that is no word, such as `Question:` and `Answer:`.
const UNKNOWN: u32 = 127;

/// Choices of one to three words, some short and some long, so that length matters.
fn choices(question: u32) -> Vec<Vec<u32>> {
    (0..2 + question % 3)
        .map(|choice| {
            let words = 1 + (question + choice) % 3;
            (0..words)
                .map(|word| (question * 37 + choice * 11 + word * 59) % UNKNOWN)
                .collect()
        })
        .collect()
}

fn words(ids: &[u32]) -> String {
    let words: Vec<String> = ids.iter().map(|id| format!("w{id}")).collect();
    words.join(" ")
}

fn asked(question: u32) -> Vec<u32> {
    (0..2 + question % 4)
        .map(|at| (question * 13 + at * 29) % UNKNOWN)
        .collect()
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let shapes = TinyModel::new(Family::Llama);
        shapes.write(&at("model"));
        write_text(&at("text.txt"), shapes.vocab, 300);
        Place {
            model: at("model"),
            text: at("text.txt"),
            folder,
        }
    }

    fn write(&self, name: &str, rows: &[Value]) -> PathBuf {
        let path = self.folder.path().join(name);
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        fs::write(&path, lines).unwrap();
        path
    }

    /// `count` questions in the layout of ARC, the right choice being the first.
    fn arc(&self, name: &str, count: u32) -> PathBuf {
        let row = |question: u32| {
            let choices: Vec<String> = choices(question).iter().map(|ids| words(ids)).collect();
            let labels: Vec<String> = (0..choices.len()).map(|at| format!("L{at}")).collect();
            let choices = json!({"text": choices, "label": labels});
            json!({"question": words(&asked(question)), "choices": choices, "answerKey": "L0"})
        };
        self.write(name, &(0..count).map(row).collect::<Vec<_>>())
    }

    fn eval(&self) -> Command {
        let mut command = gptq("eval");
        command.arg(&self.model).arg("--dataset").arg(&self.text);
        command.args(["--seq-len", "32", "--max-windows", "2"]);
        command
    }

    fn eval_task(&self, name: &str, file: &Path) -> Command {
        let mut command = self.eval();
        command
            .arg("--task")
            .arg(format!("{name}={}", file.display()));
        command
    }

    /// Log-likelihood of the last `answer` tokens, by the logits that another command writes.
    fn log_likelihood(&self, ids: &[u32], answer: usize) -> f64 {
        let file = self.folder.path().join("logits.safetensors");
        let list: Vec<String> = ids.iter().map(u32::to_string).collect();
        let mut command = gptq("verify");
        command.arg(&self.model).arg("--write").arg(&file);
        run(command.args(["--ids", &list.join(",")])).done();
        let stored = SafetensorsFile::open(&file).unwrap();
        let bytes = stored.read("logits").unwrap();
        fs::remove_file(&file).unwrap();
        let logits: Vec<f64> = (bytes.chunks_exact(4))
            .map(|word| f64::from(f32::from_le_bytes(word.try_into().unwrap())))
            .collect();
        let vocab = logits.len() / ids.len();
        (ids.len() - answer..ids.len())
            .map(|at| {
                let row = &logits[(at - 1) * vocab..at * vocab];
                let sum: f64 = row.iter().map(|logit| logit.exp()).sum();
                row[ids[at] as usize] - sum.ln()
            })
            .sum()
    }
}

fn first_is_largest(values: &[f64]) -> bool {
    values[1..].iter().all(|value| *value < values[0])
}

fn close(found: &Value, want: f64) -> bool {
    (found.as_f64().unwrap() - want).abs() < 1e-9
}

/// acc and acc_norm by hand, from the logits that another command writes.
#[test]
fn figures_follow_from_the_logits() {
    const COUNT: u32 = 16;
    let place = Place::new();
    let (mut plain, mut normed) = (0, 0);
    for question in 0..COUNT {
        let before = [vec![UNKNOWN], asked(question), vec![UNKNOWN]].concat();
        let (likelihoods, by_length): (Vec<f64>, Vec<f64>) = (choices(question).iter())
            .map(|choice| {
                let whole = [before.clone(), choice.clone()].concat();
                let found = place.log_likelihood(&whole, choice.len());
                (found, found / words(choice).len() as f64)
            })
            .unzip();
        plain += usize::from(first_is_largest(&likelihoods));
        normed += usize::from(first_is_largest(&by_length));
    }
    assert_ne!(plain, normed, "the two must differ to be told apart");
    let share = |right: usize| right as f64 / f64::from(COUNT);
    let error = |right: usize| {
        let share = share(right);
        (share * (1.0 - share) / f64::from(COUNT - 1)).sqrt()
    };
    let file = place.arc("q.jsonl", COUNT);
    // groups that hold a few choices, and all at once
    for group in ["40", "100000"] {
        let mut command = place.eval_task("words", &file);
        let record = json(command.args(["--group-tokens", group]))[0].clone();
        let task = &record["tasks"][0];
        assert_eq!(task["task"], "words");
        assert_eq!(task["examples"], COUNT);
        assert!(close(&task["share"], share(plain)), "{task}, {plain}");
        assert!(close(&task["stderr"], error(plain)));
        let found = &task["acc_norm"];
        assert!(close(&found["share"], share(normed)), "{task}, {normed}");
        assert!(close(&found["stderr"], error(normed)));
        let protocol = record["protocol"].as_str().unwrap();
        assert!(
            protocol.contains("; words: multiple choice of ARC: `q.jsonl`, all 16 questions"),
            "{protocol}"
        );
    }
    let table = run(&mut place.eval_task("words", &file)).done().stdout;
    let percent = |right| {
        format!(
            "{:.1} ± {:.1} %",
            100.0 * share(right),
            100.0 * error(right)
        )
    };
    let cells = format!("| {} | {} |", percent(plain), percent(normed));
    assert!(
        table.contains("| words, acc | words, acc_norm |") && table.contains(&cells),
        "{cells}: {table}"
    );
}

/// Each layout by its columns, each choice after its own text; packed and float side by side.
#[test]
fn several_tasks_and_checkpoints_share_a_run_and_its_state() {
    let place = Place::new();
    let packed = place.folder.path().join("packed");
    let mut command = gptq("quantize");
    command.arg(&place.model).arg("--out").arg(&packed);
    run(command.args(["--method", "rtn", "--group-size", "32"])).done();
    let arc = place.arc("arc.jsonl", 9);
    let piqa = place.write(
        "piqa.jsonl",
        &[
            json!({"goal": "w1 w2", "sol1": "w3", "sol2": "w4 w5", "label": 0}),
            json!({"goal": "w6", "sol1": "w7 w8", "sol2": "w9", "label": "1"}),
        ],
    );
    let wino = place.write(
        "wino.jsonl",
        &[
            json!({"sentence": "w1 _ w2 w3", "option1": "w4", "option2": "w5", "answer": "1"}),
            json!({"sentence": "w1 _ w2 w3", "option1": "w4", "option2": "w5", "answer": "2"}),
        ],
    );
    let swag = place.write(
        "swag.jsonl",
        &[
            json!({"activity_label": "w1", "ctx_a": "w2 w3", "ctx_b": "", "label": 1,
                   "endings": ["w4", "w5 w6", "w7", "w8"]}),
        ],
    );
    let state = place.folder.path().join("state.jsonl");
    let eval = |tasks: &[(&str, &Path)]| {
        let mut command = place.eval();
        command.arg(&packed).arg("--lambada").arg(place.write(
            "passages.jsonl",
            &[json!({"text": "w1 w2"}), json!({"text": "w1 w2 w3"})],
        ));
        for (name, file) in tasks {
            command
                .arg("--task")
                .arg(format!("{name}={}", file.display()));
        }
        command
    };
    let all: [(&str, &Path); 4] = [
        ("arc", &arc),
        ("piqa", &piqa),
        ("wino", &wino),
        ("swag", &swag),
    ];
    let whole = json(&mut eval(&all));
    for record in whole.as_array().unwrap() {
        let tasks = record["tasks"].as_array().unwrap();
        let names: Vec<&str> = tasks.iter().map(|t| t["task"].as_str().unwrap()).collect();
        assert_eq!(names, ["arc", "piqa", "wino", "swag"]);
        assert_eq!(record["accuracy"]["examples"], 2);
        // one of two opposite answers is right
        assert_eq!(tasks[2]["share"], 0.5);
        assert!(tasks[2].get("acc_norm").is_none());
        assert!(tasks[3]["acc_norm"]["share"].is_number());
    }
    let of = |records: &Value| -> Vec<Value> {
        let records = records.as_array().unwrap().iter();
        records.map(|record| record["tasks"].clone()).collect()
    };
    let kept = |tasks: &[(&str, &Path)]| {
        let mut command = eval(tasks);
        command.args(["--group-tokens", "64"]);
        command.arg("--state").arg(&state);
        command
    };
    assert_eq!(of(&json(&mut kept(&all))), of(&whole));
    // a run that stopped: its last lines are gone
    let lines = fs::read_to_string(&state).unwrap();
    let cut: Vec<&str> = lines.lines().take(lines.lines().count() - 5).collect();
    fs::write(&state, cut.join("\n") + "\n").unwrap();
    assert_eq!(of(&json(&mut kept(&all))), of(&whole));
    let again = fs::read_to_string(&state).unwrap();
    assert_eq!(again.lines().count(), lines.lines().count());
    // an edited likelihood is noticed
    let edited = lines.replacen("\"likelihoods\":[-", "\"likelihoods\":[-1", 1);
    assert_ne!(edited, lines);
    fs::write(&state, edited).unwrap();
    let folder = place.folder.path();
    refused(&mut kept(&all), folder, &["state.jsonl", "was changed"]);
    fs::write(&state, &lines).unwrap();
    for tasks in [&all[..3], &[]] {
        refused(&mut kept(tasks), folder, &["another set of questions:"]);
    }
}

#[test]
fn what_is_no_task_is_refused() {
    let place = Place::new();
    let arc = place.arc("arc.jsonl", 3);
    let other = place.write("other.jsonl", &[json!({"prompt": "a", "choices": ["b"]})]);
    let of = |given: &str| {
        let mut command = place.eval();
        command.args(["--task", given]);
        command
    };
    let given = |name: &str, file: &Path| format!("{name}={}", file.display());
    let folder = place.folder.path();
    refused(
        &mut of(&given("x", &other)),
        folder,
        &["other.jsonl", "PIQA: `goal`", "it has `prompt`, `choices`"],
    );
    refused(&mut of("x=none.jsonl"), folder, &["none.jsonl"]);
    let text = given("x", &place.text);
    refused(&mut of(&text), folder, &["a row per question"]);
    let mut twice = of(&given("x", &arc));
    twice.args(["--task", &given("x", &arc)]);
    let told = refused(&mut twice, folder, &["two tasks are called `x`"]);
    assert!(told.hint().is_some());
    let mut named = of(&given("lambada", &arc));
    named.arg("--lambada").arg(&other);
    refused(&mut named, folder, &["two tasks are called `lambada`"]);
    let mut none = of(&given("x", &arc));
    none.args(["--task-examples", "0"]);
    refused(&mut none, folder, &["`task_examples` is 0"]);
    let mut two = of(&given("x", &arc));
    let record = json(two.args(["--task-examples", "2"]))[0].clone();
    assert_eq!(record["tasks"][0]["examples"], 2);
    for wrong in ["q.jsonl", "=q.jsonl", "a|b=q.jsonl", "x="] {
        let run = run(&mut of(wrong)).ended_with(2);
        assert!(run.stderr.contains("NAME"), "{run:#?}");
    }
}

/// A model with few positions sees only the end of a long text, and the command reports that.
#[test]
fn a_text_that_is_cut_is_told() {
    let place = Place::new();
    let goal = words(&(0..700).map(|at| at % UNKNOWN).collect::<Vec<_>>());
    let rows = [json!({"goal": goal, "sol1": "w1", "sol2": "w2", "label": 0})];
    let file = place.write("long.jsonl", &rows);
    let told = run(&mut place.eval_task("long", &file)).done().stderr;
    let line = "warning: long: the text before 2 of 2 choices lost its start, since the model has 512 \
                positions";
    assert!(told.contains(line), "{told}");
}

/// Log-likelihoods closer than this may change places: sums of f32 in another order.
const CLOSE: f64 = 1e-4;
/// The stored ones have four digits behind the point; the model's channels may stand in another order.
const TOLERANCE: f64 = 5e-3;

/// The first questions of both tasks on SmolLM2-135M, every choice against what the harness says.
#[test]
fn smollm2_answers_as_in_the_harness() {
    for task in ["arc_easy", "piqa"] {
        let (Some(file), Some(told), Some(model)) = (
            shared(&format!("data/tasks/{task}.validation.arrow")),
            shared(&format!("data/tasks/{task}.smollm2.jsonl")),
            smollm2(),
        ) else {
            return;
        };
        answers_as_in(&file, &fs::read_to_string(told).unwrap(), &model);
    }
}

fn answers_as_in(file: &Path, told: &str, model: &Path) {
    const COUNT: usize = 40;
    let tokenizer = Tokenizer::open(model).unwrap();
    let checkpoint = Checkpoint::open(model).unwrap();
    let config = checkpoint.config_json().unwrap();
    let opened = gptq_inference::open(Arc::new(checkpoint), &config, None).unwrap();
    let positions = opened.spec.max_position_embeddings;
    let questions = Questions::read(file, Some(COUNT), &tokenizer, positions).unwrap();
    let passages: Vec<Passage> = (questions.choices())
        .map(|choice| Passage {
            ids: choice.ids.clone(),
            answer: choice.answer,
        })
        .collect();
    let mut decoder = opened.decoder(&DeviceContext::Cpu).unwrap();
    let weighed = weigh_choices(decoder.as_mut(), &passages, &mut || {}).unwrap();
    let mut rest = weighed.as_slice();
    for (row, (question, line)) in questions.questions.iter().zip(told.lines()).enumerate() {
        let line: Value = serde_json::from_str(line).unwrap();
        let (own, others) = rest.split_at(question.choices.len());
        rest = others;
        let numbers = line["log_likelihoods"].as_array().unwrap();
        let want: Vec<f64> = numbers.iter().map(|ll| ll.as_f64().unwrap()).collect();
        assert_eq!(own.len(), want.len());
        for (own, want) in own.iter().zip(&want) {
            assert!((own - want).abs() < TOLERANCE, "row {row}: {own}, {want}");
        }
        assert_eq!(line["answer"], question.right.to_string());
        let by_length = |all: &[f64]| -> Vec<f64> {
            let characters = question.choices.iter().map(|choice| choice.characters);
            all.iter()
                .zip(characters)
                .map(|(ll, count)| ll / count as f64)
                .collect()
        };
        for (values, key) in [(own.to_vec(), "acc"), (by_length(own), "acc_norm")] {
            let mut order: Vec<usize> = (0..values.len()).collect();
            order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
            let is_right = order[0] == question.right;
            if values[order[0]] - values[order[1]] > CLOSE {
                assert_eq!(
                    line[key].as_f64() == Some(1.0),
                    is_right,
                    "row {row}, {key}"
                );
            }
        }
    }
    assert!(rest.is_empty());
}
