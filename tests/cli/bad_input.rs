//! Flags, texts and files that cannot be used: each is refused by name, and nothing is left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use gptq_types::{Dtype, TensorInfo};

use crate::support::{Family, TinyModel, gptq, quantize, refused, run, write_text};

struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
    text: PathBuf,
    out: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let shapes = TinyModel::new(Family::Llama);
        let model = folder.path().join("model");
        let text = folder.path().join("text.txt");
        shapes.write(&model);
        write_text(&text, shapes.vocab, 2_000);
        let out = folder.path().join("out");
        Place {
            folder,
            model,
            text,
            out,
        }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn quantize(&self, text: &Path, out: &Path) -> Command {
        let mut command = quantize(&self.model, out, text);
        command.args(["--group-size", "32", "--samples", "4", "--seq-len", "32"]);
        command
    }

    #[track_caller]
    fn refuses_flags(&self, flags: &[&str], names: &[&str]) {
        let mut command = self.quantize(&self.text, &self.out);
        refused(command.args(flags), self.path(), names);
    }

    #[track_caller]
    fn refuses_text(&self, text: &Path, names: &[&str]) {
        refused(&mut self.quantize(text, &self.out), self.path(), names);
    }

    /// Writes a text under `name`.
    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

#[test]
fn numbers_outside_their_range() {
    let place = Place::new();
    place.refuses_flags(&["--damp", "0"], &["damp", "`0`"]);
    place.refuses_flags(&["--damp", "1"], &["damp", "`1`"]);
    place.refuses_flags(&["--damp", "NaN"], &["damp"]);
    place.refuses_flags(&["--max-shard-size", "0"], &["--max-shard-size `0`"]);
    // Less than a byte was taken for no limit that matters.
    for tiny in ["1e-12", "0.0009", "-1"] {
        let flag = format!("--max-shard-size={tiny}");
        place.refuses_flags(&[&flag], &["--max-shard-size", "0.001 GB or more"]);
    }
    place.refuses_flags(&["--max-shard-size", "NaN"], &["--max-shard-size"]);
    place.refuses_flags(
        &["--method", "rtn", "--desc-act"],
        &["rtn", "a column order"],
    );
    let mut flags = quantize(&place.model, &place.out, &place.text);
    flags.args(["--group-size", "32", "--samples", "0", "--seq-len", "32"]);
    refused(&mut flags, place.path(), &["samples", "0"]);
    let mut flags = quantize(&place.model, &place.out, &place.text);
    flags.args(["--group-size", "32", "--samples", "4", "--seq-len", "0"]);
    refused(&mut flags, place.path(), &["seq_len", "0"]);
    let own = |flags: &[&str], names: &[&str]| {
        let mut command = quantize(&place.model, &place.out, Path::new("self"));
        command.args(["--group-size", "32"]).args(flags);
        refused(&mut command, place.path(), names);
    };
    own(&["--temperature", "0"], &["temperature 0"]);
    own(&["--seq-len", "1"], &["1 tokens"]);
    own(&["--samples", "0"], &["samples", "0"]);
    // More windows than there is memory were a panic.
    own(
        &["--samples", "18446744073709551615"],
        &["samples", "18446744073709551615"],
    );
}

#[test]
fn calibration_files() {
    let place = Place::new();
    place.refuses_text(&place.write("empty.txt", ""), &["empty.txt", "no text"]);
    place.refuses_text(
        &place.write("empty.jsonl", "\n"),
        &["empty.jsonl", "no text"],
    );
    place.refuses_text(
        &place.write("short.txt", "w1 w2 w3"),
        &["short.txt", "3 tokens", "33"],
    );
    place.refuses_text(&place.path().join("absent.txt"), &["absent.txt"]);
    place.refuses_text(
        &place.write("latin.txt", b"caf\xe9"),
        &["latin.txt", "byte 3"],
    );
    place.refuses_text(&place.write("text.csv", "a,b"), &["text.csv", "`.txt`"]);
    place.refuses_text(
        &place.write("rows.jsonl", "{\"title\": \"w1\"}\n"),
        &["rows.jsonl", "`text`", "`title`"],
    );
    place.refuses_text(
        &place.write("cut.jsonl", "{\"text\": \"w1\"}\n{\"text\": \"w"),
        &["cut.jsonl"],
    );
    place.refuses_text(&place.write("cut.parquet", "PAR1"), &["cut.parquet"]);
    place.refuses_text(&place.write("cut.txt.gz", [0x1f, 0x8b, 8]), &["cut.txt.gz"]);
    place.refuses_text(
        &place.write("cut.safetensors", [1; 20]),
        &["cut.safetensors"],
    );
    place.refuses_text(place.path(), &[&place.path().display().to_string()]);
}

#[test]
fn an_unknown_dataset() {
    let place = Place::new();
    place.refuses_text(
        Path::new("openwebtext"),
        &["`openwebtext`", "`c4`", "`wikitext2`", "`self`"],
    );
    let mut eval = gptq("eval");
    eval.arg(&place.model).args(["--dataset", "ptb"]);
    refused(&mut eval, place.path(), &["`ptb`", "`wikitext2`"]);
}

#[test]
fn stored_windows_of_another_vocabulary() {
    let place = Place::new();
    let path = place.path().join("windows.safetensors");
    let ids: Vec<u8> = (126..130i32).flat_map(|id| id.to_le_bytes()).collect();
    write_file(&path, &[("input_ids", Dtype::I32, &[2, 2], &ids)]);
    place.refuses_text(&path, &["window 1", "128"]);
}

#[test]
fn an_output_that_is_taken() {
    let place = Place::new();
    fs::create_dir(&place.out).unwrap();
    fs::write(place.out.join("mine"), "kept").unwrap();
    let mut command = place.quantize(&place.text, &place.out);
    let run = refused(&mut command, place.path(), &["out", "not an empty folder"]);
    assert!(run.hint().is_some(), "{run:#?}");
    assert_eq!(fs::read(place.out.join("mine")).unwrap(), b"kept");

    let file = place.write("file", "kept");
    let mut command = place.quantize(&place.text, &file);
    refused(&mut command, place.path(), &["file", "not an empty folder"]);
    assert_eq!(fs::read(&file).unwrap(), b"kept");

    let below_a_file = file.join("out");
    let mut command = place.quantize(&place.text, &below_a_file);
    refused(&mut command, place.path(), &["file"]);

    let mut import = gptq("import");
    import.arg(&file).arg("--out").arg(&place.out);
    refused(&mut import, place.path(), &[]);
}

#[test]
fn an_empty_output_folder_is_free() {
    let place = Place::new();
    fs::create_dir(&place.out).unwrap();
    run(&mut place.quantize(&place.text, &place.out)).done();
    assert!(place.out.join("model.safetensors").exists());
}

#[test]
fn a_resume_without_an_interrupted_run() {
    let place = Place::new();
    // One command line serves a scheduler that retries.
    let mut command = place.quantize(&place.text, &place.out);
    let told = run(command.arg("--resume")).done();
    assert!(told.stderr.contains("no interrupted run"), "{told:#?}");
    let told = run(&mut command).done();
    assert!(told.stderr.contains("done before"), "{told:#?}");
}

#[test]
fn evaluation_of_what_cannot_be() {
    let place = Place::new();
    let refuse = |args: &[&str], names: &[&str]| {
        let mut eval = gptq("eval");
        refused(eval.arg(&place.model).args(args), place.path(), names);
    };
    refuse(&["--dataset", "self"], &["`self`"]);
    let windows = place.path().join("windows.safetensors");
    let ids: Vec<u8> = [1i32, 2].iter().flat_map(|id| id.to_le_bytes()).collect();
    write_file(&windows, &[("input_ids", Dtype::I32, &[2, 1], &ids)]);
    let windows = windows.to_str().unwrap();
    // One token predicts nothing; this was a panic.
    refuse(
        &["--dataset", windows],
        &["windows.safetensors", "1 tokens"],
    );
    let text = place.text.to_str().unwrap();
    refuse(&["--dataset", text, "--seq-len", "1"], &["seq_len", "1"]);
    refuse(
        &["--dataset", text, "--seq-len", "4000"],
        &["text.txt", "2000"],
    );
    refuse(
        &["--dataset", text, "--max-windows", "0"],
        &["max_windows", "0"],
    );

    let other = place.path().join("other");
    let larger = TinyModel {
        vocab: 160,
        ..TinyModel::new(Family::Llama)
    };
    larger.write(&other);
    let other = other.to_str().unwrap();
    refuse(
        &[other, "--dataset", text, "--seq-len", "32"],
        &["160", "128", other],
    );
}

#[test]
fn files_to_verify_against() {
    let place = Place::new();
    let refuse = |name: &str, names: &[&str]| {
        let mut verify = gptq("verify");
        verify
            .arg(&place.model)
            .arg("--expect")
            .arg(place.path().join(name));
        refused(&mut verify, place.path(), names);
    };
    let ids: Vec<u8> = [1i32, 2].iter().flat_map(|id| id.to_le_bytes()).collect();
    let logits = vec![0; 2 * 128 * 4];

    refuse("absent.safetensors", &["absent.safetensors"]);
    let write = |name: &str, tensors: &[(&str, Dtype, &[usize], &[u8])]| {
        write_file(&place.path().join(name), tensors);
    };
    write("ids.safetensors", &[("input_ids", Dtype::I32, &[2], &ids)]);
    refuse("ids.safetensors", &["ids.safetensors", "`logits`"]);
    let f32 = Dtype::F32;
    write("logits.safetensors", &[("logits", f32, &[2, 128], &logits)]);
    refuse("logits.safetensors", &["logits.safetensors", "`input_ids`"]);
    write(
        "vocab.safetensors",
        &[
            ("input_ids", Dtype::I32, &[2], &ids),
            ("logits", f32, &[2, 64], &logits[..512]),
        ],
    );
    refuse("vocab.safetensors", &["vocab.safetensors", "[2, 128]"]);
    let outside: Vec<u8> = [1i32, -1].iter().flat_map(|id| id.to_le_bytes()).collect();
    write(
        "outside.safetensors",
        &[
            ("input_ids", Dtype::I32, &[2], &outside),
            ("logits", f32, &[2, 128], &logits),
        ],
    );
    refuse("outside.safetensors", &["128"]);
    fs::write(place.path().join("noise.safetensors"), [9; 40]).unwrap();
    refuse("noise.safetensors", &["noise.safetensors"]);

    let mut verify = gptq("verify");
    verify.arg(&place.model).args(["--ids", "128"]);
    verify
        .arg("--write")
        .arg(place.path().join("new.safetensors"));
    refused(&mut verify, place.path(), &["128"]);
}

fn write_file(path: &Path, tensors: &[(&str, Dtype, &[usize], &[u8])]) {
    let tensors: Vec<_> = tensors
        .iter()
        .map(|&(name, dtype, shape, bytes)| {
            let shape = shape.to_vec();
            (name, TensorInfo { dtype, shape }, bytes)
        })
        .collect();
    gptq_packer::write_safetensors(path, &tensors, &Default::default()).unwrap();
}
