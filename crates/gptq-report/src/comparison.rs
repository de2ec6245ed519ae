//! Checkpoints side by side.

use gptq_types::{EvalRecord, PairedDifference, Speed, kl};

use crate::size;

/// Columns of the table of positions, at most: 32 would not fit a page.
const POSITION_COLUMNS: usize = 8;

/// A Markdown table, a row a checkpoint, with the protocol above it; a second one where the
/// divergence is known by position. The first row is what KL divergence, agreement and differences
/// are relative to. A column without a value is left out.
///
/// Records of several texts come text after text, each with the same checkpoints: each text has
/// columns of its own.
pub fn comparison(records: &[EvalRecord]) -> String {
    let texts: Vec<&[EvalRecord]> = records.chunk_by(|a, b| a.text == b.text).collect();
    let Some(&first) = texts.first() else {
        return String::new();
    };
    let mut out = String::new();
    for text in &texts {
        out += &format!("{}\n\n", of_text(&text[0], &text[0].protocol));
    }
    let mut columns = vec![
        column(first, "checkpoint", &|record| record.model.clone()),
        column(first, "kind", &|record| record.kind.clone()),
        column(first, "size", &|record| size(record.weight_bytes)),
    ];
    for text in &texts {
        columns.extend(scores(text));
    }
    columns.extend(tasks(first));
    columns.extend(speeds(first));
    out += &table(columns);
    if let Some(speed) = first.iter().find_map(|record| record.speed.as_ref()) {
        out += &format!(
            "\nSpeed on {}: a prompt of {} tokens, then new ones to {}.\n",
            speed.device,
            speed.prompt_tokens,
            sequences(speed.batch)
        );
    }
    for text in &texts {
        let compared: Vec<&EvalRecord> = (text.iter())
            .filter(|record| !record.kl_by_position.is_empty())
            .collect();
        if !compared.is_empty() {
            let head = of_text(&text[0], "KL, nats, by token of the window:");
            out += &format!("\n{head}\n\n{}", positions(&compared));
        }
    }
    out
}

/// Words about a text, behind its name where there are several.
fn of_text(record: &EvalRecord, words: &str) -> String {
    match record.text.as_str() {
        "" => words.to_string(),
        name => format!("{name}: {words}"),
    }
}

fn column(records: &[EvalRecord], head: &str, cell: &dyn Fn(&EvalRecord) -> String) -> Column {
    Column {
        head: head.to_string(),
        cells: records.iter().map(cell).collect(),
    }
}

/// Columns of the scores on one text.
fn scores(records: &[EvalRecord]) -> Vec<Column> {
    let first = &records[0];
    let scored = |head: &str, cell: &dyn Fn(&EvalRecord) -> String| {
        column(records, &of_text(first, head), cell)
    };
    vec![
        scored("perplexity", &perplexity),
        scored("vs first", &|record| match std::ptr::eq(record, first) {
            true => String::new(),
            false => percent_change(record, first),
        }),
        scored("KL, nats", &|record| decimals(record.kl.map(kl))),
        scored("KL 99.9 %", &|record| decimals(record.kl_p999.map(kl))),
        scored("same top token", &|record| {
            (record.top1_agreement).map_or(String::new(), |share| format!("{:.1} %", 100.0 * share))
        }),
        scored("ln ppl less first (95 %)", &|record| {
            (record.nll_difference.as_ref()).map_or(String::new(), interval)
        }),
        scored("noise floor", &|record| {
            decimals(record.nll_difference.map(|found| found.noise_floor()))
        }),
    ]
}

/// A column for each task, two where choices are also weighed by their length.
fn tasks(records: &[EvalRecord]) -> Vec<Column> {
    let mut names: Vec<&str> = Vec::new();
    for found in records.iter().flat_map(EvalRecord::accuracies) {
        if !names.contains(&found.task.as_str()) {
            names.push(&found.task);
        }
    }
    let mut columns = Vec::new();
    for name in names {
        let of = |record: &EvalRecord| {
            record
                .accuracies()
                .find(|found| found.task == name)
                .cloned()
        };
        let normed = |record: &EvalRecord| of(record)?.acc_norm;
        let head = match records.iter().any(|record| normed(record).is_some()) {
            true => format!("{name}, acc"),
            false => name.to_string(),
        };
        columns.push(column(records, &head, &|record| {
            of(record).map_or(String::new(), |found| share(found.share, found.stderr))
        }));
        columns.push(column(records, &format!("{name}, acc_norm"), &|record| {
            normed(record).map_or(String::new(), |found| share(found.share, found.stderr))
        }));
    }
    columns
}

fn speeds(records: &[EvalRecord]) -> [Column; 3] {
    let of = |head: &str, cell: fn(&Speed) -> String| {
        column(records, head, &|record| {
            record.speed.as_ref().map_or(String::new(), cell)
        })
    };
    [
        of("prompt, tokens/s", |speed| {
            format!("{:.0}", speed.prefill_tokens_per_second)
        }),
        of("new tokens/s", |speed| {
            format!("{:.1}", speed.decode_tokens_per_second)
        }),
        of("peak memory", |speed| size(speed.peak_memory)),
    ]
}

fn sequences(batch: usize) -> String {
    match batch {
        1 => "one sequence".to_string(),
        _ => format!("{batch} sequences"),
    }
}

struct Column {
    head: String,
    cells: Vec<String>,
}

fn table(mut columns: Vec<Column>) -> String {
    columns.retain(|column| column.cells.iter().any(|cell| !cell.is_empty()));
    let rows = columns.first().map_or(0, |column| column.cells.len());
    let line = |cell: &dyn Fn(&Column) -> String| -> String {
        let cells: Vec<String> = columns.iter().map(cell).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut out = line(&|column| column.head.clone());
    out += &format!("|{}\n", "---|".repeat(columns.len()));
    for row in 0..rows {
        out += &line(&|column| column.cells[row].clone());
    }
    out
}

fn positions(compared: &[&EvalRecord]) -> String {
    let shortest = compared
        .iter()
        .map(|record| record.kl_by_position.len())
        .min();
    let count = POSITION_COLUMNS.min(shortest.unwrap_or(0));
    let seq_len = compared
        .iter()
        .map(|record| record.seq_len)
        .max()
        .unwrap_or(0);
    let mut columns = vec![Column {
        head: "checkpoint".to_string(),
        cells: compared.iter().map(|record| record.model.clone()).collect(),
    }];
    columns.extend((0..count).map(|index| {
        Column {
            head: format!("to {}", (index + 1) * seq_len / count),
            cells: (compared.iter())
                .map(|record| decimals(Some(kl(part(&record.kl_by_position, index, count)))))
                .collect(),
        }
    }));
    table(columns)
}

/// Mean of the `index`th of `count` runs of `values`.
fn part(values: &[f64], index: usize, count: usize) -> f64 {
    let bound = |index: usize| index * values.len() / count;
    let part = &values[bound(index)..bound(index + 1)];
    part.iter().sum::<f64>() / part.len() as f64
}

/// With one standard error of the mean log-likelihood, carried over to the perplexity.
fn perplexity(record: &EvalRecord) -> String {
    let spread = record.perplexity * record.nll_stderr;
    format!("{:.3} ± {spread:.3}", record.perplexity)
}

fn percent_change(record: &EvalRecord, first: &EvalRecord) -> String {
    let ratio = record.perplexity / first.perplexity;
    format!("{:+.2} %", 100.0 * (ratio - 1.0))
}

fn interval(found: &PairedDifference) -> String {
    format!(
        "{:+.4} ({:+.4} to {:+.4})",
        found.mean, found.low, found.high
    )
}

fn share(share: f64, stderr: f64) -> String {
    format!("{:.1} ± {:.1} %", 100.0 * share, 100.0 * stderr)
}

fn decimals(value: Option<f64>) -> String {
    value.map_or(String::new(), |value| format!("{value:.4}"))
}

#[cfg(test)]
mod tests {
    use gptq_types::{Accuracy, Share};

    use super::*;

    fn record(model: &str, perplexity: f64, kl: Option<f64>) -> EvalRecord {
        EvalRecord {
            model: model.into(),
            kind: "k".into(),
            protocol: "text, 2 windows of 8".into(),
            token_sha256: "0".into(),
            windows: 2,
            seq_len: 8,
            nll: perplexity.ln(),
            nll_stderr: 0.01,
            perplexity,
            kl,
            top1_agreement: kl.map(|_| 0.875),
            weight_bytes: 123_456_789,
            seconds: 1.0,
            ..EvalRecord::default()
        }
    }

    #[test]
    fn rows_are_relative_to_the_first() {
        let table = comparison(&[record("a", 20.0, None), record("b", 21.0, Some(0.0512))]);
        let want = "text, 2 windows of 8\n\n\
            | checkpoint | kind | size | perplexity | vs first | KL, nats | same top token |\n\
            |---|---|---|---|---|---|---|\n\
            | a | k | 123 MB | 20.000 ± 0.200 |  |  |  |\n\
            | b | k | 123 MB | 21.000 ± 0.210 | +5.00 % | 0.0512 | 87.5 % |\n";
        assert_eq!(table, want);
    }

    #[test]
    fn a_column_without_values_is_left_out() {
        let table = comparison(&[record("a", 20.0, None)]);
        let want = "text, 2 windows of 8\n\n\
            | checkpoint | kind | size | perplexity |\n\
            |---|---|---|---|\n\
            | a | k | 123 MB | 20.000 ± 0.200 |\n";
        assert_eq!(table, want);
    }

    #[test]
    fn tails_differences_and_answers_have_columns() {
        let accuracy = |share| Accuracy {
            task: "lambada".into(),
            examples: 50,
            share,
            stderr: 0.07,
            acc_norm: None,
        };
        let first = EvalRecord {
            accuracy: Some(accuracy(0.42)),
            ..record("a", 20.0, None)
        };
        let second = EvalRecord {
            kl_p999: Some(0.7),
            kl_by_position: (0..32).map(|part| 0.1 * f64::from(part / 4)).collect(),
            nll_difference: Some(PairedDifference {
                mean: 0.0488,
                low: 0.0388,
                high: 0.0588,
            }),
            accuracy: Some(accuracy(0.4)),
            seq_len: 2048,
            ..record("b", 21.0, Some(0.0512))
        };
        let table = comparison(&[first, second]);
        let want = "text, 2 windows of 8\n\n\
            | checkpoint | kind | size | perplexity | vs first | KL, nats | KL 99.9 % \
            | same top token | ln ppl less first (95 %) | noise floor | lambada |\n\
            |---|---|---|---|---|---|---|---|---|---|---|\n\
            | a | k | 123 MB | 20.000 ± 0.200 |  |  |  |  |  |  | 42.0 ± 7.0 % |\n\
            | b | k | 123 MB | 21.000 ± 0.210 | +5.00 % | 0.0512 | 0.7000 | 87.5 % \
            | +0.0488 (+0.0388 to +0.0588) | 0.0100 | 40.0 ± 7.0 % |\n\n\
            KL, nats, by token of the window:\n\n\
            | checkpoint | to 256 | to 512 | to 768 | to 1024 | to 1280 | to 1536 | to 1792 \
            | to 2048 |\n\
            |---|---|---|---|---|---|---|---|---|\n\
            | b | 0.0000 | 0.1000 | 0.2000 | 0.3000 | 0.4000 | 0.5000 | 0.6000 | 0.7000 |\n";
        assert_eq!(table, want);
    }

    #[test]
    fn tasks_have_one_column_or_two() {
        let accuracy = |task: &str, share, acc_norm: Option<f64>| Accuracy {
            task: task.into(),
            examples: 100,
            share,
            stderr: 0.05,
            acc_norm: acc_norm.map(|share| Share {
                share,
                stderr: 0.04,
            }),
        };
        let first = EvalRecord {
            accuracy: Some(accuracy("lambada", 0.5, None)),
            tasks: vec![
                accuracy("arc", 0.25, Some(0.375)),
                accuracy("wino", 0.625, None),
            ],
            ..record("a", 20.0, None)
        };
        let second = EvalRecord {
            tasks: vec![accuracy("wino", 0.75, None)],
            ..record("b", 20.0, None)
        };
        let want = "text, 2 windows of 8\n\n\
            | checkpoint | kind | size | perplexity | vs first | lambada | arc, acc | arc, acc_norm \
            | wino |\n\
            |---|---|---|---|---|---|---|---|---|\n\
            | a | k | 123 MB | 20.000 ± 0.200 |  | 50.0 ± 5.0 % | 25.0 ± 5.0 % | 37.5 ± 4.0 % \
            | 62.5 ± 5.0 % |\n\
            | b | k | 123 MB | 20.000 ± 0.200 | +0.00 % |  |  |  | 75.0 ± 5.0 % |\n";
        assert_eq!(comparison(&[first, second]), want);
    }

    #[test]
    fn each_of_several_texts_has_its_columns() {
        let of = |text: &str, model: &str, perplexity, kl: Option<f64>| EvalRecord {
            text: text.into(),
            protocol: format!("`{text}`, 2 windows of 8"),
            kl_by_position: kl.into_iter().collect(),
            ..record(model, perplexity, kl)
        };
        let table = comparison(&[
            of("one", "a", 20.0, None),
            of("one", "b", 21.0, Some(0.0512)),
            of("two", "a", 10.0, None),
            of("two", "b", 12.0, Some(0.25)),
        ]);
        let want = "one: `one`, 2 windows of 8\n\n\
            two: `two`, 2 windows of 8\n\n\
            | checkpoint | kind | size | one: perplexity | one: vs first | one: KL, nats \
            | one: same top token | two: perplexity | two: vs first | two: KL, nats \
            | two: same top token |\n\
            |---|---|---|---|---|---|---|---|---|---|---|\n\
            | a | k | 123 MB | 20.000 ± 0.200 |  |  |  | 10.000 ± 0.100 |  |  |  |\n\
            | b | k | 123 MB | 21.000 ± 0.210 | +5.00 % | 0.0512 | 87.5 % \
            | 12.000 ± 0.120 | +20.00 % | 0.2500 | 87.5 % |\n\n\
            one: KL, nats, by token of the window:\n\n\
            | checkpoint | to 8 |\n\
            |---|---|\n\
            | b | 0.0512 |\n\n\
            two: KL, nats, by token of the window:\n\n\
            | checkpoint | to 8 |\n\
            |---|---|\n\
            | b | 0.2500 |\n";
        assert_eq!(table, want);
    }

    #[test]
    fn speed_has_columns_and_says_of_what() {
        let fast = EvalRecord {
            speed: Some(Speed {
                device: "cpu, 2 threads".into(),
                prompt_tokens: 512,
                prefill_tokens_per_second: 812.4,
                batch: 16,
                decode_tokens_per_second: 75.94,
                peak_memory: 210_000_000,
            }),
            ..record("a", 20.0, None)
        };
        let table = comparison(&[fast, record("b", 20.0, None)]);
        let want = "text, 2 windows of 8\n\n\
            | checkpoint | kind | size | perplexity | vs first | prompt, tokens/s | new tokens/s \
            | peak memory |\n\
            |---|---|---|---|---|---|---|---|\n\
            | a | k | 123 MB | 20.000 ± 0.200 |  | 812 | 75.9 | 210 MB |\n\
            | b | k | 123 MB | 20.000 ± 0.200 | +0.00 % |  |  |  |\n\n\
            Speed on cpu, 2 threads: a prompt of 512 tokens, then new ones to 16 sequences.\n";
        assert_eq!(table, want);
    }

    #[test]
    fn parts_that_do_not_divide_evenly_are_all_counted() {
        assert_eq!(part(&[1.0, 2.0, 3.0], 0, 2), 1.0);
        assert_eq!(part(&[1.0, 2.0, 3.0], 1, 2), 2.5);
    }
}
