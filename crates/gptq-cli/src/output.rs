//! Output of commands: data on stdout, and folders that are whole or absent.
//!
//! A closed pipe, as from `head`, ends the output and nothing else.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::ops::ControlFlow;
use std::path::Path;

use crate::failure::Failure;

/// Writes `text` to stdout.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::new(format!("cannot write to stdout: {error}")))
        }
        _ => Ok(()),
    }
}

/// Writes a piece of a text that goes on, at once; whether anyone still reads.
pub fn print_piece(text: &str) -> Result<ControlFlow<()>, Failure> {
    let mut stdout = std::io::stdout().lock();
    let written = stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush());
    match written {
        Ok(()) => Ok(ControlFlow::Continue(())),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
        Err(error) => Err(Failure::new(format!("cannot write to stdout: {error}"))),
    }
}

/// Writes `value` to stdout as JSON.
pub fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
}

/// Refuses a folder that could not be published, before any work.
pub fn check_vacant(out: &Path) -> Result<(), Failure> {
    let occupied = match std::fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => out.exists(),
    };
    match occupied {
        false => Ok(()),
        true => Err(Failure::with_hint(
            format!("`{}` exists and is not an empty folder", out.display()),
            "name a folder that does not exist yet",
        )),
    }
}

/// Publishes small files as the folder `out`: written to a folder next to it, synced, then renamed.
pub fn publish(out: &Path, files: &[(&str, &str)]) -> Result<(), Failure> {
    let failed = |path: &Path, error: std::io::Error| {
        Failure::new(format!("cannot write `{}`: {error}", path.display()))
    };
    let out = std::path::absolute(out).map_err(|error| failed(out, error))?;
    let parent = out.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).map_err(|error| failed(parent, error))?;
    let beside = tempfile::Builder::new()
        .prefix(".writing-")
        .tempdir_in(parent)
        .map_err(|error| failed(parent, error))?;
    let part = beside.path().join("whole");
    let written = fs::create_dir(&part).and_then(|()| {
        for (name, text) in files {
            let mut file = File::create(part.join(name))?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
        }
        File::open(&part)?.sync_all()?;
        fs::rename(&part, &out)?;
        File::open(parent)?.sync_all()
    });
    written.map_err(|error| failed(&out, error))
}
