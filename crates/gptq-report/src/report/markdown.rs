//! The report as Markdown: everything but the figures.

use super::command::quantize_command;
use super::data::{Report, Row};
use super::format::ABSENT;
use super::table::{self, BRANCH, Table};
use super::words::{Fact, degradations, own_facts, shared_facts, text_facts, verdict};
use crate::markup::{block, code, plain, prose};

impl Report {
    /// Tables and lists, for places that show no HTML.
    pub fn markdown(&self) -> String {
        let mut out = format!("# {}: GPTQ report\n", plain(&self.title()));
        out += &format!("{} · {}\n\n", plain(&self.date), plain(&self.tool));
        if self.texts.is_empty() {
            out += "Nothing was scored: there is no evaluation among the records.\n\n";
        }
        for (index, text) in self.texts.iter().enumerate() {
            if self.texts.len() > 1 {
                out += &format!("Text {}:\n\n", index + 1);
            }
            out += &fact_list(&text_facts(self, index, text));
            out.push('\n');
        }
        for doubt in &self.doubts {
            out += &format!("> **Note.** {}.\n\n", prose(doubt));
        }
        out += "## Branches\n";
        for table in [table::branches(self), table::worth(self)] {
            out += &markdown_table(&table);
            out += &meanings(&table);
        }
        for text in 0..self.texts.len() {
            if text > 0 {
                let scores = table::scores(self, text);
                out += &format!("## Text {}\n", text + 1);
                out += &markdown_table(&scores);
            }
            out += &with_caption(&table::positions(self, text));
        }
        out += "## Layers\n";
        let errors = table::errors_by_module(self);
        out += &match errors.columns.is_empty() {
            true => "No errors of layers are known: rounding to nearest sees no inputs, and only \
                     run records hold them.\n\n"
                .to_string(),
            false => with_caption(&errors),
        };
        out += "## What degraded\n";
        for (_, row) in self.branches() {
            out += &degraded(row);
        }
        let runtimes = table::runtimes(self);
        if !runtimes.columns.is_empty() {
            out += "## Runtimes\n";
            out += &markdown_table(&runtimes);
            out += "By the rules of each runtime's source, from settings and shapes.\n\n";
        }
        out += "## How it was made\n";
        out += "Commands as far as the records hold them: every setting that decides the codes. \
                Outputs are named after their rows.\n\n";
        out += &fact_list(&shared_facts(self));
        for row in self.rows.iter().filter(|row| row.run.is_some()) {
            out += &made(self, row);
        }
        out.truncate(out.trim_end().len());
        out + "\n"
    }
}

fn markdown_table(table: &Table) -> String {
    if table.columns.is_empty() {
        return String::new();
    }
    let heads: Vec<String> = (table.columns.iter())
        .map(|column| match column.group.as_str() {
            // Such a head is meaningless without its group.
            group if group.starts_with("speed") => format!("{}, {}", column.head, plain(group)),
            "memory" => format!("{} memory", column.head),
            _ => plain(&column.head),
        })
        .collect();
    let mut out = format!("| {} | {} |\n|---|", table.corner, heads.join(" | "));
    for column in &table.columns {
        out += if column.is_number { "--:|" } else { "---|" };
    }
    out.push('\n');
    for (row, (name, _)) in table.rows.iter().enumerate() {
        let cells: Vec<String> = (table.columns.iter())
            .map(|column| column.cells[row].as_deref().map_or(ABSENT.into(), plain))
            .collect();
        let name = match table.corner == BRANCH {
            true => code(name),
            false => plain(name),
        };
        out += &format!("| {name} | {} |\n", cells.join(" | "));
    }
    out.push('\n');
    out
}

fn with_caption(table: &Table) -> String {
    match table.columns.is_empty() {
        true => String::new(),
        false => format!("{}:\n\n{}", plain(&table.caption), markdown_table(table)),
    }
}

fn meanings(table: &Table) -> String {
    let known = table.columns.iter().filter(|c| !c.meaning.is_empty());
    let lines: Vec<String> = known
        .map(|column| format!("- {}: {}", plain(&column.head), plain(column.meaning)))
        .collect();
    match lines.is_empty() {
        true => String::new(),
        false => lines.join("\n") + "\n\n",
    }
}

fn fact_list(facts: &[Fact]) -> String {
    (facts.iter())
        .map(|(label, value)| format!("- {label}: {}\n", prose(value)))
        .collect()
}

fn degraded(row: &Row) -> String {
    let mut out = format!("### {}\n{}\n\n", code(&row.name), prose(&verdict(row)));
    let lists = row.degraded.as_ref().map_or(Vec::new(), degradations);
    for list in &lists {
        out += &format!("- {}\n", prose(&list.heading));
        for (name, text) in &list.items {
            let item = format!("  - {} {}", code(name), plain(text));
            out += item.trim_end();
            out.push('\n');
        }
    }
    if !lists.is_empty() {
        out.push('\n');
    }
    out
}

fn made(report: &Report, row: &Row) -> String {
    let mut out = format!("### {}\n", code(&row.name));
    if let Some(run) = &row.run {
        let command = quantize_command(run, &row.name);
        out += &block("shell", &command.replace(char::is_control, " "));
    }
    out + &fact_list(&own_facts(report, row)) + "\n"
}
