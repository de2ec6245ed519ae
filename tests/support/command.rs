//! The command, its exit code and both of its streams.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use super::entries;

/// Output of a finished process.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// Environment variables that a shell or a CI service may set and that change results.
const OF_WHO_RUNS_THE_TESTS: [&str; 9] = [
    "GITHUB_ACTIONS",
    "GIT_AUTHOR_EMAIL",
    "GIT_AUTHOR_NAME",
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HF_TOKEN",
    "NO_COLOR",
    "SOURCE_DATE_EPOCH",
    "TZ",
];

/// The command under test: no network, no hub cache, few threads whatever the machine has. It is the
/// binary built with the tests, or `GPTQ_COMMAND` on a machine without sources.
pub fn gptq(subcommand: &str) -> Command {
    let built = env!("CARGO_BIN_EXE_gptq");
    let program = std::env::var("GPTQ_COMMAND").unwrap_or(built.to_string());
    let mut command = Command::new(program);
    command
        .arg(subcommand)
        .env("HF_HUB_OFFLINE", "1")
        .env(
            "HF_HOME",
            concat!(env!("CARGO_TARGET_TMPDIR"), "/no-hub-cache"),
        )
        .env("RAYON_NUM_THREADS", "2")
        .stdin(Stdio::null());
    for setting in OF_WHO_RUNS_THE_TESTS {
        command.env_remove(setting);
    }
    command
}

/// `quantize` with settings that fit a tiny model; later flags may not repeat these.
pub fn quantize(model: &Path, out: &Path, text: &Path) -> Command {
    let mut command = gptq("quantize");
    command.arg(model).arg("--out").arg(out);
    command.arg("--dataset").arg(text);
    command
}

/// Runs to the end.
pub fn run(command: &mut Command) -> Run {
    let output = command.output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

impl Run {
    /// Exit code 0.
    #[track_caller]
    pub fn done(self) -> Self {
        self.ended_with(0)
    }

    /// This exit code; the streams are shown if not.
    #[track_caller]
    pub fn ended_with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        self
    }

    /// Exactly one `error: ` line, with nothing after it but one `hint: ` line at most.
    #[track_caller]
    pub fn error_line(&self) -> &str {
        assert!(!self.stderr.contains("panicked at"), "{self:#?}");
        let lines: Vec<&str> = self.stderr.lines().collect();
        let errors: Vec<usize> = (0..lines.len())
            .filter(|&index| lines[index].starts_with("error: "))
            .collect();
        let &[at] = errors.as_slice() else {
            panic!("{} error lines: {self:#?}", errors.len());
        };
        match lines[at + 1..] {
            [] => {}
            [hint] if hint.starts_with("hint: ") => {}
            _ => panic!("more than a hint after the error: {self:#?}"),
        }
        lines[at]
    }

    /// The hint, where there is one.
    pub fn hint(&self) -> Option<&str> {
        self.stderr.lines().find(|line| line.starts_with("hint: "))
    }
}

/// Runs `command`, which must name all of `names` in one error line, exit with 2, print nothing on
/// stdout and leave `workspace` unchanged.
#[track_caller]
pub fn refused(command: &mut Command, workspace: &Path, names: &[&str]) -> Run {
    let before = entries(workspace);
    let run = run(command).ended_with(2);
    let error = run.error_line();
    for name in names {
        assert!(error.contains(name), "`{name}` is not in: {error}");
    }
    assert_eq!(run.stdout, "", "stdout is for data");
    assert_eq!(entries(workspace), before, "something was left behind");
    run
}

/// Runs `command` to exit code 0 and reads its stdout.
#[track_caller]
pub fn json(command: &mut Command) -> Value {
    let run = run(command.arg("--json")).done();
    serde_json::from_str(&run.stdout).unwrap_or_else(|error| panic!("{error}: {run:#?}"))
}
