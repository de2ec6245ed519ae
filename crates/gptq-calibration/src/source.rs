//! What was typed after `--dataset`, and what it means.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::CalibrationError;
use crate::manifest::{Manifest, Rule};

/// The source whose windows the model itself writes.
const GENERATED: &str = "self";

/// Kinds of files that texts or tokens come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Rows; column `text` or `content`.
    Parquet,
    /// Rows; Arrow IPC, file or stream.
    Arrow,
    /// Rows; a JSON object per line or one JSON array of objects.
    Json,
    /// One text.
    Text,
    /// Token windows: safetensors, tensor `input_ids`, integers `[windows, tokens]`.
    Tokens,
}

/// Extensions and whether `.gz` or `.zst` may follow them.
const EXTENSIONS: [(&str, Format, bool); 8] = [
    (".parquet", Format::Parquet, false),
    (".arrow", Format::Arrow, false),
    (".jsonl", Format::Json, true),
    (".json", Format::Json, true),
    (".txt", Format::Text, true),
    (".raw", Format::Text, true),
    (".md", Format::Text, true),
    (".safetensors", Format::Tokens, false),
];

impl Format {
    /// The format that a file name says, upper and lower case alike.
    pub fn of(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        let (stem, is_packed) = match Packing::of(&name) {
            Packing::Plain => (name.as_str(), false),
            Packing::Gzip => (name.trim_end_matches(".gz"), true),
            Packing::Zstd => (name.trim_end_matches(".zst"), true),
        };
        EXTENSIONS
            .into_iter()
            .find(|(extension, _, may_pack)| stem.ends_with(extension) && (*may_pack || !is_packed))
            .map(|(_, format, _)| format)
    }

    /// `parquet`, `arrow`, `json`, `text` or `safetensors`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Parquet => "parquet",
            Format::Arrow => "arrow",
            Format::Json => "json",
            Format::Text => "text",
            Format::Tokens => "safetensors",
        }
    }

    fn known() -> String {
        let names = EXTENSIONS.map(|(extension, _, may_pack)| {
            let packed = if may_pack { "(.gz, .zst)" } else { "" };
            format!("`{extension}`{packed}")
        });
        names.join(", ")
    }
}

/// Compression around a whole file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    Plain,
    Gzip,
    Zstd,
}

impl Packing {
    pub(crate) fn of(name: &str) -> Self {
        let name = name.to_ascii_lowercase();
        if name.ends_with(".gz") {
            Packing::Gzip
        } else if name.ends_with(".zst") {
            Packing::Zstd
        } else {
            Packing::Plain
        }
    }
}

/// Where windows come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The hub files of a named dataset.
    Hub(Manifest),
    /// A local file under the rule of a named dataset.
    Copy(Manifest, PathBuf, Format),
    /// A local file.
    File(PathBuf, Format),
    /// The model; the windows are made elsewhere.
    Generated,
}

/// A source of windows, as typed and as understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    given: String,
    origin: Origin,
}

impl Source {
    /// Understands `c4`, `wikitext2`, `self`, `NAME=PATH` and `PATH`. Opens no file.
    ///
    /// Fails on an unknown name (the error lists the known ones), an unknown extension, and a
    /// format that the rule of NAME cannot use.
    pub fn parse(given: &str) -> Result<Self, CalibrationError> {
        let origin = Self::origin_of(given)?;
        Ok(Self {
            given: given.to_string(),
            origin,
        })
    }

    fn origin_of(given: &str) -> Result<Origin, CalibrationError> {
        if given == GENERATED {
            return Ok(Origin::Generated);
        }
        if let Some(manifest) = Manifest::named(given)? {
            return Ok(Origin::Hub(manifest));
        }
        if let Some((name, path)) = given.split_once('=')
            && let Some(manifest) = Manifest::named(name)?
        {
            let format = known_format(path)?;
            allow(&manifest, path, format)?;
            return Ok(Origin::Copy(manifest, PathBuf::from(path), format));
        }
        if Format::of(given).is_none() && !Path::new(given).exists() {
            let name = given.split_once('=').map_or(given, |(name, _)| name);
            return Err(unknown_source(name));
        }
        known_format(given).map(|format| Origin::File(PathBuf::from(given), format))
    }

    /// As typed.
    pub fn given(&self) -> &str {
        &self.given
    }

    /// As understood.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Whether the windows come from the model.
    pub fn is_generated(&self) -> bool {
        self.origin == Origin::Generated
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.given)
    }
}

fn known_format(path: &str) -> Result<Format, CalibrationError> {
    Format::of(path).ok_or_else(|| CalibrationError::UnknownFormat {
        path: path.to_string(),
        known: Format::known(),
    })
}

/// A rule draws from texts; drawing documents needs to know where each one ends.
fn allow(manifest: &Manifest, path: &str, format: Format) -> Result<(), CalibrationError> {
    let needs = match (manifest.rule, format) {
        (_, Format::Tokens) => "text",
        (Rule::Documents, Format::Text) => "a row per document",
        _ => return Ok(()),
    };
    Err(CalibrationError::Rule {
        name: manifest.name.clone(),
        path: path.to_string(),
        format: format.name(),
        needs,
    })
}

fn unknown_source(name: &str) -> CalibrationError {
    let mut known: Vec<String> = Manifest::names()
        .into_iter()
        .chain([GENERATED])
        .map(|name| format!("`{name}`"))
        .collect();
    known.push("a file".to_string());
    CalibrationError::UnknownSource {
        name: name.to_string(),
        known: known.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(given: &str) -> Origin {
        Source::parse(given).unwrap().origin().clone()
    }

    #[test]
    fn names_paths_and_copies_are_told_apart() {
        assert!(matches!(origin("c4"), Origin::Hub(m) if m.name == "c4"));
        assert!(matches!(origin("wikitext2"), Origin::Hub(m) if m.name == "wikitext2"));
        assert_eq!(origin("self"), Origin::Generated);
        assert!(matches!(
            origin("wikitext2=a/wiki.train.raw"),
            Origin::Copy(m, path, Format::Text)
                if m.name == "wikitext2" && path == Path::new("a/wiki.train.raw")
        ));
        assert!(matches!(
            origin("c4=x=y.json.gz"),
            Origin::Copy(m, path, Format::Json) if m.name == "c4" && path == Path::new("x=y.json.gz")
        ));
        assert_eq!(
            origin("lr=3.txt"),
            Origin::File(PathBuf::from("lr=3.txt"), Format::Text)
        );
    }

    #[test]
    fn extensions_name_formats_in_any_case() {
        let formats = [
            ("a.parquet", Some(Format::Parquet)),
            ("a.arrow", Some(Format::Arrow)),
            ("A.JSONL", Some(Format::Json)),
            ("a.json.gz", Some(Format::Json)),
            ("a.jsonl.zst", Some(Format::Json)),
            ("a.md", Some(Format::Text)),
            ("a.raw.gz", Some(Format::Text)),
            ("a.safetensors", Some(Format::Tokens)),
            ("a.parquet.gz", None),
            ("a.bin", None),
            ("a.gz", None),
        ];
        for (name, format) in formats {
            assert_eq!(Format::of(name), format, "{name}");
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let error = Source::parse("pile").unwrap_err();
        assert_eq!(
            error.to_string(),
            "source `pile` is not one of `c4`, `wikitext2`, `self`, a file"
        );
        assert!(error.hint().is_some());
        let error = Source::parse("ptb=somewhere").unwrap_err();
        assert!(matches!(error, CalibrationError::UnknownSource { name, .. } if name == "ptb"));
    }

    #[test]
    fn an_unknown_extension_is_answered_with_the_known_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("text.doc");
        std::fs::write(&path, "x").unwrap();
        let error = Source::parse(path.to_str().unwrap()).unwrap_err();
        assert!(matches!(error, CalibrationError::UnknownFormat { .. }));
        assert!(error.to_string().contains("`.jsonl`(.gz, .zst)"), "{error}");
        let error = Source::parse("c4=text.doc").unwrap_err();
        assert!(matches!(error, CalibrationError::UnknownFormat { .. }));
    }

    #[test]
    fn a_rule_refuses_formats_it_cannot_draw_from() {
        let error = Source::parse("c4=all.txt").unwrap_err();
        assert_eq!(
            error.to_string(),
            "the rule of `c4` needs a row per document, and all.txt is a text file"
        );
        let error = Source::parse("wikitext2=w.safetensors").unwrap_err();
        assert!(matches!(
            error,
            CalibrationError::Rule { needs: "text", .. }
        ));
    }
}
