//! Where models come from, and where they go.

use std::path::PathBuf;

use clap::Args;

/// Where models come from.
#[derive(Args, Clone)]
pub struct HubArgs {
    /// Never touch the network; also set by HF_HUB_OFFLINE=1
    #[arg(long)]
    pub offline: bool,
}

/// How much a model's `config.json` may say that is not known here.
#[derive(Args, Clone)]
pub struct StrictArgs {
    /// Refuse keys of config.json whose meaning is not known here, instead of naming them
    #[arg(long)]
    pub strict: bool,
}

/// Which tokenizer reads the text.
#[derive(Args, Clone)]
pub struct TokenizerArgs {
    /// Take tokenizer and chat template from this folder instead of the model's
    #[arg(id = "tokenizer", long = "tokenizer", value_name = "DIR")]
    pub folder: Option<PathBuf>,
}

#[derive(Args)]
pub struct PullArgs {
    /// `REPO[:branch]`, a repository that `matrix` made, or `owner/name[:branch]` on the hub
    pub source: String,
    /// The folder to write; must not exist or be empty
    #[arg(short, long)]
    pub out: PathBuf,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct PushArgs {
    /// A repository that `matrix` made, or a folder that `quantize` wrote
    pub place: PathBuf,
    /// `owner/name` on the hub, for a folder also `owner/name:branch` (else `main`); made where it
    /// does not exist. HF_TOKEN must be allowed to write
    pub target: String,
    /// Push this branch of a repository alone; can be repeated [default: all]
    #[arg(long, value_name = "BRANCH")]
    pub branch: Vec<String>,
    /// A repository that is made now is for its owner alone
    #[arg(long)]
    pub private: bool,
    /// Replace the files of branches that hold others
    #[arg(long)]
    pub update: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}
