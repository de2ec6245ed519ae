//! `gptq generate`.

use std::io::{IsTerminal, Read};

use gptq_inference::{Finish, Message, Reply, Session, fill_prompt};
use serde_json::json;

use crate::Verdict;
use crate::args::GenerateArgs;
use crate::device;
use crate::failure::Failure;
use crate::models::{Model, find};
use crate::output::print_json;
use crate::unread_keys;
use crate::voice::{Voice, chat_template, context, no_template, opening, reason, summary};

pub fn run(args: &GenerateArgs) -> Result<Verdict, Failure> {
    let model = find(&args.model, &args.hub)?.with_tokenizer(args.tokenizer.folder.as_deref());
    let voice = Voice::open(&model, &args.text)?;
    let opened = model.open()?;
    unread_keys::heed(&args.strict, &args.model, &opened.spec)?;
    let prompt = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None => voice.idle(read_stdin)?,
    };
    let ids = tokens(args, &model, &voice, &prompt)?;
    let context = context(&opened.spec);
    if ids.len() >= context {
        return Err(Failure::new(format!(
            "the prompt has {} tokens, the model takes {context}",
            ids.len()
        )));
    }
    let device = device::resolve_whole(&args.device)?;
    let mut runner = opened.runner(&device)?;
    let capacity = context.min(ids.len().saturating_add(args.text.max_new_tokens));
    let mut session = Session::new(runner.as_mut(), capacity, voice.sampling)?;
    if args.no_cache {
        session = session.without_cache();
    }
    let reply = voice.reply(&mut session, &ids, !args.json)?;
    eprintln!("{}", summary(&reply));
    if args.json {
        print_json(&record(&reply, runner.peak_memory()))?;
    }
    Ok(match reply.finish {
        Finish::Interrupted => Verdict::Interrupted,
        _ => Verdict::Yes,
    })
}

fn tokens(
    args: &GenerateArgs,
    model: &Model,
    voice: &Voice,
    prompt: &str,
) -> Result<Vec<u32>, Failure> {
    if args.chat {
        let folder = model.tokenizer_dir();
        let template = chat_template(folder)?.ok_or_else(|| no_template(folder))?;
        let mut messages = opening(args.system.as_deref());
        messages.push(Message::new("user", prompt));
        // The template has the special tokens in it.
        return Ok(voice.tokenizer.encode_plain(&template.render(&messages)?)?);
    }
    let text = match &args.prompt_template {
        Some(template) => fill_prompt(template, prompt)?,
        None => prompt.to_string(),
    };
    let ids = voice.tokenizer.encode(&text)?;
    match (ids.is_empty(), voice.tokenizer.bos_id()) {
        (false, _) => Ok(ids),
        (true, Some(bos)) => Ok(vec![bos]),
        (true, None) => Err(Failure::with_hint(
            "the prompt is empty, and the model has no token that begins a text",
            "pass --prompt",
        )),
    }
}

/// Reads all of stdin, without the final line break.
fn read_stdin() -> Result<String, Failure> {
    if std::io::stdin().is_terminal() {
        eprintln!("the prompt, ended by Ctrl-D:");
    }
    let mut text = String::new();
    std::io::stdin()
        .read_to_string(&mut text)
        .map_err(|error| Failure::new(format!("cannot read the prompt from stdin: {error}")))?;
    let line_end = text
        .strip_suffix('\n')
        .map(|text| text.trim_end_matches('\r'));
    Ok(line_end.unwrap_or(&text).to_string())
}

fn record(reply: &Reply, peak_memory: u64) -> serde_json::Value {
    json!({
        "text": reply.text,
        "tokens": reply.tokens,
        "leads": reply.leads,
        "ended_by": reason(&reply.finish),
        "prompt_tokens": reply.prompt_tokens,
        "prefill_seconds": reply.prefill_seconds,
        "steps": reply.steps,
        "decode_seconds": reply.decode_seconds,
        "peak_memory": peak_memory,
    })
}
