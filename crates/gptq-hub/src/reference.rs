//! Parses `owner/name:branch`, and checks names that become part of a path or an address.

use gptq_types::outside_name::{relative_path, shown};

use crate::HubError;

/// Longest owner or name on the hub.
const MAX_NAME_BYTES: usize = 96;
const MAX_REVISION_BYTES: usize = 256;

/// A repository on the hub at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelRef {
    /// `owner/name`.
    pub repo: String,
    /// Branch, tag or commit; `main` when none was given.
    pub revision: String,
}

/// Reads `owner/name` or `owner/name:branch`.
///
/// Fails on anything else: both parts of the name consist of letters, digits, `.`, `_` and `-`,
/// do not begin with `.` or `-`, and hold neither `..` nor `--`; a branch may also hold `/`.
///
/// ```
/// let model = gptq_hub::parse_model_ref("TheBloke/Llama-2-7B-GPTQ:gptq-4bit-32g-actorder_True");
/// assert_eq!(model.unwrap().revision, "gptq-4bit-32g-actorder_True");
/// ```
pub fn parse_model_ref(model: &str) -> Result<ModelRef, HubError> {
    let (repo, revision) = model.split_once(':').unwrap_or((model, "main"));
    if !is_repo(repo) || !is_revision(revision) {
        return Err(HubError::Reference(shown(model, 160)));
    }
    Ok(ModelRef {
        repo: repo.to_string(),
        revision: revision.to_string(),
    })
}

/// Whether the text is `owner/name`.
pub(crate) fn is_repo(repo: &str) -> bool {
    repo.split_once('/')
        .is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.bytes().all(is_name_byte)
        && !name.starts_with(['.', '-'])
        && !name.contains("..")
        && !name.contains("--")
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// Whether the text may name a branch, tag or commit, and so a file below `refs`.
pub(crate) fn is_revision(revision: &str) -> bool {
    revision.len() <= MAX_REVISION_BYTES && relative_path(revision).is_ok() && {
        revision
            .bytes()
            .all(|byte| is_name_byte(byte) || matches!(byte, b'/' | b'+'))
    }
}

/// Whether a commit id: 40 hexadecimal digits.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_branch_follows_the_colon() {
        let model = parse_model_ref("owner/name:gptq-4bit-32g-actorder_True").unwrap();
        assert_eq!(model.repo, "owner/name");
        assert_eq!(model.revision, "gptq-4bit-32g-actorder_True");
        assert_eq!(parse_model_ref("o/n").unwrap().revision, "main");
        assert_eq!(
            parse_model_ref("o/n:refs/pr/1").unwrap().revision,
            "refs/pr/1"
        );
    }

    #[test]
    fn names_that_could_leave_the_cache_are_refused() {
        for model in [
            "", "name", "a/b/c", "../b", "a/..", "a/b:", "a/b:../c", "a/b:/c", "a/b:c//d",
            "a/b:c d", "./a", "a/.b", "a--b/c", "a/b:c:d", "a\\b/c", "/a", "a/",
        ] {
            assert!(parse_model_ref(model).is_err(), "`{model}` was accepted");
        }
    }
}
