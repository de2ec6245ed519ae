//! The baseline file.

use std::path::Path;

use gptq_types::{BASELINE_SCHEMA, Baseline};
use serde::Deserialize;

use crate::failure::Failure;
use crate::matrix::replace;

/// Read before all else: what a newer schema holds is not known here.
#[derive(Deserialize)]
struct Head {
    schema: u32,
}

/// Reads a baseline and refuses what cannot be run.
pub fn read(path: &Path) -> Result<Baseline, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::with_hint(
            format!("cannot read `{}`: {error}", path.display()),
            "write a recipe there, as docs/REGRESS.md has one, and run it with --update",
        )
    })?;
    let failed = |text: String| Failure::new(format!("`{}`: {text}", path.display()));
    let head: Head = serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
    if head.schema > BASELINE_SCHEMA {
        return Err(Failure::with_hint(
            format!(
                "`{}` has schema {}, this program knows {BASELINE_SCHEMA}",
                path.display(),
                head.schema
            ),
            "take a newer gptq, or make the baseline again with this one",
        ));
    }
    let baseline: Baseline =
        serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
    baseline.check().map_err(failed)?;
    Ok(baseline)
}

/// Replaces a baseline by a rename, so that the file is either the old one or the new one.
pub fn write(path: &Path, baseline: &Baseline) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(baseline)? + "\n";
    replace(path, text.as_bytes())
        .map_err(|error| Failure::new(format!("cannot write `{}`: {error}", path.display())))
}
