//! `gptq generate` and `gptq chat`.

use clap::Args;

use super::{HubArgs, StrictArgs, TokenizerArgs, WholeDeviceArgs};

/// How tokens are chosen and when a text ends.
#[derive(Args)]
pub struct TextArgs {
    /// Divides the logits; 0 takes the likeliest token [default: generation_config.json's, or 0]
    #[arg(long, allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Draw among the likeliest tokens that together have this probability [default:
    /// generation_config.json's, or 1: all]
    #[arg(long, allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Draw among so many likeliest tokens [default: generation_config.json's, or 0: all]
    #[arg(long)]
    pub top_k: Option<usize>,
    /// Makes tokens that occurred less likely, above 1 [default: generation_config.json's, or 1]
    #[arg(long, allow_negative_numbers = true)]
    pub repetition_penalty: Option<f32>,
    /// Tokens to write at most
    #[arg(long, default_value_t = 512)]
    pub max_new_tokens: usize,
    /// Seed of the draw: the same seed gives the same text [default: 0]
    #[arg(long)]
    pub seed: Option<u64>,
    /// End before this string; can be repeated. Tokens that end a text always end it
    #[arg(long, value_name = "STRING")]
    pub stop: Vec<String>,
}

#[derive(Args)]
pub struct GenerateArgs {
    /// A folder, or `owner/name[:branch]` on the hub, packed or not
    pub model: String,
    /// The text to write on from [default: stdin]
    #[arg(long)]
    pub prompt: Option<String>,
    /// Put the prompt into the place of `{prompt}` in this text; `\n` is a line's end
    #[arg(long, value_name = "TEMPLATE")]
    pub prompt_template: Option<String>,
    /// Put the prompt into the checkpoint's chat template
    #[arg(long, conflicts_with = "prompt_template")]
    pub chat: bool,
    /// With --chat: what the model is told beforehand
    #[arg(long, requires = "chat")]
    pub system: Option<String>,
    #[command(flatten)]
    pub tokenizer: TokenizerArgs,
    #[command(flatten)]
    pub text: TextArgs,
    /// Read the whole text anew for each token, slowly: what the key-value cache is checked against
    #[arg(long)]
    pub no_cache: bool,
    #[command(flatten)]
    pub device: WholeDeviceArgs,
    #[command(flatten)]
    pub strict: StrictArgs,
    /// Print the text with its tokens, its end and the speed as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub hub: HubArgs,
}

#[derive(Args)]
pub struct ChatArgs {
    /// A folder, or `owner/name[:branch]` on the hub, packed or not
    pub model: String,
    /// What the model is told beforehand
    #[arg(long, conflicts_with = "prompt_template")]
    pub system: Option<String>,
    /// Put each line into the place of `{prompt}` in this text, instead of the checkpoint's chat
    /// template; `\n` is a line's end
    #[arg(long, value_name = "TEMPLATE")]
    pub prompt_template: Option<String>,
    /// Tokens that the conversation may have [default: what the model was trained for, at most
    /// 4096]
    #[arg(long, value_name = "TOKENS")]
    pub context: Option<usize>,
    #[command(flatten)]
    pub tokenizer: TokenizerArgs,
    #[command(flatten)]
    pub text: TextArgs,
    #[command(flatten)]
    pub device: WholeDeviceArgs,
    #[command(flatten)]
    pub hub: HubArgs,
}
