//! Mutations of JSON, TOML and templates: of their numbers, strings and brackets.

use crate::random::Random;

/// Numbers that do not fit where they are read.
const NUMBERS: [&str; 30] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "5",
    "16",
    "31",
    "100000",
    "10000000",
    "2147483647",
    "2147483648",
    "4294967295",
    "4294967296",
    "1000000000000",
    "4611686018427387904",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "-9223372036854775808",
    "0.0",
    "-0.0",
    "0.5",
    "1e-320",
    "1e308",
    "1e309",
    "-1e308",
    "1e-5",
    "99999999999999999999999999999999999999999",
];

/// Texts that lead out of a folder, out of a line, or out of what a reader expects. The absolute
/// paths lead to `OUTSIDE`.
const STRINGS: [&str; 38] = [
    "",
    ".",
    "..",
    "/",
    "../escaped",
    "../../escaped",
    "../canary/escaped",
    "a/../../canary/escaped",
    "/tmp/gptq-fuzz-outside/escaped",
    "/tmp/gptq-fuzz-outside/escaped.safetensors",
    "../canary/model.safetensors",
    "..\\\\escaped",
    "sub/dir/file.safetensors",
    "con:stream",
    "~",
    "~/escaped",
    "$HOME",
    "-rf",
    "--help",
    "\\u0000",
    "a\\u0000b",
    "\\n",
    "error: forged\\nerror: line",
    "\\u001b[31mred",
    "\\ud800",
    "\u{202e}",
    "\u{feff}",
    "é",
    "日本語",
    "🦀",
    "NaN",
    "null",
    "true",
    "{{ 1 }}",
    "{prompt}",
    "%s%n",
    "<script>alert(1)</script>",
    "| a | b |",
];

/// Values of another kind than was expected.
const VALUES: [&str; 10] = [
    "null",
    "true",
    "false",
    "[]",
    "{}",
    "\"\"",
    "[1]",
    "[null]",
    "{\"a\":{\"a\":1}}",
    "NaN",
];

/// A piece of text that the mutations move as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    String,
    Number,
    /// Brackets, words and all the rest.
    Other,
}

#[derive(Clone, Copy, Debug)]
struct Token {
    start: usize,
    end: usize,
    kind: Kind,
}

/// Changes `bytes` in one place; `other` is a second seed of the same kind.
pub fn mutate(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    let tokens = tokens(bytes);
    if tokens.is_empty() {
        bytes.extend(b"{}");
        return;
    }
    match random.below(12) {
        0..=2 => number(bytes, &tokens, random),
        3..=5 => string(bytes, &tokens, random),
        6 => {
            let at = random.pick(&tokens);
            replace(bytes, at, random.pick(&VALUES).as_bytes());
        }
        7 => nest(bytes, random.pick(&tokens), random),
        8 => repeat(bytes, &tokens, random),
        9 => {
            let (from, to) = two(&tokens, random);
            let end = to.end.min(from.start + 256);
            bytes.drain(from.start..end.max(from.end));
        }
        10 => {
            let (one, two) = two(&tokens, random);
            let first = bytes[one.start..one.end].to_vec();
            let second = bytes[two.start..two.end].to_vec();
            if one.start != two.start {
                replace(bytes, two, &first);
                replace(bytes, one, &second);
            }
        }
        _ => {
            let theirs = self::tokens(other);
            if let Some(theirs) = theirs.get(random.below(theirs.len())) {
                let text = other[theirs.start..theirs.end].to_vec();
                replace(bytes, random.pick(&tokens), &text);
            }
        }
    }
}

fn number(bytes: &mut Vec<u8>, tokens: &[Token], random: &mut Random) {
    let all: Vec<&Token> = of_kind(tokens, Kind::Number);
    let Some(&&token) = all.get(random.below(all.len())) else {
        return string(bytes, tokens, random);
    };
    let text = std::str::from_utf8(&bytes[token.start..token.end]).unwrap_or("");
    let near = text.parse::<i64>().ok().filter(|_| random.once_in(3));
    let new = match near {
        Some(value) => match random.below(5) {
            0 => value.wrapping_add(1),
            1 => value.wrapping_sub(1),
            2 => value.wrapping_mul(2),
            3 => value / 2,
            _ => value.wrapping_neg(),
        }
        .to_string(),
        None => random.pick(&NUMBERS).to_string(),
    };
    replace(bytes, &token, new.as_bytes());
}

fn string(bytes: &mut Vec<u8>, tokens: &[Token], random: &mut Random) {
    let all = of_kind(tokens, Kind::String);
    let Some(&&token) = all.get(random.below(all.len())) else {
        return;
    };
    let inner = token.start + 1..token.end - 1;
    let new: Vec<u8> = match random.below(8) {
        0..=3 => random.pick(&STRINGS).as_bytes().to_vec(),
        4 => {
            let length = *random.pick(&[300, 5_000, 100_000, 1_000_000]);
            vec![*random.pick(b"aA0 /.\xff"); length]
        }
        5 => b"\xc3\x28\xff".to_vec(),
        6 => {
            let own = &bytes[inner.clone()];
            let cut = own.len() / 2;
            [&own[..cut], random.pick(&STRINGS).as_bytes(), &own[cut..]].concat()
        }
        _ => {
            let from = random.pick(&all);
            bytes[from.start + 1..from.end - 1].to_vec()
        }
    };
    bytes.splice(inner, new);
}

/// The token behind thousands of brackets, closed again or not.
fn nest(bytes: &mut Vec<u8>, token: &Token, random: &mut Random) {
    let depth = *random.pick(&[60, 200, 5_000, 200_000]);
    let (open, close): (&[u8], &[u8]) = match random.below(3) {
        0 => (b"[", b"]"),
        1 => (b"{\"a\":", b"}"),
        _ => (b"(", b")"),
    };
    let mut new = open.repeat(depth);
    new.extend(b"1");
    if !random.once_in(3) {
        new.extend(close.repeat(depth));
    }
    replace(bytes, token, &new);
}

/// A stretch of tokens once more behind itself: members of an object twice.
fn repeat(bytes: &mut Vec<u8>, tokens: &[Token], random: &mut Random) {
    let from = random.below(tokens.len());
    let to = (from + 1 + random.below(6)).min(tokens.len() - 1);
    let (start, end) = (tokens[from].start, tokens[to].end);
    let copy = bytes[start..end].to_vec();
    let times = *random.pick(&[1, 1, 1, 2, 1000]);
    let separator = random.pick(&[",", "", "\n"]).as_bytes();
    let new = [separator, copy.as_slice()].concat().repeat(times);
    bytes.splice(end..end, new);
}

fn of_kind(tokens: &[Token], kind: Kind) -> Vec<&Token> {
    tokens.iter().filter(|token| token.kind == kind).collect()
}

/// Two tokens in their order, perhaps the same one.
fn two<'a>(tokens: &'a [Token], random: &mut Random) -> (&'a Token, &'a Token) {
    let (one, two) = (random.below(tokens.len()), random.below(tokens.len()));
    (&tokens[one.min(two)], &tokens[one.max(two)])
}

fn replace(bytes: &mut Vec<u8>, token: &Token, new: &[u8]) {
    bytes.splice(token.start..token.end, new.iter().copied());
}

fn tokens(bytes: &[u8]) -> Vec<Token> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let (end, kind) = match bytes[at] {
            b' ' | b'\n' | b'\t' | b'\r' => {
                at += 1;
                continue;
            }
            quote @ (b'"' | b'\'') => match closing(bytes, at, quote) {
                Some(end) => (end, Kind::String),
                None => (at + 1, Kind::Other),
            },
            b'0'..=b'9' | b'-' => (run(bytes, at, b"0123456789.eE+-_"), Kind::Number),
            byte if byte.is_ascii_alphabetic() => {
                let word = bytes[at..].iter().take_while(|b| b.is_ascii_alphanumeric());
                (at + word.count(), Kind::Other)
            }
            _ => (at + 1, Kind::Other),
        };
        let start = at;
        found.push(Token { start, end, kind });
        at = end;
    }
    found
}

/// Behind the quote that ends the string which begins at `start`.
fn closing(bytes: &[u8], start: usize, quote: u8) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match bytes.get(at)? {
            b'\\' => at += 2,
            &byte if byte == quote => return Some(at + 1),
            b'\n' if quote == b'\'' => return None,
            _ => at += 1,
        }
    }
}

fn run(bytes: &[u8], start: usize, of: &[u8]) -> usize {
    let rest = bytes[start..].iter();
    start + rest.take_while(|byte| of.contains(byte)).count()
}
