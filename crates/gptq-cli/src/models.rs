//! A MODEL argument as an opened checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use gptq_hub::{Checkpoint, ResolveOptions, resolve};
use gptq_inference::OpenedModel;

use crate::args::HubArgs;
use crate::failure::Failure;
use crate::progress::Bytes;

/// Files beside the weights that travel with a model.
const COMPANIONS: [&str; 12] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
    "LICENSE.txt",
];

/// A checkpoint folder and what its configs say.
pub struct Model {
    pub checkpoint: Arc<Checkpoint>,
    pub config_json: String,
}

/// The hub options of a command line.
pub fn options(hub: &HubArgs) -> ResolveOptions {
    ResolveOptions {
        offline: hub.offline,
        ..ResolveOptions::default()
    }
}

/// Finds and opens the folder of `model`.
pub fn find(model: &str, hub: &HubArgs) -> Result<Model, Failure> {
    let mut bar = Bytes::new();
    let folder = resolve(model, &options(hub), &mut |file, done, all| {
        bar.show(file, done, all);
    })?;
    bar.end();
    let checkpoint = Arc::new(Checkpoint::open(&folder)?);
    let config_json = checkpoint.config_json()?;
    Ok(Model {
        checkpoint,
        config_json,
    })
}

impl Model {
    /// Reads the configs and picks the reader for the weights.
    pub fn open(&self) -> Result<OpenedModel, Failure> {
        let settings = self.checkpoint.dir().join("quantize_config.json");
        let text = match settings.exists() {
            true => Some(std::fs::read_to_string(&settings).map_err(|error| {
                Failure::new(format!("cannot read `{}`: {error}", settings.display()))
            })?),
            false => None,
        };
        let source = self.checkpoint.clone();
        Ok(gptq_inference::open(
            source,
            &self.config_json,
            text.as_deref(),
        )?)
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.checkpoint.dir()
    }

    /// Tokenizer and generation files that are there.
    pub fn companions(&self) -> Vec<PathBuf> {
        let files = COMPANIONS.iter().map(|name| self.dir().join(name));
        files.filter(|file| file.exists()).collect()
    }
}
