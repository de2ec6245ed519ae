//! The report as Markdown: everything but the figures.

use super::command::quantize_command;
use super::data::{Report, Row};
use super::format::ABSENT;
use super::table::{self, BRANCH, Table};
use super::words::{Fact, degradations, own_facts, parts, shared_facts, text_facts, verdict};

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
            // Without its group such a head says nothing.
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
        let command = command.replace(char::is_control, " ");
        let fence = "`".repeat(longest_run(&command, '`').max(2) + 1);
        out += &format!("{fence}shell\n{command}\n{fence}\n");
    }
    out + &fact_list(&own_facts(report, row)) + "\n"
}

/// Text with its code in the type of code.
fn prose(text: &str) -> String {
    let parts = parts(text).into_iter();
    parts
        .map(|(is_code, part)| if is_code { code(part) } else { plain(part) })
        .collect()
}

/// Text that Markdown shows as it is, on one line.
fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '~' => out.extend(['\\', c]),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// A name in the type of code, also in a table.
fn code(name: &str) -> String {
    let name = name.replace(char::is_control, " ").replace('|', "\\|");
    let fence = "`".repeat(longest_run(&name, '`') + 1);
    match name.starts_with('`') || name.ends_with('`') || name.is_empty() {
        true => format!("{fence} {name} {fence}"),
        false => format!("{fence}{name}{fence}"),
    }
}

fn longest_run(text: &str, wanted: char) -> usize {
    let runs = text.split(|c| c != wanted);
    runs.map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(plain("a|b\n<i>_x_"), "a\\|b &lt;i&gt;\\_x\\_");
        assert_eq!(code("a`b|c"), "``a`b\\|c``");
        assert_eq!(code("`"), "`` ` ``");
    }
}
