//! Texts for calibration and evaluation, with the hub behind names and the model's chat template
//! behind conversations.

use std::cell::OnceCell;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use gptq_calibration::{
    ChatTemplate, Dataset, DatasetFiles, Format, FoundDataset, Origin, Source, Turn,
};
use gptq_hub::{HubError, ResolveOptions, fetch_dataset_file, find_dataset};
use gptq_inference::Message;

use crate::args::HubArgs;
use crate::failure::Failure;
use crate::isolation::ChatRenderer;
use crate::models::{Model, options};
use crate::voice::chat_template_at;

/// The date given to chat templates that write one: noon of 26 July 2024, UTC, the default of the Llama 3.1
/// template. It is fixed so that the same data give the same tokens on any day.
const TODAY: u64 = 1_721_995_200;

/// Fetches files of datasets from the hub.
pub struct HubFiles(ResolveOptions);

impl HubFiles {
    /// With the hub options of a command line.
    pub fn new(hub: &HubArgs) -> Self {
        HubFiles(options(hub))
    }
}

impl DatasetFiles for HubFiles {
    fn fetch(&self, repo: &str, revision: &str, file: &str) -> Result<PathBuf, String> {
        fetch_dataset_file(repo, revision, file, &self.0).map_err(in_a_line)
    }

    fn find(&self, dataset: &Dataset) -> Result<FoundDataset, String> {
        let has_rows = |name: &str| Format::of(name).is_some_and(Format::has_rows);
        let config = dataset.config.as_deref();
        let found = find_dataset(&dataset.repo, config, &dataset.split, &has_rows, &self.0);
        let found = found.map_err(in_a_line)?;
        Ok(FoundDataset {
            revision: found.revision,
            commit: found.commit,
            files: found.files,
        })
    }
}

fn in_a_line(error: HubError) -> String {
    match error.hint() {
        Some(hint) => format!("{error} ({hint})"),
        None => error.to_string(),
    }
}

/// The chat template of a model, read when the first conversation asks for it: a broken one is no
/// reason to refuse plain text.
pub struct ModelTemplate<'a> {
    model: &'a Model,
    template: OnceCell<Option<ChatRenderer>>,
}

impl<'a> ModelTemplate<'a> {
    /// Reads nothing yet.
    pub fn of(model: &'a Model) -> Self {
        ModelTemplate {
            model,
            template: OnceCell::new(),
        }
    }

    fn get(&self) -> Result<Option<&ChatRenderer>, String> {
        if self.template.get().is_none() {
            let now = SystemTime::UNIX_EPOCH + Duration::from_secs(TODAY);
            let found = chat_template_at(self.model.tokenizer_dir(), now);
            let found = found.map_err(|failure: Failure| failure.text)?;
            let _ = self.template.set(found);
        }
        Ok(self.template.get().and_then(Option::as_ref))
    }
}

impl ChatTemplate for ModelTemplate<'_> {
    fn is_there(&self) -> Result<bool, String> {
        Ok(self.get()?.is_some())
    }

    fn render(&self, turns: &[Turn]) -> Result<String, String> {
        let messages: Vec<Message> = (turns.iter())
            .map(|turn| Message::new(&turn.role, turn.content.as_str()))
            .collect();
        let template = self.get()?.ok_or("the model has no chat template")?;
        template
            .transcript(&messages)
            .map_err(|failure| format!("cannot be rendered: {}", failure.text))
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

/// Name of the file that a named dataset is read from, where a copy was given: of files without a rule
/// of their own it is their public name.
pub fn local_copy(source: &Source) -> Option<String> {
    match source.origin() {
        Origin::Copy(_, path, _) => Some(path.file_name()?.to_string_lossy().into_owned()),
        _ => None,
    }
}

/// Whether calibration and evaluation read the same text. A named dataset of the hub has a split for
/// each, so it is never one text.
pub fn is_one_text(calibration: &Source, evaluation: &Source) -> bool {
    let file = |source: &Source| match source.origin() {
        Origin::Copy(_, path, _) | Origin::File(path, _) => {
            Some(path.canonicalize().unwrap_or(path.clone()))
        }
        _ => None,
    };
    match (calibration.origin(), evaluation.origin()) {
        (Origin::Dataset(one), Origin::Dataset(other)) => one == other,
        _ => file(calibration).is_some_and(|path| file(evaluation) == Some(path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `wikitext2=/data/wiki.txt` once stood as it was in files that are pushed.
    #[test]
    fn no_path_is_published() {
        assert_eq!(public_name("wikitext2=/data/wiki.txt"), "wikitext2");
        assert_eq!(public_name("c4=c4.jsonl.gz"), "c4");
        assert_eq!(public_name("/data/text.txt"), "text.txt");
        assert_eq!(public_name("../text.jsonl"), "text.jsonl");
        assert_eq!(public_name("self"), "self");
        assert_eq!(public_name("wikitext2"), "wikitext2");
        assert_eq!(public_name("acme/chats:en"), "acme/chats:en");
    }
}
