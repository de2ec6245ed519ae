//! Errors between a model's name and its tensors, one line each.

use std::io;
use std::path::PathBuf;

use gptq_packer::{LayoutError, SafetensorsError, StageError};
use gptq_types::{OutsideNameError, StandIn};

/// A model that could not be had. The text is the cause; advice is in [`HubError::hint`].
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum HubError {
    #[error("folder `{0}` does not exist")]
    FolderMissing(PathBuf),
    #[error("`{0}` is a file, not a model folder")]
    NotAFolder(PathBuf),
    #[error("`{0}` is a GGUF file, not a model folder")]
    GgufFile(PathBuf),
    #[error("`{0}` holds no `*.safetensors` file")]
    NoWeights(String),
    #[error("`{place}` holds `{file}` but no `*.safetensors` file; pickled weights are not read")]
    OnlyPickles { place: String, file: String },
    #[error("`{place}` holds `{file}` but no `*.safetensors` file")]
    OnlyGguf { place: String, file: String },
    #[error("`{place}` is an adapter of `{base}`, not a model")]
    Adapter { place: String, base: String },
    #[error("`{path}` {what}")]
    StandIn { path: PathBuf, what: StandIn },
    #[error("`{folder}` {reason}")]
    Names { folder: PathBuf, reason: String },
    #[error("tensor `{tensor}` of type F8_E4M3 {reason}")]
    EightBit { tensor: String, reason: String },
    #[error("`{folder}` holds several weight files and no index: {files}")]
    Ambiguous { folder: PathBuf, files: String },
    #[error("`{index}` names `{shard}`, but `{single}` lies beside it")]
    Contradiction {
        index: PathBuf,
        shard: String,
        single: String,
    },
    #[error("`{index}` names `{shard}`, which is not a plain `*.safetensors` file name")]
    ShardName { index: PathBuf, shard: String },
    #[error("`{index}` names `{shard}`, which does not exist")]
    ShardMissing { index: PathBuf, shard: String },
    #[error("tensor `{tensor}` is not in `{shard}`, where `{index}` puts it")]
    NotInShard {
        tensor: String,
        shard: PathBuf,
        index: PathBuf,
    },
    #[error("tensor `{tensor}` is in both `{first}` and `{second}`")]
    Twice {
        tensor: String,
        first: PathBuf,
        second: PathBuf,
    },
    #[error(transparent)]
    OutsideName(#[from] OutsideNameError),
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    #[error("`{path}`: {reason}")]
    BadFile { path: PathBuf, reason: String },
    #[error("cannot {action} `{path}`: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },

    #[error("`{0}` is neither a folder nor `owner/name` nor `owner/name:branch`")]
    Reference(String),
    #[error("no home folder is known, so there is no hub cache")]
    NoCache,
    #[error("offline, and the hub cache has no {missing} of `{repo}` at `{revision}`")]
    NotCached {
        repo: String,
        revision: String,
        missing: String,
    },
    #[error(
        "this build cannot reach the hub, and the cache has no {missing} of `{repo}` at `{revision}`"
    )]
    NoNetwork {
        repo: String,
        revision: String,
        missing: String,
    },
    #[error("the hub has no {what} `{repo}` at `{revision}` (status 404)")]
    NotFound {
        what: String,
        repo: String,
        revision: String,
    },
    #[error("`{repo}` at `{revision}`: {reason}")]
    NoSplit {
        repo: String,
        revision: String,
        reason: String,
    },
    #[error("the hub refuses `{repo}` at `{revision}` (status {status})")]
    Refused {
        repo: String,
        revision: String,
        status: u16,
    },
    #[error("cannot fetch {what} `{repo}` at `{revision}` from {endpoint}: {reason}")]
    Fetch {
        what: Box<str>,
        repo: String,
        revision: String,
        endpoint: Box<str>,
        reason: String,
    },
    #[error(
        "`{file}` of `{repo}` at `{revision}` arrived with sha256 {found}, expected {expected}"
    )]
    Digest {
        file: String,
        repo: String,
        revision: String,
        found: Box<str>,
        expected: Box<str>,
    },

    #[error("uploading needs a token, and none is set")]
    NoToken,
    #[error("this build cannot reach the hub")]
    NoUploads,
    #[error("the hub does not let this token {doing} (status {status}){reason}")]
    NotAllowed {
        doing: String,
        status: u16,
        reason: String,
    },
    #[error("branch `{branch}` of `{repo}` holds other files already")]
    BranchTaken { repo: String, branch: String },
    #[error("cannot {doing}: {reason}")]
    Push { doing: String, reason: String },

    #[error("`{path}`: not a readable GGUF file: {reason}")]
    Gguf { path: PathBuf, reason: String },
    #[error("`{path}`: metadata `{key}` {reason}")]
    Metadata {
        path: PathBuf,
        key: String,
        reason: String,
    },
    #[error("`{path}`: tensor `{tensor}` {reason}")]
    Tensor {
        path: PathBuf,
        tensor: String,
        reason: String,
    },
    #[error("shape `{name}` is not one of {known}")]
    UnknownShape { name: String, known: String },
    #[error("`{0}` does not end in `.safetensors`")]
    WindowFileName(PathBuf),
    #[error("{samples} windows of {seq_len} tokens are not between 1 and {most} tokens in all")]
    WindowCount {
        samples: usize,
        seq_len: usize,
        most: usize,
    },
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Stage(#[from] StageError),
}

impl HubError {
    /// Advice to the user, if any; never part of the cause.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            HubError::GgufFile(path) => format!(
                "turn it into a model folder first: gptq import {} -o FOLDER",
                path.display()
            ),
            HubError::OnlyGguf { file, .. } => {
                format!("turn it into a model folder first: gptq import {file} -o FOLDER")
            }
            HubError::Adapter { .. } => {
                "merge it into its base first (peft: merge_and_unload), and give the result".into()
            }
            HubError::StandIn { what, .. }
            | HubError::Safetensors(SafetensorsError::StandIn { what, .. }) => what.hint().into(),
            HubError::Names { .. } => {
                "only plain decoders are read; save the language model alone".into()
            }
            HubError::EightBit { .. } => {
                "give the checkpoint in bf16, as most are published too".into()
            }
            HubError::Ambiguous { .. } => {
                "keep one, or name it as `model_file_base_name` in quantize_config.json".into()
            }
            HubError::OnlyPickles { .. } => {
                "convert the weights to safetensors, or take a revision that has them".into()
            }
            HubError::NotAFolder(_) => "give the folder that holds it".into(),
            HubError::FolderMissing(_) | HubError::Reference(_) => {
                "give a folder, `owner/name` or `owner/name:branch`".into()
            }
            HubError::NotCached { repo, .. } => {
                format!("fetch `{repo}` once while online, or unset HF_HUB_OFFLINE")
            }
            HubError::NoSplit { .. } => {
                "OWNER/NAME:CONFIG:SPLIT names both, and a local copy can be given as a file".into()
            }
            HubError::NoNetwork { .. } => "build with `--features hub`".into(),
            HubError::NotFound { .. } => {
                "check the spelling of owner, name and branch; if it is a folder, it does not exist"
                    .into()
            }
            HubError::Refused {
                status: 401 | 403, ..
            } => {
                "the repository is gated, private or does not exist: accept its licence on the hub \
                  and set HF_TOKEN"
                    .into()
            }
            HubError::Fetch { reason, .. } if reason.contains("status 429") => {
                "too many requests: wait, or set HF_TOKEN; what was fetched is kept".into()
            }
            HubError::Fetch { .. } => {
                "check the connection and HF_ENDPOINT; what was fetched is kept".into()
            }
            HubError::Stage(StageError::Occupied(_)) => "choose a new folder".into(),
            HubError::NoToken => "set HF_TOKEN to a token that may write".into(),
            HubError::NoUploads => "build with `--features hub`".into(),
            HubError::NotAllowed { status: 401, .. } => {
                "set HF_TOKEN to a valid token that may write to that account".into()
            }
            HubError::BranchTaken { .. } => "--update replaces its files with a new commit".into(),
            HubError::Push { reason, .. } if reason == "offline" => {
                "leave out --offline, and unset HF_HUB_OFFLINE".into()
            }
            HubError::Push { .. } => {
                "the same command goes on: what has arrived is not sent again".into()
            }
            _ => return None,
        })
    }

    pub(crate) fn io(action: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        HubError::Io {
            action,
            path: path.into(),
            source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_stays_small_enough_to_return_by_value() {
        // clippy::result_large_err begins at 128 bytes, in every crate that returns this type
        assert!(size_of::<HubError>() < 128);
    }
}
