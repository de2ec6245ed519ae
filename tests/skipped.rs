//! Not a test: the last test binary that `cargo test --workspace` runs, since cargo orders packages by
//! name and this belongs to the last. It lists the skipped tests of the run, whose own messages cargo
//! shows only on request.
#![allow(clippy::print_stdout)]

#[path = "support/data.rs"]
mod data;

use std::collections::BTreeSet;

fn main() {
    let text = std::fs::read_to_string(data::record()).unwrap_or_default();
    for cause in data::Cause::ALL {
        // one test may ask for several files
        let tests: BTreeSet<&str> = text
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .filter(|(words, _)| *words == cause.words())
            .map(|(_, test)| test)
            .collect();
        if cause == data::Cause::Data || !tests.is_empty() {
            println!("{}", closing_line(cause, &tests));
        }
    }
    // absent where nothing was skipped
    let _ = std::fs::remove_file(data::record());
}

fn closing_line(cause: data::Cause, tests: &BTreeSet<&str>) -> String {
    let names: Vec<&str> = tests.iter().copied().collect();
    match names.len() {
        0 => "no test was skipped for want of data".to_string(),
        count => {
            let noun = if count == 1 { "test" } else { "tests" };
            let names = names.join(", ");
            format!("skipped, since {}: {count} {noun}: {names}", cause.words())
        }
    }
}
