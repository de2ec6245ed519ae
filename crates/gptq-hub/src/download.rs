//! Fetching from the hub into its cache.
//!
//! A branch is asked for its commit once and every file is fetched at that commit, so that a push
//! in between cannot mix two versions. The reference of the branch is written last: an interrupted
//! fetch leaves blobs that the next one resumes, never a branch that looks complete.
//!
//! hf-hub knows the layout of the cache, the paths of the API and the stored token. Its own download
//! asks for ranges and gzip at once and fails on every answer without `Content-Range`, so bytes come
//! through [`crate::transfer`].

use std::fs;
use std::path::{Component, Path, PathBuf};

use gptq_types::outside_name::{file_name, relative_path, shown};
use hf_hub::api::RepoInfo;
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use crate::HubError;
use crate::cache::{CachedRepo, RepoKind, missing_in};
use crate::client::{Client, Trouble, encoded};
use crate::companions::is_companion;
use crate::reference::{ModelRef, is_commit};
use crate::resolve::Settings;
use crate::transfer::{Arrived, Failed, fetch, unmistakable};
use crate::weight_files::{ADAPTER_CONFIG, adapter_of, no_weights};

/// The list of a repository of 100,000 files takes about 10 MiB.
const MAX_LIST_BYTES: u64 = 64 << 20;

type Progress<'a> = &'a mut dyn FnMut(&str, u64, u64);

/// Fetches the needed files of a model; returns its snapshot folder.
pub(crate) fn model(
    model: &ModelRef,
    settings: &Settings,
    progress: Progress<'_>,
) -> Result<PathBuf, HubError> {
    let hub = Hub::new(model, RepoType::Model, settings);
    let info = hub.info()?;
    let names: Vec<String> = (info.siblings.into_iter())
        .map(|file| file.rfilename)
        .collect();
    let wanted = needed_files(&names);
    if !wanted.iter().any(|name| name.ends_with(".safetensors")) {
        return Err(hub.no_model(&names, &info.sha, progress)?);
    }
    let cached = CachedRepo::new(&settings.cache, RepoKind::Model, &model.repo);
    for name in &wanted {
        if cached.file(&info.sha, name).is_none() {
            hub.file(&info.sha, name, progress)?;
        }
    }
    let snapshot = hub.cached(&info.sha).pointer_path(&info.sha);
    // the hub listed other files than the index names, or no `config.json`
    let missing = missing_in(&snapshot);
    if !missing.needed.is_empty() {
        let reason = format!("the repository has no {}", missing.in_words());
        return Err(hub.failed("model", reason));
    }
    hub.remember(&info.sha)?;
    Ok(snapshot)
}

/// Fetches one file of a dataset.
pub(crate) fn dataset_file(
    dataset: &ModelRef,
    file: &str,
    settings: &Settings,
) -> Result<PathBuf, HubError> {
    let hub = Hub::new(dataset, RepoType::Dataset, settings);
    let (commit, path) = hub.file(&dataset.revision, file, &mut |_, _, _| {})?;
    hub.remember(&commit)?;
    Ok(path)
}

/// The commit of a dataset's revision and the names of its files.
pub(crate) fn dataset_names(
    dataset: &ModelRef,
    settings: &Settings,
) -> Result<(String, Vec<String>), HubError> {
    let hub = Hub::new(dataset, RepoType::Dataset, settings);
    let info = hub.info()?;
    // files are fetched at the commit, and looked for in the cache by the branch
    hub.remember(&info.sha)?;
    let names = info.siblings.into_iter().map(|file| file.rfilename);
    Ok((info.sha, names.collect()))
}

/// The files of a repository that make up a model folder, small ones first.
///
/// Weights named `model*` win: `consolidated.safetensors` and adapters hold the same again, or
/// something else.
fn needed_files(names: &[String]) -> Vec<String> {
    let top = |name: &&String| file_name(name).is_ok();
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
    const WHOLE: [&str; 5] = [
        "README.md",
        "config.json",
        "gptq_branch.json",
        "gptq_run.json",
        "quantize_config.json",
    ];
    WHOLE.contains(&name)
        || is_companion(name)
        || name.starts_with("tokenizer")
        || name.starts_with("chat_template")
        || name.ends_with(".model")
        || name.ends_with(".safetensors.index.json")
}

/// One repository on one hub.
struct Hub<'a> {
    client: Client,
    kind: RepoType,
    wanted: &'a ModelRef,
    settings: &'a Settings,
}

impl<'a> Hub<'a> {
    fn new(wanted: &'a ModelRef, kind: RepoType, settings: &'a Settings) -> Self {
        Hub {
            client: Client::new(settings),
            kind,
            wanted,
            settings,
        }
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.wanted.repo.clone(), self.kind, revision.to_string())
    }

    fn cached(&self, revision: &str) -> CacheRepo {
        Cache::new(self.settings.cache.clone()).repo(self.repo(revision))
    }

    /// The commit of the wanted revision and the names of its files.
    fn info(&self) -> Result<RepoInfo, HubError> {
        let what = kind_name(self.kind);
        let url = format!("api/{}", self.repo(&self.wanted.revision).api_url());
        let url = self.client.url(&url.replace('+', "%2B"));
        let ask = || {
            let mut answer = self.client.get(&url, &mut |_| Ok(Vec::new()))?;
            let body = answer.response.body_mut().with_config();
            let bytes = body.limit(MAX_LIST_BYTES).read_to_vec();
            bytes.map_err(|error| self.client.trouble(&error))
        };
        let bytes = self.client.persist(ask, || 0);
        let bytes = bytes.map_err(|trouble| self.error(what, trouble))?;
        let info: RepoInfo = serde_json::from_slice(&bytes).map_err(|error| {
            let reason = shown(&error.to_string(), 160);
            self.failed(what, format!("the answer is no list of files: {reason}"))
        })?;
        match is_commit(&info.sha) {
            true => Ok(info),
            false => Err(self.failed(what, format!("`{}` is not a commit", shown(&info.sha, 80)))),
        }
    }

    /// Fetches a file at a revision into the snapshot of its commit; returns both.
    fn file(
        &self,
        revision: &str,
        name: &str,
        progress: Progress<'_>,
    ) -> Result<(String, PathBuf), HubError> {
        let what = format!("file `{}` of", shown(name, 96));
        let relative = relative_path(name)?;
        let repo = self.repo(revision);
        let place = format!(
            "{}/resolve/{}",
            repo.url(),
            repo.url_revision().replace('+', "%2B")
        );
        let url = self.client.url(&format!("{place}/{}", encoded(name)));
        let blobs = self.cached(revision).blob_path("");
        let fetched = fetch(&self.client, &url, &blobs, &mut |done, all| {
            progress(name, done, all);
        });
        let Arrived { blob, commit } = fetched.map_err(|failed| match failed {
            Failed::Trouble(Trouble::Disk(action, source)) => HubError::io(action, &blobs, source),
            Failed::Trouble(trouble) => self.error(&what, trouble),
            Failed::Digest { found, expected } => HubError::Digest {
                file: name.to_string(),
                repo: self.wanted.repo.clone(),
                revision: self.wanted.revision.clone(),
                found: found.into(),
                expected: expected.into(),
            },
        })?;
        let commit = match is_commit(revision) {
            true => revision.to_string(),
            false => self.commit_of(commit)?,
        };
        let path = self.cached(revision).pointer_path(&commit).join(relative);
        point(&path, &blob).map_err(|source| HubError::io("link", &path, source))?;
        Ok((commit, path))
    }

    /// The commit that came with a file, or the one that the hub's list names.
    fn commit_of(&self, said: Option<String>) -> Result<String, HubError> {
        match said.filter(|commit| is_commit(commit)) {
            Some(commit) => Ok(commit),
            None => Ok(self.info()?.sha),
        }
    }

    /// Writes down which commit the wanted revision is.
    fn remember(&self, commit: &str) -> Result<(), HubError> {
        let cached = self.cached(&self.wanted.revision);
        let written = cached.create_ref(commit);
        written.map_err(|source| {
            HubError::io(
                "write the reference of",
                cached.pointer_path(commit),
                source,
            )
        })
    }

    /// Why a list of files holds no model; an adapter is asked for its base.
    fn no_model(
        &self,
        names: &[String],
        commit: &str,
        progress: Progress<'_>,
    ) -> Result<HubError, HubError> {
        let place = format!("{}:{}", self.wanted.repo, self.wanted.revision);
        if !names.iter().any(|name| name == ADAPTER_CONFIG) {
            return Ok(no_weights(place, names));
        }
        let (_, path) = self.file(commit, ADAPTER_CONFIG, progress)?;
        let text = fs::read_to_string(&path).map_err(|e| HubError::io("read", &path, e))?;
        Ok(adapter_of(place, &text))
    }

    fn error(&self, what: &str, trouble: Trouble) -> HubError {
        let (repo, revision) = (self.wanted.repo.clone(), self.wanted.revision.clone());
        match trouble {
            Trouble::Status(404 | 410) => HubError::NotFound {
                what: what.to_string(),
                repo,
                revision,
            },
            Trouble::Status(status @ (401 | 403)) => HubError::Refused {
                repo,
                revision,
                status,
            },
            Trouble::Status(status) => self.failed(what, format!("status {status}")),
            Trouble::Passing(reason, _) | Trouble::Lasting(reason) => self.failed(what, reason),
            Trouble::Disk(action, source) => HubError::io(action, &self.settings.cache, source),
        }
    }

    fn failed(&self, what: &str, reason: String) -> HubError {
        HubError::Fetch {
            what: what.into(),
            repo: self.wanted.repo.clone(),
            revision: self.wanted.revision.clone(),
            endpoint: self.settings.endpoint.address.as_str().into(),
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

/// Makes `path`, in a snapshot, a relative link to `blob`, as Python's library does. A temporary link
/// is renamed over it, so that there is never none.
fn point(path: &Path, blob: &Path) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)?;
    let repo = blob.parent().and_then(Path::parent).unwrap_or(blob);
    let inner = folder.strip_prefix(repo).unwrap_or(folder);
    let up = inner.components().map(|_| Component::ParentDir);
    let name = blob.file_name().unwrap_or_default();
    let target: PathBuf = up.collect::<PathBuf>().join("blobs").join(name);
    let beside = folder.join(format!(".gptq-{}.link", unmistakable()));
    std::os::unix::fs::symlink(target, &beside)?;
    fs::rename(&beside, path)
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
            "NOTICE",
            "USE_POLICY.md",
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
                "NOTICE",
                "USE_POLICY.md",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
            ]
        );
        let autogptq = ["gptq_model-4bit-128g.safetensors".to_string()];
        assert_eq!(needed_files(&autogptq), autogptq);
    }
}
