//! What windows of text begin with.

use clap::Args;

/// Whether every window begins with the beginning-of-sequence token.
#[derive(Args, Clone)]
pub struct WindowBosArgs {
    /// Begin every window, of calibration and of evaluation, with the beginning-of-sequence token; one
    /// token less of the text follows. Stored windows are taken as they are [default: where the model's
    /// family computes nonsense without it, as Gemma does, and one is known]
    #[arg(long, conflicts_with = "no_window_bos")]
    pub window_bos: bool,
    /// Begin windows anywhere in the text, whatever the family needs
    #[arg(long)]
    pub no_window_bos: bool,
}

impl WindowBosArgs {
    /// What was asked for; nothing leaves it to the model's family.
    pub fn choice(&self) -> Option<bool> {
        match (self.window_bos, self.no_window_bos) {
            (true, _) => Some(true),
            (_, true) => Some(false),
            _ => None,
        }
    }
}
