//! Windows that begin with the beginning-of-sequence token: Gemma's by themselves, others' when asked to.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::{
    Family, TinyModel, edit_json, fixture, gptq, json, quantize, refused, run, write_text,
};

const VOCAB: usize = 64;

struct Place {
    folder: tempfile::TempDir,
    /// A Llama, which reads text without BOS.
    llama: PathBuf,
    gemma: PathBuf,
    text: PathBuf,
}

impl Place {
    /// `bos_token_id` of both is 1.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let (llama, gemma, text) = (at("llama"), at("gemma"), at("text.txt"));
        let shapes = TinyModel {
            vocab: VOCAB,
            ..TinyModel::new(Family::Llama)
        };
        shapes.write(&llama);
        fs::create_dir(&gemma).unwrap();
        let copy = |from: PathBuf, to: &str| {
            fs::write(gemma.join(to), fs::read(from).unwrap()).unwrap();
        };
        for file in ["config.json", "model.safetensors"] {
            copy(fixture("arch/gemma3").join(file), file);
        }
        copy(llama.join("tokenizer.json"), "tokenizer.json");
        write_text(&text, VOCAB, 3000);
        Place {
            folder,
            llama,
            gemma,
            text,
        }
    }

    fn quantize(&self, model: &Path, text: &Path, flags: &[&str]) -> Command {
        let out = self.folder.path().join("out");
        let _ = fs::remove_dir_all(&out);
        let mut command = quantize(model, &out, text);
        // Heads of 12 channels fit four codes a word, not eight.
        command.args(["--bits", "8", "--group-size", "none", "--device", "cpu"]);
        command.args(["--samples", "8", "--seq-len", "16"]);
        command.args(flags);
        command
    }

    fn record(&self, model: &Path, text: &Path, flags: &[&str]) -> Value {
        run(&mut self.quantize(model, text, flags)).done();
        let text = fs::read_to_string(self.folder.path().join("out/gptq_run.json")).unwrap();
        serde_json::from_str(&text).unwrap()
    }
}

fn begins(protocol: &Value) -> bool {
    let words = "BOS (token 1) is put in front of each window";
    protocol.as_str().unwrap().contains(words)
}

#[test]
fn windows_of_gemma_begin_with_bos_and_those_of_llama_do_not() {
    let place = Place::new();
    let other = place.folder.path().join("other.txt");
    write_text(&other, VOCAB, 2000);
    let checks = ["--check-windows", "2", "--check-dataset"];
    let checks = [&checks[..], &[other.to_str().unwrap()]].concat();

    let gemma = place.record(&place.gemma, &place.text, &checks);
    let tokens = &gemma["calibration"];
    assert_eq!(tokens["window_bos"], true);
    assert!(begins(&tokens["rule"]), "{tokens}");
    assert_eq!(
        (&tokens["seq_len"], &tokens["tokens"]),
        (&16.into(), &128.into())
    );
    for compared in gemma["divergence"].as_array().unwrap() {
        assert!(begins(&compared["protocol"]), "{compared}");
        assert_eq!(compared["seq_len"], 16);
    }
    assert_eq!(gemma["divergence"].as_array().unwrap().len(), 2);

    let refusing = [&checks[..], &["--no-window-bos"]].concat();
    let without = place.record(&place.gemma, &place.text, &refusing);
    assert_eq!(without["calibration"]["window_bos"], false);
    assert!(!without.to_string().contains("BOS"), "{without}");

    let llama = place.record(&place.llama, &place.text, &checks);
    assert!(!llama.to_string().contains("bos"), "{llama}");
    let hash = |record: &Value| record["calibration"]["token_sha256"].clone();
    assert_eq!(hash(&llama), hash(&without), "the same text and tokenizer");
    let asked = place.record(&place.llama, &place.text, &["--window-bos"]);
    assert_eq!(hash(&asked), hash(&gemma));

    // The model's own text begins with it too.
    let own = place.record(&place.gemma, Path::new("self"), &[]);
    assert_eq!(own["calibration"]["window_bos"], true);
    assert!(begins(&own["calibration"]["rule"]));
    assert_eq!(own["calibration"]["tokens"], 128);
}

#[test]
fn evaluation_says_so_in_its_protocol() {
    let place = Place::new();
    let eval = |model: &Path, flags: &[&str]| {
        let mut command = gptq("eval");
        command.arg(model).arg("--dataset").arg(&place.text);
        command.args(["--seq-len", "16", "--max-windows", "3", "--device", "cpu"]);
        json(command.args(flags))[0].clone()
    };
    let gemma = eval(&place.gemma, &[]);
    assert!(begins(&gemma["protocol"]), "{gemma}");
    assert_eq!(
        (&gemma["seq_len"], &gemma["windows"]),
        (&16.into(), &3.into())
    );
    let llama = eval(&place.llama, &[]);
    assert!(!llama.to_string().contains("BOS"), "{llama}");
    let same = |one: &Value, other: &Value| one["token_sha256"] == other["token_sha256"];
    assert!(same(&llama, &eval(&place.gemma, &["--no-window-bos"])));
    assert!(same(&gemma, &eval(&place.llama, &["--window-bos"])));
}

#[test]
fn a_model_without_bos_is_refused_or_told() {
    let place = Place::new();
    for model in [&place.llama, &place.gemma] {
        edit_json(&model.join("config.json"), |config| {
            config.as_object_mut().unwrap().remove("bos_token_id");
        });
        let mut asked = place.quantize(model, &place.text, &["--window-bos"]);
        refused(
            &mut asked,
            place.folder.path(),
            &["--window-bos", "beginning-of-sequence token"],
        );
    }
    let checks = ["--check-windows", "2"];
    let told = run(&mut place.quantize(&place.gemma, &place.text, &checks)).done();
    let lines = told.stderr.matches("windows without BOS at their start");
    assert_eq!(lines.count(), 1, "{told:#?}");
    let told = run(&mut place.quantize(&place.llama, &place.text, &checks)).done();
    assert!(!told.stderr.contains("BOS"), "{told:#?}");

    // Above the vocabulary: of another model.
    edit_json(&place.gemma.join("config.json"), |config| {
        config["bos_token_id"] = VOCAB.into();
    });
    let mut wrong = place.quantize(&place.gemma, &place.text, &[]);
    refused(&mut wrong, place.folder.path(), &["BOS is token 64"]);
}

/// A matrix found out when its repository was there, and `--dry-run` not at all.
#[test]
fn a_matrix_that_asks_for_bos_in_vain_is_refused_at_once() {
    let place = Place::new();
    let at = |name: &str| place.folder.path().join(name);
    edit_json(&place.llama.join("config.json"), |config| {
        config.as_object_mut().unwrap().remove("bos_token_id");
    });
    let plan = "[[branch]]\nname = \"main\"\nbits = 4\ngroup_size = 32\n";
    fs::write(at("plan.toml"), plan).unwrap();
    let matrix = |out: &[&str], flags: &[&str]| {
        let mut command = gptq("matrix");
        command.arg(&place.llama).arg("--plan").arg(at("plan.toml"));
        command.arg("--dataset").arg(&place.text);
        command.arg("--evaluate").arg(&place.text);
        command.args(["--samples", "8", "--seq-len", "16", "--device", "cpu"]);
        command.args(["--eval-seq-len", "16"]).args(out).args(flags);
        command
    };
    let out = at("repository").display().to_string();
    for out in [&["--out", out.as_str()][..], &["--dry-run"]] {
        let mut asked = matrix(out, &["--window-bos"]);
        let words = ["--window-bos", "beginning-of-sequence token"];
        refused(&mut asked, place.folder.path(), &words);
    }
    run(&mut matrix(&["--dry-run"], &[])).done();
}
