//! What a command writes: data for stdout, and a folder that must be free.
//!
//! A reader that has seen enough, such as `head`, ends nothing but the output.

use std::io::{ErrorKind, Write};
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
