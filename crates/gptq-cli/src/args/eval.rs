//! `gptq eval`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use super::{DeviceArgs, HubArgs, StrictArgs, TokenizerArgs, WindowBosArgs};

#[derive(Args)]
pub struct EvalArgs {
    /// Checkpoints: folders or `owner/name[:branch]`, packed or not; the first is the reference
    #[arg(required = true)]
    pub models: Vec<String>,
    /// Text: `wikitext2` by the papers' protocol, `c4`, NAME=FILE for a local copy, a FILE, or
    /// OWNER/NAME[:CONFIG[:SPLIT]] on the hub; can be repeated, each text has scores of its own
    #[arg(long, default_value = "wikitext2")]
    pub dataset: Vec<String>,
    /// Column of its rows that holds the text or the conversations [default: the first known one]
    #[arg(long, value_name = "NAME")]
    pub column: Option<String>,
    /// Tokens in a window
    #[arg(long, default_value_t = 2048)]
    pub seq_len: usize,
    /// Score only this many windows from the start
    #[arg(long)]
    pub max_windows: Option<usize>,
    #[command(flatten)]
    pub window_bos: WindowBosArgs,
    /// Also guess the last words of passages: `lambada`, or a FILE with a passage in each row
    #[arg(long, value_name = "FILE")]
    pub lambada: Option<String>,
    /// With --lambada: only this many passages from the start
    #[arg(long, value_name = "N", requires = "lambada")]
    pub lambada_examples: Option<usize>,
    /// Also answer questions of multiple choice: FILE has the columns of ARC, PIQA, WinoGrande or
    /// HellaSwag in its rows, NAME stands above the results; can be repeated
    #[arg(long, value_name = "NAME=FILE")]
    pub task: Vec<TaskArg>,
    /// With --task: only this many questions of each from the start
    #[arg(long, value_name = "N", requires = "task")]
    pub task_examples: Option<usize>,
    #[command(flatten)]
    pub tokenizer: TokenizerArgs,
    /// Keep scores in FILE as they come; the same command goes on with it after a kill
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Tokens that go through a checkpoint together, 32768 on a processor and 196608 on a GPU:
    /// memory grows with them, and so does what a kill costs; each group reads all weights once
    #[arg(long, value_name = "TOKENS")]
    pub group_tokens: Option<NonZeroUsize>,
    #[command(flatten)]
    pub speed: SpeedArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub strict: StrictArgs,
    /// Print the records as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

/// A file of questions and the name of its results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskArg {
    pub name: String,
    pub file: PathBuf,
}

impl FromStr for TaskArg {
    type Err = String;

    /// The name heads a column of tables, so it is a plain word.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, file) = text.split_once('=').ok_or("expected NAME=FILE")?;
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
        if name.is_empty() || !name.chars().all(is_plain) {
            return Err("NAME is made of letters, digits, `.`, `_` and `-`".to_string());
        }
        match file {
            "" => Err("expected NAME=FILE".to_string()),
            file => Ok(TaskArg {
                name: name.to_string(),
                file: PathBuf::from(file),
            }),
        }
    }
}

#[derive(Args)]
pub struct SpeedArgs {
    /// Also measure how fast each reads a prompt and writes tokens with all its weights on the device,
    /// and the memory that takes
    #[arg(long)]
    pub speed: bool,
    /// With --speed: tokens of the prompt, at most what the model was trained on
    #[arg(long, value_name = "TOKENS", requires = "speed", default_value = "512")]
    pub speed_prompt: NonZeroUsize,
    /// With --speed: tokens that are written after it, to each sequence
    #[arg(long, value_name = "TOKENS", requires = "speed", default_value = "64")]
    pub speed_tokens: NonZeroUsize,
    /// With --speed: sequences side by side
    #[arg(long, value_name = "N", requires = "speed", default_value = "1")]
    pub speed_batch: NonZeroUsize,
}
