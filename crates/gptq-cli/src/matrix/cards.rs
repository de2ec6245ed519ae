//! Cards from what the branches themselves hold.

use std::path::Path;

use gptq_report::CardInfo;
use gptq_repository::Repository;
use gptq_types::outside_name::shown;
use gptq_types::{Branch, BranchRecord, RunRecord};
use serde::de::DeserializeOwned;

use super::read_text;
use crate::failure::Failure;
use crate::isolation::render_card;
use crate::records::{BRANCH_RECORD, RUN_RECORD, check_branch, check_schema};

/// Finished branches, in the order of `wanted`; others after them, by name.
pub fn read_branches(repository: &Repository, wanted: &[String]) -> Result<Vec<Branch>, Failure> {
    let mut names = repository.branches()?;
    let place = |name: &String| wanted.iter().position(|wanted| wanted == name);
    names.sort_by_key(|name| (place(name).unwrap_or(usize::MAX), name.clone()));
    let mut branches = Vec::new();
    for name in &names {
        let branch = Branch {
            record: read::<BranchRecord>(repository, name, BRANCH_RECORD)?,
            run: read::<RunRecord>(repository, name, RUN_RECORD)?,
        };
        let checked = check_schema(&branch.run, &format!("{name}: {RUN_RECORD}"));
        checked
            .and_then(|()| check_branch(&branch, name))
            .map_err(|failure| {
                let place = repository.path().display();
                Failure::new(format!("branch `{name}` of `{place}`: {}", failure.text))
            })?;
        branches.push(branch);
    }
    refuse_two_models(repository, &branches)?;
    Ok(branches)
}

/// A card presents its branches as one model's.
fn refuse_two_models(repository: &Repository, branches: &[Branch]) -> Result<(), Failure> {
    let mut known = (branches.iter())
        .filter_map(|branch| Some((branch, branch.record.weights_sha256.as_ref()?)));
    let Some((first, identity)) = known.next() else {
        return Ok(());
    };
    match known.find(|(_, other)| *other != identity) {
        None => Ok(()),
        Some((other, found)) => Err(Failure::new(format!(
            "`{}` holds branches of two models: `{}` of identity {identity}, `{}` of {found}",
            repository.path().display(),
            first.record.permutation.branch,
            other.record.permutation.branch,
        ))),
    }
}

fn read<T: DeserializeOwned>(
    repository: &Repository,
    branch: &str,
    file: &str,
) -> Result<T, Failure> {
    let place = format!("branch `{branch}` of `{}`", repository.path().display());
    let content = (repository.read(branch, file)?)
        .ok_or_else(|| Failure::new(format!("{place} has no `{file}`")))?;
    serde_json::from_slice(&content).map_err(|error| {
        let error = shown(&error.to_string(), 200);
        Failure::new(format!("{place}, `{file}`: {error}"))
    })
}

/// Reads the user's description of the model; gaps are filled from the model's own card.
pub fn card_info(file: Option<&Path>, model_dir: &Path, given: &str) -> Result<CardInfo, Failure> {
    let mut info = match file {
        Some(path) => toml::from_str::<CardInfo>(&read_text(path)?)
            .map_err(|error| Failure::new(format!("`{}`: {}", path.display(), error.message())))?,
        None => CardInfo::default(),
    };
    let original = model_dir.join("README.md");
    if original.exists() {
        let text = read_text(&original)?;
        let (front, body) = split_front_matter(&text);
        let field = |key: &str| {
            (front.lines())
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
                .map(|value| value.trim().trim_matches(['"', '\'']).to_string())
                .filter(|value| !value.is_empty())
        };
        info.license = info.license.or_else(|| field("license"));
        if info.original_card.is_none() {
            info.original_card = Some(body.trim().to_string());
        }
    }
    let on_hub = !model_dir.ends_with(given) && gptq_hub::parse_model_ref(given).is_ok();
    if info.base_model.is_none() && on_hub {
        info.base_model = given.split(':').next().map(str::to_string);
    }
    if info.model_name.is_empty() {
        let name = (info.base_model.as_deref()).map(|id| id.rsplit('/').next().unwrap_or(id));
        let folder = std::fs::canonicalize(model_dir).ok();
        let folder = folder.and_then(|path| Some(path.file_name()?.to_string_lossy().into_owned()));
        info.model_name = (name.map(str::to_string)).or(folder).unwrap_or_default();
    }
    Ok(info)
}

/// The text between two lines of `---` at the start, and what follows.
fn split_front_matter(text: &str) -> (&str, &str) {
    let inner = text
        .strip_prefix("---\n")
        .and_then(|rest| rest.split_once("\n---"));
    match inner {
        Some((front, body)) => (front, body.split_once('\n').map_or("", |(_, body)| body)),
        None => ("", text),
    }
}

/// The card of `branches` in words.
pub fn render(
    info: &CardInfo,
    model_type: &str,
    branches: &[Branch],
    template: Option<&Path>,
) -> Result<String, Failure> {
    match template {
        Some(file) => render_card(read_text(file)?, info, model_type, branches),
        None => Ok(gptq_report::card(info, model_type, branches, None)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn front_matter_is_cut_off() {
        let (front, body) = split_front_matter("---\nlicense: mit\n---\n# Title\n");
        assert_eq!((front, body), ("license: mit", "# Title\n"));
        assert_eq!(split_front_matter("# Title\n"), ("", "# Title\n"));
    }
}
