//! Good inputs of every kind: the project's fixtures, files that are kept, and what the command
//! itself makes of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::binary::{self, Tensor};
use crate::command::{Gptq, git, git_word};

/// The branch whose parts are changed.
pub const BRANCH: &str = "gptq-4bit-32g-actorder_False";

const TEXT_BYTES: usize = 20_000;

fn here() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Copies a file, or a folder with all that is in it. Times of change go along: an evaluation's
/// state knows its checkpoints by them.
pub fn copy(from: &Path, to: &Path) -> Result<(), String> {
    let said = |error: std::io::Error| format!("{}: {error}", from.display());
    if !from.is_dir() {
        if let Some(parent) = to.parent() {
            fs::create_dir_all(parent).map_err(said)?;
        }
        let modified = from.metadata().and_then(|meta| meta.modified());
        return fs::copy(from, to)
            .and_then(|_| fs::File::options().append(true).open(to))
            .and_then(|file| file.set_modified(modified?))
            .map_err(said);
    }
    fs::create_dir_all(to).map_err(said)?;
    for entry in fs::read_dir(from).map_err(said)? {
        let entry = entry.map_err(said)?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// The bytes of a file, or which could not be read and why.
pub fn read(path: &Path) -> Result<Vec<u8>, String> {
    fs::read(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Writes a file.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    fs::write(path, bytes).map_err(|error| format!("{}: {error}", path.display()))
}

/// Makes all seeds in an empty `folder`.
pub fn make(gptq: &Gptq, folder: &Path) -> Result<(), String> {
    let fixtures = here().join("../fixtures");
    copy(&here().join("seeds"), &folder.join("seeds"))?;
    let text = read(&fixtures.join("verne-held-out.txt"))?;
    write(&folder.join("text.txt"), &text[..TEXT_BYTES])?;
    copy(
        &folder.join("seeds/two_branches.toml"),
        &folder.join("plan.toml"),
    )?;
    models(folder, &fixtures)?;
    binaries(folder)?;
    made(gptq, folder)?;
    interrupted(gptq, folder)?;
    repository(gptq, folder)
}

fn models(folder: &Path, fixtures: &Path) -> Result<(), String> {
    let model = folder.join("model");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        copy(&fixtures.join("verne").join(name), &model.join(name))?;
    }
    copy(&model, &folder.join("bare"))?;
    fs::remove_file(folder.join("bare/tokenizer.json")).map_err(|error| error.to_string())?;
    for name in [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
    ] {
        copy(&folder.join("seeds").join(name), &model.join(name))?;
    }
    for (name, fixture) in [("act", "3bit-32g-v1-asym-act"), ("v1", "4bit-64g-v1-asym")] {
        let packed = folder.join(name);
        copy(&fixtures.join("gptqmodel").join(fixture), &packed)?;
        copy(
            &model.join("tokenizer.json"),
            &packed.join("tokenizer.json"),
        )?;
    }
    sharded(folder)
}

/// The model in two files with an index.
fn sharded(folder: &Path) -> Result<(), String> {
    let sharded = folder.join("sharded");
    copy(&folder.join("model"), &sharded)?;
    let whole = sharded.join("model.safetensors");
    let file = read(&whole)?;
    fs::remove_file(&whole).map_err(|error| error.to_string())?;
    let mut tensors = binary::tensors(&file);
    let second = tensors.split_off(tensors.len() / 2);
    let mut map = Vec::new();
    for (number, part) in [tensors, second].iter().enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", number + 1);
        write(&sharded.join(&name), &binary::safetensors(part))?;
        map.extend(
            part.iter()
                .map(|tensor| format!("\"{}\": \"{name}\"", tensor.name)),
        );
    }
    let map = map.join(",\n    ");
    let index = format!(
        "{{\n  \"metadata\": {{\"total_size\": 1}},\n  \"weight_map\": {{\n    {map}\n  }}\n}}\n"
    );
    write(
        &sharded.join("model.safetensors.index.json"),
        index.as_bytes(),
    )
}

fn binaries(folder: &Path) -> Result<(), String> {
    write(&folder.join("llama.gguf"), &binary::llama_gguf())?;
    write(&folder.join("gpt2.gguf"), &binary::gpt2_gguf())?;
    write(&folder.join("unigram.model"), &binary::sentencepiece(1))?;
    write(&folder.join("tokenizer.model"), &binary::sentencepiece(2))?;
    let ids: Vec<u8> = (0..64u32)
        .flat_map(|id| (id * 7 % 512).to_le_bytes())
        .collect();
    let kind = "\"dtype\":\"I32\",\"shape\":[4,16]";
    let windows = binary::safetensors(&[Tensor {
        name: "input_ids",
        kind,
        data: &ids,
    }]);
    write(&folder.join("rows.safetensors"), &windows)
}

fn made(gptq: &Gptq, folder: &Path) -> Result<(), String> {
    gptq.good(
        folder,
        "quantize model --out packed --dataset text.txt --samples 4 --seq-len 16 --group-size 32 --device cpu",
    )?;
    gptq.good(
        folder,
        "verify packed --write logits.safetensors --ids 1,5,20",
    )?;
    let eval = "eval model packed --dataset text.txt --max-windows 2 --seq-len 16 --task q=seeds/piqa.jsonl --state state.jsonl --device cpu --json";
    let record = gptq.good(folder, eval)?;
    write(&folder.join("eval.json"), &record)?;
    let recipe = r#"{"schema": 1, "recipe": {"model": "model",
        "spec": {"bits": 4, "group_size": 32, "sym": true, "order": "natural", "damp_percent": 0.1,
            "method": "gptq", "format": "gptq", "scale_search": true},
        "calibration": {"dataset": "text.txt", "samples": 4, "seq_len": 16, "seed": 0},
        "evaluation": {"dataset": "text.txt", "seq_len": 16, "max_windows": 2}}}"#;
    write(&folder.join("baseline.json"), recipe.as_bytes())?;
    gptq.good(folder, "regress --baseline baseline.json --update")?;
    Ok(())
}

/// A run that was killed after its second block.
fn interrupted(gptq: &Gptq, folder: &Path) -> Result<(), String> {
    let line = "quantize model --out out --dataset text.txt --samples 16 --seq-len 64 --group-size 32 --device cpu";
    let (partial, out) = (folder.join(".out.partial"), folder.join("out"));
    for _ in 0..20 {
        let mut child = gptq
            .start(folder, line)
            .stderr(std::process::Stdio::null())
            .spawn()
            .map_err(|error| error.to_string())?;
        let begin = Instant::now();
        let lines = || {
            fs::read_to_string(partial.join("journal.jsonl")).map_or(0, |text| text.lines().count())
        };
        while lines() < 3 && begin.elapsed() < Duration::from_secs(20) && !out.exists() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = child.kill();
        let _ = child.wait();
        if !out.exists() && lines() >= 3 {
            return fs::rename(&partial, folder.join("partial")).map_err(|error| error.to_string());
        }
        let _ = fs::remove_dir_all(&out);
        let _ = fs::remove_dir_all(&partial);
    }
    Err("no run could be killed between two blocks".to_string())
}

/// A repository of two branches, and the parts of one of them.
fn repository(gptq: &Gptq, folder: &Path) -> Result<(), String> {
    gptq.good(
        folder,
        "matrix model --plan plan.toml --out repo --dataset text.txt --samples 2 --seq-len 16 --evaluate text.txt --eval-seq-len 16 --eval-windows 1 --device cpu",
    )?;
    gptq.good(folder, &format!("pull repo:{BRANCH} --out branch"))?;
    let repo = folder.join("repo");
    let tree = git(
        &repo,
        &["cat-file", "tree", &format!("{BRANCH}^{{tree}}")],
        b"",
    )?;
    write(&folder.join("branch.tree"), &tree)?;
    let pointer = git(
        &repo,
        &["cat-file", "blob", &format!("{BRANCH}:model.safetensors")],
        b"",
    )?;
    write(&folder.join("branch.pointer"), &pointer)?;
    copy(&commit_object(&repo)?, &folder.join("branch.commit"))
}

/// The file of the branch's commit.
pub fn commit_object(repository: &Path) -> Result<PathBuf, String> {
    let id = git_word(repository, &["rev-parse", BRANCH], b"")?;
    Ok(repository.join("objects").join(&id[..2]).join(&id[2..]))
}

/// The file of the store that the branch's weights are.
pub fn lfs_object(repository: &Path) -> Result<PathBuf, String> {
    let pointer = git(
        repository,
        &["cat-file", "blob", &format!("{BRANCH}:model.safetensors")],
        b"",
    )?;
    let pointer = String::from_utf8_lossy(&pointer).into_owned();
    let oid = pointer
        .split("sha256:")
        .nth(1)
        .and_then(|rest| rest.get(..64));
    let oid = oid.ok_or("the branch's weights are no pointer")?;
    Ok(repository
        .join("lfs/objects")
        .join(&oid[..2])
        .join(&oid[2..4])
        .join(oid))
}
