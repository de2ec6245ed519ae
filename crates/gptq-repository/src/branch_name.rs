//! Checks of branch names before any work: the rules of git and of the hub, and names that may coexist
//! in one repository on any file system.

use std::collections::BTreeMap;

use git2::Reference;
use gptq_types::outside_name::shown;

use crate::RepositoryError;
use crate::repository::head_of;

/// Files and folders are called after a branch, with up to 50 characters around its name and `%2F`
/// for a slash; file systems take 255 bytes.
const MAX_BYTES: usize = 200;
/// Characters of a refused name that an error repeats.
const SHOWN: usize = 80;

/// Refuses names that cannot be branches of one repository: each by itself, names that differ in
/// case alone, and names that would be a file and a folder of refs (`feature`, `feature/x`).
pub fn check_branch_names<'a>(
    names: impl IntoIterator<Item = &'a str>,
) -> Result<(), RepositoryError> {
    let mut taken: BTreeMap<String, &str> = BTreeMap::new();
    for name in names {
        if let Some(reason) = reason_against(name) {
            return Err(refused(name, reason));
        }
        match taken.insert(name.to_lowercase(), name) {
            Some(before) if before == name => return Err(refused(name, "it is there twice")),
            Some(before) => {
                let reason = format!("it differs from `{}` in case alone", shown(before, SHOWN));
                return Err(refused(name, reason));
            }
            None => {}
        }
    }
    for (key, name) in &taken {
        let folders = key.match_indices('/').map(|(end, _)| &key[..end]);
        if let Some(folder) = folders.filter_map(|folder| taken.get(folder)).next() {
            let folder = shown(folder, SHOWN);
            let reason = format!("`{folder}` is a branch, and would have to be a folder");
            return Err(refused(name, reason));
        }
    }
    Ok(())
}

fn refused(name: &str, reason: impl Into<String>) -> RepositoryError {
    RepositoryError::BranchName {
        branch: shown(name, SHOWN),
        reason: reason.into(),
    }
}

pub(crate) fn reason_against(name: &str) -> Option<&'static str> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./+".contains(&byte);
    if name.is_empty() {
        return Some("it is empty");
    }
    if name.replace('/', "%2F").len() > MAX_BYTES {
        return Some("it has more than 200 bytes, a slash counted as three");
    }
    if name.eq_ignore_ascii_case("HEAD") || name.starts_with("refs/") {
        return Some("git gives it another meaning");
    }
    if name.len() == 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Some("it reads as the id of a commit");
    }
    if !name.bytes().all(known) {
        return Some("git and the hub take letters, digits and `-`, `_`, `.`, `/`, `+`");
    }
    if name.split('/').any(|part| part.starts_with('-')) {
        return Some("a part of it begins with `-`");
    }
    if !Reference::is_valid_name(&head_of(name)) || name.contains("..") {
        return Some("git refuses it");
    }
    // On file systems without case, `x.LOCK` is git's lock of `x`.
    if (name.split('/')).any(|part| part.to_ascii_lowercase().ends_with(".lock")) {
        return Some("a part of it ends with `.lock`");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_git_or_the_hub_refuses_is_no_branch() {
        let long = "x".repeat(201);
        let commit = "a".repeat(40);
        for name in [
            "",
            "a b",
            "x.lock",
            "x.LOCK",
            "x.lock/y",
            "..",
            "a..b",
            ".a",
            "a/.b",
            "a.",
            "a/",
            "/a",
            "a//b",
            "HEAD",
            "head",
            "refs/heads/x",
            "-a",
            "a/-b",
            "a~1",
            "a^",
            "a:b",
            "a?",
            "a*",
            "a[",
            "a\\b",
            "@",
            "a@{b",
            "é",
            "a\nb",
            "a\0",
            &long,
            &commit,
        ] {
            let error = check_branch_names([name]).expect_err(name).to_string();
            assert!(error.len() < 300 && !error.contains('\n'), "{error}");
        }
        let good = [
            "main",
            "gptq-8bit--1g-actorder_True",
            "v1.0",
            "a/b",
            "a/c",
            "ab",
            "x+y",
        ];
        check_branch_names(good).unwrap();
    }

    #[test]
    fn names_that_cannot_lie_beside_each_other_are_refused() {
        for (names, reason) in [
            (["feature/x", "feature"], "would have to be a folder"),
            (["a", "a/b/c"], "would have to be a folder"),
            (["A", "a/b"], "would have to be a folder"),
            (["Main", "main"], "in case alone"),
            (["main", "main"], "twice"),
        ] {
            let error = check_branch_names(names).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
