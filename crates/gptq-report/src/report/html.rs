//! The report as a self-contained HTML page.

use minijinja::{
    Environment, ErrorKind, Output, State, UndefinedBehavior, Value, context, escape_formatter,
};
use serde::Serialize;

use super::command::quantize_command;
use super::data::{Report, ReportError, Row};
use super::figures::{self, Figure};
use super::format::ABSENT;
use super::marks::{escape, mark_alone, sample};
use super::table::{self, Table};
use super::words::{Fact, Listed, degradations, own_facts, shared_facts, text_facts, verdict};
use crate::markup::parts;

const PAGE: (&str, &str) = (
    "report.html",
    include_str!("../../templates/report.html.jinja"),
);
const TABLE: (&str, &str) = (
    "table.html",
    include_str!("../../templates/table.html.jinja"),
);
const STYLE: &str = include_str!("../../templates/report.css");
/// Shorter lists stand in their line.
const INLINE: usize = 3;
/// Longer lists are folded on a screen.
const FOLDED_FROM: usize = 12;

impl Report {
    /// One HTML page with style and figures inside, without scripts.
    pub fn html(&self) -> Result<String, ReportError> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_formatter(escaped);
        let page = Page {
            report: self,
            environment: &environment,
        };
        let (name, template) = PAGE;
        environment
            .render_named_str(name, template, page.context()?)
            .map_err(failed)
    }
}

/// Every text is escaped but what this crate made as markup. minijinja's own escapes would also
/// take the slash, and leave control characters.
fn escaped(
    out: &mut Output<'_>,
    state: &State<'_, '_>,
    value: &Value,
) -> Result<(), minijinja::Error> {
    match value.as_str().filter(|_| !value.is_safe()) {
        Some(text) => out.write_str(&escape(text)).map_err(|error| {
            minijinja::Error::new(ErrorKind::WriteFailure, "the page").with_source(error)
        }),
        None => escape_formatter(out, state, value),
    }
}

fn failed(error: minijinja::Error) -> ReportError {
    ReportError::Template(error.to_string())
}

struct Page<'a> {
    report: &'a Report,
    environment: &'a Environment<'a>,
}

#[derive(Serialize)]
struct Head {
    text: String,
    span: usize,
}

#[derive(Serialize)]
struct Cell<'a> {
    text: &'a str,
    is_number: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    mark: Value,
    name: &'a str,
    cells: Vec<Cell<'a>>,
}

impl Page<'_> {
    fn context(&self) -> Result<Value, ReportError> {
        let report = self.report;
        let others: Vec<Value> = (1..report.texts.len())
            .map(|text| {
                Ok(context! {
                    number => text + 1,
                    table => self.table(&table::scores(report, text))?,
                    figures => drawn(self.scored(text)),
                })
            })
            .collect::<Result<_, ReportError>>()?;
        Ok(context! {
            style => Value::from_safe_string(STYLE.to_string()),
            title => report.title(),
            tool => &report.tool,
            date => &report.date,
            doubts => report.doubts.iter().map(|doubt| prose(doubt)).collect::<Vec<_>>(),
            texts => self.texts(),
            branches => self.table(&table::branches(report))?,
            worth => self.table(&table::worth(report))?,
            figures => drawn(if report.texts.is_empty() { Vec::new() } else { self.scored(0) }),
            others => others,
            errors_by_module => self.table(&table::errors_by_module(report))?,
            layers => drawn(vec![
                figures::error_against_rtn(report),
                figures::relative_error(report),
                figures::damping(report),
            ]),
            damped => figures::damping(report).is_some(),
            measured => !table::errors_by_module(report).columns.is_empty(),
            degraded => report.branches().map(|(n, row)| degraded(n, row)).collect::<Vec<_>>(),
            runtimes => self.table(&table::runtimes(report))?,
            knows_runtimes => !table::runtimes(report).columns.is_empty(),
            shared => told(shared_facts(report)),
            made => report.rows.iter().filter(|row| row.run.is_some()).map(|row| made(report, row)).collect::<Vec<_>>(),
        })
    }

    fn scored(&self, text: usize) -> Vec<Option<Figure>> {
        vec![
            figures::size_and_perplexity(self.report, text),
            figures::kl_by_position(self.report, text),
        ]
    }

    fn texts(&self) -> Vec<Vec<(String, Value)>> {
        let texts = self.report.texts.iter().enumerate();
        texts
            .map(|(index, text)| told(text_facts(self.report, index, text)))
            .collect()
    }

    /// A table as markup.
    fn table(&self, table: &Table) -> Result<Value, ReportError> {
        if table.columns.is_empty() {
            return Ok(Value::from(""));
        }
        let lines: Vec<Line> = (table.rows.iter().enumerate())
            .map(|(row, (name, number))| Line {
                mark: Value::from_safe_string(number.map_or(String::new(), mark_alone)),
                name,
                cells: (table.columns.iter())
                    .map(|column| Cell {
                        text: column.cells[row].as_deref().unwrap_or(ABSENT),
                        is_number: column.is_number,
                    })
                    .collect(),
            })
            .collect();
        let groups = groups(table);
        let meanings: Vec<(&str, &str)> = (table.columns.iter())
            .filter(|column| !column.meaning.is_empty())
            .map(|column| (column.head.as_str(), column.meaning))
            .collect();
        let (name, template) = TABLE;
        let values = context! {
            caption => &table.caption,
            corner => table.corner,
            grouped => groups.iter().any(|group| !group.text.is_empty()),
            groups => groups,
            heads => table.columns.iter()
                .map(|column| (column.head.as_str(), column.is_number))
                .collect::<Vec<_>>(),
            lines => lines,
            meanings => meanings,
        };
        let rendered = self.environment.render_named_str(name, template, values);
        Ok(Value::from_safe_string(rendered.map_err(failed)?))
    }
}

/// Neighbours of one group under one head.
fn groups(table: &Table) -> Vec<Head> {
    let mut heads: Vec<Head> = Vec::new();
    for column in &table.columns {
        match heads.last_mut() {
            Some(head) if head.text == column.group => head.span += 1,
            _ => heads.push(Head {
                text: column.group.clone(),
                span: 1,
            }),
        }
    }
    heads
}

fn drawn(figures: Vec<Option<Figure>>) -> Vec<Value> {
    (figures.into_iter().flatten())
        .map(|figure| {
            context! {
                caption => figure.caption,
                key => figure.key.into_iter().map(|(number, label, name)| context! {
                    sample => Value::from_safe_string(sample(number)),
                    also => (name != label).then_some(name),
                    label => label,
                }).collect::<Vec<_>>(),
                many => figure.svgs.len() > 1,
                svgs => figure.svgs.into_iter().map(Value::from_safe_string).collect::<Vec<_>>(),
            }
        })
        .collect()
}

fn degraded(number: usize, row: &Row) -> Value {
    let lists = row.degraded.as_ref().map_or(Vec::new(), degradations);
    context! {
        mark => Value::from_safe_string(mark_alone(number)),
        name => &row.name,
        verdict => prose(&verdict(row)),
        lists => lists.into_iter().map(listed).collect::<Vec<_>>(),
    }
}

fn told(facts: Vec<Fact>) -> Vec<(String, Value)> {
    (facts.into_iter())
        .map(|(label, value)| (label, prose(&value)))
        .collect()
}

/// Text with its code in the type of code.
fn prose(text: &str) -> Value {
    let markup = parts(text).into_iter().map(|(is_code, part)| {
        let part = escape(part);
        match is_code {
            true => format!("<code>{part}</code>"),
            false => part,
        }
    });
    Value::from_safe_string(markup.collect())
}

fn listed(list: Listed) -> Value {
    context! {
        heading => prose(&list.heading),
        folded => list.items.len() >= FOLDED_FROM,
        inline => list.items.len() <= INLINE,
        items => list.items,
    }
}

fn made(report: &Report, row: &Row) -> Value {
    context! {
        name => &row.name,
        command => row.run.as_ref().map(|run| quantize_command(run, &row.name)),
        facts => told(own_facts(report, row)),
    }
}
