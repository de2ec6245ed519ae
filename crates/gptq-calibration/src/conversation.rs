//! Turns of a conversation, out of the two shapes in which data sets keep them.

use serde_json::Value;

/// One turn, in the words of chat templates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Turn {
    /// `system`, `user`, `assistant`, or what the data set says.
    pub role: String,
    /// The text of the message.
    pub content: String,
}

impl Turn {
    pub(crate) fn new(role: &str, content: impl Into<String>) -> Self {
        Turn {
            role: role.to_string(),
            content: content.into(),
        }
    }
}

/// The chat template of the model that is calibrated; whoever has the model implements it.
pub trait ChatTemplate {
    /// Whether the model has one; the error is a reason in one line.
    fn is_there(&self) -> Result<bool, String>;

    /// The whole conversation as the model was trained to read it, no answer begun after it.
    fn render(&self, turns: &[Turn]) -> Result<String, String>;
}

/// A model without a chat template.
pub struct NoTemplate;

impl ChatTemplate for NoTemplate {
    fn is_there(&self) -> Result<bool, String> {
        Ok(false)
    }

    fn render(&self, _: &[Turn]) -> Result<String, String> {
        Err("the model has no chat template".to_string())
    }
}

/// ShareGPT's names of speakers, and what templates call them.
const SPEAKERS: [(&str, &str); 6] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("bot", "assistant"),
    ("chatgpt", "assistant"),
    ("model", "assistant"),
    ("function_response", "tool"),
];

/// `[{role, content}]` or `[{from, value}]`; other fields of a turn are not shown to the template.
pub(crate) fn turns(cell: &Value) -> Result<Vec<Turn>, String> {
    let Value::Array(cells) = cell else {
        return Err("no list of turns".to_string());
    };
    if cells.is_empty() {
        return Err("a conversation without turns".to_string());
    }
    (cells.iter().enumerate())
        .map(|(index, cell)| turn(cell).map_err(|reason| format!("turn {} {reason}", index + 1)))
        .collect()
}

fn turn(cell: &Value) -> Result<Turn, &'static str> {
    let said = |name: &str| cell.get(name).and_then(Value::as_str);
    let (role, content) = match (said("role"), said("from")) {
        (Some(role), _) => (role, cell.get("content")),
        (None, Some(speaker)) => (role_of(speaker), cell.get("value")),
        (None, None) => return Err("has neither `role` nor `from`"),
    };
    match content.and_then(content_text) {
        Some(content) => Ok(Turn::new(role, content)),
        None => Err("holds no text: calls of tools, pictures and sound are not read"),
    }
}

fn role_of(speaker: &str) -> &str {
    let known = SPEAKERS.iter().find(|(name, _)| *name == speaker);
    known.map_or(speaker, |(_, role)| role)
}

/// A string, or parts of which each is `{"type": "text", "text": ...}`.
fn content_text(content: &Value) -> Option<String> {
    match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| part.get("text")?.as_str())
            .collect(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_shapes_give_the_same_turns() {
        let expected = vec![
            Turn::new("system", "s"),
            Turn::new("user", "q"),
            Turn::new("assistant", "a"),
        ];
        let messages = json!([
            {"role": "system", "content": "s", "weight": 0},
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": "a"}]);
        assert_eq!(turns(&messages).unwrap(), expected);
        let shared = json!([
            {"from": "system", "value": "s"}, {"from": "human", "value": "q"},
            {"from": "gpt", "value": "a"}]);
        assert_eq!(turns(&shared).unwrap(), expected);
    }

    #[test]
    fn a_turn_without_words_is_named() {
        for (cell, reason) in [
            (json!([]), "a conversation without turns"),
            (json!("hello"), "no list of turns"),
            (
                json!([{"role": "user", "content": "q"}, {"text": "a"}]),
                "turn 2 has neither",
            ),
            (
                json!([{"role": "assistant", "content": null, "tool_calls": []}]),
                "turn 1 holds no text",
            ),
            (
                json!([{"role": "user", "content": [{"type": "image"}]}]),
                "turn 1 holds no text",
            ),
        ] {
            let error = turns(&cell).unwrap_err();
            assert!(error.starts_with(reason), "{error}");
        }
    }
}
