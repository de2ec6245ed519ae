//! A run that is killed goes on where it stopped, and ends in the bytes of an undisturbed one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use gptq_packer::SafetensorsFile;

use crate::support::{
    Family, TinyModel, edit_tensor, entries, quantize, refused, run, same_files, small_model,
    write_text,
};

/// Enough text for each block to take a while, so that the kill comes in the middle.
const WORK: [&str; 4] = ["--samples", "192", "--seq-len", "128"];

pub(super) struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
    out: PathBuf,
    partial: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = small_model(folder.path());
        Place::of(folder, model, text)
    }

    /// A model whose blocks have half a megabyte each at 8 bits, to be cut into files of one.
    fn with_larger_blocks() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
        let shapes = TinyModel {
            hidden: 128,
            head_dim: 32,
            ffn: 1024,
            layers: 3,
            ..TinyModel::new(Family::Llama)
        };
        shapes.write(&model);
        write_text(&text, shapes.vocab, 30_000);
        Place::of(folder, model, text)
    }

    pub(super) fn of(folder: tempfile::TempDir, model: PathBuf, text: PathBuf) -> Self {
        let out = folder.path().join("out");
        let partial = folder.path().join(".out.partial");
        Place {
            folder,
            model,
            text,
            out,
            partial,
        }
    }

    /// A copy of the model's only weight file that the test may change.
    fn own_weights(&mut self) -> PathBuf {
        let own = self.folder.path().join("own");
        fs::create_dir_all(&own).unwrap();
        for file in entries(&self.model) {
            fs::copy(&file, own.join(file.file_name().unwrap())).unwrap();
        }
        self.model = own;
        self.model.join("model.safetensors")
    }

    fn run_into(&self, out: &Path, flags: &[&str]) -> Command {
        let mut command = quantize(&self.model, out, &self.text);
        command.args(WORK).args(flags);
        command
    }

    /// Starts a run and kills it once `blocks` of its blocks are in the journal.
    fn kill_after(&self, blocks: usize, flags: &[&str]) {
        let mut command = self.run_into(&self.out, flags);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        // The first line holds the settings.
        self.wait_for_lines(&mut child, 1 + blocks);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!self.out.exists(), "the run ended before it was killed");
        assert!(self.partial.is_dir());
    }

    fn wait_for_lines(&self, child: &mut Child, lines: usize) {
        let journal = self.partial.join("journal.jsonl");
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(60) {
            let text = fs::read_to_string(&journal).unwrap_or_default();
            if text.matches('\n').count() >= lines {
                return;
            }
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the run ended by itself: {status}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no {lines} lines in the journal after a minute");
    }
}

/// Flips a bit in the middle of a tensor.
fn damage(shard: &Path, name: &str) {
    let file = SafetensorsFile::open(shard).unwrap();
    let stored = file.read(name).unwrap();
    let mut bytes = fs::read(shard).unwrap();
    let at = bytes
        .windows(stored.len())
        .position(|w| w == stored)
        .unwrap();
    bytes[at + stored.len() / 2] ^= 1;
    fs::write(shard, bytes).unwrap();
}

/// A run that is killed after `blocks` blocks leaves the files of one that is not.
pub(super) fn killed_and_resumed(place: &Place, blocks: usize, flags: &[&str]) {
    let whole = place.folder.path().join("whole");
    run(&mut place.run_into(&whole, flags)).done();
    place.kill_after(blocks, flags);
    let told = run(place.run_into(&place.out, flags).arg("--resume")).done();
    assert!(told.stderr.contains("blocks are done already"), "{told:#?}");
    assert!(!place.partial.exists());
    same_files(&whole, &place.out);
    assert!(place.out.join("gptq_run.json").exists());
    assert!(!place.out.join("journal.jsonl").exists());
}

#[test]
fn after_the_first_block() {
    killed_and_resumed(&Place::new(), 1, &["--group-size", "32", "--asym"]);
}

/// The float stream passes through the finished blocks with the weights that they had.
#[test]
fn after_the_second_block_beside_the_float_model() {
    let flags = ["--group-size", "32", "--effort", "balanced"];
    killed_and_resumed(&Place::new(), 2, &flags);
}

/// The third block is trained towards the float stream, from the inputs that the two before it gave.
#[test]
fn after_the_second_block_with_blocks_that_are_trained() {
    let flags = ["--group-size", "32", "--bits", "2", "--effort", "best"];
    killed_and_resumed(&Place::new(), 2, &flags);
}

/// Finished blocks lie permuted on disk, their biases too.
#[test]
fn after_the_first_block_with_permuted_channels() {
    let folder = tempfile::tempdir().unwrap();
    let (model, text) = (folder.path().join("model"), folder.path().join("text.txt"));
    let shapes = TinyModel {
        head_dim: 32,
        layers: 3,
        ..TinyModel::new(Family::Qwen2)
    };
    shapes.write(&model);
    write_text(&text, shapes.vocab, 30_000);
    let place = Place::of(folder, model, text);
    killed_and_resumed(&place, 1, &["--group-size", "16", "--order", "folded"]);
}

#[test]
fn after_the_second_block_with_act_order_and_shards() {
    let place = Place::with_larger_blocks();
    killed_and_resumed(
        &place,
        2,
        &[
            "--group-size",
            "64",
            "--desc-act",
            "--bits",
            "8",
            "--format",
            "gptq_v2",
            "--max-shard-size",
            "0.001",
        ],
    );
    let second = place.out.join("model-00002-of-00002.safetensors");
    assert!(second.exists(), "{:?}", entries(&place.out));
}

#[test]
fn what_is_left_of_a_run_is_neither_taken_nor_overwritten_unasked() {
    let mut place = Place::new();
    let weights = place.own_weights();
    let flags = ["--group-size", "32", "--bits", "4"];
    let whole = place.folder.path().join("whole");
    run(&mut place.run_into(&whole, &flags)).done();
    place.kill_after(1, &flags);
    let left = entries(&place.partial);

    let told = refused(
        &mut place.run_into(&place.out, &flags),
        place.folder.path(),
        &[".out.partial", "earlier run"],
    );
    assert!(told.hint().unwrap().contains("--resume"), "{told:#?}");

    let others: [(&[&str], &str); 7] = [
        (&["--group-size", "32", "--bits", "8"], "bits"),
        (&["--group-size", "64", "--bits", "4"], "group_size"),
        (&["--group-size", "32", "--bits", "4", "--asym"], "sym"),
        (
            &["--group-size", "32", "--bits", "4", "--damp", "0.05"],
            "damp_percent",
        ),
        (
            &["--group-size", "32", "--bits", "4", "--desc-act"],
            "order",
        ),
        (
            &["--group-size", "32", "--bits", "4", "--format", "gptq_v2"],
            "format",
        ),
        (
            &["--group-size", "32", "--bits", "4", "--seed", "1"],
            "calibration tokens",
        ),
    ];
    for (other, setting) in others {
        let told = refused(
            place.run_into(&place.out, other).arg("--resume"),
            place.folder.path(),
            &[".out.partial", &format!("another {setting}:")],
        );
        assert!(told.hint().is_some(), "{told:#?}");
    }
    assert_eq!(entries(&place.partial), left);

    let journal = place.partial.join("journal.jsonl");
    let begun = fs::read_to_string(&journal).unwrap();
    let elsewhere = begun.replacen("\"device\":\"cpu\"", "\"device\":\"NVIDIA H200\"", 1);
    assert_ne!(elsewhere, begun);
    fs::write(&journal, elsewhere).unwrap();
    refused(
        place.run_into(&place.out, &flags).arg("--resume"),
        place.folder.path(),
        &["another device:", "NVIDIA H200"],
    );
    fs::write(&journal, &begun).unwrap();

    // Half of a model and half of another were once published as one.
    let original = fs::read(&weights).unwrap();
    edit_tensor(&place.model, "model.norm.weight", |bytes| bytes[0] ^= 1);
    refused(
        place.run_into(&place.out, &flags).arg("--resume"),
        place.folder.path(),
        &["another weights:"],
    );
    fs::write(&weights, original).unwrap();

    // The journal vouches for everything written: a tensor, and every number of a line.
    let shard = place.partial.join("model.safetensors");
    let written = fs::read(&shard).unwrap();
    let name = "model.layers.0.self_attn.q_proj.qweight";
    damage(&shard, name);
    let told = refused(
        place.run_into(&place.out, &flags).arg("--resume"),
        place.folder.path(),
        &[name, "line 2"],
    );
    assert!(told.hint().is_some(), "{told:#?}");
    fs::write(&shard, written).unwrap();
    let edited = begun.replacen("\"error\":", "\"error\":1", 1);
    fs::write(&journal, edited).unwrap();
    refused(
        place.run_into(&place.out, &flags).arg("--resume"),
        place.folder.path(),
        &["line 2", "damaged"],
    );
    fs::write(&journal, &begun).unwrap();

    // A line that the kill cut short was never a finished block.
    let mut text = fs::read_to_string(&journal).unwrap();
    text.push_str("{\"block\": 1, \"lay");
    fs::write(&journal, text).unwrap();
    run(place.run_into(&place.out, &flags).arg("--resume")).done();
    same_files(&whole, &place.out);
}

/// Each was an error after the last block, and hours of work went with it.
#[test]
fn what_fails_at_the_end_costs_no_finished_block() {
    let place = Place::new();
    let flags = &["--group-size", "32"];
    let whole = place.folder.path().join("whole");
    run(&mut place.run_into(&whole, flags)).done();
    for name in ["config.json", "tokenizer.json", "gptq_run.json"] {
        let mut command = place.run_into(&place.out, flags);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        place.wait_for_lines(&mut child, 2);
        // A folder in its place prevents the write.
        let in_the_way = place.partial.join(format!(".{name}.partial"));
        fs::create_dir(&in_the_way).unwrap();
        let output = child.wait_with_output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{told}");
        assert!(told.contains(name), "{told}");
        assert!(
            told.contains("blocks are kept in") && told.contains("--resume"),
            "{told}"
        );
        fs::remove_dir(&in_the_way).unwrap();
        run(place.run_into(&place.out, flags).arg("--resume")).done();
        same_files(&whole, &place.out);
        fs::remove_dir_all(&place.out).unwrap();
    }
}
