//! Reads what users read: checkpoints as they lie on disk, packed or not.
//!
//! Knows: packed linears as weights of the forward pass; perplexity, divergence from another checkpoint with
//! its tail and its place in the window, paired confidence intervals, last words guessed by greedy tokens,
//! choices weighed by their likelihood; the journal by which an evaluation goes on after a kill; logits of
//! given tokens; runners that keep all weights as the file has them, text and windows sampled from them, and
//! their speed.
//!
//! Does not know: how a checkpoint was made. Nothing of the solver or the pipeline is reachable
//! from here, so a number from this crate is a number about the files.

mod confidence;
mod draw;
mod evaluate;
mod generate;
mod journal;
mod last_word;
mod logits;
mod multiple_choice;
mod open;
mod packed;
mod passage;
mod perplexity;
mod run;
mod sample_windows;
mod speed;
mod stored;
mod summary;

pub use confidence::paired_difference;
pub use evaluate::{EvaluationError, Request, Scores, Step, evaluate, group_tokens, groups};
pub use generate::{
    ChatTemplate, Decode, Finish, GenerateError, Limits, Message, Reply, Sampling, SamplingError,
    Session, TemplateError, fill_prompt,
};
pub use journal::{Journal, JournalError};
pub use last_word::guess_last_words;
pub use logits::{LogitComparison, compare, logits};
pub use multiple_choice::{Question, choice_accuracy, weigh_choices};
pub use open::{OpenError, OpenedModel, open};
pub use packed::PackedWeights;
pub use passage::Passage;
pub use perplexity::{
    Divergence, Reference, ScoreError, WindowScore, score_reference, score_windows,
};
pub use run::{RunError, Runner};
pub use sample_windows::{SampleSpec, sample_windows};
pub use speed::measure_speed;
pub use stored::{StoredLinear, StoredMatrix, StoredWeight};
pub use summary::{Comparison, Evaluation, NoPerplexity, accuracy, summarize};
