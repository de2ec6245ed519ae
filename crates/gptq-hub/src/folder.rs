//! A model folder that is made here appears whole or not at all, and leaves nothing after an error.

use std::path::{Path, PathBuf};

use gptq_packer::{CheckpointLayout, StageError, StagedCheckpoint, discard_partial};
use serde_json::Value as Json;

use crate::HubError;

/// Makes the folder `out`, which must be empty or not exist: `fill` writes all that belongs in it,
/// `publish` gives it its name.
pub(crate) fn make_folder(
    out: &Path,
    layout: &CheckpointLayout,
    fill: impl FnOnce(&StagedCheckpoint) -> Result<(), HubError>,
    publish: fn(StagedCheckpoint) -> Result<PathBuf, StageError>,
) -> Result<PathBuf, HubError> {
    // what a killed one left is of no use: nothing here goes on where it stopped
    discard_partial(out)?;
    let stage = StagedCheckpoint::create(out, layout)?;
    // in both cases the first error is the one to report
    if let Err(error) = fill(&stage) {
        let _ = stage.discard();
        return Err(error);
    }
    publish(stage).map_err(|error| {
        let _ = discard_partial(out);
        error.into()
    })
}

/// Adds `json` as a file of lines.
pub(crate) fn add_json(stage: &StagedCheckpoint, name: &str, json: &Json) -> Result<(), HubError> {
    let mut text = serde_json::to_vec_pretty(json).map_err(|error| HubError::BadFile {
        path: stage.partial_dir().join(name),
        reason: error.to_string(),
    })?;
    text.push(b'\n');
    Ok(stage.add_file(name, &text)?)
}
