//! The `gptq` command: arguments, progress, hints, exit codes. It wires the libraries together; the
//! order of work of `matrix`, `eval` and `regress` is kept here too, their arithmetic is not.
//!
//! Exit codes: 0 done; 1 ran, and the answer is no (`matrix`: a branch is missing; `doctor`: a GPU
//! cannot be used; `inspect`, `verify`, `regress`, `--max-degraded`); 2 usage, input or internal error;
//! 130 broken off by Ctrl-C.
#![allow(clippy::print_stderr)]

mod args;
mod calibrate;
mod commands;
mod datasets;
mod device;
mod divergence;
mod failure;
mod forecast;
mod interrupt;
mod isolation;
mod matrix;
mod models;
mod output;
mod progress;
mod records;
mod regression;
mod scored;
mod scoring;
mod speed;
mod unread_keys;
mod voice;
mod watch;
mod window_bos;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches};

use args::{Cli, Command, check, idle_flags};
use failure::Failure;
use gptq_types::outside_name::shown;

/// Longest line about an error. Texts of libraries and names from files are cut where they are quoted;
/// what slips through there neither fills the terminal nor steers it.
const LINE_CHARACTERS: usize = 1000;

/// The outcome of a command that ran.
pub(crate) enum Verdict {
    Yes,
    No,
    /// The user interrupted it.
    Interrupted,
}

fn main() -> ExitCode {
    let matches = Cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    for line in idle_flags(&cli, &matches) {
        eprintln!("warning: {line}");
    }
    match run(cli) {
        Ok(Verdict::Yes) => ExitCode::SUCCESS,
        Ok(Verdict::No) => ExitCode::from(1),
        Ok(Verdict::Interrupted) => ExitCode::from(interrupt::EXIT_CODE),
        Err(failure) => {
            eprintln!("error: {}", shown(&failure.text, LINE_CHARACTERS));
            if let Some(hint) = failure.hint {
                eprintln!("hint: {}", shown(&hint, LINE_CHARACTERS));
            }
            ExitCode::from(2)
        }
    }
}

fn run(cli: Cli) -> Result<Verdict, Failure> {
    check(&cli)?;
    if let Some(threads) = cli.threads {
        rayon::ThreadPoolBuilder::new()
            .num_threads(threads.into())
            .build_global()
            .map_err(|error| Failure::new(error.to_string()))?;
    }
    match cli.command {
        Command::Quantize(args) => commands::quantize::run(&args),
        Command::Matrix(args) => commands::matrix::run(&args),
        Command::Card(args) => commands::card::run(&args),
        Command::Pull(args) => commands::pull::run(&args),
        Command::Push(args) => commands::push::run(&args),
        Command::Import(args) => commands::import::run(&args),
        Command::Synth(args) => commands::synth::run(&args),
        Command::Generate(args) => commands::generate::run(&args),
        Command::Chat(args) => commands::chat::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Verify(args) => commands::verify::run(&args),
        Command::Regress(args) => commands::regress::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Report(args) => commands::report::run(&args),
        Command::Doctor => commands::doctor::run(),
        Command::RenderTemplates => isolation::serve(),
    }
}
