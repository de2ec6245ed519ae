//! Parts that `generate` and `chat` share: tokenizer, generation settings, streamed output.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::SystemTime;

use gptq_calibration::{Tokenizer, special_tokens};
use gptq_inference::{Finish, Limits, Message, Reply, Sampling, Session};
use serde_json::Value;

use crate::args::TextArgs;
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::isolation::ChatRenderer;
use crate::models::Model;
use crate::output::print_piece;

/// A tokenizer, sampling settings, and the limits that end a text.
pub struct Voice {
    pub tokenizer: Tokenizer,
    pub limits: Limits,
    pub sampling: Sampling,
    interrupt: Interrupt,
}

impl Voice {
    /// Combines the checkpoint's settings with the command line, and reports those taken from the checkpoint.
    pub fn open(model: &Model, args: &TextArgs) -> Result<Self, Failure> {
        let tokenizer = Tokenizer::open(model.tokenizer_dir())?;
        let sampling = sampling(model.dir(), args)?;
        Ok(Voice {
            limits: Limits {
                max_new_tokens: args.max_new_tokens,
                end_ids: tokenizer.eos_ids().to_vec(),
                stop: args.stop.clone(),
            },
            tokenizer,
            sampling,
            interrupt: Interrupt::listen()?,
        })
    }

    /// Runs `wait`, in which Ctrl-C ends the program at once.
    pub fn idle<R>(&self, wait: impl FnOnce() -> R) -> R {
        self.interrupt.idle(wait)
    }

    /// Writes `text` on; with `aloud`, to stdout as it comes.
    pub fn reply(
        &self,
        session: &mut Session<'_>,
        text: &[u32],
        aloud: bool,
    ) -> Result<Reply, Failure> {
        let decode = |ids: &[u32]| {
            let text = self.tokenizer.decode(ids, true);
            text.map_err(|error| error.to_string())
        };
        let mut failure = None;
        let mut show = |text: &str| {
            if self.interrupt.asked() {
                return ControlFlow::Break(());
            }
            match aloud {
                false => ControlFlow::Continue(()),
                true => print_piece(text).unwrap_or_else(|error| {
                    failure = Some(error);
                    ControlFlow::Break(())
                }),
            }
        };
        let reply = session.reply(text, &self.limits, &decode, &mut show)?;
        if let Some(failure) = failure {
            return Err(failure);
        }
        if aloud && !reply.text.ends_with('\n') {
            let _ = print_piece("\n")?;
        }
        Ok(reply)
    }
}

/// Tokens and their rates, and why the text ended.
pub fn summary(reply: &Reply) -> String {
    let rate = |tokens: usize, seconds: f64| tokens as f64 / seconds.max(1e-9);
    format!(
        "prompt: {} tokens, {:.0} tokens/s; text: {} tokens, {:.1} tokens/s; ended by {}",
        reply.prompt_tokens,
        rate(reply.prompt_tokens, reply.prefill_seconds),
        reply.tokens.len(),
        rate(reply.steps, reply.decode_seconds),
        reason(&reply.finish),
    )
}

/// Why a text ended, in words.
pub fn reason(finish: &Finish) -> String {
    match finish {
        Finish::EndToken(id) => format!("token {id}"),
        Finish::StopString(stop) => format!("the stop string {stop:?}"),
        Finish::Length => "--max-new-tokens".to_string(),
        Finish::Capacity => "a full context".to_string(),
        Finish::Interrupted => "Ctrl-C or a reader that went away".to_string(),
    }
}

/// The command line's settings, else those of `generation_config.json`, else the likeliest token.
fn sampling(dir: &Path, args: &TextArgs) -> Result<Sampling, Failure> {
    let config = read_json(&dir.join("generation_config.json"))?.unwrap_or(Value::Null);
    let plain = Sampling::default();
    let mut taken = Vec::new();
    let mut stored = |name: &str, given: bool| {
        let value = config[name].as_f64().filter(|_| !given)?;
        taken.push(format!("{} {value}", name.replace('_', "-")));
        Some(value)
    };
    // Without it the file's settings of a draw are not in force.
    let draws = config["do_sample"].as_bool().unwrap_or(false);
    let temperature = match draws {
        true => stored("temperature", args.temperature.is_some()).or(Some(1.0)),
        false => None,
    };
    let [top_k, top_p] = [
        ("top_k", args.top_k.is_some()),
        ("top_p", args.top_p.is_some()),
    ]
    .map(|(name, given)| draws.then(|| stored(name, given)).flatten());
    let penalty = stored("repetition_penalty", args.repetition_penalty.is_some());
    if !taken.is_empty() {
        eprintln!("generation_config.json: {}", taken.join(", "));
    }
    let number = |given: Option<f32>, stored: Option<f64>, plain: f32| {
        given.or(stored.map(|value| value as f32)).unwrap_or(plain)
    };
    let sampling = Sampling {
        repetition_penalty: number(args.repetition_penalty, penalty, plain.repetition_penalty),
        temperature: number(args.temperature, temperature, plain.temperature),
        top_k: (args.top_k)
            .or(top_k.map(|k| k as usize))
            .unwrap_or(plain.top_k),
        top_p: number(args.top_p, top_p, plain.top_p),
        seed: args.seed.unwrap_or(0),
    };
    sampling.validate()?;
    let draw = [
        ("top-k", args.top_k.is_some()),
        ("top-p", args.top_p.is_some()),
        ("seed", args.seed.is_some()),
    ];
    for (flag, _) in draw
        .iter()
        .filter(|(_, given)| *given && sampling.temperature == 0.0)
    {
        eprintln!("warning: --{flag} has no effect: at temperature 0 the likeliest token is taken");
    }
    Ok(sampling)
}

/// The chat template of a checkpoint, wherever it keeps it; nothing where it has none.
pub fn chat_template(dir: &Path) -> Result<Option<ChatRenderer>, Failure> {
    chat_template_at(dir, SystemTime::now())
}

/// The chat template of a checkpoint; `now` is the time for templates that write the date.
pub fn chat_template_at(dir: &Path, now: SystemTime) -> Result<Option<ChatRenderer>, Failure> {
    let config = read_json(&dir.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
    let apart = read_json(&dir.join("chat_template.json"))?.unwrap_or(Value::Null);
    let source = read_text(&dir.join("chat_template.jinja"))?
        .or_else(|| template_text(&config["chat_template"]))
        .or_else(|| template_text(&apart["chat_template"]));
    let Some(source) = source else {
        return Ok(None);
    };
    let tokens = special_tokens(dir)?.into_iter().collect();
    Ok(Some(ChatRenderer::new(source, tokens, now)?))
}

/// A string, or of several named templates the one called `default`.
fn template_text(value: &Value) -> Option<String> {
    let default = |named: &&Value| named["name"] == "default";
    match value {
        Value::Array(all) => Some(all.iter().find(default)?["template"].as_str()?.to_string()),
        one => Some(one.as_str()?.to_string()),
    }
}

/// The messages of a new conversation: the system message, if any.
pub fn opening(system: Option<&str>) -> Vec<Message> {
    let told = system.map(|text| Message::new("system", text));
    told.into_iter().collect()
}

/// The error for a checkpoint without a chat template.
pub fn no_template(dir: &Path) -> Failure {
    Failure::with_hint(
        format!("`{}` has no chat template", dir.display()),
        "pass one with --prompt-template, as the model's card has it",
    )
}

/// Tokens that a model takes: what it was trained for.
pub fn context(spec: &gptq_model::ModelSpec) -> usize {
    spec.max_position_embeddings
}

fn read_text(path: &Path) -> Result<Option<String>, Failure> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::new(format!(
            "cannot read `{}`: {error}",
            path.display()
        ))),
    }
}

fn read_json(path: &Path) -> Result<Option<Value>, Failure> {
    let wrong = |error| Failure::new(format!("`{}` is not valid: {error}", path.display()));
    (read_text(path)?)
        .map(|text| serde_json::from_str(&text).map_err(wrong))
        .transpose()
}
