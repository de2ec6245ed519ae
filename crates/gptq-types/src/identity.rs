//! Hashes by which files, tensors and models are known again.

use std::collections::BTreeMap;
use std::fmt::{self, Write};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::TensorInfo;
use crate::outside_name::shown;

/// A sha256, written as 64 lower-case hexadecimal digits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ContentHash(String);

/// A text that is no sha256.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a sha256 of 64 hexadecimal digits")]
pub struct NotAHash(String);

impl ContentHash {
    /// The hash of bytes.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = ContentHasher::default();
        hasher.update(bytes);
        hasher.finish()
    }

    /// The digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ContentHash {
    type Error = NotAHash;

    fn try_from(text: String) -> Result<Self, NotAHash> {
        let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        match text.len() == 64 && text.bytes().all(digit) {
            true => Ok(ContentHash(text)),
            false => Err(NotAHash(shown(&text, 80))),
        }
    }
}

impl From<ContentHash> for String {
    fn from(hash: ContentHash) -> String {
        hash.0
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A [`ContentHash`] of bytes that come in pieces.
#[derive(Clone, Default)]
pub struct ContentHasher(Sha256);

impl ContentHasher {
    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash of all of them.
    pub fn finish(self) -> ContentHash {
        let mut digits = String::with_capacity(64);
        for byte in self.0.finalize() {
            write!(digits, "{byte:02x}").expect("a string takes all");
        }
        ContentHash(digits)
    }
}

/// The identity of a model's weights: the sha256 over a line `HASH TYPE SHAPE NAME` for each tensor,
/// in the order of names. Two models have the same one exactly where all tensors are equal, however
/// they are cut into files.
pub fn model_identity(tensors: &BTreeMap<String, (TensorInfo, ContentHash)>) -> ContentHash {
    let mut hasher = ContentHasher::default();
    for (name, (info, hash)) in tensors {
        let line = format!("{hash} {} {:?} {name}\n", info.dtype, info.shape);
        hasher.update(line.as_bytes());
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dtype;

    #[test]
    fn of_known_bytes() {
        // FIPS 180-2, appendix B.1
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(ContentHash::of(b"abc").as_str(), abc);
        let mut pieces = ContentHasher::default();
        pieces.update(b"a");
        pieces.update(b"bc");
        assert_eq!(pieces.finish().as_str(), abc);
    }

    #[test]
    fn only_a_sha256_is_read() {
        for text in [
            "",
            "ab",
            &"g".repeat(64),
            &"A".repeat(64),
            "../../etc/passwd",
        ] {
            assert!(ContentHash::try_from(text.to_string()).is_err(), "{text}");
        }
        let hash = ContentHash::of(b"");
        assert_eq!(ContentHash::try_from(hash.to_string()).unwrap(), hash);
    }

    #[test]
    fn one_byte_shape_type_or_name_makes_another_model() {
        let identity = |name: &str, dtype, shape: &[usize], bytes: &[u8]| {
            let info = TensorInfo {
                dtype,
                shape: shape.to_vec(),
            };
            model_identity(&BTreeMap::from([(
                name.to_string(),
                (info, ContentHash::of(bytes)),
            )]))
        };
        let first = identity("a", Dtype::F16, &[2], &[1, 2, 3, 4]);
        assert_eq!(first, identity("a", Dtype::F16, &[2], &[1, 2, 3, 4]));
        assert_ne!(first, identity("b", Dtype::F16, &[2], &[1, 2, 3, 4]));
        assert_ne!(first, identity("a", Dtype::BF16, &[2], &[1, 2, 3, 4]));
        assert_ne!(first, identity("a", Dtype::F16, &[1, 2], &[1, 2, 3, 4]));
        assert_ne!(first, identity("a", Dtype::F16, &[2], &[1, 2, 3, 5]));
    }
}
