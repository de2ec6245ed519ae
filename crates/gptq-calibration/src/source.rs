//! Parses the argument of `--dataset`.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::CalibrationError;
use crate::manifest::{Manifest, Rule};
use gptq_types::outside_name::shown;

/// The source whose windows the model itself writes.
const GENERATED: &str = "self";

/// Kinds of files that texts or tokens come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Rows.
    Parquet,
    /// Rows; Arrow IPC, file or stream.
    Arrow,
    /// Rows; an object or a string per line, or one array of them.
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

    /// Whether a file of this format holds rows with columns to choose from.
    pub fn has_rows(self) -> bool {
        matches!(self, Format::Parquet | Format::Arrow | Format::Json)
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

/// The origin of windows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The hub files of a named dataset.
    Hub(Manifest),
    /// A local file under the rule of a named dataset.
    Copy(Manifest, PathBuf, Format),
    /// A dataset of the hub without a manifest.
    Dataset(Dataset),
    /// A local file.
    File(PathBuf, Format),
    /// The model; the windows are made elsewhere.
    Generated,
}

/// One split of a dataset on the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dataset {
    /// `owner/name`.
    pub repo: String,
    /// The configuration, where one was named.
    pub config: Option<String>,
    /// The split: `train` where none was named.
    pub split: String,
}

impl Dataset {
    const SPLIT: &str = "train";

    /// `OWNER/NAME[:CONFIG[:SPLIT]]`; `None` where it is not of that form.
    fn parse(given: &str) -> Option<Self> {
        let mut parts = given.split(':');
        let repo = parts.next()?;
        let (owner, name) = repo.split_once('/')?;
        let [config, split] = [parts.next(), parts.next()];
        let is_name = |name: &str| {
            let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            !name.is_empty() && name.bytes().all(is_known) && !name.starts_with(['.', '-'])
        };
        let named = [Some(owner), Some(name), config, split];
        let is_one = named.into_iter().flatten().all(is_name) && parts.next().is_none();
        is_one.then(|| Dataset {
            repo: repo.to_string(),
            config: config.map(str::to_string),
            split: split.unwrap_or(Self::SPLIT).to_string(),
        })
    }
}

impl fmt::Display for Dataset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if let Some(config) = &self.config {
            write!(f, ":{config}")?;
        }
        write!(f, " {} split", self.split)
    }
}

/// A source of windows, as typed and as understood.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    given: String,
    origin: Origin,
    column: Option<String>,
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
            column: None,
        })
    }

    /// Takes the text, or the conversations, from this column of its rows.
    ///
    /// Fails where there are no rows, or where the rule of a named dataset fixes the column.
    pub fn with_column(mut self, column: Option<String>) -> Result<Self, CalibrationError> {
        let can_choose = match &self.origin {
            Origin::Dataset(_) => true,
            Origin::File(_, format) | Origin::Copy(_, _, format) => format.has_rows(),
            Origin::Hub(_) | Origin::Generated => false,
        };
        match column {
            Some(column) if !can_choose => Err(CalibrationError::NoRows {
                column: shown(&column, 40),
                given: format!("`{}`", shown(&self.given, 80)),
            }),
            column => {
                self.column = column;
                Ok(self)
            }
        }
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
            if let Some(dataset) = Dataset::parse(given) {
                return Ok(Origin::Dataset(dataset));
            }
            let name = given.split_once('=').map_or(given, |(name, _)| name);
            return Err(unknown_source(name));
        }
        known_format(given).map(|format| Origin::File(PathBuf::from(given), format))
    }

    /// The argument as typed.
    pub fn given(&self) -> &str {
        &self.given
    }

    /// The column that was asked for.
    pub fn column(&self) -> Option<&str> {
        self.column.as_deref()
    }

    /// The rule for taking windows from its rows.
    pub(crate) fn rule(&self) -> Rule {
        match &self.origin {
            Origin::Hub(manifest) | Origin::Copy(manifest, _, _) => manifest.rule,
            Origin::Dataset(_) | Origin::File(_, _) | Origin::Generated => Rule::Joined,
        }
    }

    /// The parsed origin.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Whether it holds windows of ids, which are taken as they are.
    pub fn is_stored(&self) -> bool {
        matches!(self.origin, Origin::File(_, Format::Tokens))
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

/// The format that the name of a file says.
pub(crate) fn known_format(path: &str) -> Result<Format, CalibrationError> {
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
    known.push("OWNER/NAME on the hub".to_string());
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
    fn datasets_of_the_hub_have_a_configuration_and_a_split() {
        let dataset = |given: &str| match origin(given) {
            Origin::Dataset(dataset) => dataset.to_string(),
            other => panic!("{other:?}"),
        };
        assert_eq!(dataset("acme/chats"), "acme/chats train split");
        assert_eq!(dataset("acme/chats:en"), "acme/chats:en train split");
        assert_eq!(
            dataset("acme/chats:en:test_sft"),
            "acme/chats:en test_sft split"
        );
        for given in [
            "acme",
            "a/b/c",
            "./a",
            "a/..",
            "a/b:",
            "a/b:c:d:e",
            "../a",
            "a/b:../c",
        ] {
            let error = Source::parse(given).unwrap_err();
            assert!(
                matches!(error, CalibrationError::UnknownSource { .. }),
                "{error}"
            );
        }
        // a path that is there wins, and a file that is not is still a file
        let error = Source::parse("src/lib.rs").unwrap_err();
        assert!(
            matches!(error, CalibrationError::UnknownFormat { .. }),
            "{error}"
        );
        assert!(matches!(
            origin("acme/chats.jsonl"),
            Origin::File(_, Format::Json)
        ));
    }

    #[test]
    fn a_column_needs_rows_to_choose_it_from() {
        let with = |given: &str| {
            Source::parse(given)
                .unwrap()
                .with_column(Some("body".into()))
        };
        for given in ["t.jsonl", "t.parquet", "c4=t.arrow", "acme/chats"] {
            assert_eq!(with(given).unwrap().column(), Some("body"));
        }
        for given in ["c4", "self", "t.txt", "t.safetensors"] {
            let error = with(given).unwrap_err().to_string();
            assert!(error.starts_with("`--column body` chooses"), "{error}");
        }
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
            "source `pile` is not one of `c4`, `wikitext2`, `self`, a file, OWNER/NAME on the hub"
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
