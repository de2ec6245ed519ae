//! Calls of the command and of git: no network, one thread, nothing of the caller's home.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The command under test and where its home is.
#[derive(Clone, Debug)]
pub struct Gptq {
    /// The program.
    pub program: PathBuf,
}

impl Gptq {
    /// Sets what every run has in common; `home` is an empty folder.
    pub fn surround(command: &mut Command, home: &Path, temporary: &Path) {
        command
            .env("HOME", home)
            .env("HF_HOME", home)
            .env("TMPDIR", temporary)
            .env("HF_HUB_OFFLINE", "1")
            .env("RAYON_NUM_THREADS", "1")
            .env("SOURCE_DATE_EPOCH", "1764000000")
            .env_remove("HF_HUB_CACHE")
            .env_remove("HF_TOKEN")
            .env_remove("RUST_BACKTRACE")
            .env_remove("GITHUB_ACTIONS")
            .stdin(Stdio::null());
    }

    /// A run whose input is good, in `folder`; its standard output.
    pub fn good(&self, folder: &Path, line: &str) -> Result<Vec<u8>, String> {
        let mut command = self.start(folder, line);
        let output = command
            .output()
            .map_err(|error| format!("{line}: {error}"))?;
        match output.status.success() {
            true => Ok(output.stdout),
            false => Err(format!(
                "{line}: {}",
                String::from_utf8_lossy(&output.stderr)
            )),
        }
    }

    /// A prepared command, not yet started.
    pub fn start(&self, folder: &Path, line: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.args(line.split_whitespace()).current_dir(folder);
        Self::surround(&mut command, folder, folder);
        command
    }
}

/// Runs git in a bare repository with `input` on its standard input; its standard output.
pub fn git(repository: &Path, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>, String> {
    let said = |error: std::io::Error| format!("git {}: {error}", arguments.join(" "));
    let mut child = Command::new("git")
        .arg("--git-dir")
        .arg(repository)
        .args(arguments)
        .env("GIT_AUTHOR_NAME", "fuzz")
        .env("GIT_AUTHOR_EMAIL", "fuzz@example.org")
        .env("GIT_COMMITTER_NAME", "fuzz")
        .env("GIT_COMMITTER_EMAIL", "fuzz@example.org")
        .env("GIT_AUTHOR_DATE", "1764000000 +0000")
        .env("GIT_COMMITTER_DATE", "1764000000 +0000")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(said)?;
    // Objects of this size fit the pipe or are read while they are written.
    let mut stdin = child.stdin.take().expect("standard input is a pipe");
    stdin.write_all(input).map_err(said)?;
    drop(stdin);
    let output = child.wait_with_output().map_err(said)?;
    match output.status.success() {
        true => Ok(output.stdout),
        false => Err(format!(
            "git {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr)
        )),
    }
}

/// Calls git and returns a single word of output.
pub fn git_word(repository: &Path, arguments: &[&str], input: &[u8]) -> Result<String, String> {
    let out = git(repository, arguments, input)?;
    Ok(String::from_utf8_lossy(&out).trim().to_string())
}
