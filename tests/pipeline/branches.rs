//! A matrix becomes branches of a repository, whole or absent, the same however it is made.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::support::{
    Cause, Family, TinyModel, gptq, json, refused, run, same_files, skipped, tensor_names,
    write_text,
};

const PLAN: &str = r#"
samples = 8
seq_len = 64
[[branch]]
name = "main"
bits = 4
group_size = 32
[[branch]]
bits = 4
group_size = 16
desc_act = true
[[branch]]
bits = 8
group_size = "none"
desc_act = true
"#;
const ACT_ORDER: &str = "gptq-4bit-16g-actorder_True";
/// The folder of a repository for branches in progress.
const WORK: &str = "gptq/work";
const EIGHT: &str = "gptq-8bit--1g-actorder_True";

struct Place {
    folder: tempfile::TempDir,
    model: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("tiny");
        let shapes = TinyModel {
            layers: 3,
            ..TinyModel::new(Family::Llama)
        };
        shapes.write(&model);
        let card = "---\nlicense: apache-2.0\n---\n# The original\nIts own card.\n";
        fs::write(model.join("README.md"), card).unwrap();
        for (name, words) in [("text.txt", 20_000), ("held.txt", 2_000)] {
            write_text(&folder.path().join(name), shapes.vocab, words);
        }
        fs::write(folder.path().join("plan.toml"), PLAN).unwrap();
        Place { folder, model }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The matrix of the plan into the repository `name`; its commits have one date.
    fn matrix(&self, name: &str) -> Command {
        let mut command = gptq("matrix");
        command.env("SOURCE_DATE_EPOCH", "1700000000");
        command.arg(&self.model).arg("--out").arg(self.path(name));
        command.arg("--plan").arg(self.path("plan.toml"));
        command.arg("--dataset").arg(self.path("text.txt"));
        command.arg("--evaluate").arg(self.path("held.txt"));
        command.args(["--eval-seq-len", "64", "--eval-windows", "8"]);
        command
    }

    fn pull(&self, repository: &str, branch: &str, to: &str) -> PathBuf {
        let out = self.path(to);
        let source = format!("{}:{branch}", self.path(repository).display());
        run(gptq("pull").arg(source).arg("--out").arg(&out)).done();
        out
    }

    /// Branches and the commits that they point to.
    fn tips(&self, repository: &str) -> Vec<(String, String)> {
        let heads = self.path(repository).join("refs/heads");
        let mut found: Vec<_> = fs::read_dir(heads)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                (name, fs::read_to_string(entry.path()).unwrap())
            })
            .collect();
        found.sort();
        found
    }
}

#[test]
fn branches_hold_what_quantize_writes_and_a_card() {
    let place = Place::new();
    let branches = json(&mut place.matrix("repo"));
    let names: Vec<&str> = (branches.as_array().unwrap().iter())
        .map(|branch| branch["record"]["permutation"]["branch"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["main", ACT_ORDER, EIGHT]);
    for branch in branches.as_array().unwrap() {
        let scores = &branch["record"]["evaluation"];
        assert!(scores["branch"]["kl"].as_f64().unwrap() > 0.0);
        assert_eq!(scores["reference"]["windows"], 8);
        // Its path on this machine is not published.
        assert_eq!(branch["run"]["calibration"]["dataset"], "text.txt");
    }

    let alone = place.path("alone");
    let mut quantize = gptq("quantize");
    quantize.arg(&place.model).arg("--out").arg(&alone);
    quantize.arg("--dataset").arg(place.path("text.txt"));
    quantize.args([
        "--bits",
        "4",
        "--group-size",
        "16",
        "--desc-act",
        "--device",
        "cpu",
    ]);
    run(quantize.args(["--samples", "8", "--seq-len", "64"])).done();
    let pulled = place.pull("repo", ACT_ORDER, "pulled");
    let weights = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
    assert_eq!(weights(&pulled), weights(&alone));
    for file in [
        "config.json",
        "tokenizer.json",
        "gptq_run.json",
        ".gitattributes",
    ] {
        assert!(pulled.join(file).exists(), "{file}");
    }

    let card = fs::read_to_string(pulled.join("README.md")).unwrap();
    // 64 and 172 are no widths for the kernel that optimum takes on Hopper.
    assert!(card.contains("AutoTokenizer, GPTQConfig\n"), "{card}");
    assert!(card.contains("backend=\"torch\")"), "{card}");
    assert!(card.contains("quantization_config=plain)"), "{card}");
    for text in [
        "license: \"apache-2.0\"",
        "# tiny - GPTQ",
        "| main | 4 | 32 | No | 0.1 | either sign | balanced | text.txt | 64 |",
        "| gptq-8bit--1g-actorder_True | 8 | None | Yes |",
        "no: 8 bits",
        "# Original model card\n# The original",
    ] {
        assert!(card.contains(text), "`{text}` is not in {card}");
    }
    assert!(!card.contains("license: apache-2.0\n---\n# The"), "{card}");
    assert!(!card.contains(&place.folder.path().display().to_string()));
    let score = branches[1]["record"]["evaluation"]["branch"]["perplexity"]
        .as_f64()
        .unwrap();
    assert!(card.contains(&format!("{score:.3} ±")), "{card}");
    let printed = run(gptq("card").arg(place.path("repo"))).done().stdout;
    assert_eq!(printed, card);
}

/// A group on a processor has 32,768 tokens; what is compared must be of the same one.
#[test]
fn a_text_of_two_groups_is_scored_as_eval_scores_it() {
    let place = Place::new();
    write_text(&place.path("held.txt"), 128, 40_000);
    let rounded = "[[branch]]\nname = \"main\"\nbits = 4\ngroup_size = 32\nmethod = \"rtn\"\n";
    fs::write(place.path("plan.toml"), rounded).unwrap();
    let mut matrix = gptq("matrix");
    matrix
        .arg(&place.model)
        .arg("--out")
        .arg(place.path("repo"));
    matrix.arg("--plan").arg(place.path("plan.toml"));
    matrix.arg("--evaluate").arg(place.path("held.txt"));
    let branches = json(matrix.args(["--eval-seq-len", "64"]));
    let of_matrix = &branches[0]["record"]["evaluation"]["branch"];
    assert!(of_matrix["windows"].as_u64().unwrap() > 32_768 / 64);

    let pulled = place.pull("repo", "main", "pulled");
    let mut eval = gptq("eval");
    eval.arg(&place.model).arg(pulled);
    eval.arg("--dataset").arg(place.path("held.txt"));
    let scores = json(eval.args(["--seq-len", "64", "--group-tokens", "5000"]));
    for what in ["perplexity", "kl", "top1_agreement"] {
        assert_eq!(of_matrix[what], scores[1][what], "{what}");
        assert!(of_matrix[what].as_f64().unwrap() > 0.0);
    }
}

#[test]
fn one_by_one_and_side_by_side_give_the_same_commits() {
    let place = Place::new();
    run(&mut place.matrix("whole")).done();
    for branch in [EIGHT, "main", ACT_ORDER] {
        run(place.matrix("parts").args(["--only", branch])).done();
    }
    let parts = place.pull("parts", "main", "parts-main");
    assert!(
        !parts.join("README.md").exists(),
        "cards come with --assemble"
    );
    run(place.matrix("parts").arg("--assemble")).done();
    assert_eq!(place.tips("parts"), place.tips("whole"));
    let mut beside = place.matrix("beside");
    run(beside.args(["--device", "cpu,cpu"])).done();
    assert_eq!(place.tips("beside"), place.tips("whole"));

    // Again: nothing is left to do.
    run(&mut place.matrix("whole")).done();
    assert_eq!(place.tips("parts"), place.tips("whole"));
}

/// There is no quantized stream then, whose inputs could be other ones.
#[test]
fn shared_hessians_exclude_an_aim_at_the_float_model() {
    let place = Place::new();
    let plan = place.path("plan.toml");
    let text = fs::read_to_string(&plan).unwrap();
    fs::write(&plan, text + "effort = \"balanced\"\n").unwrap();
    let mut dry = place.matrix("repo");
    run(dry.args(["--shared-hessian", "--dry-run"])).ended_with(2);
    let mut command = place.matrix("repo");
    let told = run(command.arg("--shared-hessian")).ended_with(2);
    assert!(told.error_line().contains(EIGHT), "{told:#?}");
    assert!(told.error_line().contains("input mismatch"), "{told:#?}");
    assert!(!place.path("repo").exists());
}

#[test]
fn shared_hessians_give_one_branch_the_same_whatever_others_are_made() {
    let place = Place::new();
    let shared = |name: &str| {
        let mut command = place.matrix(name);
        command.arg("--shared-hessian");
        command
    };
    let branches = json(&mut shared("whole"));
    run(shared("parts").args(["--only", ACT_ORDER])).done();
    run(&mut shared("parts")).done();
    assert_eq!(place.tips("parts"), place.tips("whole"));
    let main = &branches[0];
    assert_eq!(main["run"]["shared_hessian"], true);
    let card = run(gptq("card").arg(place.path("whole"))).done().stdout;
    assert_eq!(
        card.matches("Hessians of one pass of the float model")
            .count(),
        3,
        "{card}"
    );

    // The first stage of the first block sees the same inputs either way; later ones do not.
    let plan = fs::read_to_string(place.path("plan.toml")).unwrap();
    let fast = plan.replace("[[branch]]", "[[branch]]\neffort = \"fast\"");
    fs::write(place.path("plan.toml"), fast).unwrap();
    let exact = json(&mut place.matrix("exact"));
    fs::write(place.path("plan.toml"), plan).unwrap();
    for (index, same) in [(0, true), (2, true), (3, false), (20, false)] {
        let error = |branch: &serde_json::Value| {
            branch["run"]["layers"][index]["loss"]["error"]
                .as_f64()
                .unwrap()
        };
        assert_eq!(error(main) == error(&exact[0]), same, "layer {index}");
    }
    refused(
        &mut place.matrix("whole"),
        place.folder.path(),
        &["another kind of Hessians"],
    );
    let mut two = shared("two");
    let told = run(two.args(["--device", "cpu,cpu"])).ended_with(2);
    assert!(told.stderr.contains("on one device"), "{told:#?}");
}

#[test]
fn killed_in_the_middle_it_goes_on_and_keeps_what_is_done() {
    let place = Place::new();
    run(&mut place.matrix("whole")).done();
    let mut command = place.matrix("killed");
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let heads = place.path("killed").join("refs/heads");
    let begun = Instant::now();
    let first = loop {
        let whole = |path: &PathBuf| path.extension().is_none_or(|end| end != "lock");
        let all = fs::read_dir(&heads).into_iter().flatten();
        match all.map(|branch| branch.unwrap().path()).find(whole) {
            Some(branch) => break branch,
            None => assert!(begun.elapsed() < Duration::from_secs(60), "no branch"),
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let name = first.file_name().unwrap().to_str().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let commit = fs::read_to_string(&first).unwrap();
    assert!(
        place.tips("killed").len() < 3,
        "it ended before it was killed"
    );
    let told = run(&mut place.matrix("killed")).done();
    let again = told.stderr.contains(&format!("{name}: blocks"));
    assert!(!again, "{told:#?}");
    assert_eq!(place.tips("killed"), place.tips("whole"));
    let card = place.path("killed").join("objects").join(&commit[..2]);
    assert!(
        card.join(commit[2..].trim()).exists(),
        "the first commit is still there"
    );
}

/// Killed after a folder was there and before its record had lost its times, the branch got them:
/// another commit than an unbroken run's.
#[test]
fn killed_before_the_record_was_kept_it_gives_the_same_commits() {
    let place = Place::new();
    run(&mut place.matrix("whole")).done();
    run(place.matrix("killed").args(["--only", EIGHT])).done();
    let work = place.pull("whole", "main", &format!("killed/{WORK}/main"));
    for later in ["README.md", "gptq_branch.json", ".gitattributes"] {
        let _ = fs::remove_file(work.join(later));
    }
    let path = work.join("gptq_run.json");
    let record = fs::read_to_string(&path).unwrap();
    let timed = record.replacen("\n", "\n  \"seconds\": 1.5,\n", 1);
    fs::write(&path, timed).unwrap();
    let told = run(&mut place.matrix("killed")).done();
    assert!(!told.stderr.contains("main: blocks"), "{told:#?}");
    assert_eq!(place.tips("killed"), place.tips("whole"));
    let full = place.path("killed").join("gptq/records");
    assert_eq!(fs::read_dir(full).unwrap().count(), 3);
}

#[test]
fn a_branch_that_fails_is_absent_and_the_others_are_whole() {
    let place = Place::new();
    run(place.matrix("repo").args(["--only", "main"])).done();
    let junk = place.path("repo").join(WORK).join(ACT_ORDER);
    fs::create_dir(&junk).unwrap();
    fs::write(junk.join("config.json"), "{}").unwrap();
    let told = run(&mut place.matrix("repo")).ended_with(1);
    assert!(
        told.stderr.contains(&format!("{ACT_ORDER}: failed: ")),
        "{told:#?}"
    );
    assert!(
        told.stderr.contains("1 of 3 branches are absent"),
        "{told:#?}"
    );
    let tips = place.tips("repo");
    let names: Vec<&str> = tips.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, [EIGHT, "main"]);
    fs::remove_dir_all(junk).unwrap();
    run(&mut place.matrix("repo")).done();
    run(&mut place.matrix("whole")).done();
    let [repo, whole] = ["repo", "whole"].map(|name| place.pull(name, EIGHT, &format!("{name}-8")));
    same_files(&repo, &whole);
}

#[test]
fn what_a_model_cannot_have_is_refused_before_any_work() {
    let place = Place::new();
    let preset = |more: &[&str]| {
        let mut command = gptq("matrix");
        command.arg(&place.model).args(["--preset", "long-context"]);
        command.arg("--dataset").arg(place.path("text.txt"));
        command.args(["--samples", "8", "--seq-len", "64", "--device", "cpu"]);
        command.args(more);
        command
    };
    let out = place.path("repo");
    let out = out.to_str().unwrap();
    let told = refused(
        &mut preset(&["--out", out]),
        place.folder.path(),
        &[
            "branch `main`",
            "group size 128",
            "`gptq-8bit-128g-actorder_True`",
        ],
    );
    assert!(
        told.hint().unwrap().contains("--skip-impossible"),
        "{told:#?}"
    );
    let told = run(&mut preset(&["--dry-run"])).ended_with(1);
    assert!(
        told.stdout.contains("| main | 4 | 128 | natural |"),
        "{told:#?}"
    );
    assert_eq!(told.stdout.matches("impossible: ").count(), 3, "{told:#?}");
    let plan = preset(&["--dry-run", "--skip-impossible", "--json"])
        .output()
        .unwrap();
    let plan: serde_json::Value = serde_json::from_slice(&plan.stdout).unwrap();
    let sizes: Vec<u64> = (plan.as_array().unwrap().iter())
        .map(|branch| branch["weight_bytes"].as_u64().unwrap())
        .collect();

    let less = ["--out", out, "--skip-impossible", "--evaluate", "none"];
    run(&mut preset(&less)).done();
    let tips = place.tips("repo");
    let names: Vec<&str> = tips.iter().map(|(name, _)| name.as_str()).collect();
    let made = [
        "gptq-4bit-32g-actorder_True",
        "gptq-4bit-64g-actorder_True",
        EIGHT,
    ];
    assert_eq!(names, made);
    let pulled = place.pull("repo", made[0], "pulled");
    let size = fs::metadata(pulled.join("model.safetensors"))
        .unwrap()
        .len();
    assert_eq!(size, sizes[1], "the size that was planned");
    assert!(!tensor_names(&pulled).is_empty());
    let card = fs::read_to_string(pulled.join("README.md")).unwrap();
    assert!(
        card.contains("Perplexity and KL were not measured."),
        "{card}"
    );
}

#[test]
fn what_is_wrong_with_a_repository_or_a_card_is_one_line() {
    let place = Place::new();
    run(&mut place.matrix("repo")).done();
    let root = place.folder.path();
    refused(
        place.matrix("repo").args(["--samples", "9"]),
        root,
        &["branch `main`", "another"],
    );
    refused(
        place.matrix("repo").args(["--only", "x"]),
        root,
        &["--only x"],
    );
    fs::create_dir(place.path("full")).unwrap();
    fs::write(place.path("full").join("file"), "").unwrap();
    refused(&mut place.matrix("full"), root, &["not an empty folder"]);

    let source = format!("{}:other", place.path("repo").display());
    let out = place.path("out");
    let mut pull = gptq("pull");
    refused(
        pull.arg(source).arg("--out").arg(&out),
        root,
        &["no branch `other`"],
    );
    fs::write(place.path("card.toml"), "licence = 'mit'").unwrap();
    let mut card = gptq("card");
    card.arg(place.path("repo"))
        .arg("--card")
        .arg(place.path("card.toml"));
    refused(&mut card, root, &["card.toml", "unknown field `licence`"]);
    fs::write(
        place.path("t.jinja"),
        "{{ info.model_name }}\n{{ nothing }}",
    )
    .unwrap();
    let mut card = gptq("card");
    card.arg(place.path("repo"))
        .arg("--template")
        .arg(place.path("t.jinja"));
    refused(&mut card, root, &["card template, line 2"]);
    fs::write(
        place.path("t.jinja"),
        "{{ info.model_name }}: {{ branches | length }}",
    )
    .unwrap();
    let mut card = gptq("card");
    card.arg(place.path("repo"))
        .arg("--template")
        .arg(place.path("t.jinja"));
    assert_eq!(run(&mut card).done().stdout, "tiny: 3");
}

/// With the real client, where it is installed.
#[test]
fn stock_git_and_git_lfs_clone_a_branch_that_loads() {
    let available = |args: &[&str]| {
        let output = Command::new("git").args(args).output();
        output.is_ok_and(|output| output.status.success())
    };
    if !available(&["lfs", "version"]) {
        skipped(Cause::Machine, "git-lfs");
        return;
    }
    let place = Place::new();
    run(&mut place.matrix("repo")).done();
    let clone = place.path("clone");
    let filters = [
        "-c",
        "filter.lfs.smudge=git-lfs smudge -- %f",
        "-c",
        "filter.lfs.process=git-lfs filter-process",
        "-c",
        "filter.lfs.required=true",
    ];
    let mut git = Command::new("git");
    // not the settings of who runs the tests, nor a repository whose hook does
    git.env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env_remove("GIT_DIR");
    git.args(filters)
        .args(["clone", "-q", "--single-branch", "--branch", EIGHT]);
    let output = git.arg(place.path("repo")).arg(&clone).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let pulled = place.pull("repo", EIGHT, "pulled");
    fs::remove_dir_all(clone.join(".git")).unwrap();
    same_files(&clone, &pulled);
    let logits = place.path("logits.safetensors");
    let mut write = gptq("verify");
    write.arg(&pulled).arg("--write").arg(&logits);
    run(write.args(["--ids", "1,5,20"])).done();
    let mut expect = gptq("verify");
    expect.arg(&clone).arg("--expect").arg(&logits);
    run(expect.args(["--tolerance", "0"])).done();
}

#[test]
fn a_push_that_cannot_begin_is_one_line() {
    let place = Place::new();
    run(place.matrix("repo").args(["--only", "main"])).done();
    let root = place.folder.path();
    let push = |target: &str| {
        let mut command = gptq("push");
        command.arg(place.path("repo")).arg(target);
        // No one answers there.
        command
            .env("HF_HUB_OFFLINE", "0")
            .env("HF_ENDPOINT", "http://127.0.0.1:9");
        command.env_remove("HF_TOKEN");
        command
    };
    let told = refused(&mut push("me/model"), root, &["needs a token"]);
    assert!(told.hint().unwrap().contains("HF_TOKEN"), "{told:#?}");
    let mut with_token = push("me/model");
    with_token.env("HF_TOKEN", "hf_secret");
    let told = refused(
        &mut with_token,
        root,
        &["cannot make repository `me/model`"],
    );
    assert!(!told.stderr.contains("hf_secret"), "{told:#?}");
    refused(&mut push("model"), root, &["`model` is neither"]);
    refused(
        push("me/model").args(["--branch", "x"]),
        root,
        &["no branch `x`"],
    );
    refused(push("me/model").arg("--offline"), root, &["offline"]);
}
