//! Inputs of a recipe: their paths, and whether they are unchanged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use gptq_calibration::{Origin, Source, file_sha256};
use gptq_hub::parse_model_ref;
use gptq_types::Inputs;

use crate::failure::Failure;
use crate::models::Model;

/// The folder of a baseline file: paths in a recipe are relative to it, so that the file works from
/// wherever the command is run.
pub struct Place(PathBuf);

impl Place {
    /// The folder of `baseline`.
    pub fn of(baseline: &Path) -> Self {
        Place(baseline.parent().unwrap_or(Path::new("")).to_path_buf())
    }

    /// A MODEL argument: a folder that is there, else a name on the hub, else a folder that is not.
    pub fn model(&self, model: &str) -> String {
        let folder = self.0.join(model);
        match !folder.exists() && parse_model_ref(model).is_ok() {
            true => model.to_string(),
            false => folder.display().to_string(),
        }
    }

    /// A `--dataset` argument.
    pub fn dataset(&self, dataset: &str) -> Result<String, Failure> {
        Ok(match Source::parse(dataset)?.origin() {
            Origin::Hub(_) | Origin::Dataset(_) | Origin::Generated => dataset.to_string(),
            Origin::Copy(manifest, file, _) => {
                format!("{}={}", manifest.name, self.0.join(file).display())
            }
            Origin::File(file, _) => self.0.join(file).display().to_string(),
        })
    }
}

/// sha256 of `config.json` and of every weight file, by name.
pub fn hash_model(model: &Model) -> Result<BTreeMap<String, String>, Failure> {
    let mut files = model.checkpoint.files();
    files.push(model.dir().join("config.json"));
    let hash = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let digest = file_sha256(path)
            .map_err(|error| Failure::new(format!("cannot read `{}`: {error}", path.display())))?;
        Ok((name.into_owned(), digest))
    };
    files.iter().map(hash).collect()
}

/// Lower-case hex of a digest.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Refuses to compare figures of different inputs, and names the input that differs.
pub fn check_same(was: &Inputs, now: &Inputs, baseline: &Path) -> Result<(), Failure> {
    let names = was.model.keys().chain(now.model.keys());
    let mut changed: Vec<String> = names
        .filter(|name| was.model.get(*name) != now.model.get(*name))
        .map(|name| format!("`{name}` of the model"))
        .collect();
    changed.sort();
    changed.dedup();
    let tokens = [
        (
            "calibration",
            &was.calibration_tokens,
            &now.calibration_tokens,
        ),
        ("evaluation", &was.evaluation_tokens, &now.evaluation_tokens),
    ];
    for (what, was, now) in tokens {
        if was != now {
            changed.push(format!("the {what} tokens (sha256 {now}, were {was})"));
        }
    }
    if changed.is_empty() {
        return Ok(());
    }
    Err(Failure::with_hint(
        format!(
            "`{}` was made of other inputs; changed: {}",
            baseline.display(),
            changed.join(", ")
        ),
        "bring them back, or make the baseline of the new ones with --update",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_relative_to_the_file() {
        let place = Place::of(Path::new("a/b/baseline.json"));
        assert_eq!(place.model("../m"), "a/b/../m");
        assert_eq!(place.model("owner/name:branch"), "owner/name:branch");
        assert_eq!(place.model("/m"), "/m");
        let dataset = |name: &str| place.dataset(name).map_err(|failure| failure.text);
        assert_eq!(dataset("c4"), Ok("c4".to_string()));
        assert_eq!(dataset("../t.txt"), Ok("a/b/../t.txt".to_string()));
        let copy = "wikitext2=t.raw";
        assert_eq!(dataset(copy), Ok("wikitext2=a/b/t.raw".to_string()));
        assert_eq!(Place::of(Path::new("baseline.json")).model("../m"), "../m");
    }
}
