//! Kernels are looked up by name when they are launched, so a wrong name would show on a GPU alone. Here the
//! names in `src/cuda` are compared with those in `kernels/`, as text and without a GPU or the `cuda` feature.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A macro of a kernel source: parameters, body.
type Macros = BTreeMap<String, (Vec<String>, String)>;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn files(name: &str, extension: &str) -> Vec<(String, String)> {
    let entries = fs::read_dir(folder(name)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .map(|path| {
            let file = path.file_name().unwrap().to_str().unwrap().to_string();
            (file, fs::read_to_string(&path).unwrap())
        })
        .collect()
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The position behind the parenthesis that closes the one at the start of `text`.
fn behind_parentheses(text: &str) -> usize {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' if depth == 1 => return at + 1,
            ')' => depth -= 1,
            _ => {}
        }
    }
    panic!("a parenthesis stays open: {text:.60}");
}

/// A source with its headers in it, without comments; macros with parameters go to `macros`. Both sides of
/// every `#if` stay.
fn preprocessed(source: &str, macros: &mut Macros) -> String {
    let lines = source.lines().map(|line| line.split("//").next().unwrap());
    let joined = lines.collect::<Vec<_>>().join("\n").replace("\\\n", " ");
    let mut out = String::new();
    for line in joined.lines() {
        let line = line.trim();
        if let Some(header) = line.strip_prefix("#include") {
            let header = header.trim().trim_matches('"');
            let text = fs::read_to_string(folder("../../kernels").join(header)).unwrap();
            out += &preprocessed(&text, macros);
        } else if let Some(definition) = line.strip_prefix("#define ") {
            let name: String = definition.chars().take_while(|&c| is_word(c)).collect();
            let rest = &definition[name.len()..];
            if rest.starts_with('(') {
                let end = behind_parentheses(rest);
                let parameters = rest[1..end - 1].split(',');
                let parameters = parameters.map(|parameter| parameter.trim().to_string());
                macros.insert(name, (parameters.collect(), rest[end..].to_string()));
            }
        } else if !line.starts_with('#') {
            out += line;
            out.push('\n');
        }
    }
    out
}

/// Splits off the longest word, or a character that is in none.
fn next_token(text: &str) -> (&str, &str) {
    let word = text.find(|c| !is_word(c)).unwrap_or(text.len());
    let length = match word {
        0 => text.chars().next().map_or(0, char::len_utf8),
        _ => word,
    };
    text.split_at(length)
}

/// `text` with the macros in it replaced by their bodies.
fn expanded(text: &str, macros: &Macros) -> String {
    let (mut out, mut rest) = (String::new(), text);
    while !rest.is_empty() {
        let (token, behind) = next_token(rest);
        rest = behind;
        match macros.get(token) {
            Some((parameters, body)) if behind.starts_with('(') => {
                let end = behind_parentheses(behind);
                let arguments: Vec<&str> = behind[1..end - 1].split(',').map(str::trim).collect();
                rest = &behind[end..];
                let (mut replaced, mut body) = (String::new(), body.as_str());
                while !body.is_empty() {
                    let (token, behind) = next_token(body);
                    let at = parameters.iter().position(|parameter| parameter == token);
                    replaced += at.map_or(token, |at| arguments[at]);
                    body = behind;
                }
                out += &expanded(&replaced.replace("##", ""), macros);
            }
            _ => out += token,
        }
    }
    out
}

/// Kernels of all files in `kernels/`.
fn kernels() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (_, source) in files("../../kernels", "cu") {
        let mut macros = Macros::new();
        let text = preprocessed(&source, &mut macros);
        for kernel in expanded(&text, &macros).split("__global__").skip(1) {
            let mut rest = kernel.trim_start().strip_prefix("void").unwrap().trim();
            if let Some(bounds) = rest.strip_prefix("__launch_bounds__") {
                rest = bounds[behind_parentheses(bounds)..].trim_start();
            }
            names.insert(next_token(rest).0.to_string());
        }
    }
    names
}

/// String literals of a text with what stands before each.
fn literals(text: &str) -> Vec<(&str, &str)> {
    let quotes: Vec<usize> = text.match_indices('"').map(|(at, _)| at).collect();
    let pairs = quotes.chunks_exact(2);
    pairs
        .map(|pair| (text[..pair[0]].trim_end(), &text[pair[0] + 1..pair[1]]))
        .collect()
}

/// What a literal is for where it names no kernel.
const OTHER_USES: [&str; 7] = [
    "scratch(",
    "named(",
    "get(",
    "contains_key(",
    "expect(",
    "feature =",
    "&str =",
];

/// Names that a file of `src/cuda` launches: its literals that are words, and each `concat!` with its
/// parameters filled in from the calls of `names!`.
fn asked_for(source: &str) -> BTreeSet<String> {
    let code = source.split("#[cfg(test)]").next().unwrap();
    let lines = code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    let mut code = lines.collect::<Vec<_>>().join("\n");
    let (mut patterns, mut calls) = (Vec::new(), Vec::new());
    for (start, into) in [("concat!(", &mut patterns), ("names!(", &mut calls)] {
        while let Some(at) = code.find(start) {
            let open = at + start.len() - 1;
            let end = open + behind_parentheses(&code[open..]);
            into.push(code[open + 1..end - 1].to_string());
            code.replace_range(at..end, "");
        }
    }
    let mut names = BTreeSet::new();
    for (before, literal) in literals(&code) {
        // A semicolon inside a line belongs to an array.
        let statement = before.rsplit(";\n").next().unwrap_or(before);
        let statement = statement.rsplit(['{', '}']).next().unwrap_or(statement);
        let is_name = literal.starts_with(|c: char| c.is_ascii_lowercase())
            && !statement.contains("assert")
            && literal.chars().all(is_word)
            && !OTHER_USES.iter().any(|other| before.ends_with(other));
        if is_name {
            names.insert(literal.to_string());
        }
    }
    for pattern in &patterns {
        let parts: Vec<&str> = pattern.split(',').map(str::trim).collect();
        let holes = parts.iter().filter(|part| part.starts_with('$')).count();
        for call in &calls {
            let arguments: Vec<&str> = call.split_whitespace().collect();
            for filling in arguments.chunks(holes) {
                let mut filling = filling.iter();
                let name = parts.iter().map(|part| match part.starts_with('$') {
                    true => filling.next().unwrap().trim_matches('"'),
                    false => part.trim_matches('"'),
                });
                names.insert(name.collect());
            }
        }
    }
    names
}

#[test]
fn every_kernel_that_is_launched_exists_and_every_kernel_is_launched() {
    let there = kernels();
    let mut launched = BTreeSet::new();
    for (file, source) in files("src/cuda", "rs") {
        let launches = [".launch(", ".launch_pdl(", "self.flat("];
        if file == "launch.rs" || !launches.iter().any(|call| source.contains(call)) {
            continue;
        }
        for name in asked_for(&source) {
            assert!(there.contains(&name), "{file}: no kernel is called {name}");
            launched.insert(name);
        }
    }
    let unused: Vec<_> = there.difference(&launched).collect();
    assert!(
        unused.is_empty(),
        "kernels that nothing launches: {unused:?}"
    );
}

#[test]
fn macros_and_name_lists_are_expanded() {
    let mut macros = Macros::new();
    let source = "#define ONE(NAME, N, ...) \\\n  __global__ void NAME##_##N(int x) { f<__VA_ARGS__>(x); }\n\
                  #define BOTH(NAME) ONE(NAME, 1, A) ONE(NAME, 8, A)\nBOTH(copy) // twice\n";
    let text = preprocessed(source, &mut macros);
    let text = expanded(&text, &macros);
    assert!(
        text.contains("void copy_1(") && text.contains("void copy_8("),
        "{text}"
    );
    let rust =
        "concat!($name, \"_1\") names!(\"copy\") names!(\"add\") scratch(\"sums\") \"norm_8\"";
    let want = ["add_1", "copy_1", "norm_8"].map(String::from);
    assert_eq!(asked_for(rust), BTreeSet::from(want));
}
