//! From a model's name to a folder on this machine.
//!
//! An existing folder wins over the hub, and the hub's cache over the network: a branch that was
//! fetched before is not asked for again, so a run can be repeated on the same bytes.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use gptq_types::outside_name::{relative_path, shown};

use crate::HubError;
use crate::cache::{CachedRepo, Missing, RepoKind, missing_in};
use crate::endpoint::Endpoint;
use crate::reference::{ModelRef, is_repo, is_revision, parse_model_ref};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Options for finding a model; fields that are `None` come from the environment.
#[derive(Clone, Default)]
pub struct ResolveOptions {
    /// Never touch the network; also set by `HF_HUB_OFFLINE`.
    pub offline: bool,
    /// The hub cache; else `HF_HUB_CACHE`, `$HF_HOME/hub` or `~/.cache/huggingface/hub`.
    pub cache_dir: Option<PathBuf>,
    /// Address of the hub without a slash at its end; else `HF_ENDPOINT` or `https://huggingface.co`.
    pub endpoint: Option<String>,
    /// Sent to the hub as a bearer token; else `HF_TOKEN` or the file `token` next to the cache.
    pub token: Option<String>,
    /// Timeouts and retries for a hub that does not answer.
    pub patience: Patience,
}

/// Timeouts and retries for a hub that does not answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Patience {
    /// Time without a byte after which a request counts as failed.
    pub silence: Duration,
    /// Wait before the first retry; it doubles before each further one.
    pub first_wait: Duration,
    /// Retries that bring no further bytes before giving up.
    pub retries: u32,
}

impl Default for Patience {
    /// 20 s of silence, tries again after 1, 2, 4 and 8 s.
    fn default() -> Self {
        Patience {
            silence: Duration::from_secs(20),
            first_wait: Duration::from_secs(1),
            retries: 4,
        }
    }
}

impl std::fmt::Debug for ResolveOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ResolveOptions")
            .field("offline", &self.offline)
            .field("cache_dir", &self.cache_dir)
            .field(
                "endpoint",
                &self
                    .endpoint
                    .as_ref()
                    .map(|text| Endpoint::parse(text).address),
            )
            .field("token", &self.token.as_ref().map(|_| "(set)"))
            .finish()
    }
}

/// [`ResolveOptions`] with the environment filled in.
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
pub(crate) struct Settings {
    pub offline: bool,
    pub cache: PathBuf,
    pub endpoint: Endpoint,
    pub token: Option<String>,
    pub patience: Patience,
}

pub(crate) type Environment<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Settings {
    pub(crate) fn new(
        options: &ResolveOptions,
        environment: Environment,
    ) -> Result<Self, HubError> {
        let set = |name: &str| environment(name).filter(|value| !value.is_empty());
        let offline = options.offline
            || set("HF_HUB_OFFLINE").is_some_and(|value| {
                ["1", "true", "yes", "on"].contains(&value.to_lowercase().as_str())
            });
        let cache = match &options.cache_dir {
            Some(dir) => dir.clone(),
            None => default_cache(&set).ok_or(HubError::NoCache)?,
        };
        let endpoint = options
            .endpoint
            .clone()
            .or_else(|| set("HF_ENDPOINT"))
            .unwrap_or_else(|| DEFAULT_ENDPOINT.into());
        let token = options.token.clone().or_else(|| set("HF_TOKEN"));
        let token = token.or_else(|| stored_token(&cache));
        Ok(Settings {
            offline,
            cache: std::path::absolute(&cache)
                .map_err(|source| HubError::io("locate", cache, source))?,
            endpoint: Endpoint::parse(&endpoint),
            token,
            patience: options.patience,
        })
    }
}

/// The token that `hf auth login` stored in the file `token` next to the cache.
#[cfg(feature = "hub")]
fn stored_token(cache: &Path) -> Option<String> {
    hf_hub::Cache::new(cache.to_path_buf()).token()
}

#[cfg(not(feature = "hub"))]
fn stored_token(_cache: &Path) -> Option<String> {
    None
}

fn default_cache(set: &dyn Fn(&str) -> Option<String>) -> Option<PathBuf> {
    if let Some(cache) = set("HF_HUB_CACHE") {
        return Some(cache.into());
    }
    let home = match set("HF_HOME") {
        Some(home) => PathBuf::from(home),
        None => match set("XDG_CACHE_HOME") {
            Some(cache) => Path::new(&cache).join("huggingface"),
            None => Path::new(&set("HOME").or_else(|| set("USERPROFILE"))?)
                .join(".cache")
                .join("huggingface"),
        },
    };
    Some(home.join("hub"))
}

/// Turns a folder, `owner/name` or `owner/name:branch` into a folder with a model in it.
///
/// `progress` is called with a file's name, the bytes fetched and all its bytes.
/// Fails when the name is none of these, when it is a GGUF file, when the hub cannot be reached or
/// refuses, and offline when the cache lacks something; every error names repository and revision.
pub fn resolve(
    model: &str,
    options: &ResolveOptions,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<PathBuf, HubError> {
    resolve_with(model, options, &|name| std::env::var(name).ok(), progress)
}

fn resolve_with(
    model: &str,
    options: &ResolveOptions,
    environment: Environment,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<PathBuf, HubError> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok(path.to_path_buf());
    }
    if path.is_file() {
        return Err(match is_gguf(path) {
            true => HubError::GgufFile(path.to_path_buf()),
            false => HubError::NotAFolder(path.to_path_buf()),
        });
    }
    if is_gguf(path) || model.starts_with(['.', '/', '~']) {
        return Err(HubError::FolderMissing(path.to_path_buf()));
    }
    let model = parse_model_ref(model)?;
    let settings = Settings::new(options, environment)?;
    let cached = CachedRepo::new(&settings.cache, RepoKind::Model, &model.repo);
    let snapshot = cached.snapshot(&model.revision);
    let missing = match &snapshot {
        Some(snapshot) => missing_in(snapshot),
        None => Missing::everything(),
    };
    match snapshot {
        Some(snapshot) if missing.needed.is_empty() && (settings.offline || !missing.tokenizer) => {
            Ok(snapshot)
        }
        _ if settings.offline => Err(not_cached(&model, missing.in_words())),
        _ => fetch_model(&model, &settings, &missing, progress),
    }
}

fn is_gguf(path: &Path) -> bool {
    let named = path.extension();
    named.is_some_and(|end| end.eq_ignore_ascii_case("gguf")) || begins_as_gguf(path)
}

/// Whatever its name: the hub's cache names files by their hash.
fn begins_as_gguf(path: &Path) -> bool {
    let mut first = [0; 4];
    let file = std::fs::File::open(path);
    file.is_ok_and(|mut file| file.read_exact(&mut first).is_ok()) && first == *b"GGUF"
}

fn not_cached(model: &ModelRef, missing: String) -> HubError {
    HubError::NotCached {
        repo: model.repo.clone(),
        revision: model.revision.clone(),
        missing,
    }
}

/// Fetches one file of a dataset repository, or finds it in the cache.
///
/// `file` is its path in the repository, such as `data/train-00000-of-00001.parquet`.
pub fn fetch_dataset_file(
    repo: &str,
    revision: &str,
    file: &str,
    options: &ResolveOptions,
) -> Result<PathBuf, HubError> {
    if !is_repo(repo) || !is_revision(revision) {
        return Err(HubError::Reference(shown(
            &format!("{repo}:{revision}"),
            160,
        )));
    }
    relative_path(file)?;
    let settings = Settings::new(options, &|name| std::env::var(name).ok())?;
    let dataset = ModelRef {
        repo: repo.to_string(),
        revision: revision.to_string(),
    };
    let cached = CachedRepo::new(&settings.cache, RepoKind::Dataset, repo);
    match cached.file(revision, file) {
        Some(path) => Ok(path),
        None if settings.offline => Err(not_cached(&dataset, format!("`{file}`"))),
        None => fetch_file(&dataset, file, &settings),
    }
}

#[cfg(feature = "hub")]
fn fetch_model(
    model: &ModelRef,
    settings: &Settings,
    _missing: &Missing,
    progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<PathBuf, HubError> {
    crate::download::model(model, settings, progress)
}

#[cfg(feature = "hub")]
pub(crate) fn list_dataset(
    dataset: &ModelRef,
    settings: &Settings,
) -> Result<(String, Vec<String>), HubError> {
    crate::download::dataset_names(dataset, settings)
}

#[cfg(not(feature = "hub"))]
pub(crate) fn list_dataset(
    dataset: &ModelRef,
    _settings: &Settings,
) -> Result<(String, Vec<String>), HubError> {
    Err(HubError::NoNetwork {
        repo: dataset.repo.clone(),
        revision: dataset.revision.clone(),
        missing: "list of files".into(),
    })
}

#[cfg(feature = "hub")]
fn fetch_file(dataset: &ModelRef, file: &str, settings: &Settings) -> Result<PathBuf, HubError> {
    crate::download::dataset_file(dataset, file, settings)
}

#[cfg(not(feature = "hub"))]
fn fetch_model(
    model: &ModelRef,
    _settings: &Settings,
    missing: &Missing,
    _progress: &mut dyn FnMut(&str, u64, u64),
) -> Result<PathBuf, HubError> {
    Err(HubError::NoNetwork {
        repo: model.repo.clone(),
        revision: model.revision.clone(),
        missing: match missing.needed.is_empty() {
            true => "tokenizer".into(),
            false => missing.in_words(),
        },
    })
}

#[cfg(not(feature = "hub"))]
fn fetch_file(dataset: &ModelRef, file: &str, _settings: &Settings) -> Result<PathBuf, HubError> {
    Err(HubError::NoNetwork {
        repo: dataset.repo.clone(),
        revision: dataset.revision.clone(),
        missing: format!("`{file}`"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn offline_in(cache: &Path) -> ResolveOptions {
        ResolveOptions {
            offline: true,
            cache_dir: Some(cache.to_path_buf()),
            ..ResolveOptions::default()
        }
    }

    #[test]
    fn a_folder_wins_and_a_gguf_file_gets_a_hint() {
        let dir = tempfile::tempdir().unwrap();
        let options = offline_in(dir.path());
        let folder = dir.path().to_str().unwrap();
        assert_eq!(
            resolve(folder, &options, &mut |_, _, _| {}).unwrap(),
            dir.path()
        );

        let file = dir.path().join("model.Q4_0.GGUF");
        fs::write(&file, "GGUF").unwrap();
        let error = resolve(file.to_str().unwrap(), &options, &mut |_, _, _| {}).unwrap_err();
        assert!(matches!(error, HubError::GgufFile(_)));
        assert!(error.hint().unwrap().contains("gptq import"));
        assert!(!error.to_string().contains("gptq import"));

        let error = resolve("./nowhere", &options, &mut |_, _, _| {}).unwrap_err();
        assert_eq!(error.to_string(), "folder `./nowhere` does not exist");
        let error = resolve("gpt2", &options, &mut |_, _, _| {}).unwrap_err();
        assert!(error.to_string().starts_with("`gpt2` is neither"));
    }

    #[test]
    fn offline_says_what_the_cache_lacks_and_takes_what_it_has() {
        let cache = tempfile::tempdir().unwrap();
        let options = offline_in(cache.path());
        let error = resolve("o/n:b", &options, &mut |_, _, _| {}).unwrap_err();
        assert_eq!(
            error.to_string(),
            "offline, and the hub cache has no file of `o/n` at `b`"
        );
        let repo = cache.path().join("models--o--n");
        let snapshot = repo.join("snapshots").join("c0ffee");
        fs::create_dir_all(repo.join("refs")).unwrap();
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(repo.join("refs/b"), "c0ffee").unwrap();
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        let error = resolve("o/n:b", &options, &mut |_, _, _| {}).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("no `*.safetensors` of `o/n` at `b`")
        );
        fs::write(snapshot.join("model.safetensors"), "").unwrap();
        assert_eq!(
            resolve("o/n:b", &options, &mut |_, _, _| {}).unwrap(),
            snapshot
        );
    }

    #[test]
    fn the_environment_fills_what_options_leave_open() {
        let environment = |name: &str| {
            Some(match name {
                "HF_HOME" => "/h".to_string(),
                "HF_HUB_OFFLINE" => "True".to_string(),
                "HF_ENDPOINT" => "http://mirror/".to_string(),
                _ => return None,
            })
        };
        let settings = Settings::new(&ResolveOptions::default(), &environment).unwrap();
        assert!(settings.offline);
        assert_eq!(settings.cache, Path::new("/h/hub"));
        assert_eq!(settings.endpoint.address, "http://mirror");

        let both = |name: &str| match name {
            "HF_HUB_CACHE" => Some("/c".to_string()),
            name => environment(name),
        };
        let settings = Settings::new(&ResolveOptions::default(), &both).unwrap();
        assert_eq!(settings.cache, Path::new("/c"));
        let nothing = Settings::new(&ResolveOptions::default(), &|_| None);
        assert!(matches!(nothing, Err(HubError::NoCache)));
    }

    #[test]
    fn a_dataset_file_is_taken_from_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        let options = offline_in(cache.path());
        let snapshot = cache.path().join("datasets--o--d/snapshots/abc/data");
        fs::create_dir_all(&snapshot).unwrap();
        fs::create_dir_all(cache.path().join("datasets--o--d/refs")).unwrap();
        fs::write(cache.path().join("datasets--o--d/refs/main"), "abc").unwrap();
        fs::write(snapshot.join("a.parquet"), "x").unwrap();
        let path = fetch_dataset_file("o/d", "main", "data/a.parquet", &options).unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), "x");
        let error = fetch_dataset_file("o/d", "main", "data/b.parquet", &options).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("no `data/b.parquet` of `o/d` at `main`")
        );
        assert!(fetch_dataset_file("o/d", "main", "../b", &options).is_err());
    }

    #[cfg(not(feature = "hub"))]
    #[test]
    fn a_build_without_the_network_says_so() {
        let cache = tempfile::tempdir().unwrap();
        let options = ResolveOptions {
            offline: false,
            ..offline_in(cache.path())
        };
        let error = resolve_with("o/n", &options, &|_| None, &mut |_, _, _| {}).unwrap_err();
        assert!(matches!(error, HubError::NoNetwork { .. }));
        assert!(error.hint().unwrap().contains("--features hub"));
    }
}
