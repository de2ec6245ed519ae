//! The folder that a run is to make: refused at once where it could not be made, and never another's.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{Family, Run, TinyModel, entries, quantize, refused, run, write_text};

struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
        let shapes = TinyModel::new(Family::Llama);
        shapes.write(&model);
        write_text(&text, shapes.vocab, 30_000);
        Place {
            folder,
            model,
            text,
        }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A run of a moment.
    fn short(&self, out: &Path) -> Command {
        self.with(out, "2", "16")
    }

    /// A run that others can meet.
    fn long(&self, out: &Path) -> Command {
        self.with(out, "192", "128")
    }

    fn with(&self, out: &Path, samples: &str, seq_len: &str) -> Command {
        let mut command = quantize(&self.model, out, &self.text);
        command.args([
            "--group-size",
            "32",
            "--samples",
            samples,
            "--seq-len",
            seq_len,
        ]);
        command
    }

    fn start_and_wait_for(&self, mut command: Command, file: &Path) -> Child {
        let mut child = command
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let begun = Instant::now();
        while !file.exists() {
            assert!(begun.elapsed() < Duration::from_secs(60), "no {file:?}");
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            std::thread::sleep(Duration::from_millis(1));
        }
        child
    }
}

fn ended(child: Child) -> Run {
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::new(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A link to nowhere was found after the last block, and the result could not be published then.
#[test]
fn what_cannot_be_published_is_refused_before_any_work() {
    let place = Place::new();
    symlink("nowhere", place.at("link")).unwrap();
    fs::write(place.at("file"), "x").unwrap();
    fs::create_dir(place.at("full")).unwrap();
    fs::write(place.at("full/x"), "x").unwrap();
    for name in ["link", "file", "full", "file/below"] {
        for flags in [&[][..], &["--resume"]] {
            let mut command = place.short(&place.at(name));
            // Read after the target is looked at, so that no text would be missed.
            command.args(flags);
            refused(&mut command, place.folder.path(), &[name]);
        }
    }
}

/// A repeated key is valid JSON for some parsers, and was once refused after the last block; a folder
/// called LICENSE was copied like a file at that point.
#[test]
fn what_goes_beside_the_weights_is_read_before_any_work() {
    let place = Place::new();
    let out = place.at("out");
    let config = place.model.join("config.json");
    let whole = fs::read_to_string(&config).unwrap();
    fs::write(&config, whole.replacen('{', r#"{"x": 1, "x": 2,"#, 1)).unwrap();
    refused(&mut place.short(&out), place.folder.path(), &["`x`"]);
    fs::write(&config, whole).unwrap();
    fs::create_dir(place.model.join("LICENSE")).unwrap();
    fs::write(place.model.join("LICENSE.md"), "mine").unwrap();
    fs::write(place.model.join("Notice"), "note").unwrap();
    fs::write(place.model.join("USE_POLICY.md"), "policy").unwrap();
    let told = run(&mut place.short(&out)).done();
    assert!(told.stderr.contains("`LICENSE` is not a file"), "{told:#?}");
    for name in ["LICENSE.md", "Notice", "USE_POLICY.md"] {
        let copied = fs::read(out.join(name)).unwrap();
        assert_eq!(copied, fs::read(place.model.join(name)).unwrap());
    }
}

#[test]
fn a_second_run_into_one_folder_learns_who_is_at_it() {
    let place = Place::new();
    let out = place.at("out");
    let journal = place.at(".out.partial/journal.jsonl");
    let child = place.start_and_wait_for(place.long(&out), &journal);
    let holder = format!("process {}", child.id());
    for flags in [&[][..], &["--resume"]] {
        let told = run(place.long(&out).args(flags)).ended_with(2);
        assert!(told.error_line().contains(&holder), "{told:#?}");
    }
    ended(child).done();
    assert!(out.join("gptq_run.json").exists());
    assert!(!entries(place.folder.path()).contains(&place.at(".out.lock")));
}

/// The finished work lay there and could neither be published nor resumed.
#[test]
fn a_target_that_appears_meanwhile_costs_nothing() {
    let place = Place::new();
    let out = place.at("out");
    let child = place.start_and_wait_for(place.long(&out), &place.at(".out.partial/journal.jsonl"));
    fs::create_dir(&out).unwrap();
    fs::write(out.join("precious"), "x").unwrap();
    let told = ended(child).ended_with(2);
    assert!(told.error_line().contains(".out.partial"), "{told:#?}");
    assert!(told.hint().unwrap().contains("--resume"), "{told:#?}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 1);
    fs::rename(&out, place.at("elsewhere")).unwrap();
    let told = run(place.long(&out).arg("--resume")).done();
    assert!(told.stderr.contains("2 of 2 blocks are done"), "{told:#?}");
    assert!(out.join("model.safetensors").exists());
    assert!(!out.join("journal.jsonl").exists());
    assert!(!place.at(".out.partial").exists());
}

/// A kill between the rename and the removal of the journal.
#[test]
fn a_run_that_was_killed_after_its_rename_is_found_done() {
    let place = Place::new();
    let out = place.at("out");
    run(&mut place.short(&out)).done();
    fs::write(out.join("journal.jsonl"), "{}\n").unwrap();
    let told = run(&mut place.short(&out)).done();
    assert!(told.stderr.contains("done before"), "{told:#?}");
    assert!(!out.join("journal.jsonl").exists());
    let mut other = place.short(&out);
    other.args(["--resume", "--bits", "8"]);
    refused(&mut other, place.folder.path(), &["not an empty folder"]);
    fs::write(out.join("config.json"), "{}").unwrap();
    let mut damaged = place.short(&out);
    refused(
        damaged.arg("--resume"),
        place.folder.path(),
        &["not an empty folder"],
    );
}

#[test]
fn paths_of_this_machine_stay_on_it() {
    let place = Place::new();
    let out = place.at("out");
    let copy = place.at("wiki.txt");
    fs::copy(&place.text, &copy).unwrap();
    let given = format!("wikitext2={}", copy.display());
    let mut command = quantize(&place.model, &out, Path::new(&given));
    command.args(["--group-size", "32", "--samples", "2"]);
    run(command.args(["--seq-len", "16", "--max-shard-size", "500MB"])).done();
    let here = place.folder.path().to_str().unwrap();
    for name in ["config.json", "quantize_config.json", "gptq_run.json"] {
        let text = fs::read_to_string(out.join(name)).unwrap();
        assert!(!text.contains(here), "{name}: {text}");
    }
    let settings = fs::read_to_string(out.join("quantize_config.json")).unwrap();
    assert!(
        settings.contains(r#""model_name_or_path": "model""#),
        "{settings}"
    );
    let record = fs::read_to_string(out.join("gptq_run.json")).unwrap();
    assert!(record.contains(r#""dataset": "wikitext2""#), "{record}");
}
