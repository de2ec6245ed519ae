//! `generate` and `chat`: text on stdout, everything else on stderr.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use gptq_calibration::Tokenizer;
use gptq_hub::Checkpoint;
use gptq_inference::{logits, open};
use gptq_model::DeviceContext;
use serde_json::{Value, json};

use crate::support::{
    Family, Run, TinyModel, edit_json, fixture, gptq, json, refused, run, small_model,
};

/// Greedy continuation by a reference: the likeliest token of the pass that streams blocks, repeated
/// for each token.
fn greedy(folder: &Path, prompt: &str, count: usize) -> String {
    let checkpoint = Arc::new(Checkpoint::open(folder).unwrap());
    let config = checkpoint.config_json().unwrap();
    let model = open(checkpoint, &config, None).unwrap();
    let mut decoder = model.decoder(&DeviceContext::Cpu).unwrap();
    let tokenizer = Tokenizer::open(folder).unwrap();
    let mut ids = tokenizer.encode(prompt).unwrap();
    let before = tokenizer.decode(&ids, true).unwrap();
    for _ in 0..count {
        let all = logits(decoder.as_mut(), &ids).unwrap();
        let last = &all[all.len() - model.spec.vocab_size..];
        let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b]));
        ids.push(best.unwrap() as u32);
    }
    let whole = tokenizer.decode(&ids, true).unwrap();
    whole.strip_prefix(&before).unwrap().to_string()
}

fn with_stdin(command: &mut Command, text: &str) -> Run {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The likeliest tokens after it are ahead of the next ones by 0.02 at least, far more than two
/// ways to sum differ by.
const PROMPT: &str = "Mr. Fogg";
/// A part of the fixture model's continuation.
const SAID: &str = "of the Japanese";

/// A copy whose configuration may be changed.
fn copied(folder: &Path) -> PathBuf {
    small_model(folder).0
}

#[test]
fn the_likeliest_text_is_the_one_of_the_streaming_pass() {
    let model = fixture("verne");
    let want = greedy(&model, PROMPT, 48);
    assert!(want.contains(SAID), "{want:?} is not from the novel");
    let limit = ["--max-new-tokens", "48", "--device", "cpu"];
    let mut command = gptq("generate");
    let told = run(command.arg(&model).args(["--prompt", PROMPT]).args(limit)).done();
    assert_eq!(told.stdout, format!("{want}\n"));
    assert!(told.stderr.contains("text: 48 tokens"), "{told:#?}");

    // The same prompt from a pipe, and inside a card's template.
    let mut command = gptq("generate");
    let piped = with_stdin(command.arg(&model).args(limit), &format!("{PROMPT}\n")).done();
    assert_eq!(piped.stdout, told.stdout);
    let mut command = gptq("generate");
    command.args(["--prompt", "Fo", "--prompt-template", "Mr. {prompt}gg"]);
    assert_eq!(
        run(command.arg(&model).args(limit)).done().stdout,
        told.stdout
    );

    // The cache changes nothing.
    let mut command = gptq("generate");
    command.arg(&model).args(["--prompt", PROMPT, "--no-cache"]);
    assert_eq!(run(command.args(limit)).done().stdout, told.stdout);

    // Packed in eight bits it is another model, but still one that tells of Japan.
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out");
    let mut rtn = gptq("quantize");
    rtn.arg(&model)
        .arg("--out")
        .arg(&out)
        .args(["--method", "rtn"]);
    run(rtn.args(["--bits", "8", "--group-size", "32"])).done();
    let mut command = gptq("generate");
    command.arg(&out).args(["--prompt", PROMPT]);
    let record = json(command.args(limit));
    assert!(
        record["text"].as_str().unwrap().contains(SAID),
        "{record:#}"
    );
    assert_eq!(record["tokens"].as_array().unwrap().len(), 48);
    assert_eq!(record["steps"], 47);
    // Greedy: no token was likelier than the one that was chosen.
    let leads = record["leads"].as_array().unwrap();
    assert_eq!(leads.len(), 48);
    assert!(leads.iter().all(|lead| lead.as_f64().unwrap() >= 0.0));
    assert!(leads.iter().any(|lead| lead.as_f64().unwrap() > 0.1));
}

#[test]
fn one_seed_gives_one_text_and_threads_change_nothing() {
    let model = fixture("verne");
    let text = |seed: &str, threads: &str| {
        let mut command = gptq("generate");
        command
            .arg(&model)
            .args(["--prompt", "Tom", "--temperature", "1.2", "--top-p", "0.95"]);
        command.args(["--top-k", "100", "--repetition-penalty", "1.1"]);
        command.args([
            "--max-new-tokens",
            "32",
            "--seed",
            seed,
            "--threads",
            threads,
        ]);
        run(&mut command).done().stdout
    };
    assert_eq!(text("5", "1"), text("5", "3"));
    assert_ne!(text("5", "1"), text("6", "1"));
}

#[test]
fn a_text_ends_where_it_is_told_to() {
    let model = fixture("verne");
    let want = greedy(&model, PROMPT, 60);
    let record = |args: &[&str]| {
        let mut command = gptq("generate");
        command.arg(&model).args(["--prompt", PROMPT]);
        json(command.args(["--max-new-tokens", "60"]).args(args))
    };
    // Tokens here are short: this string has several.
    let stopped = record(&["--stop", SAID, "--stop", "never said"]);
    let (before, _) = want.split_once(SAID).unwrap();
    assert_eq!(stopped["text"], before);
    assert_eq!(stopped["ended_by"], format!("the stop string {SAID:?}"));
    assert_eq!(record(&["--stop", "never said"])["text"], want);

    // A token that the configuration names ends it too, and has no text.
    let folder = tempfile::tempdir().unwrap();
    let model = copied(folder.path());
    let comma = Tokenizer::open(&model).unwrap().encode_plain("a,").unwrap();
    let comma = *comma.last().unwrap();
    edit_json(&model.join("config.json"), |config| {
        config["eos_token_id"] = json!([2, comma]);
    });
    let mut command = gptq("generate");
    command.arg(&model).args(["--prompt", PROMPT]);
    let ended = json(&mut command);
    assert_eq!(ended["text"], want.split_once(',').unwrap().0);
    assert_eq!(ended["ended_by"], format!("token {comma}"));
}

#[test]
fn settings_of_the_checkpoint_are_taken_and_said() {
    let folder = tempfile::tempdir().unwrap();
    let model = copied(folder.path());
    std::fs::write(
        model.join("generation_config.json"),
        r#"{"do_sample": true, "temperature": 0.9, "top_k": 40, "top_p": 0.8}"#,
    )
    .unwrap();
    let text = |args: &[&str]| {
        let mut command = gptq("generate");
        command
            .arg(&model)
            .args(["--prompt", "Tom", "--max-new-tokens", "24"]);
        run(command.args(args)).done()
    };
    let stored = text(&[]);
    assert!(
        stored
            .stderr
            .contains("generation_config.json: temperature 0.9, top-k 40, top-p 0.8"),
        "{stored:#?}"
    );
    let typed = text(&["--temperature", "0.9", "--top-k", "40", "--top-p", "0.8"]);
    assert_eq!(stored.stdout, typed.stdout);
    assert!(
        !typed.stderr.contains("generation_config.json"),
        "{typed:#?}"
    );
    assert_ne!(stored.stdout, text(&["--temperature", "0"]).stdout);
}

const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.content.strip() }} \
    {% endfor %}{{ pad_token }}";

/// `<s>`, which the template writes, is put in front of other texts too.
fn begins_with_bos(tokenizer: &mut Value) {
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    });
}

/// A conversation is its whole text at every turn, whatever the cache already holds.
#[test]
fn a_conversation_goes_on_from_what_was_said() {
    let folder = tempfile::tempdir().unwrap();
    let model = copied(folder.path());
    edit_json(&model.join("tokenizer.json"), begins_with_bos);
    std::fs::write(
        model.join("tokenizer_config.json"),
        json!({"bos_token": "<s>", "pad_token": {"content": "then"}, "chat_template": TEMPLATE})
            .to_string(),
    )
    .unwrap();
    let chat = |lines: &str| {
        let mut command = gptq("chat");
        command
            .arg(&model)
            .args(["--max-new-tokens", "12", "--context", "400"]);
        with_stdin(&mut command, lines).done()
    };
    let generated = |args: &[&str]| {
        let mut command = gptq("generate");
        command.arg(&model).args(["--max-new-tokens", "12"]);
        run(command.args(args)).done().stdout
    };
    let first = generated(&["--chat", "--prompt", " Once upon a time "]);
    assert_eq!(
        first,
        generated(&[
            "--prompt-template",
            "{prompt} then",
            "--prompt",
            "Once upon a time"
        ]),
    );

    let two = chat("Once upon a time\n\nTim\n");
    let answers: Vec<&str> = two.stdout.splitn(2, '\n').collect();
    assert_eq!(format!("{}\n", answers[0]), first);
    let said = format!("Once upon a time {} Tim then", answers[0].trim());
    let template = format!("{{prompt}}{said}");
    assert_eq!(
        answers[1],
        generated(&["--prompt", "", "--prompt-template", &template])
    );
    assert!(!two.stdout.contains('>'), "{two:#?}");

    // Forgotten, the same line gets the same answer; what follows /exit is not read.
    let again = chat("Once upon a time\n/reset\nOnce upon a time\n/exit\nTim\n");
    assert_eq!(again.stdout, format!("{first}{first}"));
}

#[test]
fn what_cannot_be_said_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    TinyModel::new(Family::Llama).write(&model);
    let place = folder.path();
    let generate = |args: &[&str]| {
        let mut command = gptq("generate");
        command.arg(&model).args(args);
        command
    };
    let long = "w1 ".repeat(600);
    let cases: [(&[&str], &[&str]); 6] = [
        (
            &["--prompt", "w1", "--chat"],
            &["model", "no chat template"],
        ),
        (
            &["--prompt", "w1", "--prompt-template", "Q: A:"],
            &["`Q: A:`", "{prompt}"],
        ),
        (&["--prompt", "w1", "--top-p", "1.5"], &["top-p 1.5"]),
        (
            &["--prompt", "w1", "--temperature", "-1"],
            &["temperature -1"],
        ),
        (&["--prompt", &long], &["600 tokens", "512"]),
        (
            &["--prompt", "w1", "--repetition-penalty", "0"],
            &["penalty 0"],
        ),
    ];
    for (args, named) in cases {
        refused(&mut generate(args), place, named);
    }
    let mut chat = gptq("chat");
    let told = refused(chat.arg(&model), place, &["no chat template"]);
    assert!(told.hint().unwrap().contains("--prompt-template"));
    let mut chat = gptq("chat");
    chat.arg(&model)
        .args(["--prompt-template", "{prompt}", "--context", "9000"]);
    refused(&mut chat, place, &["9000", "512"]);
    std::fs::write(
        model.join("tokenizer_config.json"),
        r#"{"chat_template": "{% for %}"}"#,
    )
    .unwrap();
    refused(
        &mut generate(&["--prompt", "w1", "--chat"]),
        place,
        &["chat template"],
    );
}

/// A line that does not fit is answered, and the conversation goes on.
#[test]
fn a_full_context_ends_a_text_but_not_the_conversation() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    TinyModel::new(Family::Llama).write(&model);
    let mut chat = gptq("chat");
    chat.arg(&model)
        .args(["--prompt-template", "{prompt} ", "--context", "8"]);
    let lines = format!("{}\nw1 w2 w3\n/reset\nw1 w2 w3\n", "w5 ".repeat(9));
    let told = with_stdin(&mut chat, &lines).done();
    assert!(
        told.stderr.contains("9 tokens, the context has 8"),
        "{told:#?}"
    );
    assert_eq!(
        told.stderr.matches("ended by a full context").count(),
        2,
        "{told:#?}"
    );
    let answers: Vec<&str> = told.stdout.lines().collect();
    assert_eq!(answers.len(), 2, "{told:#?}");
    assert_eq!(answers[0], answers[1]);
}

/// Ctrl-C ends the text; its statistics are still printed, and the program reports the interruption.
#[cfg(unix)]
#[test]
fn an_interrupted_text_ends_cleanly() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    TinyModel::new(Family::Llama).write(&model);
    edit_json(&model.join("config.json"), |config| {
        config["max_position_embeddings"] = json!(300_000);
    });
    let mut command = gptq("generate");
    command.arg(&model).args(["--prompt", "w1 w2"]);
    command.args(["--max-new-tokens", "200000", "--temperature", "1"]);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = [0u8; 1];
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut first).unwrap();
    let id = child.id().to_string();
    let sent = Command::new("kill").args(["-INT", &id]).status().unwrap();
    assert!(sent.success());
    let mut text = String::new();
    stdout.read_to_string(&mut text).unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(130), "{stderr}");
    assert!(text.ends_with('\n'), "{text:?}");
    assert!(stderr.contains("ended by Ctrl-C or a reader"), "{stderr}");
}

#[test]
fn speed_is_measured_where_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = small_model(folder.path());
    let mut eval = gptq("eval");
    eval.arg(&model).arg("--dataset").arg(&text);
    let records = json(eval.args(["--seq-len", "64", "--max-windows", "2", "--speed"]));
    let speed = &records[0]["speed"];
    assert_eq!(speed["device"], "cpu, 2 threads");
    assert_eq!(speed["batch"], 1);
    assert!(speed["decode_tokens_per_second"].as_f64().unwrap() > 1.0);
    assert!(speed["prefill_tokens_per_second"].as_f64().unwrap() > 1.0);
    assert!(speed["peak_memory"].as_u64().unwrap() > 100_000);
}
