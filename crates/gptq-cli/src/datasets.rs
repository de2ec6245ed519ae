//! Texts for calibration and evaluation, with the hub behind names.

use std::path::PathBuf;

use gptq_calibration::{DatasetFiles, Origin, Source};
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

/// A dataset by the name that may be published: where a file lay is nobody's business.
pub fn public_name(dataset: &str) -> String {
    let source = Source::parse(dataset);
    match source.as_ref().map(Source::origin) {
        Ok(Origin::Copy(manifest, ..)) => manifest.name.to_string(),
        Ok(Origin::File(path, _)) => match path.file_name() {
            Some(name) => name.to_string_lossy().into_owned(),
            None => dataset.to_string(),
        },
        _ => dataset.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `wikitext2=/home/me/wiki.txt` once stood as it was in files that are pushed.
    #[test]
    fn no_path_is_published() {
        assert_eq!(public_name("wikitext2=/home/me/wiki.txt"), "wikitext2");
        assert_eq!(public_name("c4=c4.jsonl.gz"), "c4");
        assert_eq!(public_name("/home/me/text.txt"), "text.txt");
        assert_eq!(public_name("../text.jsonl"), "text.jsonl");
        assert_eq!(public_name("self"), "self");
        assert_eq!(public_name("wikitext2"), "wikitext2");
    }
}
