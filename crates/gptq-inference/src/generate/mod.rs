//! Text from a runner: a prompt goes in, tokens are chosen one by one, their text comes out in
//! whole characters until a token or a string ends it.

mod sample;
mod stop;
mod stream;
mod template;

use std::ops::ControlFlow;
use std::time::Instant;

use crate::{RunError, Runner};

pub use sample::{Sampling, SamplingError};
pub use stream::Decode;
pub use template::{ChatTemplate, Message, TemplateError, fill_prompt};

use sample::Sampler;
use stop::StopStrings;
use stream::TextStream;

/// A text that cannot go on.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum GenerateError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("a token has no text: {0}")]
    Text(String),
    #[error("no logit is finite after {0} tokens: the checkpoint is broken")]
    NotFinite(usize),
}

impl GenerateError {
    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            GenerateError::Run(error) => error.hint(),
            _ => None,
        }
    }
}

/// When a text ends.
#[derive(Clone, Debug, Default)]
pub struct Limits {
    /// Tokens at most.
    pub max_new_tokens: usize,
    /// Tokens that end it and have no text.
    pub end_ids: Vec<u32>,
    /// Strings that end it and are not shown.
    pub stop: Vec<String>,
}

/// Why a text ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Finish {
    /// One of the tokens that end a text.
    EndToken(u32),
    /// One of the stop strings.
    StopString(String),
    /// The requested number of tokens was generated.
    Length,
    /// The cache is full.
    Capacity,
    /// Whoever listens wanted no more.
    Interrupted,
}

/// A finished text.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// Tokens that were chosen, an end token not among them.
    pub tokens: Vec<u32>,
    /// Margin of each token's logit over the largest other logit; negative where another token was likelier.
    /// Two ways to compute the same text may diverge where it is small.
    pub leads: Vec<f32>,
    /// Their text up to a stop string.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// Tokens that were read before the first choice; fewer than the text where the cache held some.
    pub prompt_tokens: usize,
    /// Seconds of reading them.
    pub prefill_seconds: f64,
    /// Tokens that were fed back, each one step.
    pub steps: usize,
    /// Seconds of all steps, the choice of tokens counted.
    pub decode_seconds: f64,
}

/// One sequence whose cache is kept between texts.
pub struct Session<'a> {
    runner: &'a mut dyn Runner,
    sampler: Sampler,
    capacity: usize,
    cached: bool,
    held: Vec<u32>, // what was read
}

impl<'a> Session<'a> {
    /// An empty sequence of at most `capacity` tokens. One random stream serves all its texts.
    pub fn new(
        runner: &'a mut dyn Runner,
        capacity: usize,
        sampling: Sampling,
    ) -> Result<Self, RunError> {
        runner.reset(1, capacity)?;
        let vocab = runner.spec().vocab_size;
        Ok(Session {
            runner,
            sampler: Sampler::new(sampling, vocab),
            capacity,
            cached: true,
            held: Vec::new(),
        })
    }

    /// Reads the whole text anew for each token, at the same capacity: what the cache is held
    /// against.
    pub fn without_cache(mut self) -> Self {
        self.cached = false;
        self
    }

    /// Forgets all tokens; the random stream goes on.
    pub fn restart(&mut self) -> Result<(), RunError> {
        self.held.clear();
        self.sampler.forget();
        self.runner.reset(1, self.capacity)
    }

    /// The part of `text` that is not in the cache yet. A cache that holds something else is cleared.
    fn unread<'t>(&mut self, text: &'t [u32]) -> Result<&'t [u32], RunError> {
        match text.strip_prefix(self.held.as_slice()) {
            Some(rest) if self.cached && !rest.is_empty() => Ok(rest),
            _ => {
                self.restart()?;
                Ok(text)
            }
        }
    }

    /// Continues `text`, the whole conversation so far; only the part that the KV cache lacks is prefilled.
    /// `show` receives new text as it is generated and may stop it.
    pub fn reply(
        &mut self,
        text: &[u32],
        limits: &Limits,
        decode: &Decode<'_>,
        show: &mut dyn FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Reply, GenerateError> {
        let start = Instant::now();
        let unread = self.unread(text)?;
        let logits = self.runner.prefill(0, unread)?;
        self.held.extend_from_slice(unread);
        self.sampler.note(unread);
        let mut reply = Reply {
            tokens: Vec::new(),
            leads: Vec::new(),
            text: String::new(),
            finish: Finish::Length,
            prompt_tokens: unread.len(),
            prefill_seconds: start.elapsed().as_secs_f64(),
            steps: 0,
            decode_seconds: 0.0,
        };
        let mut out = Output {
            stream: TextStream::after(&self.held),
            stops: StopStrings::new(&limits.stop),
            decode,
            show,
        };
        let start = Instant::now();
        reply.finish = self.write(logits, limits, &mut reply, &mut out)?;
        reply.decode_seconds = start.elapsed().as_secs_f64();
        Ok(reply)
    }

    fn write(
        &mut self,
        mut logits: Vec<f32>,
        limits: &Limits,
        reply: &mut Reply,
        out: &mut Output<'_, '_>,
    ) -> Result<Finish, GenerateError> {
        while reply.tokens.len() < limits.max_new_tokens {
            let Some(token) = self.sampler.pick(&logits) else {
                return Err(GenerateError::NotFinite(self.held.len()));
            };
            if limits.end_ids.contains(&token) {
                out.end(reply)?;
                return Ok(Finish::EndToken(token));
            }
            reply.tokens.push(token);
            reply.leads.push(lead(&logits, token));
            self.sampler.note(&[token]);
            if let Some(finish) = out.token(token, reply)? {
                return Ok(finish);
            }
            if reply.tokens.len() == limits.max_new_tokens {
                break;
            }
            if self.held.len() == self.capacity {
                out.end(reply)?;
                return Ok(Finish::Capacity);
            }
            self.read(token, &mut logits)?;
            reply.steps += 1;
        }
        out.end(reply)?;
        Ok(Finish::Length)
    }

    /// Appends `token`; leaves the logits after it in `logits`.
    fn read(&mut self, token: u32, logits: &mut Vec<f32>) -> Result<(), RunError> {
        self.held.push(token);
        if self.cached {
            logits.clear();
            logits.extend_from_slice(self.runner.step(&[token])?);
        } else {
            self.runner.reset(1, self.capacity)?;
            *logits = self.runner.prefill(0, &self.held)?;
        }
        Ok(())
    }
}

/// Margin of the logit of `token` over the largest other logit.
fn lead(logits: &[f32], token: u32) -> f32 {
    let others = (logits.iter().enumerate()).filter(|(at, _)| *at != token as usize);
    let next = others
        .map(|(_, logit)| *logit)
        .fold(f32::NEG_INFINITY, f32::max);
    logits[token as usize] - next
}

/// From tokens to what is shown.
struct Output<'a, 'd> {
    stream: TextStream,
    stops: StopStrings<'a>,
    decode: &'a Decode<'d>,
    show: &'a mut dyn FnMut(&str) -> ControlFlow<()>,
}

impl Output<'_, '_> {
    fn token(&mut self, token: u32, reply: &mut Reply) -> Result<Option<Finish>, GenerateError> {
        let text = self.stream.push(token, self.decode);
        self.text(&text.map_err(GenerateError::Text)?, reply)
    }

    /// Shown even if it is empty: whoever listens may break off at every token.
    fn text(&mut self, text: &str, reply: &mut Reply) -> Result<Option<Finish>, GenerateError> {
        let shown = self.stops.push(text);
        reply.text.push_str(&shown.text);
        let flow = (self.show)(&shown.text);
        Ok(match (shown.stopped_by, flow) {
            (Some(stop), _) => Some(Finish::StopString(stop)),
            (None, ControlFlow::Break(())) => Some(Finish::Interrupted),
            (None, ControlFlow::Continue(())) => None,
        })
    }

    /// Shows the text that was held back, cut at a stop string as well.
    fn end(&mut self, reply: &mut Reply) -> Result<(), GenerateError> {
        let rest = self.stream.finish(self.decode);
        let stopped = self.text(&rest.map_err(GenerateError::Text)?, reply)?;
        if !matches!(stopped, Some(Finish::StopString(_))) {
            let held = self.stops.finish();
            reply.text.push_str(&held);
            let _ = (self.show)(&held);
        }
        Ok(())
    }
}
