//! Reference data of tests: the project's fixtures, which are always there, and larger data outside of
//! the project, which may be absent. Every test binary that needs either includes this file.
//!
//! A test without its data is skipped, and a skipped test counts as passed. So each one is recorded
//! here, and the last test binary of a run (`tests/skipped.rs`) prints their names in one line.
#![allow(dead_code, clippy::print_stderr)] // a binary uses a part of it

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// Folder of the fixtures where the tests run on a machine without sources.
const FIXTURES: &str = "GPTQ_FIXTURES";
/// Folder of the data outside of the project, `../shared` by default; `none` hides it.
const SHARED: &str = "GPTQ_SHARED";
/// Folder of SmolLM2-135M-Instruct in float, where it is not the quick start's.
const SMOLLM2: &str = "GPTQ_SMOLLM2";

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// A file or folder below `tests/fixtures`.
#[track_caller]
pub fn fixture(path: &str) -> PathBuf {
    let root = variable(FIXTURES).map_or(Path::new(ROOT).join("tests/fixtures"), PathBuf::from);
    let full = root.join(path);
    assert!(full.exists(), "no fixture `{}`", full.display());
    full
}

/// The folder outside of the project, if it exists and is not hidden.
fn beside() -> Option<PathBuf> {
    let folder = match variable(SHARED).as_deref() {
        Some("none") => return None,
        Some(given) => PathBuf::from(given),
        None => Path::new(ROOT).join("../shared"),
    };
    folder.is_dir().then_some(folder)
}

/// A file or folder of the data outside of the project. `None` is recorded as a skip of the calling test.
///
/// # Panics
/// Under `CI` if the folder exists but `path` does not: an outdated name would skip its test
/// forever.
#[track_caller]
pub fn shared(path: &str) -> Option<PathBuf> {
    let folder = beside();
    if let Some(full) = folder.as_ref().map(|folder| folder.join(path))
        && full.exists()
    {
        return Some(full);
    }
    assert!(
        folder.is_none() || variable("CI").is_none(),
        "`{path}` is absent, but the folder that should hold it is there"
    );
    skipped(Cause::Data, path);
    None
}

/// SmolLM2-135M-Instruct in float: where the quick start leaves it, or where `GPTQ_SMOLLM2` says.
/// `None` is recorded: the test that asks is skipped.
pub fn smollm2() -> Option<PathBuf> {
    let usual = || Path::new(ROOT).join("target/quickstart/smollm2");
    let folder = variable(SMOLLM2).map_or_else(usual, PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    skipped(Cause::Machine, "SmolLM2");
    None
}

/// Why a test was skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Data outside of the project are absent.
    Data,
    /// The machine has no such device or program.
    Machine,
}

impl Cause {
    pub const ALL: [Cause; 2] = [Cause::Data, Cause::Machine];

    /// Behind "skipped, since".
    pub fn words(self) -> &'static str {
        match self {
            Cause::Data => "../shared is absent",
            Cause::Machine => "this machine lacks what they need",
        }
    }
}

/// Says and records that the running test is skipped for want of `what`.
pub fn skipped(cause: Cause, what: &str) {
    let test = running_test();
    eprintln!("skipped: {test}: {what} is absent");
    let line = format!("{}\t{test}\n", cause.words());
    let file = OpenOptions::new().create(true).append(true).open(record());
    file.and_then(|mut file| file.write_all(line.as_bytes()))
        .unwrap_or_else(|error| eprintln!("`{}`: {error}", record().display()));
}

/// The record of this run's skips: next to the binaries, named after the process id of cargo, which
/// started them all. So a run never reads another run's record.
pub fn record() -> PathBuf {
    #[cfg(unix)]
    let run = std::os::unix::process::parent_id();
    #[cfg(not(unix))]
    let run = 0;
    let program = std::env::current_exe().unwrap();
    program.with_file_name(format!("skips-of-{run}"))
}

/// `BINARY::MODULE::TEST`: libtest names a thread after its test.
fn running_test() -> String {
    let program = std::env::current_exe().unwrap();
    let stem = program.file_stem().unwrap().to_string_lossy().into_owned();
    // cargo puts a hash behind the name
    let binary = stem
        .rsplit_once('-')
        .map_or(stem.as_str(), |(name, _)| name);
    let thread = std::thread::current();
    format!("{binary}::{}", thread.name().unwrap_or("a thread"))
}
