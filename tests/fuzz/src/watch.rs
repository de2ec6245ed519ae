//! One run of the command, with limits, and the resources that it took.
//!
//! The peak memory of a child is known exactly where a process has had one child alone. So the
//! fuzzer starts itself once more for each run, as the only parent of that run.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, UsageWho, getrusage, setrlimit};

/// The first argument of a fuzzer that only watches.
pub const SUBCOMMAND: &str = "watch-one-run";

/// Far above what is judged, and far below what would disturb the machine.
const MOST_ADDRESS_SPACE: u64 = 8 << 30;
const LARGEST_FILE: u64 = 1 << 30;

/// Until then nobody asks what a run waited for.
const SOON: Duration = Duration::from_millis(200);
/// Limit of wall time, however busy the machine is.
const LONGEST: Duration = Duration::from_secs(150);

/// Exit status and resources of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Took {
    /// Exit code, or none where a signal ended it.
    pub code: Option<i32>,
    /// That signal; 9 also where it ran for too long.
    pub signal: Option<i32>,
    /// Wall time, without what it waited for a processor that others had.
    pub seconds: f64,
    /// Largest resident memory, in MB (10^6 bytes).
    pub megabytes: f64,
}

impl fmt::Display for Took {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (code, signal) = (self.code.unwrap_or(-1), self.signal.unwrap_or(-1));
        write!(f, "{code} {signal} {} {}", self.seconds, self.megabytes)
    }
}

impl Took {
    /// Reads what `Display` wrote.
    pub fn parse(text: &str) -> Option<Self> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let [code, signal, seconds, megabytes] = words.as_slice() else {
            return None;
        };
        let known = |word: &str| word.parse().ok().filter(|&number: &i32| number >= 0);
        Some(Took {
            code: known(code),
            signal: known(signal),
            seconds: seconds.parse().ok()?,
            megabytes: megabytes.parse().ok()?,
        })
    }
}

/// `watch-one-run REPORT SECONDS PROGRAM ARGUMENT...`: runs the program and writes a `Took` into
/// REPORT. The program is killed after SECONDS, those apart in which others had the processor.
pub fn main(arguments: &[String]) -> ExitCode {
    let [report, seconds, program, rest @ ..] = arguments else {
        return ExitCode::from(2);
    };
    let limit = Duration::from_secs_f64(seconds.parse().unwrap_or(1.0));
    let limits = [
        (Resource::RLIMIT_AS, MOST_ADDRESS_SPACE),
        (Resource::RLIMIT_FSIZE, LARGEST_FILE),
        (Resource::RLIMIT_CORE, 0),
    ];
    for (resource, limit) in limits {
        setrlimit(resource, limit, limit).expect("limits can be lowered");
    }
    let begin = Instant::now();
    let mut waited = Duration::ZERO;
    let mut command = Command::new(program);
    let mut child = command
        .args(rest)
        .stdin(Stdio::null())
        .spawn()
        .expect("the command starts");
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            break status;
        }
        if begin.elapsed() > SOON {
            waited = waited.max(waited_for_a_processor(child.id()));
            std::thread::sleep(Duration::from_millis(10));
        }
        if begin.elapsed().saturating_sub(waited) > limit || begin.elapsed() > LONGEST {
            child.kill().expect("a child can be killed");
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    let seconds = begin.elapsed().saturating_sub(waited).as_secs_f64();
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).expect("the system counts");
    let took = Took {
        code: status.code(),
        signal: status.signal(),
        seconds,
        // Linux counts in 1024 bytes.
        megabytes: usage.max_rss() as f64 * 1024.0 / 1e6,
    };
    std::fs::write(report, took.to_string()).expect("the report can be written");
    ExitCode::SUCCESS
}

/// Time that the threads of a process were runnable but not running; the kernel counts it in
/// `schedstat`, in nanoseconds, as the second number.
fn waited_for_a_processor(process: u32) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task"));
    let waited = tasks.into_iter().flatten().flatten().filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    Duration::from_nanos(waited.sum())
}
