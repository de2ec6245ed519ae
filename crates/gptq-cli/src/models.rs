//! A MODEL argument as an opened checkpoint.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use gptq_calibration::rebuilt_tokenizer;
use gptq_hub::{Checkpoint, ResolveOptions, resolve};
use gptq_inference::{OpenError, OpenedModel};
use gptq_pipeline::check_weights;
use gptq_types::{ContentHash, ContentHasher, TensorSource};
use tempfile::TempDir;

use crate::args::HubArgs;
use crate::failure::Failure;
use crate::progress::Bytes;

/// A checkpoint folder and what its configs say.
pub struct Model {
    pub checkpoint: Arc<Checkpoint>,
    pub config_json: String,
    tokenizer_dir: PathBuf,
    companions: Vec<PathBuf>,
    _rebuilt: Option<TempDir>, // what is in it is one of the companions
}

/// Files that go with the tokenizer, wherever that comes from.
const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// The hub options of a command line.
pub fn options(hub: &HubArgs) -> ResolveOptions {
    ResolveOptions {
        offline: hub.offline,
        ..ResolveOptions::default()
    }
}

/// Finds the folder of `model`, on the hub where it is none of this machine.
pub fn folder(model: &str, hub: &HubArgs) -> Result<PathBuf, Failure> {
    let mut bar = Bytes::new();
    let folder = resolve(model, &options(hub), &mut |file, done, all| {
        bar.show(file, done, all);
    })?;
    bar.end();
    Ok(folder)
}

/// Finds and opens the folder of `model`.
pub fn find(model: &str, hub: &HubArgs) -> Result<Model, Failure> {
    let folder = folder(model, hub)?;
    let checkpoint = Arc::new(Checkpoint::open(&folder)?);
    for note in checkpoint.notes() {
        eprintln!("note: {note}");
    }
    Model::of(checkpoint)
}

impl Model {
    /// An opened folder and what its configs say.
    pub fn of(checkpoint: Arc<Checkpoint>) -> Result<Self, Failure> {
        Ok(Model {
            config_json: checkpoint.config_json()?,
            tokenizer_dir: checkpoint.dir().to_path_buf(),
            companions: checkpoint.companions().to_vec(),
            _rebuilt: None,
            checkpoint,
        })
    }

    /// With the tokenizer files of `folder`, where one is given, in place of its own.
    pub fn with_tokenizer(mut self, folder: Option<&Path>) -> Self {
        if let Some(folder) = folder {
            let is_of_tokenizer = |file: &PathBuf| {
                let name = file.file_name();
                name.is_some_and(|name| TOKENIZER_FILES.iter().any(|known| name == *known))
            };
            self.companions.retain(|file| !is_of_tokenizer(file));
            let there = TOKENIZER_FILES.iter().map(|name| folder.join(name));
            self.companions.extend(there.filter(|file| file.is_file()));
            self.tokenizer_dir = folder.to_path_buf();
        }
        self
    }

    /// With a `tokenizer.json` among the files that travel, where only `tokenizer.model` is there:
    /// hardly a reader takes that one.
    pub fn with_rebuilt_tokenizer(mut self) -> Result<Self, Failure> {
        const NAME: &str = "tokenizer.json";
        if self.tokenizer_dir.join(NAME).exists() {
            return Ok(self);
        }
        match rebuilt_tokenizer(&self.tokenizer_dir) {
            Ok(Some(json)) => {
                let failed = |error| Failure::new(format!("cannot write `{NAME}`: {error}"));
                let folder = tempfile::tempdir().map_err(failed)?;
                let file = folder.path().join(NAME);
                std::fs::write(&file, json).map_err(failed)?;
                eprintln!("note: `{NAME}` is made from `tokenizer.model`");
                self.companions.push(file);
                self._rebuilt = Some(folder);
            }
            Ok(None) => {}
            Err(error) => eprintln!("warning: {error}; no `{NAME}` is made from it"),
        }
        Ok(self)
    }

    /// The folder of its tokenizer.
    pub fn tokenizer_dir(&self) -> &Path {
        &self.tokenizer_dir
    }

    /// Reads the configs, picks the reader for the weights and checks all headers.
    pub fn open(&self) -> Result<OpenedModel, Failure> {
        Ok(self.try_open()??)
    }

    /// Like [`Model::open`], but returns an [`OpenError`] as it is, so that callers can match on it.
    pub fn try_open(&self) -> Result<Result<OpenedModel, OpenError>, Failure> {
        let source = self.checkpoint.clone();
        let settings = self.quantize_config_json()?;
        Ok(gptq_inference::open(
            source,
            &self.config_json,
            settings.as_deref(),
        ))
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

    /// sha256 of the configs and of all weights. Reads every tensor once, on all threads: length and
    /// time of change, which cost nothing, are those of other weights after a copy that keeps times.
    pub fn identity(&self) -> Result<ContentHash, Failure> {
        let mut hasher = ContentHasher::default();
        for text in [
            &self.config_json,
            &self.quantize_config_json()?.unwrap_or_default(),
        ] {
            hasher.update(ContentHash::of(text.as_bytes()).as_str().as_bytes());
        }
        let weights = check_weights(self.checkpoint.as_ref())?.identity;
        hasher.update(weights.as_str().as_bytes());
        Ok(hasher.finish())
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        self.checkpoint.dir()
    }

    /// Tokenizer, generation and licence files that are there.
    pub fn companions(&self) -> Vec<PathBuf> {
        self.companions.clone()
    }
}

/// A model by the name that may be published: of a folder its own name, never the path.
pub fn public_model_name(model: &str) -> String {
    public_folder_name(Path::new(model))
}

/// A folder by its own name; what is none as it is.
pub fn public_folder_name(folder: &Path) -> String {
    let found = std::fs::canonicalize(folder).ok();
    let name = found.as_deref().and_then(Path::file_name);
    name.unwrap_or(folder.as_os_str())
        .to_string_lossy()
        .into_owned()
}
