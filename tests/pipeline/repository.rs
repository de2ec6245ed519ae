//! Repositories under other hands: other weights, damaged objects, several processes, foreign names.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::support::{
    Cause, Family, TinyModel, edit_json, edit_tensor, gptq, refused, run, skipped, write_text,
};

const PLAN: &str = r#"
samples = 4
seq_len = 32
[[branch]]
name = "main"
bits = 4
group_size = 32
[[branch]]
name = "eight"
bits = 8
group_size = "none"
"#;

struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("tiny");
        let shapes = TinyModel::new(Family::Llama);
        shapes.write(&model);
        write_text(&folder.path().join("text.txt"), shapes.vocab, 2_000);
        fs::write(folder.path().join("plan.toml"), PLAN).unwrap();
        Place { folder, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn matrix(&self, repository: &str) -> Command {
        let mut command = gptq("matrix");
        command.env("SOURCE_DATE_EPOCH", "1700000000");
        command
            .arg(&self.model)
            .arg("--out")
            .arg(self.path(repository));
        command.arg("--plan").arg(self.path("plan.toml"));
        command.arg("--dataset").arg(self.path("text.txt"));
        command.args(["--evaluate", "none", "--device", "cpu"]);
        command
    }

    fn tips(&self, repository: &str) -> Vec<(String, String)> {
        ["main", "eight"]
            .map(|name| {
                let head = self.path(repository).join("refs/heads").join(name);
                (
                    name.to_string(),
                    fs::read_to_string(head).unwrap_or_default(),
                )
            })
            .to_vec()
    }
}

/// The repository kept the hash of config.json alone: its branches came from two models, and the
/// card called them permutations of one.
#[test]
fn a_matrix_of_other_weights_or_another_tokenizer_is_refused() {
    let place = Place::new();
    run(place.matrix("repo").args(["--only", "main"])).done();
    let tokenizer = place.model.join("tokenizer.json");
    let before = fs::read(&tokenizer).unwrap();
    edit_json(&tokenizer, |json| json["version"] = "2.0".into());
    refused(
        &mut place.matrix("repo"),
        place.folder.path(),
        &["the matrix in", "another `tokenizer.json`"],
    );
    fs::write(&tokenizer, before).unwrap();
    let name = "model.layers.0.self_attn.q_proj.weight";
    edit_tensor(&place.model, name, |bytes| bytes.swap(0, 2));
    for more in [&[][..], &["--only", "eight"], &["--only", "main"]] {
        refused(
            place.matrix("repo").args(more),
            place.folder.path(),
            &["the matrix in", "another model's weights", "identity"],
        );
    }
    edit_tensor(&place.model, name, |bytes| bytes.swap(0, 2));
    run(&mut place.matrix("repo")).done();
    let source = format!("{}:eight", place.path("repo").display());
    let out = place.path("out");
    run(gptq("pull").arg(source).arg("--out").arg(&out)).done();
    let record = fs::read_to_string(out.join("gptq_branch.json")).unwrap();
    assert!(record.contains("\"weights_sha256\""), "{record}");
}

/// One byte flipped in an LFS object: `pull` wrote it and exited with 0.
#[test]
fn damaged_weights_are_not_handed_out() {
    let place = Place::new();
    run(&mut place.matrix("repo")).done();
    for object in files_below(&place.path("repo").join("lfs/objects")) {
        let mut bytes = fs::read(&object).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::remove_file(&object).unwrap();
        fs::write(&object, bytes).unwrap();
    }
    let source = format!("{}:eight", place.path("repo").display());
    let mut pull = gptq("pull");
    pull.arg(source).arg("--out").arg(place.path("out"));
    let named = ["branch `eight`", "`model.safetensors`", "is damaged"];
    refused(&mut pull, place.folder.path(), &named);
    let mut push = gptq("push");
    push.arg(place.path("repo"))
        .args(["me/model", "--branch", "eight"]);
    refused(&mut push, place.folder.path(), &named);
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let all = crate::support::entries(folder);
    all.into_iter().filter(|path| path.is_file()).collect()
}

/// `"a b"` was quantized and scored first, and refused when its branch was made.
#[test]
fn branch_names_are_checked_before_any_work() {
    let place = Place::new();
    let plan = |names: &[&str]| {
        let branch =
            |name: &&str| format!("[[branch]]\nname = {name:?}\nbits = 4\ngroup_size = 32\n");
        let branches: String = names.iter().map(branch).collect();
        let plan = format!("samples = 4\nseq_len = 32\n{branches}");
        fs::write(place.path("plan.toml"), plan).unwrap();
    };
    for (names, reason) in [
        (&["a b"][..], "`a b` cannot be the name of a branch"),
        (&["x.lock"], "`x.lock`"),
        (&["HEAD"], "`HEAD`"),
        (
            &["feature/x", "feature"],
            "`feature` is a branch, and would have to be a folder",
        ),
        (&["Main", "main"], "in case alone"),
        (&["../x"], "`../x`"),
    ] {
        plan(names);
        let root = place.folder.path();
        refused(place.matrix("repo").arg("--dry-run"), root, &[reason]);
        refused(&mut place.matrix("repo"), root, &[reason]);
    }
    plan(&["feature"]);
    run(&mut place.matrix("repo")).done();
    plan(&["feature/x"]);
    let named = ["`feature` is a branch"];
    refused(&mut place.matrix("repo"), place.folder.path(), &named);
}

/// The first start of a repository by two processes: "is not a git repository", or "failed to lock
/// config.lock"; on the same branch one deleted what the other was writing.
#[test]
fn two_starts_at_once_make_the_repository_of_one() {
    let place = Place::new();
    run(&mut place.matrix("alone")).done();
    for trial in 0..3 {
        let repository = format!("repo{trial}");
        let start = || -> Child {
            let mut command = place.matrix(&repository);
            command.stdout(Stdio::null()).stderr(Stdio::piped());
            command.spawn().unwrap()
        };
        for child in [start(), start()] {
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(0), "{said}");
        }
        assert_eq!(place.tips(&repository), place.tips("alone"));
    }
    let starts = ["main", "eight"].map(|name| {
        let mut command = place.matrix("only");
        command.args(["--only", name]).stderr(Stdio::null());
        command.spawn().unwrap()
    });
    for mut child in starts {
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }
    run(place.matrix("only").arg("--assemble")).done();
    assert_eq!(place.tips("only"), place.tips("alone"));
}

/// The stored state of a repository may have been written by anyone.
#[test]
fn a_damaged_memory_is_refused_by_the_name_of_its_file() {
    let place = Place::new();
    run(place.matrix("repo").args(["--only", "main"])).done();
    let path = place.path("repo").join("gptq/matrix.json");
    let sound = fs::read_to_string(&path).unwrap();
    for (from, to) in [
        ("\"samples\": 4", "\"samples\": 4611686018427387904"),
        ("\"branch\": \"eight\"", "\"branch\": \"../../eight\""),
        ("\"branch\": \"eight\"", "\"branch\": \"main/x\""),
        ("\"weights_sha256\": \"", "\"weights_sha256\": \"../"),
        ("\"damp_percent\": 0.1", "\"damp_percent\": 1e9"),
        ("{", ""),
    ] {
        assert!(sound.contains(from), "{from} is not in {sound}");
        fs::write(&path, sound.replacen(from, to, 1)).unwrap();
        refused(
            &mut place.matrix("repo"),
            place.folder.path(),
            &["matrix.json"],
        );
    }
}

/// A tree that names `../x`: the pull wrote there and exited with 0.
#[test]
fn a_pull_writes_nothing_outside_its_folder() {
    let place = Place::new();
    let path = place.path("evil.git");
    let git = |args: &[&str], input: &[u8]| -> Option<String> {
        let mut command = Command::new("git");
        command.arg("-C").arg(&path).args(args);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = command.ok()?;
        std::io::Write::write_all(child.stdin.as_mut()?, input).ok()?;
        let output = child.wait_with_output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_string())
    };
    fs::create_dir(&path).unwrap();
    let made = git(&["init", "-q", "--bare"], b"").and_then(|_| {
        let write = ["hash-object", "-w", "--literally", "--stdin", "-t"];
        let blob = git(&[&write[..], &["blob"]].concat(), b"evil\n")?;
        let id: Vec<u8> = (0..20)
            .map(|at| u8::from_str_radix(&blob[2 * at..2 * at + 2], 16).unwrap())
            .collect();
        let tree = [&b"100644 ../escaped.txt\0"[..], &id].concat();
        let tree = git(&[&write[..], &["tree"]].concat(), &tree)?;
        let who = "a <a@a> 1700000000 +0000";
        let commit = format!("tree {tree}\nauthor {who}\ncommitter {who}\n\nx\n");
        git(&[&write[..], &["commit"]].concat(), commit.as_bytes())
    });
    let Some(commit) = made else {
        skipped(Cause::Machine, "git");
        return;
    };
    fs::write(path.join("refs/heads/main"), commit + "\n").unwrap();
    fs::create_dir(place.path("deep")).unwrap();
    let mut pull = gptq("pull");
    pull.arg(&path).arg("--out").arg(place.path("deep/out"));
    let named = ["branch `main`", "`../escaped.txt`"];
    refused(&mut pull, place.folder.path(), &named);
}

/// `push` took a repository of matrix alone.
#[test]
fn one_folder_may_be_pushed() {
    let place = Place::new();
    let out = place.path("out");
    let mut quantize = gptq("quantize");
    quantize.arg(&place.model).arg("--out").arg(&out);
    run(quantize.args(["--method", "rtn", "--group-size", "32"])).done();
    let push = |more: &[&str]| {
        let mut command = gptq("push");
        command.arg(&out).args(more);
        command
    };
    let root = place.folder.path();
    refused(&mut push(&["me/model:x", "--offline"]), root, &["offline"]);
    refused(
        &mut push(&["me/model", "--branch", "x"]),
        root,
        &["--branch is for a repository"],
    );
    refused(&mut push(&["me/model:a..b"]), root, &["a..b"]);
    let weights = out.join("model.safetensors");
    fs::rename(&weights, place.path("moved")).unwrap();
    std::os::unix::fs::symlink(place.path("moved"), &weights).unwrap();
    refused(
        &mut push(&["me/model"]),
        root,
        &["model.safetensors", "is not a file"],
    );
}
