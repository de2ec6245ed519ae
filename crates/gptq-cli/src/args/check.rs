//! `gptq verify`, `gptq regress`, `gptq inspect` and `gptq report`: commands that judge what is there.

use std::path::PathBuf;

use clap::Args;

use super::{DeviceArg, HubArgs, StrictArgs};

#[derive(Args)]
#[group(id = "mode", required = false, multiple = false, args = ["expect", "write"])]
pub struct VerifyArgs {
    /// The checkpoint
    pub model: String,
    /// Compare with this file: input_ids i32 [t], logits f32 [t, vocab]; exit 1 if they differ
    #[arg(long, value_name = "FILE")]
    pub expect: Option<PathBuf>,
    /// Write such a file
    #[arg(long, value_name = "FILE", requires = "ids")]
    pub write: Option<PathBuf>,
    /// Token ids for --write, separated by commas
    #[arg(long, value_delimiter = ',', requires = "write")]
    pub ids: Vec<u32>,
    /// Largest absolute difference of a logit, a number of 0 or more
    #[arg(
        long,
        default_value_t = 1e-3,
        requires = "expect",
        allow_hyphen_values = true
    )]
    pub tolerance: f32,
    /// `cpu` computes in f32; `cuda:N` in the model's sixteen-bit type, which needs another tolerance
    #[arg(long, default_value = "cpu", value_name = "DEVICE", requires = "mode")]
    pub device: DeviceArg,
    #[command(flatten)]
    pub strict: StrictArgs,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct RegressArgs {
    /// A recipe with the figures that it once gave; exit 1 if one got worse by more than its
    /// tolerance, 2 if model or text are other ones. Runs on the processor, in $TMPDIR
    #[arg(long, value_name = "FILE")]
    pub baseline: PathBuf,
    /// Run the recipe twice and write its figures, hashes and tolerances into the file
    #[arg(long)]
    pub update: bool,
    /// Judge this packed folder instead of a run
    #[arg(long, value_name = "DIR", conflicts_with = "update")]
    pub checkpoint: Option<PathBuf>,
    /// Also write JUnit XML, a test case a linear
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Also print annotations of GitHub Actions [default: where GITHUB_ACTIONS is true, but for
    /// --json]
    #[arg(long, conflicts_with = "json")]
    pub github: bool,
    /// Print the verdict as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct InspectArgs {
    /// The checkpoint
    pub model: String,
    /// List every packed linear
    #[arg(long)]
    pub layers: bool,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct ReportArgs {
    /// Checkpoint folders with a run record, repositories that `matrix` made, JSON files of `eval`,
    /// JSON files of one run record. A score belongs to the run whose path `eval` was given, else
    /// to the one whose folder or branch has its last name
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// The folder to write, index.html and report.md; must not exist or be empty
    #[arg(short, long, value_name = "DIR")]
    pub out: PathBuf,
    /// Print all that the report is made from as JSON too
    #[arg(long)]
    pub json: bool,
}
