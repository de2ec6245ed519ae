//! Branches made here, read here and by stock git.

#[path = "../../../tests/support/data.rs"]
mod data;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use gptq_repository::{Repository, RepositoryError};

struct Place {
    folder: tempfile::TempDir,
    repository: Repository,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let repository = Repository::open_or_create(&folder.path().join("repo"), "main").unwrap();
        Place { folder, repository }
    }

    /// A folder with a weight file of `weights` and a config.
    fn checkpoint(&self, name: &str, weights: &[u8]) -> PathBuf {
        let folder = self.folder.path().join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("model.safetensors"), weights).unwrap();
        fs::write(
            folder.join("config.json"),
            format!("{{\"name\": \"{name}\"}}"),
        )
        .unwrap();
        folder
    }
}

fn git(folder: &Path, args: &[&str]) -> Option<String> {
    let Ok(output) = Command::new("git")
        .current_dir(folder)
        .args(args)
        // not the settings of who runs the tests
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env_remove("GIT_DIR")
        .output()
    else {
        data::skipped(data::Cause::Machine, "git");
        return None;
    };
    assert!(output.status.success(), "git {args:?}: {output:?}");
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn a_folder_becomes_a_branch_and_a_folder_again() {
    let place = Place::new();
    let repository = &place.repository;
    for (branch, weights) in [
        ("main", [1u8; 3000]),
        ("gptq-8bit--1g-actorder_True", [2; 3000]),
    ] {
        let folder = place.checkpoint(branch, &weights);
        repository.publish(branch, &folder, "made").unwrap();
        let again = place.folder.path().join(format!("{branch}-again"));
        repository.checkout(branch, &again).unwrap();
        assert_eq!(fs::read(again.join("model.safetensors")).unwrap(), weights);
        let config = fs::read(folder.join("config.json")).unwrap();
        assert_eq!(fs::read(again.join("config.json")).unwrap(), config);
    }
    let names: Vec<String> = (repository.files("main").unwrap().into_iter())
        .map(|file| format!("{} {} {}", file.name, file.bytes, file.oid.is_some()))
        .collect();
    assert_eq!(
        names[1..],
        ["config.json 16 false", "model.safetensors 3000 true"]
    );
    let all = ["gptq-8bit--1g-actorder_True", "main"];
    assert_eq!(repository.branches().unwrap(), all);
    let reopened = Repository::open(repository.path()).unwrap();
    assert_eq!(reopened.branches().unwrap(), all);
    if let Some(fsck) = git(repository.path(), &["fsck", "--full", "--strict"]) {
        assert_eq!(fsck, "");
        let tree = git(repository.path(), &["ls-tree", "--name-only", "main"]).unwrap();
        assert_eq!(tree, ".gitattributes\nconfig.json\nmodel.safetensors\n");
        let head = git(repository.path(), &["symbolic-ref", "HEAD"]).unwrap();
        assert_eq!(head, "refs/heads/main\n");
    }
}

#[test]
fn a_branch_is_made_once_and_its_small_files_replaced() {
    let place = Place::new();
    let repository = &place.repository;
    let folder = place.checkpoint("one", b"weights");
    repository.publish("main", &folder, "made").unwrap();
    assert!(repository.publish("main", &folder, "made").is_err());
    let first = repository.tip("main").unwrap();
    assert!(
        repository
            .replace("main", "README.md", b"card", "card")
            .unwrap()
    );
    assert!(
        !repository
            .replace("main", "README.md", b"card", "card")
            .unwrap()
    );
    assert_ne!(repository.tip("main").unwrap(), first);
    assert_eq!(
        repository.read("main", "README.md").unwrap().unwrap(),
        b"card"
    );
    assert_eq!(repository.read("main", "other").unwrap(), None);
    if let Some(log) = git(repository.path(), &["log", "--format=%H", "main"]) {
        assert_eq!(log.lines().last(), Some(first.as_str()));
        assert_eq!(log.lines().count(), 2);
    }
}

#[test]
fn what_is_missing_is_named() {
    let place = Place::new();
    let repository = &place.repository;
    let error = repository.tip("other").unwrap_err();
    assert!(error.to_string().contains("no branch `other`"), "{error}");
    let folder = place.checkpoint("one", b"weights");
    let error = repository.publish("a b", &folder, "made").unwrap_err();
    assert!(
        matches!(error, RepositoryError::BranchName { .. }),
        "{error}"
    );
    let error = repository.publish("../x", &folder, "made").unwrap_err();
    assert!(
        matches!(error, RepositoryError::BranchName { .. }),
        "{error}"
    );
    repository.publish("main", &folder, "made").unwrap();
    let objects = repository.path().join("lfs/objects");
    fs::remove_dir_all(objects).unwrap();
    let out = place.folder.path().join("out");
    let error = repository.checkout("main", &out).unwrap_err();
    assert!(error.to_string().contains("`model.safetensors`"), "{error}");
    assert!(!out.exists());
    let occupied = Repository::open_or_create(&folder, "main").err().unwrap();
    assert!(
        matches!(occupied, RepositoryError::Occupied(_)),
        "{occupied}"
    );
    fs::create_dir(folder.join("inner")).unwrap();
    let error = repository.publish("second", &folder, "made").unwrap_err();
    assert!(matches!(error, RepositoryError::Nested(_)), "{error}");
}
