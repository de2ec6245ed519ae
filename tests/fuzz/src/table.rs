//! Statistics over all runs of a target.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::worker::Verdict;

#[derive(Clone, Copy, Debug, Default)]
struct Row {
    runs: usize,
    exits: [usize; 3],
    other: usize,
    faults: usize,
    seconds: f64,
    megabytes: f64,
}

/// A row for each target.
#[derive(Debug, Default)]
pub struct Table(BTreeMap<&'static str, Row>);

impl Table {
    /// Counts a run.
    pub fn add(&mut self, target: &'static str, verdict: &Verdict) {
        let row = self.0.entry(target).or_default();
        row.runs += 1;
        match verdict.took.code {
            Some(code @ 0..=2) => row.exits[code as usize] += 1,
            _ => row.other += 1,
        }
        row.faults += usize::from(!verdict.faults.is_empty());
        row.seconds = row.seconds.max(verdict.took.seconds);
        row.megabytes = row.megabytes.max(verdict.took.megabytes);
    }

    /// Runs with a fault.
    pub fn faults(&self) -> usize {
        self.0.values().map(|row| row.faults).sum()
    }

    /// Formats the table as text.
    pub fn render(&self) -> String {
        let mut text = String::from(
            "| target | runs | exit 0 | exit 1 | exit 2 | other | faults | max s | max MB |\n|---|---|---|---|---|---|---|---|---|\n",
        );
        let mut all = Row::default();
        for (target, row) in &self.0 {
            line(&mut text, target, row);
            all.runs += row.runs;
            (0..3).for_each(|exit| all.exits[exit] += row.exits[exit]);
            all.other += row.other;
            all.faults += row.faults;
            all.seconds = all.seconds.max(row.seconds);
            all.megabytes = all.megabytes.max(row.megabytes);
        }
        line(&mut text, "all", &all);
        text
    }
}

fn line(text: &mut String, target: &str, row: &Row) {
    let [done, found, refused] = row.exits;
    let Row {
        runs,
        other,
        faults,
        seconds,
        megabytes,
        ..
    } = row;
    writeln!(
        text,
        "| {target} | {runs} | {done} | {found} | {refused} | {other} | {faults} | {seconds:.2} | {megabytes:.0} |"
    )
    .expect("a string takes all");
}
