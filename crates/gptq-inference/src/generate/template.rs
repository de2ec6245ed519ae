//! Prompts from templates: a card's `...{prompt}...`, or the chat template of a checkpoint.

use std::sync::Arc;
use std::time::SystemTime;

use chrono::format::{Item, StrftimeItems};
use chrono::{DateTime, Utc};
use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

/// The place of the prompt in a card's template.
const PLACE: &str = "{prompt}";
const NAME: &str = "chat";

/// A template that gives no prompt.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum TemplateError {
    #[error("the prompt template `{0}` has no `{{prompt}}` in it")]
    NoPlace(String),
    #[error("the chat template is not one: {0}")]
    Syntax(String),
    #[error("the chat template refuses: {0}")]
    Refused(String),
}

/// `template` with the prompt in its place. A card's `\n` is a line's end.
pub fn fill_prompt(template: &str, prompt: &str) -> Result<String, TemplateError> {
    match template.contains(PLACE) {
        true => Ok(template.replace("\\n", "\n").replace(PLACE, prompt)),
        false => Err(TemplateError::NoPlace(template.to_string())),
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: String,
}

impl Message {
    /// A turn of `role`.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Message {
            role: role.to_string(),
            content: content.into(),
        }
    }
}

/// A Jinja template with the surroundings that `apply_chat_template` of transformers gives it:
/// trimmed blocks, Python's string methods, `raise_exception`, `strftime_now`, `tojson`.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Parses `source`. `special_tokens` are the variables beside the messages, such as `bos_token`
    /// and its text; `now` is what `strftime_now` tells, in UTC.
    pub fn parse(
        source: &str,
        special_tokens: Vec<(String, String)>,
        now: SystemTime,
    ) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_function("strftime_now", move |format: String| {
            format_time(now.into(), &format)
        });
        environment
            .add_template_owned(NAME, source.to_string())
            .map_err(|error| TemplateError::Syntax(one_line(&error)))?;
        Ok(ChatTemplate {
            environment,
            special_tokens,
        })
    }

    /// The text of a conversation, up to where the assistant's answer begins.
    pub fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        let mut variables: Vec<(Arc<str>, Value)> = (self.special_tokens.iter())
            .map(|(name, text)| (name.as_str().into(), Value::from(text.as_str())))
            .collect();
        variables.push(("messages".into(), Value::from_serialize(messages)));
        variables.push(("add_generation_prompt".into(), Value::from(true)));
        // Templates ask whether these are none, not whether they are there.
        variables.push(("tools".into(), Value::from(())));
        variables.push(("documents".into(), Value::from(())));
        let variables: Value = variables.into_iter().collect();
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(variables))
            .map_err(|error| TemplateError::Refused(one_line(&error)))
    }
}

fn one_line(error: &Error) -> String {
    let text = match error.detail() {
        Some(detail) => detail.to_string(),
        None => error.kind().to_string(),
    };
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match error.line() {
        Some(line) => format!("{text}, in its line {line}"),
        None => text,
    }
}

fn format_time(now: DateTime<Utc>, format: &str) -> Result<String, Error> {
    let items: Vec<Item<'_>> = StrftimeItems::new(format).collect();
    if items.iter().any(|item| matches!(item, Item::Error)) {
        let text = format!("`{format}` is no format of a time");
        return Err(Error::new(ErrorKind::InvalidOperation, text));
    }
    Ok(now.format_with_items(items.into_iter()).to_string())
}

/// As `json.dumps(value, ensure_ascii=False, indent=indent)` writes it, and nothing escaped for
/// HTML, as Jinja's own filter would.
fn to_json(value: Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let _: Option<bool> = options.get("ensure_ascii")?;
    options.assert_all_used()?;
    let text = match indent {
        Some(width) => write_json(&value, PrettyFormatter::with_indent(&b" ".repeat(width))),
        None => write_json(&value, PythonFormatter(CompactFormatter)),
    };
    text.map(Value::from_safe_string)
        .map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
}

fn write_json(value: &Value, formatter: impl Formatter) -> Result<String, serde_json::Error> {
    let mut bytes = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    value.serialize(&mut serializer)?;
    Ok(String::from_utf8(bytes).expect("JSON is text"))
}

/// A space after commas and colons.
struct PythonFormatter(CompactFormatter);

impl Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        match first {
            true => Ok(()),
            false => writer.write_all(b", "),
        }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.begin_array_value(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(
        &mut self,
        writer: &mut W,
    ) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let tokens = tokens.map(|(name, text)| (name.to_string(), text.to_string()));
        // 2024-07-09 12:00 UTC.
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_720_526_400);
        ChatTemplate::parse(source, tokens.to_vec(), now)
    }

    fn render(source: &str, messages: &[Message]) -> String {
        template(source).unwrap().render(messages).unwrap()
    }

    fn hello() -> [Message; 1] {
        [Message::new("user", "Hello <b>")]
    }

    /// The template of SmolLM2-135M-Instruct; what it gives was written by hand.
    #[test]
    fn a_published_template_gives_the_expected_text() {
        let source = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let said = [
            Message::new("user", "Hi."),
            Message::new("assistant", "Hello!"),
            Message::new("user", "Sums?\n1 < 2"),
        ];
        let want = "<|im_start|>system\n\
            You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n\
            <|im_start|>user\nHi.<|im_end|>\n\
            <|im_start|>assistant\nHello!<|im_end|>\n\
            <|im_start|>user\nSums?\n1 < 2<|im_end|>\n\
            <|im_start|>assistant\n";
        assert_eq!(render(source, &said), want);
        let system = [Message::new("system", "Be brief."), hello()[0].clone()];
        let want = "<|im_start|>system\nBe brief.<|im_end|>\n\
            <|im_start|>user\nHello <b><|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(render(source, &system), want);
    }

    /// What templates of Llama 2 and 3, Mistral and Qwen use: methods of Python strings, macros,
    /// namespaces, loop controls, slices, blocks on lines of their own.
    #[test]
    fn python_and_jinja_as_templates_use_them() {
        let source = "{{- bos_token }}\n\
            {%- set ns = namespace(count=0) %}\n\
            {%- macro turn(m) %}[{{ m.role.upper() }}] {{ m['content'].strip() | trim }}{% endmacro %}\n\
            {% for m in messages[::-1] %}\n\
                {% if m.content.startswith('skip') %}\n\
                    {% continue %}\n\
                {% endif %}\n\
                {% set ns.count = ns.count + 1 %}\n\
            {{ turn(m) }}{{ eos_token if not loop.last }}\n\
            {% endfor %}\n\
            {{ ns.count }} {{ 'a-b'.split('-')[1] }} {{ tools is none }} {{ x is defined }}";
        let said = [
            Message::new("user", " one "),
            Message::new("assistant", "skip me"),
            Message::new("user", "two"),
        ];
        let want = "<s>[USER] two</s>\n[USER] one\n2 b true false";
        assert_eq!(
            render(source, &said)
                .replace("True", "true")
                .replace("False", "false"),
            want
        );
    }

    #[test]
    fn json_is_pythons_and_not_escaped() {
        let want = r#"[{"role": "user", "content": "Hello <b>"}]"#;
        assert_eq!(render("{{ messages | tojson }}", &hello()), want);
        let want = "[\n  {\n    \"role\": \"user\",\n    \"content\": \"Hello <b>\"\n  }\n]";
        assert_eq!(render("{{ messages | tojson(indent=2) }}", &hello()), want);
    }

    #[test]
    fn the_date_is_the_one_that_was_given() {
        assert_eq!(render("{{ strftime_now('%d %b %Y') }}", &[]), "09 Jul 2024");
        let refused = template("{{ strftime_now('%!') }}").unwrap().render(&[]);
        assert!(refused.unwrap_err().to_string().contains("`%!`"));
    }

    #[test]
    fn a_template_may_refuse_and_a_broken_one_is_named() {
        let refusing = template("{{ raise_exception('roles must\nalternate') }}").unwrap();
        assert_eq!(
            refusing.render(&[]).unwrap_err().to_string(),
            "the chat template refuses: roles must alternate, in its line 1"
        );
        let Err(error) = template("{% for %}") else {
            panic!("it was parsed");
        };
        assert!(
            error
                .to_string()
                .starts_with("the chat template is not one: "),
            "{error}"
        );
    }

    #[test]
    fn a_cards_template_is_filled_in() {
        let filled = fill_prompt("USER: {prompt}\\nASSISTANT:", "{x}").unwrap();
        assert_eq!(filled, "USER: {x}\nASSISTANT:");
        let refused = fill_prompt("USER:", "x").unwrap_err().to_string();
        assert_eq!(
            refused,
            "the prompt template `USER:` has no `{prompt}` in it"
        );
    }
}
