//! Tables of a report, before they are HTML or Markdown.

use gptq_types::{Accuracy, ColumnOrder, EvalRecord, QuantSpec, Speed, kl};

use super::data::{Report, Row};
use super::format::{nats, percent, perplexity_with_error, rate, signed_nats};
use super::labels::tail;
use super::layers::{module_against_rtn, modules};
use crate::size;

/// Corner of most tables, whose rows are branches.
pub(super) const BRANCH: &str = "branch";

/// Rows of text; a cell without a value is `None`.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    pub(super) caption: String,
    /// The kind of the rows.
    pub(super) corner: &'static str,
    pub(super) columns: Vec<Column>,
    /// Name of each row, and the number of its mark in figures.
    pub(super) rows: Vec<(String, Option<usize>)>,
}

/// One column, with at least one value.
#[derive(Clone, Debug)]
pub(super) struct Column {
    /// Columns of one kind lie together under it; may be empty.
    pub(super) group: String,
    pub(super) head: String,
    /// Explanation of the head; empty where it is obvious.
    pub(super) meaning: &'static str,
    pub(super) is_number: bool,
    pub(super) cells: Vec<Option<String>>,
}

/// Every row of the report.
struct Builder<'a> {
    report: &'a Report,
    rows: Vec<(Option<usize>, &'a Row)>,
    columns: Vec<Column>,
}

impl<'a> Builder<'a> {
    fn new(report: &'a Report, keep: impl Fn(&Row) -> bool) -> Self {
        let references = report.rows.iter().filter(|row| row.is_reference);
        let branches = report.branches().map(|(number, row)| (Some(number), row));
        let rows = references.map(|row| (None, row)).chain(branches);
        Builder {
            report,
            rows: rows.filter(|(_, row)| keep(row)).collect(),
            columns: Vec::new(),
        }
    }

    fn text(&mut self, group: &str, head: &str, cell: impl Fn(&Row) -> Option<String>) {
        self.add(group, head, "", false, cell);
    }

    fn number(
        &mut self,
        group: &str,
        head: &str,
        meaning: &'static str,
        cell: impl Fn(&Row) -> Option<String>,
    ) {
        self.add(group, head, meaning, true, cell);
    }

    fn add(
        &mut self,
        group: &str,
        head: &str,
        meaning: &'static str,
        is_number: bool,
        cell: impl Fn(&Row) -> Option<String>,
    ) {
        let cells: Vec<Option<String>> = self.rows.iter().map(|(_, row)| cell(row)).collect();
        if cells.iter().any(Option::is_some) {
            self.columns.push(Column {
                group: group.to_string(),
                head: head.to_string(),
                meaning,
                is_number,
                cells,
            });
        }
    }

    fn scores(&mut self, text: usize) {
        let of = |pick: fn(&EvalRecord) -> Option<String>| {
            move |row: &Row| row.score(text).and_then(pick)
        };
        let group = match self.report.reference(text) {
            Some(_) => "accuracy, against the reference",
            None => "accuracy",
        };
        self.number(
            group,
            "perplexity",
            "± one standard error over windows; mostly that of the text, which all rows share, so \
             that differences between rows are surer than it looks",
            of(|r| Some(perplexity_with_error(r.perplexity, r.nll_stderr))),
        );
        self.number(
            group,
            "Δ ln perplexity",
            "difference of the logarithms of the perplexities, in nats a token, with its 95 % \
             confidence interval, window by window against the reference",
            of(|r| {
                let difference = r.nll_difference.as_ref()?;
                Some(format!(
                    "{} [{}, {}]",
                    signed_nats(difference.mean),
                    signed_nats(difference.low),
                    signed_nats(difference.high)
                ))
            }),
        );
        self.number(
            group,
            "noise floor",
            "half of that interval: a difference below it cannot be told from none",
            of(|r| Some(nats(r.nll_difference.as_ref()?.noise_floor()))),
        );
        self.number(
            group,
            "KL, mean",
            "mean divergence of the next-token distribution from the reference's, in nats",
            of(|r| r.kl.map(kl).map(nats)),
        );
        self.number(
            group,
            "KL, 99.9 %",
            "one position in a thousand diverges by more, in nats",
            of(|r| r.kl_p999.map(kl).map(nats)),
        );
        self.number(
            group,
            "same top token",
            "share of positions where the likeliest token is the reference's",
            of(|r| r.top1_agreement.map(percent)),
        );
    }

    /// Measurements that do not depend on the text.
    fn abilities(&mut self) {
        let mut tasks: Vec<String> = Vec::new();
        for (_, row) in &self.rows {
            for found in accuracies(row) {
                if !tasks.contains(&found.task) {
                    tasks.push(found.task.clone());
                }
            }
        }
        for task in tasks {
            let of = |row: &Row| accuracies(row).find(|found| found.task == task).cloned();
            let is_normed = |row: &Row| of(row).is_some_and(|found| found.acc_norm.is_some());
            let head = match task.as_str() {
                "lambada" => "LAMBADA".to_string(),
                _ if self.rows.iter().any(|(_, row)| is_normed(row)) => format!("{task}, acc"),
                _ => task.clone(),
            };
            self.number(
                "tasks",
                &head,
                "share answered right, ± one standard error",
                |row| {
                    let found = of(row)?;
                    Some(share(found.share, found.stderr))
                },
            );
            self.number(
                "tasks",
                &format!("{task}, acc_norm"),
                "the same where each choice's log-likelihood is divided by its characters",
                |row| {
                    let found = of(row)?.acc_norm?;
                    Some(share(found.share, found.stderr))
                },
            );
        }
        let mut devices: Vec<&String> = (self.rows.iter())
            .filter_map(|(_, row)| Some(&speed(row)?.device))
            .collect();
        devices.dedup();
        let group = match devices.as_slice() {
            [device] => format!("speed on {device}, tokens/s"),
            _ => "speed, tokens/s".to_string(),
        };
        let (group, several) = (group.as_str(), devices.len() > 1);
        self.number(
            group,
            "prefill",
            "tokens of a prompt, one sequence",
            |row| Some(rate(speed(row)?.prefill_tokens_per_second)),
        );
        self.number(
            group,
            "decode",
            "new tokens, of all sequences together",
            |row| {
                let speed = speed(row)?;
                let rate = rate(speed.decode_tokens_per_second);
                Some(match speed.batch {
                    0 | 1 => rate,
                    batch => format!("{rate} (batch {batch})"),
                })
            },
        );
        if several {
            self.text(group, "on", |row| Some(speed(row)?.device.clone()));
        }
        self.number(
            "memory",
            "peak",
            "most bytes allocated at a time: GPU memory there, resident memory on a processor",
            |row| Some(size(speed(row)?.peak_memory)),
        );
    }

    fn finish(self, caption: String) -> Table {
        Table {
            caption,
            corner: BRANCH,
            rows: (self.rows.iter())
                .map(|(number, row)| (row.name.clone(), *number))
                .collect(),
            columns: self.columns,
        }
    }
}

/// Accuracies of all texts together: a task's score does not depend on the text.
fn accuracies(row: &Row) -> impl Iterator<Item = &Accuracy> {
    row.scores.iter().flat_map(|s| s.record.accuracies())
}

fn share(share: f64, stderr: f64) -> String {
    format!("{:.1} ± {:.1} %", 100.0 * share, 100.0 * stderr)
}

fn speed(row: &Row) -> Option<&Speed> {
    row.scores.iter().find_map(|s| s.record.speed.as_ref())
}

/// Table of branches: settings, size, and the runtimes that load them.
pub(super) fn branches(report: &Report) -> Table {
    let mut table = Builder::new(report, |_| true);
    let spec = |pick: fn(&QuantSpec) -> String| {
        move |row: &Row| row.run.as_ref().map(|run| pick(&run.spec))
    };
    let settings = "settings";
    table.number(settings, "bits", "", spec(|s| s.bits.to_string()));
    table.number(
        settings,
        "group",
        "input channels that share one scale",
        spec(|s| s.group_size.to_string()),
    );
    table.add(
        settings,
        "act-order",
        "order in which channels are rounded; static and in-group keep g_idx trivial",
        false,
        spec(act_order),
    );
    table.text(
        settings,
        "sym",
        spec(|s| if s.sym { "yes" } else { "no" }.to_string()),
    );
    table.number(
        settings,
        "damp",
        "share of the mean Hessian diagonal that was to be added to it",
        |row| {
            let run = row.run.as_ref()?;
            // Rounding to nearest has no Hessian.
            run.calibration.as_ref()?;
            Some(run.spec.damp_percent.to_string())
        },
    );
    table.text(settings, "dataset", |row| {
        let calibration = row.run.as_ref()?.calibration.as_ref()?;
        Some(dataset_name(&calibration.dataset))
    });
    table.text(settings, "packing", |row| {
        match (&row.run, row.is_reference) {
            (None, false) => row.kind.clone(),
            _ => None,
        }
    });
    table.number("weights", "size", "of all weight files", |row| {
        row.weight_bytes.map(size)
    });
    table.number(
        "weights",
        "bits per weight",
        "of the quantised linears, scales, zeros and g_idx included",
        |row| row.bits_per_weight.map(|bits| format!("{bits:.2}")),
    );
    table.number("runtimes", "loads in", "see the table of runtimes", |row| {
        let loading = row.readings.iter().filter(|r| r.refusal.is_none());
        match row.readings.len() {
            0 => None,
            all => Some(format!("{} of {all}", loading.count())),
        }
    });
    table.finish("What the branches are".to_string())
}

/// Table of scores: the first text, tasks and speed.
pub(super) fn worth(report: &Report) -> Table {
    let told = |row: &Row| {
        row.score(0).is_some() || speed(row).is_some() || accuracies(row).next().is_some()
    };
    let mut table = Builder::new(report, told);
    if !report.texts.is_empty() {
        table.scores(0);
    }
    table.abilities();
    table.finish("What the branches are worth".to_string())
}

/// Scores on a text that is not in the table of branches.
pub(super) fn scores(report: &Report, text: usize) -> Table {
    let mut table = Builder::new(report, |row| row.score(text).is_some());
    table.scores(text);
    let caption = format!("Scores on {}", report.texts[text].protocol);
    table.finish(caption)
}

/// KL divergence in equal parts of the window, a row a part: there are more parts than branches.
pub(super) fn positions(report: &Report, text: usize) -> Table {
    let scored = report.branches().filter_map(|(_, row)| {
        let parts = row.score(text)?.kl_by_position.as_slice();
        (!parts.is_empty()).then_some((row, parts))
    });
    let scored: Vec<(&Row, &[f64])> = scored.collect();
    let parts = scored.iter().map(|(_, parts)| parts.len()).max();
    let count = parts.unwrap_or(0);
    let end = |part: usize| (part + 1) * report.texts[text].seq_len / count;
    Table {
        caption: "Mean KL by position in the window, nats".to_string(),
        corner: "to token",
        columns: (scored.iter())
            .map(|(row, parts)| Column {
                group: String::new(),
                head: row.name.clone(),
                meaning: "",
                is_number: true,
                cells: (0..count)
                    .map(|part| parts.get(part).copied().map(nats))
                    .collect(),
            })
            .collect(),
        rows: (0..count)
            .map(|part| (end(part).to_string(), None))
            .collect(),
    }
}

/// Error of each module, all blocks together, over that of rounding.
pub(super) fn errors_by_module(report: &Report) -> Table {
    let measured = |row: &Row| {
        let run = row.run.as_ref();
        run.is_some_and(|run| run.layers.iter().any(|layer| layer.loss.is_some()))
    };
    let mut table = Builder::new(report, measured);
    for module in modules(report) {
        table.number("", module.title(), "", |row| {
            module_against_rtn(row.run.as_ref()?, &module).map(|ratio| format!("{ratio:.3}"))
        });
    }
    table.finish(
        "Output error over that of rounding to nearest, by module, all blocks together".to_string(),
    )
}

/// Table of the runtimes that load each branch, with the reasons of those that refuse.
pub(super) fn runtimes(report: &Report) -> Table {
    let mut table = Builder::new(report, |row| !row.readings.is_empty());
    let mut readers: Vec<String> = Vec::new();
    for (_, row) in &table.rows {
        for reading in &row.readings {
            if !readers.contains(&reading.reader) {
                readers.push(reading.reader.clone());
            }
        }
    }
    for reader in readers {
        table.text("", &reader, |row| {
            let reading = row.readings.iter().find(|r| r.reader == reader)?;
            Some(match &reading.refusal {
                None => "yes".to_string(),
                Some(reason) => format!("no: {reason}"),
            })
        });
    }
    table.finish("Which runtimes load it".to_string())
}

fn act_order(spec: &QuantSpec) -> String {
    match spec.order {
        ColumnOrder::Natural => "no",
        ColumnOrder::ActOrder => "yes",
        ColumnOrder::ActOrderStaticGroups => "static groups",
        ColumnOrder::GroupAware => "in-group",
        ColumnOrder::Folded => "folded",
        ColumnOrder::Auto => "by layer",
    }
    .to_string()
}

/// A named dataset by its name, a file by its own.
pub(super) fn dataset_name(dataset: &str) -> String {
    match dataset.split_once('=') {
        Some((name, _)) => name.to_string(),
        None => tail(dataset).to_string(),
    }
}
