//! Chooses the columns that make the text of a row.

use crate::CalibrationError;
use crate::conversation::{ChatTemplate, Turn, turns};
use serde_json::Value;

/// Columns of plain text, in the order in which a row is asked for them.
const TEXT: [&str; 2] = ["text", "content"];

/// Columns that hold a conversation.
const CONVERSATIONS: [&str; 3] = ["messages", "conversations", "conversation"];

/// Columns of the instruction, of optional further input, and of the answer.
const ANSWERS: [(&str, Option<&str>, &str); 6] = [
    ("instruction", Some("input"), "output"),
    ("instruction", Some("context"), "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("question", None, "answer"),
    ("question", None, "response"),
];

/// Separator between the parts of a row that no template renders.
const BLANK_LINE: &str = "\n\n";

/// The way to make a text of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// The row is a string.
    Strings,
    /// The first of these columns that holds a string.
    Text(Vec<String>),
    /// A conversation, rendered.
    Conversation(String),
    /// A question in several columns and its answer: two turns where the model has a template.
    Answer {
        asked: Vec<String>,
        answer: String,
        is_rendered: bool,
    },
}

/// A layout, and what else was there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) layout: Layout,
    /// The column was named by the user.
    is_asked_for: bool,
    /// Columns that would have been read had the others not been there.
    passed_over: Vec<String>,
}

impl Chosen {
    pub(crate) fn strings() -> Self {
        Chosen {
            layout: Layout::Strings,
            is_asked_for: false,
            passed_over: Vec::new(),
        }
    }

    /// By the names of columns; `is_list` tells those that hold lists. `None` where no column is
    /// known, or the one that was asked for is not there.
    pub(crate) fn among(
        names: &[&str],
        is_list: impl Fn(&str) -> bool,
        asked_for: Option<&str>,
    ) -> Option<Self> {
        if let Some(column) = asked_for {
            let column = names.iter().find(|name| **name == column)?.to_string();
            let layout = match is_list(&column) {
                true => Layout::Conversation(column),
                false => Layout::Text(vec![column]),
            };
            return Some(Chosen {
                layout,
                is_asked_for: true,
                passed_over: Vec::new(),
            });
        }
        let mut found = known_layouts().filter(|layout| {
            let needed = layout.needed();
            needed.iter().all(|column| names.contains(column))
        });
        let first = found.next()?;
        let mut passed_over: Vec<String> = Vec::new();
        for layout in found {
            let others = layout.needed().into_iter().map(str::to_string);
            passed_over.extend(others.filter(|name| !first.needed().contains(&name.as_str())));
        }
        passed_over.dedup();
        Some(Chosen {
            layout: first.with_optional(names),
            is_asked_for: false,
            passed_over,
        })
    }

    /// The description for the record; `None` for plain text without a choice of columns.
    pub(crate) fn words(&self) -> Option<String> {
        let mut words = match &self.layout {
            Layout::Text(columns) if self.is_asked_for || !self.passed_over.is_empty() => {
                format!("column `{}`", columns[0])
            }
            Layout::Text(_) | Layout::Strings => return None,
            Layout::Conversation(column) => {
                format!("column `{column}`, rendered with the model's chat template")
            }
            Layout::Answer {
                asked,
                answer,
                is_rendered,
            } => {
                let asked = asked.join("`, `");
                match is_rendered {
                    true => format!(
                        "columns `{asked}` as the user's turn and `{answer}` as the assistant's, \
                         rendered with the model's chat template"
                    ),
                    false => format!(
                        "columns `{asked}`, `{answer}` joined with \"\\n\\n\" (the model has no chat template)"
                    ),
                }
            }
        };
        if !self.passed_over.is_empty() {
            words += &format!(", not `{}`", self.passed_over.join("`, `"));
        }
        Some(words)
    }

    /// Whether the texts come from the template, which puts its own marks around them.
    pub(crate) fn is_rendered(&self) -> bool {
        match &self.layout {
            Layout::Conversation(_) => true,
            Layout::Answer { is_rendered, .. } => *is_rendered,
            Layout::Strings | Layout::Text(_) => false,
        }
    }

    /// Asks the template whether it is there, where the layout depends on it.
    pub(crate) fn settle(mut self, chat: &dyn ChatTemplate) -> Result<Self, CalibrationError> {
        let ask = || chat.is_there().map_err(CalibrationError::ChatTemplate);
        match &mut self.layout {
            Layout::Conversation(column) if !ask()? => Err(CalibrationError::NoChatTemplate {
                column: column.clone(),
            }),
            Layout::Answer { is_rendered, .. } => {
                *is_rendered = ask()?;
                Ok(self)
            }
            _ => Ok(self),
        }
    }

    /// Columns to read, in the order of the cells that [`Chosen::text`] takes.
    pub(crate) fn columns(&self) -> Vec<&str> {
        match &self.layout {
            Layout::Strings => Vec::new(),
            Layout::Text(columns) => columns.iter().map(String::as_str).collect(),
            Layout::Conversation(column) => vec![column],
            Layout::Answer { asked, answer, .. } => {
                asked.iter().chain([answer]).map(String::as_str).collect()
            }
        }
    }

    /// The text of a row by its cells; the error is what is wrong with the row.
    pub(crate) fn text(
        &self,
        cells: Vec<Option<Value>>,
        chat: &dyn ChatTemplate,
    ) -> Result<String, String> {
        let columns = self.columns();
        match &self.layout {
            Layout::Strings => Err("is no string, as the first row is".to_string()),
            Layout::Text(_) => first_text(&columns, cells),
            Layout::Conversation(column) => match cells.into_iter().next().flatten() {
                Some(cell) => {
                    let turns = turns(&cell);
                    chat.render(&turns.map_err(|reason| format!("column `{column}`: {reason}"))?)
                }
                None => Err(format!("has no column `{column}`")),
            },
            Layout::Answer { is_rendered, .. } => {
                let mut parts = said(&columns, cells)?;
                let answer = parts.pop().unwrap_or_default();
                match is_rendered {
                    true => chat.render(&[
                        Turn::new("user", parts.join(BLANK_LINE)),
                        Turn::new("assistant", answer),
                    ]),
                    false => Ok([parts, vec![answer]].concat().join(BLANK_LINE)),
                }
            }
        }
    }
}

fn known_layouts() -> impl Iterator<Item = Layout> {
    let texts = (0..TEXT.len()).map(|first| {
        let columns = TEXT[first..].iter().map(|name| name.to_string());
        Layout::Text(columns.collect())
    });
    let conversations = CONVERSATIONS.map(|name| Layout::Conversation(name.to_string()));
    let answers = ANSWERS.map(|(asked, besides, answer)| Layout::Answer {
        asked: [Some(asked), besides]
            .into_iter()
            .flatten()
            .map(str::to_string)
            .collect(),
        answer: answer.to_string(),
        is_rendered: false,
    });
    texts.chain(conversations).chain(answers)
}

impl Layout {
    /// The columns without which it is another layout.
    fn needed(&self) -> Vec<&str> {
        match self {
            Layout::Strings => Vec::new(),
            Layout::Text(columns) => vec![&columns[0]],
            Layout::Conversation(column) => vec![column],
            Layout::Answer { asked, answer, .. } => vec![&asked[0], answer],
        }
    }

    fn with_optional(mut self, names: &[&str]) -> Self {
        if let Layout::Answer { asked, .. } = &mut self {
            asked.retain(|column| names.contains(&column.as_str()));
        }
        self
    }
}

fn first_text(columns: &[&str], cells: Vec<Option<Value>>) -> Result<String, String> {
    let mut why = None;
    for (column, cell) in columns.iter().zip(cells) {
        match cell {
            Some(Value::String(text)) => return Ok(text),
            Some(cell) => why = why.or(Some(no_text(column, &cell))),
            None => {}
        }
    }
    Err(why.unwrap_or_else(|| format!("has no column `{}`", columns.join("` or `"))))
}

/// The cells of a question and its answer; the optional further input may be absent or empty.
fn said(columns: &[&str], cells: Vec<Option<Value>>) -> Result<Vec<String>, String> {
    let mut parts = Vec::new();
    for (index, (column, cell)) in columns.iter().zip(cells).enumerate() {
        let is_optional = index > 0 && index + 1 < columns.len();
        match cell {
            Some(Value::String(text)) if !(is_optional && text.is_empty()) => parts.push(text),
            Some(Value::String(_)) => {}
            None | Some(Value::Null) if is_optional => {}
            None => return Err(format!("has no column `{column}`")),
            Some(cell) => return Err(no_text(column, &cell)),
        }
    }
    Ok(parts)
}

/// The error for a cell that should be a string.
pub(crate) fn no_text(column: &str, cell: &Value) -> String {
    match cell {
        Value::Null => format!("holds no text in column `{column}`"),
        cell => format!(
            "holds {} in column `{column}`, expected a string",
            kind(cell)
        ),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::conversation::NoTemplate;

    struct Marked;

    impl ChatTemplate for Marked {
        fn is_there(&self) -> Result<bool, String> {
            Ok(true)
        }

        fn render(&self, turns: &[Turn]) -> Result<String, String> {
            Ok(turns
                .iter()
                .map(|turn| format!("<{}>{}", turn.role, turn.content))
                .collect())
        }
    }

    fn chosen(names: &[&str], column: Option<&str>) -> Chosen {
        let is_list = |name: &str| CONVERSATIONS.contains(&name) || name == "talk";
        Chosen::among(names, is_list, column).unwrap()
    }

    fn text(names: &[&str], cells: &[Value], chat: &dyn ChatTemplate) -> Result<String, String> {
        let chosen = chosen(names, None)
            .settle(chat)
            .map_err(|error| error.to_string())?;
        let cell = |name: &&str| Some(cells[names.iter().position(|n| n == name)?].clone());
        chosen.text(chosen.columns().iter().map(cell).collect(), chat)
    }

    #[test]
    fn the_first_known_columns_win_and_the_others_are_said() {
        let all = [
            "output",
            "prompt",
            "messages",
            "instruction",
            "completion",
            "content",
            "text",
        ];
        let taken = chosen(&all, None);
        assert_eq!(
            taken.layout,
            Layout::Text(vec!["text".into(), "content".into()])
        );
        let words = taken.words().unwrap();
        assert!(
            words.starts_with("column `text`, not `content`, `messages`, `instruction`"),
            "{words}"
        );
        assert_eq!(chosen(&["url", "text"], None).words(), None);
        assert_eq!(
            chosen(&["body"], Some("body")).words().unwrap(),
            "column `body`"
        );
        assert_eq!(
            chosen(&["text", "talk"], Some("talk")).layout,
            Layout::Conversation("talk".into())
        );
        assert_eq!(Chosen::among(&["text"], |_| false, Some("body")), None);
        assert_eq!(Chosen::among(&["prompt"], |_| false, None), None);
    }

    #[test]
    fn questions_are_turns_where_there_is_a_template_and_joined_where_there_is_none() {
        let names = ["instruction", "input", "output"];
        let cells = [json!("Add."), json!("1 2"), json!("3")];
        assert_eq!(
            text(&names, &cells, &Marked).unwrap(),
            "<user>Add.\n\n1 2<assistant>3"
        );
        assert_eq!(
            text(&names, &cells, &NoTemplate).unwrap(),
            "Add.\n\n1 2\n\n3"
        );
        let cells = [json!("Add."), json!(""), json!("3")];
        assert_eq!(text(&names, &cells, &NoTemplate).unwrap(), "Add.\n\n3");
        for (asked, answer) in [
            ("prompt", "completion"),
            ("prompt", "response"),
            ("question", "answer"),
        ] {
            let made = text(&[asked, answer], &[json!("q"), json!("a")], &NoTemplate);
            assert_eq!(made.unwrap(), "q\n\na");
        }
        let made = text(
            &["prompt", "response"],
            &[json!("q"), json!(3)],
            &NoTemplate,
        );
        assert_eq!(
            made.unwrap_err(),
            "holds a number in column `response`, expected a string"
        );
    }

    #[test]
    fn a_conversation_needs_a_template() {
        let cells = [json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])];
        assert_eq!(
            text(&["conversations"], &cells, &Marked).unwrap(),
            "<user>q<assistant>a"
        );
        let error = text(&["conversations"], &cells, &NoTemplate).unwrap_err();
        assert!(error.contains("`conversations`"), "{error}");
    }
}
