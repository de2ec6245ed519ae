//! Repositories that others made, or that were damaged: refused by name, with nothing written.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use git2::{ObjectType, Oid};
use gptq_repository::{Repository, RepositoryError};

const FILE: &str = "100644";

/// A bare repository whose branch `main` has a tree of raw entries, which no git would write.
struct Evil {
    folder: tempfile::TempDir,
    repository: Repository,
}

impl Evil {
    fn new(entries: &[(&str, &[u8], &[u8])]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("repo");
        let repository = Repository::open_or_create(&path, "main").unwrap();
        let git = git2::Repository::open_bare(&path).unwrap();
        let objects = git.odb().unwrap();
        let write = |kind, bytes: &[u8]| objects.write(kind, bytes).unwrap();
        let mut tree = Vec::new();
        for (mode, name, content) in entries {
            let kind = if *mode == "40000" {
                ObjectType::Tree
            } else {
                ObjectType::Blob
            };
            let content = if kind == ObjectType::Tree {
                &[][..]
            } else {
                content
            };
            tree.extend(format!("{mode} ").bytes());
            tree.extend_from_slice(name);
            tree.push(0);
            tree.extend_from_slice(write(kind, content).as_bytes());
        }
        let tree: Oid = write(ObjectType::Tree, &tree);
        let who = "a <a@a> 1700000000 +0000";
        let commit = format!("tree {tree}\nauthor {who}\ncommitter {who}\n\nx\n");
        let commit = write(ObjectType::Commit, commit.as_bytes());
        fs::write(path.join("refs/heads/main"), format!("{commit}\n")).unwrap();
        Evil { folder, repository }
    }

    /// Checks the branch out and looks whether anything at all was written.
    #[track_caller]
    fn refused(&self) -> RepositoryError {
        let before = everything(self.folder.path());
        let out = self.folder.path().join("deep");
        let error = self.repository.checkout("main", &out).unwrap_err();
        assert_eq!(
            everything(self.folder.path()),
            before,
            "something was written"
        );
        let text = error.to_string();
        assert!(text.len() < 400 && !text.contains('\n'), "{text}");
        error
    }
}

fn everything(folder: &Path) -> Vec<PathBuf> {
    let mut found = vec![folder.to_path_buf()];
    if folder.is_dir() {
        let mut inner: Vec<_> = (fs::read_dir(folder).unwrap())
            .flat_map(|entry| everything(&entry.unwrap().path()))
            .collect();
        inner.sort();
        found.extend(inner);
    }
    found
}

/// `../x` and `/x` in a tree were joined to the target: `gptq pull` wrote anywhere on disk.
#[test]
fn an_entry_that_leaves_its_folder_is_refused_by_name() {
    let escape = tempfile::tempdir().unwrap();
    let absolute = escape.path().join("absolute.txt");
    let absolute = absolute.to_str().unwrap().as_bytes();
    for name in [
        &b"../escaped.txt"[..],
        absolute,
        b"a/b",
        b".git",
        b".GIT",
        b"..",
        b".",
        b"",
        b"a\\b",
        b"a\nb",
        b"\xff\xfe",
    ] {
        let evil = Evil::new(&[(FILE, b"config.json", b"{}"), (FILE, name, b"evil")]);
        evil.refused();
        assert!(evil.repository.files("main").is_err());
        assert!(evil.repository.read("main", "config.json").is_err());
    }
    assert_eq!(fs::read_dir(escape.path()).unwrap().count(), 0);
}

/// Links, folders and submodules were read as if they were files.
#[test]
fn what_is_no_file_is_refused_by_name() {
    for (mode, kind) in [
        ("120000", "a symbolic link"),
        ("40000", "a folder"),
        ("160000", "a submodule"),
    ] {
        let evil = Evil::new(&[
            (FILE, b"config.json", b"{}"),
            (mode, b"weights", b"/etc/passwd"),
        ]);
        let error = evil.refused().to_string();
        assert!(
            error.contains("`weights`") && error.contains(kind),
            "{error}"
        );
    }
}

/// On some file systems the second would be written over the first.
#[test]
fn two_entries_of_one_name_are_refused() {
    for second in [&b"config.json"[..], b"Config.JSON"] {
        let evil = Evil::new(&[(FILE, b"config.json", b"{}"), (FILE, second, b"[]")]);
        let error = evil.refused().to_string();
        assert!(error.contains("`config.json` is the same file"), "{error}");
    }
}

/// The oid of a pointer chooses a path in the store: only a sha256 may.
#[test]
fn a_damaged_pointer_is_refused_by_name() {
    let version = "version https://git-lfs.github.com/spec/v1\n";
    let oid = "ab".repeat(32);
    for rest in [
        "oid sha256:../../../../../etc/passwd\nsize 5\n".to_string(),
        format!("oid sha256:{oid}\nsize -5\n"),
        format!("oid sha256:{oid}\nsize 5\n{}", "x".repeat(2000)),
        String::new(),
    ] {
        let pointer = format!("{version}{rest}");
        let evil = Evil::new(&[(FILE, b"model.safetensors", pointer.as_bytes())]);
        let error = evil.refused().to_string();
        assert!(error.contains("`model.safetensors`"), "{error}");
    }
    let missing = format!("{version}oid sha256:{oid}\nsize 18446744073709551615\n");
    let evil = Evil::new(&[(FILE, b"model.safetensors", missing.as_bytes())]);
    assert!(matches!(
        evil.refused(),
        RepositoryError::MissingObject { .. }
    ));
}

/// A few bytes of git that claim to unpack to 300 MB: memory was taken by what the header says.
#[test]
fn a_blob_that_blows_up_is_refused_by_its_header() {
    let evil = Evil::new(&[(FILE, b"config.json", b"{}")]);
    let [file] = evil.repository.files("main").unwrap().try_into().unwrap();
    let (folder, name) = file.git_oid.split_at(2);
    let object = evil.repository.path().join("objects").join(folder);
    fs::remove_file(object.join(name)).unwrap();
    fs::write(object.join(name), stored_by_zlib(b"blob 300000000\0{}")).unwrap();
    let error = evil.refused().to_string();
    assert!(error.contains("300000000 bytes in git itself"), "{error}");
}

/// RFC 1950 and 1951: one block that is not compressed.
fn stored_by_zlib(bytes: &[u8]) -> Vec<u8> {
    let length = bytes.len() as u16;
    let (mut low, mut high) = (1u32, 0u32);
    for &byte in bytes {
        low = (low + u32::from(byte)) % 65521;
        high = (high + low) % 65521;
    }
    let mut out = vec![0x78, 0x01, 0x01];
    out.extend(length.to_le_bytes());
    out.extend((!length).to_le_bytes());
    out.extend_from_slice(bytes);
    out.extend((high << 16 | low).to_be_bytes());
    out
}

fn checkpoint(folder: &Path, weights: &[u8]) -> PathBuf {
    let checkpoint = folder.join("checkpoint");
    fs::create_dir_all(&checkpoint).unwrap();
    fs::write(checkpoint.join("model.safetensors"), weights).unwrap();
    fs::write(checkpoint.join("config.json"), "{}").unwrap();
    checkpoint
}

/// The only file below `folder`.
fn object(folder: &Path) -> PathBuf {
    let files = everything(folder);
    files.into_iter().find(|path| path.is_file()).unwrap()
}

/// Objects were known by their length: with a byte flipped, `pull` wrote them and exited with 0, and
/// a branch that was made anew kept them.
#[test]
fn an_object_is_what_its_hash_says_or_refused() {
    let folder = tempfile::tempdir().unwrap();
    let weights = vec![7; 5000];
    let source = checkpoint(folder.path(), &weights);
    let repository = Repository::open_or_create(&folder.path().join("repo"), "main").unwrap();
    repository.publish("main", &source, "made").unwrap();
    let stored = object(&folder.path().join("repo/lfs/objects"));
    // Not in place: the source may be the same file on disk.
    let mut damaged = weights.clone();
    damaged[1000] ^= 1;
    fs::remove_file(&stored).unwrap();
    fs::write(&stored, &damaged).unwrap();

    let out = folder.path().join("out");
    let error = repository.checkout("main", &out).unwrap_err();
    assert!(
        matches!(error, RepositoryError::DamagedObject { .. }),
        "{error}"
    );
    for named in [
        "branch `main`",
        "`model.safetensors`",
        stored.file_name().unwrap().to_str().unwrap(),
    ] {
        assert!(error.to_string().contains(named), "{error}");
    }
    assert!(!out.exists());
    let files = repository.files("main").unwrap();
    let sent = files.iter().map(|file| repository.object("main", file));
    assert!(
        sent.into_iter().any(|object| object.is_err()),
        "push would send it"
    );

    repository.publish("again", &source, "made").unwrap();
    repository.checkout("main", &out).unwrap();
    assert_eq!(fs::read(out.join("model.safetensors")).unwrap(), weights);
}

/// Two starts on a new repository: one saw a folder that was neither empty nor a repository, or
/// could not lock git's config.
#[test]
fn many_may_make_one_repository_at_once() {
    for _ in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("repo");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| Repository::open_or_create(&path, "main").map(drop).unwrap());
            }
        });
        let mut names: Vec<_> = (fs::read_dir(&path).unwrap())
            .map(|entry| entry.unwrap().file_name())
            .collect();
        names.sort();
        assert!(
            names
                .iter()
                .all(|name| !name.to_string_lossy().starts_with('.')),
            "{names:?}"
        );
        let fsck = Command::new("git")
            .arg("-C")
            .arg(&path)
            .args(["rev-parse", "--is-bare-repository"])
            .output();
        assert!(fsck.map_or(true, |output| output.status.success()));
    }
}

/// Killed between two renames: the next start completes what is there.
#[test]
fn a_repository_that_was_half_made_is_completed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("repo");
    drop(Repository::open_or_create(&path, "main").unwrap());
    fs::remove_file(path.join("HEAD")).unwrap();
    fs::create_dir(path.join(".making-left")).unwrap();
    Repository::open_or_create(&path, "main").unwrap();
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.txt"), "").unwrap();
    let error = Repository::open_or_create(&other, "main").err().unwrap();
    assert!(matches!(error, RepositoryError::Occupied(_)), "{error}");
}

/// Two processes that put the same card on a branch make one commit of it.
#[test]
fn a_card_of_two_processes_is_one_commit() {
    let folder = tempfile::tempdir().unwrap();
    let source = checkpoint(folder.path(), b"weights");
    let path = folder.path().join("repo");
    let repository = Repository::open_or_create(&path, "main").unwrap();
    repository.publish("main", &source, "made").unwrap();
    let commits: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let repository = Repository::open(&path).unwrap();
                    repository
                        .replace("main", "README.md", b"card", "card")
                        .unwrap()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| usize::from(thread.join().unwrap()))
            .sum()
    });
    assert_eq!(commits, 1);
}
