//! A MODEL argument as an opened checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use gptq_hub::{Checkpoint, ResolveOptions, resolve};
use gptq_inference::OpenedModel;
use gptq_types::TensorSource;
use sha2::{Digest, Sha256};

use crate::args::HubArgs;
use crate::failure::Failure;
use crate::progress::Bytes;

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
    for note in checkpoint.notes() {
        eprintln!("note: {note}");
    }
    let config_json = checkpoint.config_json()?;
    Ok(Model {
        checkpoint,
        config_json,
    })
}

impl Model {
    /// Reads the configs and picks the reader for the weights.
    pub fn open(&self) -> Result<OpenedModel, Failure> {
        let source = self.checkpoint.clone();
        let settings = self.quantize_config_json()?;
        Ok(gptq_inference::open(
            source,
            &self.config_json,
            settings.as_deref(),
        )?)
    }

    fn quantize_config_json(&self) -> Result<Option<String>, Failure> {
        let path = self.checkpoint.dir().join("quantize_config.json");
        if !path.exists() {
            return Ok(None);
        }
        std::fs::read_to_string(&path)
            .map(Some)
            .map_err(|error| Failure::new(format!("cannot read `{}`: {error}", path.display())))
    }

    /// sha256 of the configs and of each weight file's name, length and time of change: a digest
    /// of the weights themselves would take as long as a good part of an evaluation.
    pub fn identity(&self) -> Result<String, Failure> {
        let mut digest = Sha256::new();
        digest.update(&self.config_json);
        digest.update(self.quantize_config_json()?.unwrap_or_default());
        for file in self.checkpoint.files() {
            let wrong = |error: std::io::Error| {
                Failure::new(format!("cannot read `{}`: {error}", file.display()))
            };
            let metadata = std::fs::metadata(&file).map_err(wrong)?;
            let changed = metadata.modified().map_err(wrong)?;
            let name = file.file_name().unwrap_or_default();
            digest.update(format!("{name:?} {} {changed:?}\n", metadata.len()));
        }
        let digest = digest.finalize();
        Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.checkpoint.dir()
    }

    /// Tokenizer, generation and licence files that are there.
    pub fn companions(&self) -> Vec<PathBuf> {
        self.checkpoint.companions().to_vec()
    }
}
