//! Templates of strangers, rendered in a process of their own.
//!
//! A template is a program. Its steps can be counted and its text can be cut off, but one step may
//! double a string, sort a product of lists or fold a constant of gigabytes, and no library stops in
//! the middle of that. So this program starts itself once more, with little memory, and ends that
//! process when a text takes too long. It costs 10 ms for a conversation, and nothing for each of its
//! turns.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, SystemTime};

use gptq_inference::{ChatTemplate, Message};
use gptq_report::CardInfo;
use gptq_types::{Branch, quietly};
use serde::{Deserialize, Serialize};

use crate::Verdict;
use crate::failure::Failure;
use crate::output::print;

/// The subcommand that renders; it is not shown.
pub const SUBCOMMAND: &str = "render-templates";

/// Address space of the process that renders.
const MAX_MEMORY_KIB: u64 = 768 << 10;
/// For one text. A long conversation takes milliseconds.
const MAX_SECONDS: u64 = 6;

/// A line of the process's stdin; each is answered by one line.
#[derive(Serialize, Deserialize)]
enum Request {
    /// The template of the conversations that follow. The answer is empty.
    Chat {
        source: String,
        special_tokens: Vec<(String, String)>,
        now: SystemTime,
    },
    /// A conversation as its text, up to where the answer begins.
    Conversation(Vec<Message>),
    /// A whole conversation as its text.
    Transcript(Vec<Message>),
    /// A model card by a template.
    Card {
        source: String,
        info: Box<CardInfo>,
        model_type: String,
        branches: Vec<Branch>,
    },
}

type Answer = Result<String, String>;

/// The chat template of a checkpoint.
pub struct ChatRenderer {
    process: Mutex<Process>,
}

impl ChatRenderer {
    /// Parses `source`; `special_tokens` are variables in addition to the messages, `now` is the time that
    /// `strftime_now` gives.
    pub fn new(
        source: String,
        special_tokens: Vec<(String, String)>,
        now: SystemTime,
    ) -> Result<Self, Failure> {
        let mut process = Process::start("the chat template")?;
        process.ask(&Request::Chat {
            source,
            special_tokens,
            now,
        })?;
        Ok(ChatRenderer {
            process: Mutex::new(process),
        })
    }

    /// The text of a conversation, up to where the assistant's answer begins.
    pub fn render(&self, messages: &[Message]) -> Result<String, Failure> {
        let mut process = self.process.lock().expect("asking does not panic");
        process.ask(&Request::Conversation(messages.to_vec()))
    }

    /// The text of a whole conversation, no answer begun after it.
    pub fn transcript(&self, messages: &[Message]) -> Result<String, Failure> {
        let mut process = self.process.lock().expect("asking does not panic");
        process.ask(&Request::Transcript(messages.to_vec()))
    }
}

/// The card of `branches` by a template of the user's.
pub fn render_card(
    source: String,
    info: &CardInfo,
    model_type: &str,
    branches: &[Branch],
) -> Result<String, Failure> {
    Process::start("the card's template")?.ask(&Request::Card {
        source,
        info: Box::new(info.clone()),
        model_type: model_type.to_string(),
        branches: branches.to_vec(),
    })
}

/// The process that renders; it ends with this value.
struct Process {
    what: &'static str,
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl Process {
    fn start(what: &'static str) -> Result<Self, Failure> {
        let failed =
            |error: std::io::Error| Failure::new(format!("cannot start to render {what}: {error}"));
        let program = std::env::current_exe().map_err(failed)?;
        // The shell sets the limit, since the standard library cannot. A lower one stays in force.
        let script = format!(
            "ulimit -c 0; ulimit -v {MAX_MEMORY_KIB} 2>/dev/null; exec \"$0\" {SUBCOMMAND}"
        );
        let mut child = Command::new("sh")
            .arg("-c")
            .arg(script)
            .arg(program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Ctrl-C is for the answer, not for the template.
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let stdin = child.stdin.take().expect("stdin is a pipe");
        let stdout = BufReader::new(child.stdout.take().expect("stdout is a pipe"));
        let (send, answers) = sync_channel(1);
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Process {
            what,
            child,
            stdin,
            answers,
        })
    }

    fn ask(&mut self, request: &Request) -> Result<String, Failure> {
        let what = self.what;
        let ended = || {
            let limit = MAX_MEMORY_KIB >> 10;
            Failure::new(format!("{what} takes more than {limit} MiB of memory"))
        };
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        (self.stdin.write_all(&line))
            .and_then(|()| self.stdin.flush())
            .map_err(|_| ended())?;
        match self.answers.recv_timeout(Duration::from_secs(MAX_SECONDS)) {
            Ok(answer) => serde_json::from_str::<Answer>(&answer)?.map_err(Failure::new),
            Err(RecvTimeoutError::Timeout) => Err(Failure::new(format!(
                "{what} takes more than {MAX_SECONDS} seconds"
            ))),
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The process may have exited already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Renders what stdin asks for until it ends.
pub fn serve() -> Result<Verdict, Failure> {
    let mut chat = None;
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|error| Failure::new(error.to_string()))?;
        let request: Request = serde_json::from_str(&line)?;
        let answer: Answer = quietly(|| answer(request, &mut chat))
            .unwrap_or_else(|panic| Err(format!("the template fails: {panic}")));
        print(&format!("{}\n", serde_json::to_string(&answer)?))?;
    }
    Ok(Verdict::Yes)
}

fn answer(request: Request, chat: &mut Option<ChatTemplate>) -> Answer {
    match request {
        Request::Chat {
            source,
            special_tokens,
            now,
        } => {
            let template = ChatTemplate::parse(&source, special_tokens, now);
            *chat = Some(template.map_err(|error| error.to_string())?);
            Ok(String::new())
        }
        Request::Conversation(messages) => parsed(chat)?
            .render(&messages)
            .map_err(|error| error.to_string()),
        Request::Transcript(messages) => parsed(chat)?
            .transcript(&messages)
            .map_err(|error| error.to_string()),
        Request::Card {
            source,
            info,
            model_type,
            branches,
        } => gptq_report::card(&info, &model_type, &branches, Some(&source))
            .map_err(|error| error.to_string()),
    }
}

fn parsed(chat: &Option<ChatTemplate>) -> Result<&ChatTemplate, String> {
    let missing = || "a conversation came before its template".to_string();
    chat.as_ref().ok_or_else(missing)
}
