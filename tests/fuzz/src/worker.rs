//! One run after the other in a folder of its own: the input is put together, the command reads it,
//! and what can be seen of that is judged.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::command::{Gptq, git, git_word};
use crate::judge::{MOST_SECONDS, Seen, faults};
use crate::outside::{OUTSIDE, Snapshot, differences, snapshot};
use crate::random::Random;
use crate::seeds::{BRANCH, commit_object, copy, lfs_object, read, write};
use crate::targets::{Kind, Place, Target};
use crate::watch::{SUBCOMMAND, Took};
use crate::{bytes, layout, template, text};

/// Entries that the commands may write in a run's folder.
const WRITTEN: [&str; 7] = [
    "out",
    ".out.partial",
    "tmp",
    "repo",
    "logits.safetensors",
    "state.jsonl",
    ".out.lock",
];

/// Number of retries of a slow run.
const TRIES: usize = 2;

/// A changed file and the command that is to read it.
#[derive(Clone, Debug)]
pub struct Input {
    /// The reader.
    pub target: &'static Target,
    /// The end of the file's name, in the place of `*`.
    pub end: String,
    /// The changed file.
    pub bytes: Vec<u8>,
    /// Whether it differs from the seed.
    pub changed: bool,
    /// The command line.
    pub line: String,
}

impl Input {
    /// The input of run `run`: a mutation of the target's seed files, determined by `seed`.
    pub fn drawn(
        target: &'static Target,
        seeds: &Path,
        seed: u64,
        run: u64,
    ) -> Result<Self, String> {
        let random = &mut Random::of_run(seed, target.name, run);
        let name = *random.pick(target.seeds);
        let original = read(&seeds.join(name))?;
        let other = read(&seeds.join(random.pick(target.seeds)))?;
        let mut bytes = original.clone();
        let mut more = true;
        while more {
            change(target.kind, &mut bytes, &other, random);
            more = random.once_in(2);
        }
        let changed = bytes != original;
        let line = random.pick(target.commands);
        Ok(Self::new(target, name, bytes, changed, line))
    }

    /// A kept file named `name` and a command line of the target.
    pub fn new(
        target: &'static Target,
        name: &str,
        bytes: Vec<u8>,
        changed: bool,
        line: &str,
    ) -> Self {
        let name = name.rsplit('/').next().unwrap_or(name);
        let end = name.find('.').map_or("", |at| &name[at..]).to_string();
        let line = line.replace('*', &end);
        Input {
            target,
            end,
            bytes,
            changed,
            line,
        }
    }
}

fn change(kind: Kind, file: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    match (kind, random.below(10)) {
        (Kind::Bytes, _) => bytes::mutate(file, other, random),
        (Kind::Text, 0 | 1) => bytes::mutate(file, other, random),
        (Kind::Text, _) => text::mutate(file, other, random),
        (Kind::Template, 0 | 1) => bytes::mutate(file, other, random),
        (Kind::Template, 2..=4) => text::mutate(file, other, random),
        (Kind::Template, _) => template::mutate(file, random),
        (Kind::TokenizerConfig, 0..=3) => template::mutate_in_json(file, random),
        (Kind::TokenizerConfig, _) => text::mutate(file, other, random),
        (Kind::Safetensors, _) => layout::safetensors(file, other, random),
        (Kind::Gguf, _) => layout::gguf(file, other, random),
        (Kind::Protobuf, _) => layout::protobuf(file, other, random),
        (Kind::Tree, _) => layout::tree(file, other, random),
    }
}

/// A folder for runs, with subfolders: `run`, a home, and a canary.
pub struct Worker<'a> {
    gptq: &'a Gptq,
    seeds: &'a Path,
    root: PathBuf,
    around: Snapshot,
}

/// A finished run.
#[derive(Debug)]
pub struct Verdict {
    /// Exit status and resources.
    pub took: Took,
    /// Faults; empty for a sound run.
    pub faults: Vec<String>,
    /// Its standard error.
    pub stderr: String,
}

impl<'a> Worker<'a> {
    /// Makes the folder.
    pub fn new(gptq: &'a Gptq, seeds: &'a Path, root: PathBuf) -> Result<Self, String> {
        for folder in ["home", "canary", "run"] {
            fs::create_dir_all(root.join(folder)).map_err(|error| error.to_string())?;
        }
        write(&root.join("canary/model.safetensors"), b"untouched")?;
        let around = Self::look_around(&root);
        Ok(Worker {
            gptq,
            seeds,
            root,
            around,
        })
    }

    fn look_around(root: &Path) -> Snapshot {
        let mut found = snapshot(root, &["run", "took", "stdout", "stderr"]);
        found.extend(snapshot(Path::new(OUTSIDE), &[]));
        if let Some(above) = root.parent() {
            // Workers come and go with their folders; nothing else does.
            let names = fs::read_dir(above).into_iter().flatten().flatten();
            let stray =
                names.filter(|entry| entry.file_name().to_string_lossy().contains("escaped"));
            found.extend(stray.map(|entry| (entry.path(), None)));
        }
        found
    }

    /// Runs the command on an input. A slow run is tried again: the machine may have stalled, or given
    /// this run a small share among others.
    pub fn run(&mut self, input: &Input) -> Result<Verdict, String> {
        let mut verdict = self.run_once(input)?;
        for _ in 0..TRIES {
            if verdict.took.seconds <= MOST_SECONDS {
                break;
            }
            verdict = self.run_once(input)?;
        }
        Ok(verdict)
    }

    fn run_once(&mut self, input: &Input) -> Result<Verdict, String> {
        let folder = self.root.join("run");
        self.lay_out(input, &folder)?;
        let before = snapshot(&folder, &WRITTEN);
        let present = |name: &&&str| folder.join(name).symlink_metadata().is_ok();
        let already: Vec<&&str> = input.target.absent.iter().filter(present).collect();
        let (took, stdout, stderr) = self.start(input, &folder)?;

        let after = snapshot(&folder, &WRITTEN);
        let mut escaped = differences(&before, &after);
        let around = Self::look_around(&self.root);
        escaped.extend(differences(&self.around, &around));
        self.around = around;
        let left = input.target.absent.iter().filter(present);
        let left = left
            .filter(|name| !already.contains(name))
            .map(|name| name.to_string());
        let seen = Seen {
            took,
            left: left.collect(),
            stdout,
            stderr,
            escaped,
            must_fail: input.target.hashed && input.changed,
        };
        Ok(Verdict {
            took,
            faults: faults(&seen),
            stderr: seen.stderr,
        })
    }

    fn start(&self, input: &Input, folder: &Path) -> Result<(Took, String, String), String> {
        let said = |error: std::io::Error| format!("watching a run: {error}");
        let [report, out, err] = ["took", "stdout", "stderr"].map(|name| self.root.join(name));
        let own = std::env::current_exe().map_err(said)?;
        let mut command = Command::new(own);
        command.arg(SUBCOMMAND).arg(&report);
        // The limit is above the judged one, so that a slow run is measured and not only killed.
        command.arg((MOST_SECONDS * 1.5).to_string());
        command
            .arg(&self.gptq.program)
            .args(input.line.split_whitespace());
        command.current_dir(folder);
        Gptq::surround(&mut command, &self.root.join("home"), &folder.join("tmp"));
        command.stdout(Stdio::from(File::create(&out).map_err(said)?));
        command.stderr(Stdio::from(File::create(&err).map_err(said)?));
        let _ = fs::remove_file(&report);
        let status = command.status().map_err(said)?;
        let text = |path| Ok::<_, String>(String::from_utf8_lossy(&read(path)?).into_owned());
        let took = text(&report).ok().and_then(|text| Took::parse(&text));
        let took = took.ok_or_else(|| format!("the watcher ended with {status}"))?;
        Ok((took, text(&out)?, text(&err)?))
    }

    /// Puts the seeds and the changed file into an empty folder.
    pub fn lay_out(&self, input: &Input, folder: &Path) -> Result<(), String> {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder.join("tmp")).map_err(|error| error.to_string())?;
        for (seed, name) in input.target.beside {
            copy(&self.seeds.join(seed), &folder.join(name))?;
        }
        let repository = folder.join("repo");
        match input.target.place {
            Place::File => write(
                &folder.join(input.target.file.replace('*', &input.end)),
                &input.bytes,
            ),
            Place::Stored => write(&lfs_object(&repository)?, &input.bytes),
            Place::Commit => {
                let path = commit_object(&repository)?;
                // git makes its objects read-only
                fs::remove_file(&path).map_err(|error| error.to_string())?;
                write(&path, &input.bytes)
            }
            Place::Tree => commit(&repository, &input.bytes),
            Place::Blob(name) => {
                let blob = git_word(&repository, &["hash-object", "-w", "--stdin"], &input.bytes)?;
                let listing = git(&repository, &["ls-tree", BRANCH], b"")?;
                let listing = String::from_utf8_lossy(&listing).into_owned();
                let lines = listing.lines().map(|line| match line.split_once('\t') {
                    Some((_, found)) if found == name => format!("100644 blob {blob}\t{name}\n"),
                    _ => format!("{line}\n"),
                });
                let listing: String = lines.collect();
                let tree = git_word(&repository, &["mktree"], listing.as_bytes())?;
                point(&repository, &tree)
            }
        }
    }
}

/// The bytes as the tree of the branch, whatever they are.
fn commit(repository: &Path, tree: &[u8]) -> Result<(), String> {
    let literally = ["hash-object", "-w", "--literally", "-t", "tree", "--stdin"];
    let tree = git_word(repository, &literally, tree)?;
    point(repository, &tree)
}

/// A commit is text around the id of its tree, and git need not understand that tree.
fn point(repository: &Path, tree: &str) -> Result<(), String> {
    let text = format!(
        "tree {tree}\nauthor fuzz <fuzz@example.org> 1764000000 +0000\ncommitter fuzz <fuzz@example.org> 1764000000 +0000\n\nchanged\n"
    );
    let literally = [
        "hash-object",
        "-w",
        "--literally",
        "-t",
        "commit",
        "--stdin",
    ];
    let id = git_word(repository, &literally, text.as_bytes())?;
    write(
        &repository.join("refs/heads").join(BRANCH),
        format!("{id}\n").as_bytes(),
    )
}
