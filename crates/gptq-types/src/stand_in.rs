//! Stand-ins: content in the place of a file that was never downloaded.

use std::fmt;

/// First bytes that [`StandIn::of`] looks at.
pub const STAND_IN_BYTES: usize = 64;

/// A stand-in for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StandIn {
    /// No bytes at all.
    Empty,
    /// The pointer that a git clone without LFS leaves in place of a large file.
    LfsPointer,
    /// An HTML page: the address of a viewer was saved, or a proxy answered.
    WebPage,
}

impl StandIn {
    /// Recognizes a stand-in by the first bytes of a file.
    pub fn of(first_bytes: &[u8]) -> Option<Self> {
        if first_bytes.is_empty() {
            return Some(StandIn::Empty);
        }
        if first_bytes.starts_with(b"version https://git-lfs.github.com/") {
            return Some(StandIn::LfsPointer);
        }
        let text = first_bytes
            .strip_prefix(b"\xef\xbb\xbf")
            .unwrap_or(first_bytes)
            .trim_ascii_start();
        let begins = |tag: &str| {
            text.get(..tag.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(tag.as_bytes()))
        };
        (begins("<!doctype") || begins("<html")).then_some(StandIn::WebPage)
    }

    /// Advice to the user.
    pub fn hint(self) -> &'static str {
        match self {
            StandIn::Empty => "fetch the file again",
            StandIn::LfsPointer => "run `git lfs pull` in that folder, or give `owner/name`",
            StandIn::WebPage => {
                "fetch the file itself: addresses of the hub have `resolve` in them, not `blob`"
            }
        }
    }
}

impl fmt::Display for StandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            StandIn::Empty => "is empty",
            StandIn::LfsPointer => "is a git-LFS pointer, not the file itself",
            StandIn::WebPage => "is a web page, not the file itself",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_is_known_by_its_first_bytes() {
        let of = |text: &str| StandIn::of(text.as_bytes());
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:";
        assert_eq!(of(pointer), Some(StandIn::LfsPointer));
        for page in ["<!DOCTYPE html>", "\u{feff}\n <HTML lang", "<html>"] {
            assert_eq!(of(page), Some(StandIn::WebPage), "{page}");
        }
        assert_eq!(of(""), Some(StandIn::Empty));
        for file in ["{}", "#version: 0.2\n", "<unk>", "version"] {
            assert_eq!(of(file), None, "{file}");
        }
    }
}
