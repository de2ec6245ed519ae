//! A checkpoint is compared with the float model before it is published: on windows of the calibration
//! text that calibration did not see, and on a second text.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::support::{fixture, gptq, json, quantize, refused, run, same_files, small_model};

struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
    held: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = small_model(folder.path());
        let held = fixture("verne-held-out.txt");
        Place {
            folder,
            model,
            text,
            held,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn quantize(&self, out: &str, flags: &str) -> Command {
        let mut command = quantize(&self.model, &self.path(out), &self.text);
        command.args("--group-size 32 --seq-len 64 --device cpu".split(' '));
        command.args(flags.split(' ').filter(|flag| !flag.is_empty()));
        command
    }

    fn checked(&self, out: &str, flags: &str) -> Command {
        let mut command = self.quantize(out, flags);
        command.arg("--check-dataset").arg(&self.held);
        command
    }

    fn record(&self, out: &str) -> Value {
        record(&self.path(out))
    }
}

fn record(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("gptq_run.json")).unwrap()).unwrap()
}

#[test]
fn the_record_the_summary_and_the_card_say_what_eval_says() {
    let place = Place::new();
    let plain = run(&mut place.quantize("plain", "--samples 8")).done();
    assert!(
        !plain.stderr.contains("windows of verne-held-out.txt"),
        "{plain:#?}"
    );
    assert!(place.record("plain").get("divergence").is_none());

    let said = run(&mut place.checked("out", "--samples 8 --check-windows 3")).done();
    same_files(&place.path("plain"), &place.path("out"));
    let found = place.record("out");
    let [beside, second] = found["divergence"].as_array().unwrap().as_slice() else {
        panic!("{found}");
    };
    let mut eval = gptq("eval");
    eval.arg(&place.model).arg(place.path("out"));
    eval.arg("--dataset").arg(&place.held);
    eval.args("--seq-len 64 --max-windows 3 --device cpu".split(' '));
    let scores = json(&mut eval);
    for (ours, theirs) in [
        (&second["float_perplexity"], &scores[0]["perplexity"]),
        (&second["perplexity"], &scores[1]["perplexity"]),
        (&second["kl"], &scores[1]["kl"]),
        (&second["token_sha256"], &scores[1]["token_sha256"]),
        (&second["protocol"], &scores[1]["protocol"]),
    ] {
        assert_eq!(ours, theirs, "{found}");
    }
    assert_eq!(second["text"], "verne-held-out.txt");
    assert_eq!(second["held_out"], false);
    assert_eq!(beside["text"], "text.txt");
    assert_eq!(beside["held_out"], true);
    assert_eq!(
        (&beside["windows"], &beside["tokens"]),
        (&3.into(), &192.into())
    );
    let kl = beside["kl"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 1.0, "{kl}");
    assert_ne!(beside["token_sha256"], found["calibration"]["token_sha256"]);
    let told = format!("against the float model: KL {kl:.4} nats, perplexity");
    assert!(said.stderr.contains(&told), "{said:#?}");
    assert!(
        said.stderr.contains("3 windows of verne-held-out.txt"),
        "{said:#?}"
    );
    run(gptq("verify").arg(place.path("out"))).done();
    let card = run(gptq("card").arg(place.path("out"))).done().stdout;
    assert!(
        card.contains("text.txt, beside the calibration windows | 3 | 192 |"),
        "{card}"
    );
    assert!(card.contains("| either sign | balanced |"), "{card}");
}

/// On the windows that GPTQ would have held out, so that both can be compared.
#[test]
fn rounding_to_nearest_is_compared_on_the_same_windows() {
    let place = Place::new();
    run(&mut place.quantize("gptq", "--samples 8 --check-windows 4")).done();
    let flags = "--samples 8 --check-windows 4 --method rtn";
    let said = run(&mut place.quantize("rtn", flags)).done();
    assert!(!said.stderr.contains("has no effect"), "{said:#?}");
    let [gptq, rtn] = ["gptq", "rtn"].map(|out| place.record(out));
    assert_eq!(rtn["calibration"], Value::Null);
    let of = |record: &Value, key: &str| record["divergence"][0][key].clone();
    for key in ["token_sha256", "protocol", "float_perplexity"] {
        assert_eq!(of(&gptq, key), of(&rtn, key), "{key}");
    }
    let [gptq, rtn] = [gptq, rtn].map(|record| of(&record, "kl").as_f64().unwrap());
    assert!(gptq < rtn, "{gptq} {rtn}");
    // A second text alone has a number of its own.
    run(&mut place.checked("second", "--method rtn")).done();
    assert_eq!(place.record("second")["divergence"][0]["windows"], 16);
}

#[test]
fn killed_while_it_compares_it_goes_on_and_compares_again() {
    let place = Place::new();
    let flags = "--samples 4 --check-windows 400";
    run(&mut place.quantize("whole", flags)).done();
    let mut command = place.quantize("out", flags);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let partial = place.path(".out.partial");
    let begun = Instant::now();
    // Small files come after the last block, and before the comparison.
    while !partial.join("tokenizer.json").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(partial.join("journal.jsonl").exists() && !place.path("out").exists());
    assert!(!partial.join("gptq_run.json").exists());
    let said = run(place.quantize("out", flags).arg("--resume")).done();
    assert!(
        said.stderr.contains("5 of 5 blocks are done already"),
        "{said:#?}"
    );
    same_files(&place.path("whole"), &place.path("out"));
    let [whole, out] = ["whole", "out"].map(|out| place.record(out)["divergence"].clone());
    assert_eq!(whole, out);

    // The result of this run, with a comparison that was not asked for then.
    let other = "--samples 4 --check-windows 2 --resume";
    let said = run(&mut place.quantize("out", other)).done();
    assert!(said.stderr.contains("done before"), "{said:#?}");
    assert!(
        said.stderr
            .contains("without a comparison on these windows"),
        "{said:#?}"
    );
    let said = run(&mut place.quantize("out", &format!("{flags} --resume"))).done();
    assert!(!said.stderr.contains("without a comparison"), "{said:#?}");
}

#[test]
fn what_cannot_be_compared_on_is_refused_before_the_run() {
    let place = Place::new();
    let folder = place.folder.path();
    let refuses = |command: &mut Command, names: &[&str]| {
        let told = refused(command, folder, names);
        assert!(told.hint().is_some(), "{told:#?}");
    };
    refuses(
        &mut place.quantize("out", "--samples 4 --check-windows 999999"),
        &["text.txt has room for", "not for the 999999"],
    );
    let mut own = gptq("quantize");
    own.arg(&place.model).arg("-o").arg(place.path("out"));
    own.args("--group-size 32 --dataset self --check-windows 1 --device cpu".split(' '));
    refuses(&mut own, &["`self`"]);
    let mut same = place.quantize("out", "--samples 4");
    same.arg("--check-dataset").arg(&place.text);
    refuses(&mut same, &["is the calibration text"]);
    let mut absent = place.quantize("out", "--samples 4");
    absent.arg("--check-dataset").arg(place.path("absent.txt"));
    refused(&mut absent, folder, &["absent.txt"]);
}
