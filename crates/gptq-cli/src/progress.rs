//! Bars on a terminal, plain lines elsewhere; always on stderr.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Plain lines come no more often than this.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress over countable steps, with the time left.
pub struct Steps {
    what: String,
    all: usize,
    bar: Option<ProgressBar>,
    start: Instant,
    first: usize,
    last_line: Instant,
}

impl Steps {
    /// Begins at `done` of `all` steps.
    pub fn new(what: &str, done: usize, all: usize) -> Self {
        Self::begin(what, done, all, std::io::stderr().is_terminal())
    }

    /// Begins at 0 of `all` steps; `plain` prints lines instead of a bar, for work that runs concurrently.
    pub fn beside(what: &str, all: usize, plain: bool) -> Self {
        Self::begin(what, 0, all, !plain && std::io::stderr().is_terminal())
    }

    fn begin(what: &str, done: usize, all: usize, drawn: bool) -> Self {
        let bar = drawn.then(|| {
            let style =
                "{prefix} [{bar:30}] {pos}/{len} {elapsed_precise}, left {eta_precise} {msg}";
            let style = ProgressStyle::with_template(style)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> ");
            let bar = ProgressBar::new(all as u64).with_style(style);
            bar.set_prefix(what.to_string());
            bar.set_position(done as u64);
            bar.reset_eta();
            bar
        });
        Steps {
            what: what.to_string(),
            all,
            bar,
            start: Instant::now(),
            first: done,
            last_line: Instant::now(),
        }
    }

    /// `done` of all steps are behind us.
    pub fn set(&mut self, done: usize) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            return;
        }
        if done < self.all && self.last_line.elapsed() < LINE_EVERY {
            return;
        }
        self.last_line = Instant::now();
        let elapsed = self.start.elapsed();
        let each = elapsed.as_secs_f64() / (done - self.first).max(1) as f64;
        let left = Duration::from_secs_f64(each * (self.all - done) as f64);
        eprintln!(
            "{}: {done}/{} after {}, left {}",
            self.what,
            self.all,
            clock(elapsed),
            clock(left)
        );
    }

    /// Shows a message next to the bar.
    pub fn say(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_string());
        }
    }

    /// Takes the bar away.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!(
        "{}:{:02}:{:02}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

/// Progress over the bytes of several files.
pub struct Bytes {
    bar: Option<ProgressBar>,
    named: String,
}

impl Bytes {
    /// Nothing is shown before the first byte.
    pub fn new() -> Self {
        Bytes {
            bar: None,
            named: String::new(),
        }
    }

    /// `done` of `all` bytes of `file`.
    pub fn show(&mut self, file: &str, done: u64, all: u64) {
        if !std::io::stderr().is_terminal() {
            if self.named != file {
                eprintln!("{file}: {all} bytes");
                self.named = file.to_string();
            }
            return;
        }
        let bar = self.bar.get_or_insert_with(|| {
            let style = "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec}, left {eta}";
            let style = ProgressStyle::with_template(style)
                .unwrap_or_else(|_| ProgressStyle::default_bar())
                .progress_chars("=> ");
            ProgressBar::new(all).with_style(style)
        });
        bar.set_length(all);
        bar.set_prefix(file.to_string());
        bar.set_position(done);
    }

    /// Takes the bar away.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
