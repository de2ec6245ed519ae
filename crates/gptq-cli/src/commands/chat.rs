//! `gptq chat`.

use std::io::{BufRead, IsTerminal};

use gptq_inference::{Message, Session, fill_prompt};

use crate::Verdict;
use crate::args::ChatArgs;
use crate::device;
use crate::failure::Failure;
use crate::isolation::ChatRenderer;
use crate::models::find;
use crate::voice::{Voice, chat_template, context, no_template, opening, summary};

/// Tokens of a conversation unless more are asked for: the cache is paid for at once.
const CONTEXT: usize = 4096;

pub fn run(args: &ChatArgs) -> Result<Verdict, Failure> {
    let model = find(&args.model, &args.hub)?.with_tokenizer(args.tokenizer.folder.as_deref());
    let voice = Voice::open(&model, &args.text)?;
    let opened = model.open()?;
    let wording = match &args.prompt_template {
        Some(template) => {
            fill_prompt(template, "")?;
            Wording::Card(template.clone())
        }
        None => {
            let template = chat_template(model.tokenizer_dir())?;
            let template = template.ok_or_else(|| no_template(model.dir()))?;
            Wording::Chat(template)
        }
    };
    let trained = context(&opened.spec);
    let context = args.context.unwrap_or(CONTEXT.min(trained));
    if context == 0 || context > trained {
        return Err(Failure::new(format!(
            "--context {context} is not between 1 and the {trained} tokens that the model takes"
        )));
    }
    let device = device::resolve_whole(&args.device)?;
    let mut runner = opened.runner(&device)?;
    let mut conversation = Conversation {
        session: Session::new(runner.as_mut(), context, voice.sampling)?,
        messages: opening(args.system.as_deref()),
        told: usize::from(args.system.is_some()),
        voice,
        wording,
        context,
    };
    eprintln!("/reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C ends an answer");
    while let Some(line) = conversation.voice.idle(read_line)? {
        match line.trim() {
            "" => {}
            "/exit" => break,
            "/reset" => conversation.forget()?,
            said => conversation.turn(said)?,
        }
    }
    Ok(Verdict::Yes)
}

/// The way to render a conversation as text.
enum Wording {
    /// The checkpoint's own.
    Chat(ChatRenderer),
    /// A card's, each turn in its own copy.
    Card(String),
}

impl Wording {
    fn tokens(&self, messages: &[Message], voice: &Voice) -> Result<Vec<u32>, Failure> {
        let template = match self {
            // The template has the special tokens in it.
            Wording::Chat(template) => {
                let text = template.render(messages)?;
                return Ok(voice.tokenizer.encode_plain(&text)?);
            }
            Wording::Card(template) => template,
        };
        let turn = |message: &Message| match message.role.as_str() {
            "user" => fill_prompt(template, &message.content),
            _ => Ok(message.content.clone()),
        };
        let text = messages.iter().map(turn).collect::<Result<String, _>>()?;
        Ok(voice.tokenizer.encode(&text)?)
    }
}

struct Conversation<'a> {
    session: Session<'a>,
    messages: Vec<Message>,
    told: usize, // messages that stay when the rest is forgotten
    voice: Voice,
    wording: Wording,
    context: usize,
}

impl Conversation<'_> {
    fn turn(&mut self, said: &str) -> Result<(), Failure> {
        self.messages.push(Message::new("user", said));
        let ids = self.wording.tokens(&self.messages, &self.voice)?;
        if ids.len() >= self.context {
            self.messages.pop();
            eprintln!(
                "that makes {} tokens, the context has {}: /reset begins anew",
                ids.len(),
                self.context
            );
            return Ok(());
        }
        let reply = self.voice.reply(&mut self.session, &ids, true)?;
        eprintln!("{}", summary(&reply));
        self.messages.push(Message::new("assistant", reply.text));
        Ok(())
    }

    fn forget(&mut self) -> Result<(), Failure> {
        self.messages.truncate(self.told);
        Ok(self.session.restart()?)
    }
}

/// Reads a line; `None` at the end of the input.
fn read_line() -> Result<Option<String>, Failure> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        eprint!("> ");
    }
    let mut line = String::new();
    match stdin.lock().read_line(&mut line) {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(line)),
        Err(error) => Err(Failure::new(format!("cannot read from stdin: {error}"))),
    }
}
