//! `tojson` as the chat templates of transformers know it: what `json.dumps` of Python writes.

use minijinja::value::{Kwargs, Rest, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind};

use super::MAX_TEXT_BYTES;

/// Values nested deeper are refused: each level is a call.
const MAX_DEPTH: usize = 128;

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`, by position in this order or by
/// name; `ensure_ascii` is false unless it is given, as in transformers, and nothing is escaped for
/// HTML, as Jinja's own filter would.
pub(super) fn to_json(value: Value, rest: Rest<Value>) -> Result<Value, Error> {
    let (positional, named) = from_args::<(&[Value], Kwargs)>(&rest)?;
    if positional.len() > 4 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let option = |place: usize, name: &str| -> Result<Value, Error> {
        let named: Option<Value> = named.get(name)?;
        Ok((positional.get(place).cloned().or(named)).unwrap_or(Value::from(())))
    };
    let [ascii, indent, separators, sort_keys] = [
        option(0, "ensure_ascii")?,
        option(1, "indent")?,
        option(2, "separators")?,
        option(3, "sort_keys")?,
    ];
    named.assert_all_used()?;
    let indent = indentation(&indent)?;
    let (comma, colon) = match separators.is_none() {
        true if indent.is_some() => (",".to_string(), ": ".to_string()),
        true => (", ".to_string(), ": ".to_string()),
        false => pair(&separators)?,
    };
    let mut writer = Writer {
        text: String::new(),
        ascii: ascii.is_true(),
        sort_keys: sort_keys.is_true(),
        indent,
        comma,
        colon,
    };
    writer.value(&value, 0)?;
    Ok(Value::from_safe_string(writer.text))
}

/// The indentation of a level: a number of spaces, or the string itself.
fn indentation(indent: &Value) -> Result<Option<String>, Error> {
    if indent.is_none() {
        return Ok(None);
    }
    if let Some(text) = indent.as_str() {
        return Ok(Some(text.to_string()));
    }
    let width = i64::try_from(indent.clone())?;
    match usize::try_from(width.max(0)) {
        Ok(width) if width <= MAX_TEXT_BYTES => Ok(Some(" ".repeat(width))),
        _ => Err(too_long()),
    }
}

fn pair(separators: &Value) -> Result<(String, String), Error> {
    let all: Vec<Value> = separators.try_iter()?.take(3).collect();
    match all.as_slice() {
        [comma, colon] if comma.as_str().is_some() && colon.as_str().is_some() => {
            Ok((comma.to_string(), colon.to_string()))
        }
        _ => Err(invalid("separators of tojson are two strings")),
    }
}

fn invalid(reason: impl Into<String>) -> Error {
    Error::new(ErrorKind::BadSerialization, reason.into())
}

fn too_long() -> Error {
    invalid(format!("tojson writes more than {MAX_TEXT_BYTES} bytes"))
}

struct Writer {
    text: String,
    ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    comma: String,
    colon: String,
}

impl Writer {
    fn push(&mut self, text: &str) -> Result<(), Error> {
        if self.text.len() + text.len() > MAX_TEXT_BYTES {
            return Err(too_long());
        }
        self.text.push_str(text);
        Ok(())
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!(
                "tojson meets values nested deeper than {MAX_DEPTH} levels"
            )));
        }
        match value.kind() {
            ValueKind::None => self.push("null"),
            ValueKind::Bool => self.push(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.push(&number(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.items('[', ']', value.try_iter()?, depth, Self::value)
            }
            ValueKind::Map => self.map(value, depth),
            other => Err(invalid(format!("a value of type {other} has no JSON"))),
        }
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort_keys {
            keys.sort();
        }
        let write = |writer: &mut Self, key: &Value, depth: usize| {
            match key.kind() {
                ValueKind::String => writer.string(key.as_str().unwrap_or_default())?,
                ValueKind::Number => writer.string(&number(key)?)?,
                ValueKind::Bool => writer.string(if key.is_true() { "true" } else { "false" })?,
                ValueKind::None => writer.string("null")?,
                other => return Err(invalid(format!("a key of type {other} has no JSON"))),
            }
            let colon = writer.colon.clone();
            writer.push(&colon)?;
            writer.value(&value.get_item(key)?, depth)
        };
        self.items('{', '}', keys.into_iter(), depth, write)
    }

    /// Writes the items between two brackets, each by `write`, one level deeper.
    fn items(
        &mut self,
        open: char,
        close: char,
        items: impl Iterator<Item = Value>,
        depth: usize,
        write: impl Fn(&mut Self, &Value, usize) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.push(open.encode_utf8(&mut [0; 4]))?;
        let mut empty = true;
        for item in items {
            if !empty {
                let comma = self.comma.clone();
                self.push(&comma)?;
            }
            empty = false;
            self.line(depth + 1)?;
            write(self, &item, depth + 1)?;
        }
        if !empty {
            self.line(depth)?;
        }
        self.push(close.encode_utf8(&mut [0; 4]))
    }

    fn line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = self.indent.clone() else {
            return Ok(());
        };
        self.push("\n")?;
        (0..depth).try_for_each(|_| self.push(&indent))
    }

    fn string(&mut self, text: &str) -> Result<(), Error> {
        self.push("\"")?;
        for character in text.chars() {
            match character {
                '"' => self.push("\\\"")?,
                '\\' => self.push("\\\\")?,
                '\n' => self.push("\\n")?,
                '\r' => self.push("\\r")?,
                '\t' => self.push("\\t")?,
                '\u{8}' => self.push("\\b")?,
                '\u{c}' => self.push("\\f")?,
                plain if plain >= ' ' && (!self.ascii || plain <= '~') => {
                    self.push(plain.encode_utf8(&mut [0; 4]))?;
                }
                other => {
                    for unit in other.encode_utf16(&mut [0; 2]) {
                        self.push(&format!("\\u{unit:04x}"))?;
                    }
                }
            }
        }
        self.push("\"")
    }
}

/// A number as Python writes it.
fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let number = f64::try_from(value.clone())?;
    if !number.is_finite() {
        let names = [
            (f64::INFINITY, "Infinity"),
            (f64::NEG_INFINITY, "-Infinity"),
        ];
        let name = names.iter().find(|(value, _)| *value == number);
        return Ok(name.map_or("NaN", |(_, name)| name).to_string());
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number == 0.0 || (-4..16).contains(&exponent) {
        return Ok(format!("{number:?}"));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    Ok(format!("{digits}e{sign}{:02}", exponent.abs()))
}

#[cfg(test)]
mod tests {
    use minijinja::{Environment, context};

    use super::*;

    fn dumps(arguments: &str, json: &str) -> Result<String, Error> {
        let mut environment = Environment::new();
        environment.add_filter("tojson", to_json);
        let value: serde_json::Value = serde_json::from_str(json).unwrap();
        let source = format!("{{{{ value | tojson({arguments}) }}}}");
        environment.render_str(&source, context! { value })
    }

    /// Every expected text is what `json.dumps` of Python 3.12 printed.
    #[test]
    fn every_argument_writes_what_python_writes() {
        let value = "{\"b\": [1, 1.0, 1e16, 1e-5, 123456789.125, 0.1, true, null, -0.0, 1.5e300], \
                     \"a\": {\"é\": \"\\u2028\\u007f\\t\\u0001\\\"\\\\/<>&😀\", \"z\": [], \"y\": {}}}";
        let numbers = "[1, 1.0, 1e+16, 1e-05, 123456789.125, 0.1, true, null, -0.0, 1.5e+300]";
        let plain = format!(
            "{{\"b\": {numbers}, \"a\": {{\"é\": \"\u{2028}\u{7f}\\t\\u0001\\\"\\\\/<>&😀\", \"z\": [], \"y\": {{}}}}}}"
        );
        assert_eq!(dumps("", value).unwrap(), plain);
        assert_eq!(dumps("ensure_ascii=false", value).unwrap(), plain);
        let ascii = format!(
            "{{\"b\": {numbers}, \"a\": {{\"\\u00e9\": \"\\u2028\\u007f\\t\\u0001\\\"\\\\/<>&\\ud83d\\ude00\", \"z\": [], \"y\": {{}}}}}}"
        );
        assert_eq!(dumps("ensure_ascii=true", value).unwrap(), ascii);
        assert_eq!(dumps("true", value).unwrap(), ascii);
        let small = "{\"b\": [1, {}], \"a\": []}";
        let cases = [
            ("separators=(',', ':')", "{\"b\":[1,{}],\"a\":[]}"),
            ("sort_keys=true", "{\"a\": [], \"b\": [1, {}]}"),
            (
                "indent=2",
                "{\n  \"b\": [\n    1,\n    {}\n  ],\n  \"a\": []\n}",
            ),
            ("indent=0", "{\n\"b\": [\n1,\n{}\n],\n\"a\": []\n}"),
            ("indent=-3", "{\n\"b\": [\n1,\n{}\n],\n\"a\": []\n}"),
            (
                "indent='\t', separators=(',', ':')",
                "{\n\t\"b\":[\n\t\t1,\n\t\t{}\n\t],\n\t\"a\":[]\n}",
            ),
            (
                "false, 1, none, true",
                "{\n \"a\": [],\n \"b\": [\n  1,\n  {}\n ]\n}",
            ),
        ];
        for (arguments, want) in cases {
            assert_eq!(dumps(arguments, small).unwrap(), want, "{arguments}");
        }
    }

    #[test]
    fn an_indent_of_terabytes_is_refused() {
        for arguments in ["indent=10**12", "indent=10**30", "indent=3000000"] {
            assert!(dumps(arguments, "[[1]]").is_err(), "{arguments}");
        }
        assert!(dumps("separators=','", "[1]").is_err());
        assert!(dumps("width=1", "[1]").is_err());
    }
}
