//! Prompts from templates: a card's `...{prompt}...`, or the chat template of a checkpoint.

mod generation_tag;
mod to_json;

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use chrono::{DateTime, Local, TimeZone};
use gptq_types::outside_name::shown;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};

use generation_tag::replace_generation_tags;

/// The place of the prompt in a card's template.
const PLACE: &str = "{prompt}";
const NAME: &str = "chat";
/// Largest template; published ones have up to 20 kB.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Largest text that a template gives: a context of a million tokens. A tokenizer takes about a
/// hundred times as much memory for it.
const MAX_TEXT_BYTES: usize = 1 << 22;
/// Instructions of minijinja that a text may take, a second of them; a turn takes about a hundred.
const MAX_STEPS: u64 = 5_000_000;
/// Characters of a template's own words that an error repeats.
const SHOWN_CHARACTERS: usize = 160;

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
    #[error("the chat template has {0} bytes, the limit is {MAX_SOURCE_BYTES}")]
    SourceTooLong(usize),
    #[error("the chat template takes more than {MAX_STEPS} steps")]
    TooManySteps,
    #[error("the chat template gives more than {MAX_TEXT_BYTES} bytes")]
    TextTooLong,
}

/// `template` with the prompt in its place. A card's `\n` is a line's end.
pub fn fill_prompt(template: &str, prompt: &str) -> Result<String, TemplateError> {
    match template.contains(PLACE) {
        true => Ok(template.replace("\\n", "\n").replace(PLACE, prompt)),
        false => Err(TemplateError::NoPlace(shown(template, SHOWN_CHARACTERS))),
    }
}

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// The text of the message.
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
/// trimmed blocks, Python's string methods, `{% generation %}`, `raise_exception`, `strftime_now` in
/// local time, `tojson`.
///
/// Steps and the length of the text are bounded; the memory of one step is not: a string doubles 30 times in
/// 30 steps. Render untrusted templates in a process with its own limits.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

impl ChatTemplate {
    /// Parses `source`. `special_tokens` are variables in addition to the messages, such as `bos_token` and
    /// its text; `now` is the time of `strftime_now`, shown in the time zone of `TZ` or of the machine.
    pub fn parse(
        source: &str,
        special_tokens: Vec<(String, String)>,
        now: SystemTime,
    ) -> Result<Self, TemplateError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(TemplateError::SourceTooLong(source.len()));
        }
        let now = DateTime::<Local>::from(now);
        let mut environment = Environment::new();
        environment.set_fuel(Some(MAX_STEPS));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json::to_json);
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        environment.add_function("strftime_now", move |format: String| {
            format_time(&now, &format)
        });
        environment
            .add_template_owned(NAME, replace_generation_tags(source))
            .map_err(|error| TemplateError::Syntax(one_line(&error)))?;
        Ok(ChatTemplate {
            environment,
            special_tokens,
        })
    }

    /// The text of a conversation, up to where the assistant's answer begins.
    pub fn render(&self, messages: &[Message]) -> Result<String, TemplateError> {
        self.render_with(messages, true)
    }

    /// The text of a whole conversation, no answer begun after it.
    pub fn transcript(&self, messages: &[Message]) -> Result<String, TemplateError> {
        self.render_with(messages, false)
    }

    fn render_with(&self, messages: &[Message], begins: bool) -> Result<String, TemplateError> {
        let mut variables: Vec<(Arc<str>, Value)> = (self.special_tokens.iter())
            .map(|(name, text)| (name.as_str().into(), Value::from(text.as_str())))
            .collect();
        variables.push(("messages".into(), Value::from_serialize(messages)));
        variables.push(("add_generation_prompt".into(), Value::from(begins)));
        // Templates ask whether these are none, not whether they are there.
        variables.push(("tools".into(), Value::from(())));
        variables.push(("documents".into(), Value::from(())));
        let variables: Value = variables.into_iter().collect();
        let mut text = BoundedText::default();
        let rendered = (self.environment.get_template(NAME))
            .and_then(|template| template.render_captured_to(variables, &mut text).map(drop));
        match rendered {
            Ok(()) => Ok(String::from_utf8(text.bytes).expect("a template writes text")),
            Err(_) if text.full => Err(TemplateError::TextTooLong),
            Err(error) if error.kind() == ErrorKind::OutOfFuel => Err(TemplateError::TooManySteps),
            Err(error) => Err(TemplateError::Refused(one_line(&error))),
        }
    }
}

fn one_line(error: &Error) -> String {
    let text = match error.detail() {
        Some(detail) => detail.to_string(),
        None => error.kind().to_string(),
    };
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let text = shown(&text, SHOWN_CHARACTERS);
    match error.line() {
        Some(line) => format!("{text}, in its line {line}"),
        None => text,
    }
}

fn format_time<Tz: TimeZone>(now: &DateTime<Tz>, format: &str) -> Result<String, Error>
where
    Tz::Offset: std::fmt::Display,
{
    let mut text = String::new();
    // A format that is none fails only when it is written.
    write!(text, "{}", now.format(format)).map_err(|_| {
        let text = format!(
            "`{}` is no format of a time",
            shown(format, SHOWN_CHARACTERS)
        );
        Error::new(ErrorKind::InvalidOperation, text)
    })?;
    Ok(text)
}

/// A text that grows to [`MAX_TEXT_BYTES`] and no further.
#[derive(Default)]
struct BoundedText {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for BoundedText {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_TEXT_BYTES {
            self.full = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// 2024-07-09 12:00 UTC.
    const NOW: u64 = 1_720_526_400;

    fn template(source: &str) -> Result<ChatTemplate, TemplateError> {
        let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
        let tokens = tokens.map(|(name, text)| (name.to_string(), text.to_string()));
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(NOW);
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

    /// Features that the templates of Llama 2 and 3, Mistral and Qwen use: methods of Python strings, macros,
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
        let local = DateTime::<Local>::from(SystemTime::UNIX_EPOCH + Duration::from_secs(NOW));
        let want = local.format("%d %b %Y, %H").to_string();
        assert_eq!(render("{{ strftime_now('%d %b %Y, %H') }}", &[]), want);
        let refused = template("{{ strftime_now('%!') }}").unwrap().render(&[]);
        assert!(refused.unwrap_err().to_string().contains("`%!`"));
    }

    /// Templates of trained models keep the tag; minijinja: "unknown statement generation".
    #[test]
    fn what_the_generation_tag_marks_is_rendered() {
        let source = "{% set x = 1 %}{% for m in messages %}\n\
                      {%- if m.role == 'assistant' %}\n\
                      {% generation %}\n\
                      {% set x = 2 %}[{{ m.content }}{{ x }}]\n\
                      {% endgeneration %}\n\
                      {% else %}{{ m.content }}{% endif %}{% endfor %}{{ x }}";
        let said = [hello()[0].clone(), Message::new("assistant", "Hi")];
        assert_eq!(render(source, &said), "Hello <b>[Hi2]\n1");
    }

    /// A text of 100 MB took the tokenizer 10 GB; loops in loops never ended.
    #[test]
    fn steps_and_texts_are_bounded() {
        let refused = |source: &str| template(source).unwrap().render(&hello()).unwrap_err();
        let forever =
            "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}";
        assert!(matches!(refused(forever), TemplateError::TooManySteps));
        for long in [
            "{{ 'a' * 10**7 }}",
            "{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}",
        ] {
            assert!(
                matches!(refused(long), TemplateError::TextTooLong),
                "{long}"
            );
        }
        let long = "x".repeat(MAX_SOURCE_BYTES + 1);
        assert!(matches!(
            template(&long),
            Err(TemplateError::SourceTooLong(_))
        ));
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
