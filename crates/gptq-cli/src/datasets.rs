//! Texts for calibration and evaluation, with the hub behind names.

use std::path::PathBuf;

use gptq_calibration::DatasetFiles;
use gptq_hub::{ResolveOptions, fetch_dataset_file};

use crate::args::HubArgs;
use crate::models::options;

/// Fetches files of named datasets from the hub.
pub struct HubFiles(ResolveOptions);

impl HubFiles {
    /// With the hub options of a command line.
    pub fn new(hub: &HubArgs) -> Self {
        HubFiles(options(hub))
    }
}

impl DatasetFiles for HubFiles {
    fn fetch(&self, repo: &str, revision: &str, file: &str) -> Result<PathBuf, String> {
        fetch_dataset_file(repo, revision, file, &self.0).map_err(|error| match error.hint() {
            Some(hint) => format!("{error} ({hint})"),
            None => error.to_string(),
        })
    }
}
