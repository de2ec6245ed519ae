//! One row of JSON: its names, and the cells that are wanted; all else is skipped without being
//! built, for a row may hold megabytes that nobody reads.

use std::fmt;

use gptq_types::outside_name::shown;
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// Characters of a parser's words that an error repeats: they may hold the row itself.
const SHOWN_CHARACTERS: usize = 120;

/// Numbers that Python's `json.dumps` writes and JSON has no word for.
const NO_NUMBERS: [&[u8]; 3] = [b"NaN", b"-Infinity", b"Infinity"];

/// The kind of a row and its columns.
#[derive(Debug, PartialEq)]
pub(crate) enum Outline {
    Text(String),
    /// Names in order, each with whether its cell is a list.
    Fields(Vec<(String, bool)>),
}

/// The outline of a row; the error is what is wrong with it.
pub(crate) fn outline(json: &[u8]) -> Result<Outline, String> {
    parse(json, |json| read(json, OutlineSeed))
}

/// The cells of these columns, `None` where the row has none; of a name twice the last counts.
pub(crate) fn cells(json: &[u8], columns: &[&str]) -> Result<Vec<Option<Value>>, String> {
    parse(json, |json| read(json, Pick(columns)))
}

fn parse<T>(json: &[u8], read: impl Fn(&[u8]) -> serde_json::Result<T>) -> Result<T, String> {
    let error = match read(json) {
        Ok(value) => return Ok(value),
        Err(error) => error,
    };
    // a column of them is no reason to stop
    match without_nan(json).map(|json| read(&json)) {
        Some(Ok(value)) => Ok(value),
        _ => Err(in_words(&error)),
    }
}

fn read<'a, S: DeserializeSeed<'a>>(json: &'a [u8], seed: S) -> serde_json::Result<S::Value> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value = seed.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// serde_json's words without its line, which is always the first here.
fn in_words(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let text = text
        .rsplit_once(" at line ")
        .map_or(text.as_str(), |(text, _)| text);
    let text = shown(text, SHOWN_CHARACTERS);
    format!("cannot be read: {text} (byte {})", error.column())
}

/// `json` with `null` for `NaN` and the infinities outside strings; `None` where there are none.
fn without_nan(json: &[u8]) -> Option<Vec<u8>> {
    let mut replaced = Vec::new();
    let (mut kept, mut at) = (0, 0);
    let (mut in_string, mut is_escaped) = (false, false);
    while let Some(&byte) = json.get(at) {
        if in_string {
            (in_string, is_escaped) = match byte {
                _ if is_escaped => (true, false),
                b'\\' => (true, true),
                byte => (byte != b'"', false),
            };
        } else if let Some(word) = NO_NUMBERS.iter().find(|word| json[at..].starts_with(word)) {
            replaced.extend_from_slice(&json[kept..at]);
            replaced.extend_from_slice(b"null");
            at += word.len();
            kept = at;
            continue;
        } else {
            in_string = byte == b'"';
        }
        at += 1;
    }
    replaced.extend_from_slice(&json[kept..]);
    (kept > 0).then_some(replaced)
}

struct OutlineSeed;

impl<'de> DeserializeSeed<'de> for OutlineSeed {
    type Value = Outline;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Outline, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for OutlineSeed {
    type Value = Outline;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or a string")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Outline, E> {
        Ok(Outline::Text(text.to_string()))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Outline, A::Error> {
        let mut fields = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            fields.push((name, map.next_value_seed(IsList)?));
        }
        Ok(Outline::Fields(fields))
    }
}

/// Skips a cell and tells whether it was a list.
struct IsList;

impl<'de> DeserializeSeed<'de> for IsList {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for IsList {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut cells: A) -> Result<bool, A::Error> {
        while cells.next_element::<IgnoredAny>()?.is_some() {}
        Ok(true)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(false)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<bool, E> {
        Ok(false)
    }

    fn visit_unit<E: Error>(self) -> Result<bool, E> {
        Ok(false)
    }
}

struct Pick<'a>(&'a [&'a str]);

impl<'de> DeserializeSeed<'de> for Pick<'_> {
    type Value = Vec<Option<Value>>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Pick<'_> {
    type Value = Vec<Option<Value>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object, as the first row is")
    }

    /// The default would repeat the text in its error.
    fn visit_str<E: Error>(self, _: &str) -> Result<Self::Value, E> {
        Err(E::custom("a string, where the first row is an object"))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut cells = vec![None; self.0.len()];
        while let Some(name) = map.next_key::<String>()? {
            match self.0.iter().position(|column| *column == name) {
                Some(place) => cells[place] = Some(map.next_value()?),
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(cells)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn only_the_wanted_cells_are_built() {
        let row = br#"{"id": {"deep": [1]}, "text": "a", "n": 3, "text": "b"}"#;
        let picked = cells(row, &["text", "none", "n"]).unwrap();
        assert_eq!(picked, [Some(json!("b")), None, Some(json!(3))]);
        let fields = |row: &[u8]| match outline(row).unwrap() {
            Outline::Fields(fields) => fields,
            text => panic!("{text:?}"),
        };
        let found = fields(br#"{"a": 1, "b": [], "c": {}, "d": null, "e": true, "f": -1.5}"#);
        assert_eq!(found.iter().filter(|(_, is_list)| *is_list).count(), 1);
        assert_eq!(found[1], ("b".to_string(), true));
        assert_eq!(
            outline(b"\"a\\nb\"").unwrap(),
            Outline::Text("a\nb".to_string())
        );
    }

    /// Python's `json.dumps` writes them, and a JSON parser refuses the whole row.
    #[test]
    fn nan_and_infinity_in_another_column_are_null() {
        let row = br#"{"score": NaN, "low": -Infinity, "high": [Infinity], "text": "NaN \" NaN"}"#;
        let picked = cells(row, &["text", "score"]).unwrap();
        assert_eq!(picked, [Some(json!("NaN \" NaN")), Some(Value::Null)]);
        assert!(cells(br#"{"text": NaNa}"#, &["text"]).is_err());
    }

    #[test]
    fn half_a_surrogate_pair_and_broken_rows_say_where() {
        let error = |row: &[u8]| cells(row, &["text"]).unwrap_err();
        let half = error(br#"{"text": "cut \ud83d off"}"#);
        assert!(
            half.contains("surrogate") || half.contains("hex escape"),
            "{half}"
        );
        assert!(
            error(b"{\"text\": ").contains("EOF"),
            "{}",
            error(b"{\"text\": ")
        );
        assert!(error(b"{\"text\": \"a\xffb\"}").contains("unicode"));
        assert!(error(b"{\"text\": \"a\"} x").contains("trailing"));
        let long = format!("\"{}\"", "word ".repeat(1000));
        assert!(error(long.as_bytes()).len() < 200);
        assert!(
            cells(long.repeat(2).as_bytes(), &["text"])
                .unwrap_err()
                .len()
                < 200
        );
    }
}
