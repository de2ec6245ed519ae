//! The registry: what is known about each named dataset, read from `calibration/manifests`.

use serde::Deserialize;

use crate::CalibrationError;
use crate::error::one_line;

const SHA256_HEX: usize = 64;
const COMMIT_HEX: usize = 40;

const EMBEDDED: [(&str, &str); 2] = [
    ("c4", include_str!("../../../calibration/manifests/c4.toml")),
    (
        "wikitext2",
        include_str!("../../../calibration/manifests/wikitext2.toml"),
    ),
];

/// The rule by which windows are taken from rows of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// All rows are one text, and windows start anywhere in it.
    Joined,
    /// Each window lies in one document that is long enough.
    Documents,
}

/// A file on the hub, and the rule in words for what is done with it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HubFile {
    /// `train`, `test` or `validation`.
    pub split: String,
    /// Path inside the dataset repository.
    pub file: String,
    /// Lower-case hex of the file itself, where it is known; checked after each fetch.
    pub sha256: Option<String>,
    /// How windows are taken, in words.
    pub words: String,
}

/// The text in another file format, for local copies only.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RawCopy {
    /// Its usual name.
    pub file: String,
    /// Lower-case hex of that file.
    pub sha256: String,
}

/// One named dataset: where it lies, what it may be used for, how windows are taken from it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The name on the command line.
    pub name: String,
    /// Dataset repository on the hub, `owner/name`.
    pub repo: String,
    /// Configuration of that repository.
    pub config: String,
    /// Commit (40 hex digits) when `pinned`, else a branch.
    pub revision: String,
    /// Whether `revision` can never change its content.
    pub pinned: bool,
    /// SPDX expression of the text's licence.
    pub licence: String,
    /// How windows are taken.
    pub rule: Rule,
    /// The origin of the rule.
    pub source: String,
    /// The file that calibration windows come from.
    pub calibration: HubFile,
    /// The file that evaluation windows come from.
    pub evaluation: HubFile,
    /// The text outside the hub.
    pub raw: Option<RawCopy>,
}

impl Manifest {
    /// The names of all datasets, sorted.
    pub fn names() -> Vec<&'static str> {
        EMBEDDED.iter().map(|(name, _)| *name).collect()
    }

    /// The manifest of a dataset; `None` for a name that is not in the registry.
    ///
    /// Fails when the embedded manifest does not keep the rules of `calibration/README.md`.
    pub fn named(name: &str) -> Result<Option<Self>, CalibrationError> {
        match EMBEDDED.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::parse(name, text).map(Some),
            None => Ok(None),
        }
    }

    fn parse(name: &str, text: &str) -> Result<Self, CalibrationError> {
        let wrong = |reason: String| CalibrationError::Manifest {
            name: name.to_string(),
            reason,
        };
        let manifest: Self = toml::from_str(text).map_err(|error| wrong(one_line(error)))?;
        manifest.check(name).map_err(wrong)?;
        Ok(manifest)
    }

    fn check(&self, name: &str) -> Result<(), String> {
        if self.name != name {
            return Err(format!("its `name` is `{}`", self.name));
        }
        if self.pinned && !is_hex(&self.revision, COMMIT_HEX) {
            return Err(format!(
                "`pinned` revision `{}` is not a commit of {COMMIT_HEX} hex digits",
                self.revision
            ));
        }
        let hubs = [&self.calibration, &self.evaluation].map(|hub| hub.sha256.as_ref());
        let raw = self.raw.as_ref().map(|raw| &raw.sha256);
        for sha256 in hubs.into_iter().chain([raw]).flatten() {
            if !is_hex(sha256, SHA256_HEX) {
                return Err(format!(
                    "`sha256` is `{sha256}`, not {SHA256_HEX} hex digits"
                ));
            }
        }
        Ok(())
    }
}

fn is_hex(text: &str, digits: usize) -> bool {
    text.len() == digits && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn embedded_manifests_are_sound_and_sorted() {
        let names = Manifest::names();
        assert!(names.is_sorted());
        for name in names {
            let manifest = Manifest::named(name).unwrap().unwrap();
            assert!(manifest.pinned, "{name}");
            assert!(!manifest.licence.is_empty(), "{name}");
        }
        assert_eq!(Manifest::named("pile").unwrap(), None);
    }

    #[test]
    fn rules_are_those_of_the_original_repository() {
        let rule = |name| Manifest::named(name).unwrap().unwrap().rule;
        assert_eq!(rule("c4"), Rule::Documents);
        assert_eq!(rule("wikitext2"), Rule::Joined);
    }

    #[test]
    fn a_branch_is_not_a_pin_and_a_short_hash_is_none() {
        let text = EMBEDDED[1].1;
        let (_, revision) = text.split_once("revision = \"").unwrap();
        let branch = text.replace(&revision[..COMMIT_HEX], "main");
        let error = Manifest::parse("wikitext2", &branch).unwrap_err();
        assert!(
            error.to_string().contains("`main` is not a commit"),
            "{error}"
        );
        let short = text.replace("sha256 = \"173c", "sha256 = \"");
        let error = Manifest::parse("wikitext2", &short).unwrap_err();
        assert!(error.to_string().contains("not 64 hex digits"), "{error}");
        let error = Manifest::parse("c4", text).unwrap_err();
        assert!(
            error.to_string().contains("`name` is `wikitext2`"),
            "{error}"
        );
        let error = Manifest::parse("c4", "name = 1").unwrap_err();
        assert!(
            matches!(error, CalibrationError::Manifest { .. }),
            "{error}"
        );
        assert!(!error.to_string().contains('\n'), "{error}");
    }
}
