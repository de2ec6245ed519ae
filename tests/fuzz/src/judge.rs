//! Faults that no input may cause.

use crate::watch::Took;

/// A run and all that can be seen of it.
#[derive(Debug)]
pub struct Seen {
    /// Exit status and resources.
    pub took: Took,
    /// Its standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
    /// Files outside of its folder that it made, changed or removed.
    pub escaped: Vec<String>,
    /// Files that it left and that may only exist after success.
    pub left: Vec<String>,
    /// Whether the run must fail, since the input does not match a hash that vouches for it.
    pub must_fail: bool,
}

/// Seconds and megabytes that a run may take.
pub const MOST_SECONDS: f64 = 10.0;
/// See `MOST_SECONDS`.
pub const MOST_MEGABYTES: f64 = 1000.0;
const LONGEST_ERROR: usize = 4096;
const LONGEST_LINE: usize = 1200;

/// Everything that is wrong, in words.
pub fn faults(seen: &Seen) -> Vec<String> {
    let took = &seen.took;
    let mut faults = Vec::new();
    if took.seconds > MOST_SECONDS {
        faults.push(format!("slow: {:.1} s", took.seconds));
    } else {
        match (took.code, took.signal) {
            (Some(0..=2), _) => {}
            (Some(code), _) => faults.push(format!("exit code {code}")),
            (None, signal) => faults.push(format!("signal {}", signal.unwrap_or(0))),
        }
    }
    if took.megabytes > MOST_MEGABYTES {
        faults.push(format!("memory: {:.0} MB", took.megabytes));
    }
    let panicked = seen.stderr.contains("panicked at") || seen.stdout.contains("panicked at");
    if panicked || seen.stderr.lines().any(|line| line.starts_with("thread '")) {
        faults.push("a panic was printed".to_string());
    }
    if took.code == Some(2) {
        let errors = seen
            .stderr
            .lines()
            .filter(|line| line.starts_with("error: "));
        match errors.count() {
            1 => {}
            count => faults.push(format!("{count} error lines")),
        }
        if !seen.left.is_empty() {
            faults.push(format!("left behind: {}", seen.left.join(", ")));
        }
    }
    if took.code != Some(0) {
        if seen.stderr.len() > LONGEST_ERROR {
            faults.push(format!("{} bytes on stderr", seen.stderr.len()));
        }
        let longest = seen.stderr.lines().map(str::len).max().unwrap_or(0);
        if longest > LONGEST_LINE {
            faults.push(format!("a line of {longest} bytes"));
        }
    }
    let signs = |c: &char| c.is_control() && !matches!(c, '\n' | '\t' | '\r');
    if let Some(sign) = seen.stderr.chars().find(signs) {
        faults.push(format!("control character {sign:?} on stderr"));
    }
    if seen.must_fail && took.code == Some(0) {
        faults.push("accepted what its hash does not vouch for".to_string());
    }
    if !seen.escaped.is_empty() {
        faults.push(format!("wrote outside: {}", seen.escaped.join(", ")));
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(code: i32, stderr: &str) -> Seen {
        Seen {
            took: Took {
                code: Some(code),
                signal: None,
                seconds: 0.1,
                megabytes: 20.0,
            },
            stdout: String::new(),
            stderr: stderr.to_string(),
            escaped: Vec::new(),
            left: Vec::new(),
            must_fail: false,
        }
    }

    #[test]
    fn a_refusal_in_one_line_is_right() {
        let none: [String; 0] = [];
        assert_eq!(faults(&seen(0, "")), none);
        assert_eq!(faults(&seen(1, "2 layers are above it\n")), none);
        assert_eq!(faults(&seen(2, "error: `x` is no number\nhint: a\n")), none);
    }

    #[test]
    fn each_fault_is_named() {
        let one = |seen: &Seen| match faults(seen).as_slice() {
            [fault] => fault.clone(),
            faults => panic!("{faults:?}"),
        };
        assert_eq!(one(&seen(101, "")), "exit code 101");
        assert_eq!(one(&seen(2, "")), "0 error lines");
        assert_eq!(one(&seen(2, "error: a\nerror: b\n")), "2 error lines");
        assert_eq!(
            one(&seen(0, "thread 'main' (7) panicked at x\n")),
            "a panic was printed"
        );
        assert_eq!(
            one(&seen(0, "name \u{1b}[31m\n")),
            "control character '\\u{1b}' on stderr"
        );
        let long = format!("error: {}\n", "x".repeat(2000));
        assert_eq!(one(&seen(2, &long)), "a line of 2007 bytes");
        let many = format!("error: x\n{}", "warning: y\n".repeat(1000));
        assert_eq!(one(&seen(2, &many)), "11009 bytes on stderr");

        let mut slow = seen(0, "");
        slow.took = Took {
            code: None,
            signal: Some(9),
            seconds: 20.0,
            megabytes: 20.0,
        };
        assert_eq!(one(&slow), "slow: 20.0 s");
        slow.took.seconds = 1.0;
        assert_eq!(one(&slow), "signal 9");
        let mut large = seen(0, "");
        large.took.megabytes = 1500.0;
        assert_eq!(one(&large), "memory: 1500 MB");
        let mut escaped = seen(0, "");
        escaped.escaped = vec!["canary/x".to_string()];
        assert_eq!(one(&escaped), "wrote outside: canary/x");
        let mut left = seen(2, "error: x\n");
        left.left = vec!["out".to_string()];
        assert_eq!(one(&left), "left behind: out");
        let mut believed = seen(0, "");
        believed.must_fail = true;
        assert_eq!(one(&believed), "accepted what its hash does not vouch for");
    }
}
