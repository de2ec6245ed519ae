//! Names that come from outside, before they choose a path.
//!
//! Entries of git trees, LFS pointers, `model.safetensors.index.json`, tokenizer and companion files,
//! file lists of the hub, branches of a plan: whoever joins such a name to a folder asks here first.
//! A name is refused, never repaired, since a repaired name may be that of another file.

use std::path::{Path, PathBuf};

/// Longest name of a file that common file systems take, in bytes.
const MAX_FILE_NAME_BYTES: usize = 255;
/// Longest path that Linux takes, in bytes.
const MAX_PATH_BYTES: usize = 4096;
/// Characters of a refused name that an error repeats.
const SHOWN_CHARACTERS: usize = 80;

/// Why a name chooses no path.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` is not the name of a file in a folder: {reason}")]
pub struct OutsideNameError {
    /// The name, escaped and cut short.
    pub name: String,
    /// The reason why it is refused.
    pub reason: &'static str,
}

/// `name` as the name of a file directly in a folder: one normal component.
pub fn file_name(name: &str) -> Result<&Path, OutsideNameError> {
    match reason_against(name) {
        Some(reason) => Err(refused(name, reason)),
        None => Ok(Path::new(name)),
    }
}

/// `name` as a path below a folder: normal components with `/` between them.
pub fn relative_path(name: &str) -> Result<PathBuf, OutsideNameError> {
    if name.len() > MAX_PATH_BYTES {
        return Err(refused(name, "it has more than 4096 bytes"));
    }
    match name.split('/').find_map(reason_against) {
        Some(reason) => Err(refused(name, reason)),
        None => Ok(PathBuf::from(name)),
    }
}

/// The first characters of a text from outside, control characters escaped, for an error line.
pub fn shown(text: &str, characters: usize) -> String {
    let mut escaped = String::new();
    for (index, character) in text.chars().enumerate() {
        if index == characters {
            escaped.push_str("...");
            break;
        }
        match character.is_control() {
            true => escaped.extend(character.escape_default()),
            false => escaped.push(character),
        }
    }
    escaped
}

fn refused(name: &str, reason: &'static str) -> OutsideNameError {
    let name = shown(name, SHOWN_CHARACTERS);
    OutsideNameError { name, reason }
}

fn reason_against(component: &str) -> Option<&'static str> {
    if component.is_empty() {
        return Some("a part of it is empty");
    }
    if component == "." || component == ".." {
        return Some("`.` and `..` are other folders");
    }
    if component.contains(['/', '\\']) {
        return Some("it holds a separator");
    }
    if component.chars().any(char::is_control) {
        return Some("it holds a control character");
    }
    // Git refuses it in any case on any system; a checkout that wrote it could run its hooks.
    if component.eq_ignore_ascii_case(".git") {
        return Some("`.git` is git's own");
    }
    if component.len() > MAX_FILE_NAME_BYTES {
        return Some("it has more than 255 bytes");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTSIDE: [&str; 14] = [
        "",
        ".",
        "..",
        "/",
        "/etc/x",
        "../x",
        "a/../../x",
        "a//b",
        "a/",
        ".git",
        ".GIT/config",
        "a\\b",
        "a\0b",
        "a\nb",
    ];

    #[test]
    fn what_is_no_normal_component_chooses_no_path() {
        for name in OUTSIDE {
            assert!(file_name(name).is_err(), "{name:?}");
            assert!(relative_path(name).is_err(), "{name:?}");
        }
        assert!(file_name(&"x".repeat(256)).is_err());
    }

    #[test]
    fn folders_are_a_relative_path_alone() {
        assert!(file_name("onnx/model.bin").is_err());
        let path = relative_path("onnx/model.bin").unwrap();
        assert_eq!(path, Path::new("onnx/model.bin"));
        for name in ["model.safetensors", ".gitattributes", "..x", "a b", "é"] {
            assert_eq!(file_name(name).unwrap(), Path::new(name));
        }
    }

    #[test]
    fn an_error_repeats_little_of_a_name() {
        let error = file_name(&"../".repeat(1000)).unwrap_err();
        assert!(error.to_string().len() < 200, "{error}");
        assert_eq!(shown("a\u{1b}[2J", 80), "a\\u{1b}[2J");
    }
}
