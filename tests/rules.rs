//! Rules for the sources: dependencies between crates, places of `unsafe`, and no trace in the repository
//! of the machine it was written on.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::support::{Cause, skipped};

/// Workspace crates that each crate may use. docs/ARCHITECTURE.md holds the table for people.
const MAY_USE: [(&str, &[&str]); 12] = [
    ("gptq-types", &[]),
    ("gptq-packer", &["gptq-types"]),
    ("gptq-calibration", &["gptq-types"]),
    ("gptq-kernels", &["gptq-types"]),
    ("gptq-report", &["gptq-types"]),
    ("gptq-repository", &["gptq-types"]),
    ("gptq-hub", &["gptq-types", "gptq-packer"]),
    ("gptq-model", &["gptq-types", "gptq-kernels"]),
    ("gptq-quantizer", &["gptq-types", "gptq-kernels"]),
    (
        "gptq-pipeline",
        &["gptq-types", "gptq-packer", "gptq-model", "gptq-quantizer"],
    ),
    (
        "gptq-inference",
        &["gptq-types", "gptq-packer", "gptq-kernels", "gptq-model"],
    ),
    (
        "gptq-cli",
        &[
            "gptq-types",
            "gptq-packer",
            "gptq-calibration",
            "gptq-kernels",
            "gptq-report",
            "gptq-repository",
            "gptq-hub",
            "gptq-model",
            "gptq-quantizer",
            "gptq-pipeline",
            "gptq-inference",
        ],
    ),
];

/// The command and its tests see everything; so no rule about who may not see is about it.
const COMMAND: &str = "gptq-cli";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Whether the rules can be checked: the binary also runs on machines without sources.
fn has_sources() -> bool {
    let there =
        root().join("Cargo.toml").exists() && Command::new(cargo()).arg("-V").output().is_ok();
    if !there {
        skipped(Cause::Machine, "the sources of the project or cargo");
    }
    there
}

fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_string())
}

/// Dependencies of each package; tests may have more.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(cargo())
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value["name"].as_str().unwrap().to_string();
    let packages = metadata["packages"].as_array().unwrap().iter();
    packages
        .map(|package| {
            let all = package["dependencies"].as_array().unwrap().iter();
            let used = all.filter(|dependency| dependency["kind"] != "dev");
            (text(package), used.map(text).collect())
        })
        .collect()
}

#[test]
fn crates_see_what_the_table_says_and_no_more() {
    if !has_sources() {
        return;
    }
    let table: BTreeMap<String, BTreeSet<String>> = MAY_USE
        .into_iter()
        .map(|(name, used)| {
            (
                name.to_string(),
                used.iter().map(|u| u.to_string()).collect(),
            )
        })
        .collect();
    let mut found = dependencies();
    for used in found.values_mut() {
        used.retain(|name| table.contains_key(name));
    }
    assert_eq!(
        found, table,
        "left: Cargo.toml files, right: the table of this test"
    );
}

#[test]
fn the_crates_that_must_not_meet_do_not() {
    if !has_sources() {
        return;
    }
    let uses = reachable();
    let sees = |one: &str, other: &str| uses[one].contains(other);
    assert!(!sees("gptq-model", "gptq-quantizer"));
    assert!(!sees("gptq-quantizer", "gptq-model"));
    assert!(!sees("gptq-inference", "gptq-pipeline"));
    assert!(!sees("gptq-inference", "gptq-quantizer"));
    let of_report: Vec<&str> = uses["gptq-report"].iter().map(String::as_str).collect();
    assert_eq!(of_report, ["gptq-types"]);
    let seeing_packer: Vec<&str> = uses
        .iter()
        .filter(|(_, used)| used.contains("gptq-packer"))
        .map(|(name, _)| name.as_str())
        .collect();
    let allowed = ["gptq-cli", "gptq-hub", "gptq-inference", "gptq-pipeline"];
    assert_eq!(seeing_packer, allowed);
}

/// Crates of the workspace that each one depends on, at any distance.
fn reachable() -> BTreeMap<String, BTreeSet<String>> {
    let direct = dependencies();
    let close = |name: &String| {
        let mut seen = BTreeSet::new();
        let mut open = vec![name.clone()];
        while let Some(name) = open.pop() {
            for used in direct.get(&name).into_iter().flatten() {
                if direct.contains_key(used) && seen.insert(used.clone()) {
                    open.push(used.clone());
                }
            }
        }
        (name.clone(), seen)
    };
    direct.keys().map(close).collect()
}

#[test]
fn heavy_libraries_stay_in_their_crates() {
    if !has_sources() {
        return;
    }
    let only_in = [
        ("burn", "gptq-model"),
        ("burn-flex", "gptq-model"),
        ("burn-cubecl", "gptq-model"),
        ("cudarc", "gptq-kernels"),
        ("hf-hub", "gptq-hub"),
        ("ureq", "gptq-hub"),
        ("parquet", "gptq-calibration"),
        ("git2", "gptq-repository"),
        ("clap", COMMAND),
        ("indicatif", COMMAND),
    ];
    // Cards there, chat templates here.
    let templates = ["gptq-report", "gptq-inference"];
    for (name, used) in dependencies() {
        assert!(
            !used.contains("minijinja") || templates.contains(&name.as_str()),
            "{name}"
        );
        for (library, home) in only_in {
            let allowed = name == home || !used.contains(library);
            assert!(
                allowed,
                "{name} depends on {library}, which belongs to {home}"
            );
        }
    }
}

#[test]
fn no_crate_is_a_drawer() {
    if !has_sources() {
        return;
    }
    for name in dependencies().keys() {
        for drawer in ["core", "common", "utils", "util", "misc"] {
            assert!(!name.split('-').any(|word| word == drawer), "{name}");
        }
    }
}

/// Files of the repository, build outputs and git's own apart.
fn files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root()];
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            // In a worktree `.git` is a file that names the place of the repository.
            match path.is_dir() {
                _ if ["target", ".git", ".carry"].contains(&name.as_str()) => {}
                true => open.push(path),
                false => found.push(path),
            }
        }
    }
    found.sort();
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap().display().to_string()
}

#[test]
fn unsafe_code_stays_in_the_kernels() {
    if !has_sources() {
        return;
    }
    let mut looked_at = 0;
    for path in files() {
        let is_rust = path.extension().is_some_and(|end| end == "rs");
        // Foreign code, and where a tensor of Burn lies.
        let allowed = [
            "crates/gptq-kernels/src/cuda/",
            "crates/gptq-model/src/burn_memory.rs",
        ];
        let name = relative(&path);
        if !is_rust || allowed.iter().any(|allowed| name.starts_with(allowed)) {
            continue;
        }
        looked_at += 1;
        let text = fs::read_to_string(&path).unwrap();
        for (index, line) in text.lines().enumerate() {
            let code = line.trim_start();
            let words = code.split(|c: char| !c.is_alphanumeric() && c != '_');
            let found = !code.starts_with("//") && words.clone().any(|w| w == UNSAFE);
            assert!(!found, "{}:{}: {line}", relative(&path), index + 1);
        }
    }
    assert!(looked_at > 100, "only {looked_at} files were found");
}

/// Cut in two, so that the search does not find its own words.
const UNSAFE: &str = concat!("un", "safe");

/// Cut in two, as above: texts that only `support/data.rs` may contain.
const SKIPPED: &str = concat!("\"skip", "ped: ");
const BESIDE: &str = concat!("../sha", "red");

/// A test skipped in another way would be missing in the line that closes a run.
#[test]
fn tests_are_skipped_in_one_place() {
    if !has_sources() {
        return;
    }
    let mut skipping = Vec::new();
    for path in files() {
        if path.extension().is_none_or(|end| end != "rs") {
            continue;
        }
        let text = fs::read_to_string(&path).unwrap();
        if text.contains(SKIPPED) || text.contains(BESIDE) {
            skipping.push(relative(&path));
        }
    }
    assert_eq!(skipping, ["tests/support/data.rs"]);
}

/// `tests/skipped.rs` closes a run since its package is the last by name.
#[test]
fn the_package_that_closes_a_run_is_the_last() {
    if !has_sources() {
        return;
    }
    let packages = dependencies();
    assert_eq!(packages.keys().next_back().unwrap(), "gptq-types");
}

#[test]
fn no_file_knows_the_machine_it_was_written_on() {
    if !has_sources() {
        return;
    }
    let homes: Vec<String> = ["root", "home", "work", "mnt", "Users", "scratch"]
        .iter()
        .map(|folder| format!("/{folder}/"))
        .collect();
    for path in files() {
        // Pictures and packed fixtures hold no text.
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        for (index, line) in text.lines().enumerate() {
            for home in &homes {
                let found = line.match_indices(home.as_str()).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || "._-~*$}/".contains(c))
                });
                assert!(!found, "{}:{}: {line}", relative(&path), index + 1);
            }
        }
    }
}
