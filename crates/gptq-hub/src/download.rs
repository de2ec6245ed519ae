//! Fetching from the hub into its cache, through hf-hub.
//!
//! A branch is asked for its commit once and every file is fetched at that commit, so that a push
//! in between cannot mix two versions. The reference of the branch is written last: an interrupted
//! fetch leaves blobs that the next one resumes, never a branch that looks complete. Large files
//! have their sha256 as their name among the blobs; each is hashed after it arrived.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use crate::HubError;
use crate::cache::{CachedRepo, RepoKind, missing_in};
use crate::checkpoint::no_weights;
use crate::reference::{ModelRef, is_commit, is_inside};
use crate::resolve::Settings;

const DOWNLOAD_RETRIES: usize = 3;
const HASH_BUFFER_BYTES: usize = 1 << 20;

/// Fetches the needed files of a model; returns its snapshot folder.
pub(crate) fn model(
    model: &ModelRef,
    settings: &Settings,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<PathBuf, HubError> {
    let fetch = Fetch::new(model, RepoType::Model, settings)?;
    let info = fetch
        .at(&model.revision)
        .info()
        .map_err(|error| fetch.error(kind_name(fetch.kind), &error))?;
    if !is_commit(&info.sha) {
        return Err(fetch.failed("model", format!("`{}` is not a commit", info.sha)));
    }
    let names: Vec<String> = info
        .siblings
        .into_iter()
        .map(|file| file.rfilename)
        .collect();
    let wanted = needed_files(&names);
    if !wanted.iter().any(|name| name.ends_with(".safetensors")) {
        let place = format!("{}:{}", model.repo, model.revision);
        return Err(no_weights(place, &names));
    }
    let pinned = fetch.at(&info.sha);
    let cached = CachedRepo::new(&settings.cache, RepoKind::Model, &model.repo);
    for name in &wanted {
        if cached.file(&info.sha, name).is_none() {
            fetch.file(&pinned, name, progress)?;
        }
    }
    let snapshot = cached.snapshot(&info.sha).filter(|snapshot| {
        // the hub answered with files of another commit, or without `config.json`
        missing_in(snapshot).needed.is_empty()
    });
    let snapshot = snapshot.ok_or_else(|| {
        let missing = match cached.snapshot(&info.sha) {
            Some(snapshot) => missing_in(&snapshot).in_words(),
            None => "file".into(),
        };
        fetch.failed("model", format!("the repository has no {missing}"))
    })?;
    let reference = settings_cache(settings).repo(fetch.repo_at(&model.revision));
    reference
        .create_ref(&info.sha)
        .map_err(|source| HubError::io("write the reference of", &snapshot, source))?;
    Ok(snapshot)
}

/// Fetches one file of a dataset.
pub(crate) fn dataset_file(
    dataset: &ModelRef,
    file: &str,
    settings: &Settings,
) -> Result<PathBuf, HubError> {
    let fetch = Fetch::new(dataset, RepoType::Dataset, settings)?;
    fetch.file(&fetch.at(&dataset.revision), file, &mut |_, _, _| {})
}

/// The files of a repository that make up a model folder, small ones first.
///
/// Weights named `model*` win: `consolidated.safetensors` and adapters hold the same again, or
/// something else.
fn needed_files(names: &[String]) -> Vec<String> {
    let top = |name: &&String| is_inside(name) && !name.contains('/');
    let main_weights = names
        .iter()
        .any(|name| name.starts_with("model") && name.ends_with(".safetensors"));
    let is_wanted_weight =
        |name: &str| name.ends_with(".safetensors") && (!main_weights || name.starts_with("model"));
    let small = names.iter().filter(top).filter(|name| is_small_part(name));
    let weights = names
        .iter()
        .filter(top)
        .filter(|name| is_wanted_weight(name));
    small.chain(weights).cloned().collect()
}

fn is_small_part(name: &str) -> bool {
    const WHOLE: [&str; 11] = [
        "config.json",
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "gptq_run.json",
        "gptq_branch.json",
        "generation_config.json",
        "special_tokens_map.json",
        "quantize_config.json",
        "vocab.json",
        "merges.txt",
    ];
    WHOLE.contains(&name)
        || name.starts_with("tokenizer")
        || name.starts_with("chat_template")
        || name.ends_with(".model")
        || name.ends_with(".safetensors.index.json")
}

/// One repository on one hub.
struct Fetch<'a> {
    api: Api,
    kind: RepoType,
    wanted: &'a ModelRef,
    endpoint: &'a str,
}

impl<'a> Fetch<'a> {
    fn new(wanted: &'a ModelRef, kind: RepoType, settings: &'a Settings) -> Result<Self, HubError> {
        let mut builder = ApiBuilder::from_cache(settings_cache(settings))
            .with_endpoint(settings.endpoint.clone())
            .with_retries(DOWNLOAD_RETRIES)
            .with_progress(false);
        if settings.token.is_some() {
            builder = builder.with_token(settings.token.clone());
        }
        let api = builder.build().map_err(|error| HubError::Fetch {
            what: kind_name(kind).into(),
            repo: wanted.repo.clone(),
            revision: wanted.revision.clone(),
            endpoint: settings.endpoint.as_str().into(),
            reason: error.to_string(),
        })?;
        Ok(Fetch {
            api,
            kind,
            wanted,
            endpoint: &settings.endpoint,
        })
    }

    fn repo_at(&self, revision: &str) -> Repo {
        Repo::with_revision(self.wanted.repo.clone(), self.kind, revision.to_string())
    }

    fn at(&self, revision: &str) -> ApiRepo {
        self.api.repo(self.repo_at(revision))
    }

    fn file(
        &self,
        repo: &ApiRepo,
        name: &str,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<PathBuf, HubError> {
        let meter = Meter {
            name,
            done: 0,
            total: 0,
            report: progress,
        };
        let path = repo
            .download_with_progress(name, meter)
            .map_err(|error| self.error(&format!("file `{name}` of"), &error))?;
        self.check_digest(&path, name)?;
        Ok(path)
    }

    /// Compares a large file with the sha256 that is its name among the blobs, and drops it when
    /// they differ; small files are named after a git hash and pass.
    fn check_digest(&self, path: &Path, name: &str) -> Result<(), HubError> {
        let blob = fs::canonicalize(path).map_err(|e| HubError::io("read", path, e))?;
        let expected = match blob.file_name().and_then(|name| name.to_str()) {
            Some(etag) if is_sha256(etag) => etag.to_lowercase(),
            _ => return Ok(()),
        };
        let found = sha256_of(&blob).map_err(|source| HubError::io("read", &blob, source))?;
        if found == expected {
            return Ok(());
        }
        for file in [path, &blob] {
            fs::remove_file(file).map_err(|source| HubError::io("remove", file, source))?;
        }
        Err(HubError::Digest {
            file: name.to_string(),
            repo: self.wanted.repo.clone(),
            revision: self.wanted.revision.clone(),
            found: found.into(),
            expected: expected.into(),
        })
    }

    fn error(&self, what: &str, error: &ApiError) -> HubError {
        let (repo, revision) = (self.wanted.repo.clone(), self.wanted.revision.clone());
        match status_of(error) {
            Some(404) => HubError::NotFound {
                what: what.to_string(),
                repo,
                revision,
            },
            Some(status @ (401 | 403 | 429)) => HubError::Refused {
                repo,
                revision,
                status,
            },
            Some(status) => self.failed(what, format!("status {status}")),
            None => self.failed(what, reason_of(error)),
        }
    }

    fn failed(&self, what: &str, reason: String) -> HubError {
        HubError::Fetch {
            what: what.into(),
            repo: self.wanted.repo.clone(),
            revision: self.wanted.revision.clone(),
            endpoint: self.endpoint.into(),
            reason,
        }
    }
}

fn kind_name(kind: RepoType) -> &'static str {
    match kind {
        RepoType::Model => "model",
        RepoType::Dataset => "dataset",
        RepoType::Space => "space",
    }
}

fn settings_cache(settings: &Settings) -> Cache {
    Cache::new(settings.cache.clone())
}

fn status_of(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(request) => match **request {
            ureq::Error::StatusCode(status) => Some(status),
            _ => None,
        },
        ApiError::TooManyRetries(last) => status_of(last),
        _ => None,
    }
}

/// The innermost cause, on one line.
fn reason_of(error: &ApiError) -> String {
    let text = match error {
        ApiError::RequestError(request) => match &**request {
            ureq::Error::Io(error) => error.to_string(),
            other => other.to_string(),
        },
        ApiError::IoError(error) => error.to_string(),
        ApiError::TooManyRetries(last) => {
            return format!(
                "gave up after {DOWNLOAD_RETRIES} retries: {}",
                reason_of(last)
            );
        }
        other => other.to_string(),
    };
    text.replace('\n', " ").to_lowercase()
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn sha256_of(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; HASH_BUFFER_BYTES];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
    }
    let digest = hasher.finalize();
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

struct Meter<'a> {
    name: &'a str,
    done: u64,
    total: u64,
    report: &'a mut dyn FnMut(&str, u64, u64),
}

impl Progress for Meter<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        (self.done, self.total) = (0, size as u64);
        (self.report)(self.name, 0, self.total);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        (self.report)(self.name, self.done, self.total);
    }

    fn finish(&mut self) {
        (self.report)(self.name, self.total, self.total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_model_folder_needs_is_fetched() {
        let names: Vec<String> = [
            ".gitattributes",
            "README.md",
            "config.json",
            "consolidated.safetensors",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "onnx/model.safetensors",
            "pytorch_model.bin",
            "../config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
        ]
        .map(String::from)
        .to_vec();
        assert_eq!(
            needed_files(&names),
            [
                "README.md",
                "config.json",
                "model.safetensors.index.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "chat_template.jinja",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ]
        );
        let autogptq = ["gptq_model-4bit-128g.safetensors".to_string()];
        assert_eq!(needed_files(&autogptq), autogptq);
    }
}
