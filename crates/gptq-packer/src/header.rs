//! The JSON at the head of a safetensors file: 8 bytes of length, then names, types and offsets.
//!
//! Parsing goes through the types of the `safetensors` crate, which checks that offsets leave no
//! hole. That crate collects names in a map, which silently drops a repeated name, so the object is
//! walked member by member here.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use gptq_types::{Dtype, TensorInfo};
use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo as StoredInfo};
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use serde::ser::{SerializeMap, Serializer};
use serde::{Deserialize, Serialize};

/// The longest header that is read or written; the limit of the `safetensors` crate.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the length field before the header.
pub(crate) const LENGTH_BYTES: u64 = 8;

const METADATA_KEY: &str = "__metadata__";

/// A header that does not describe a file.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum HeaderError {
    #[error("the header is not a safetensors header: {0}")]
    Json(#[from] serde_json::Error),
    #[error("tensor `{0}` is listed twice")]
    Duplicate(String),
    #[error("tensor `{name}` has type {dtype}, which is not supported")]
    UnsupportedType { name: String, dtype: String },
    #[error("the offsets do not cover the data: {0}")]
    Cover(#[from] SafeTensorError),
    #[error("tensor `{0}` is larger than this machine can address")]
    Overflow(String),
    #[error("`__metadata__` is not a tensor name")]
    ReservedName,
    #[error("the header has {length} bytes, more than {MAX_HEADER_BYTES}")]
    TooLong { length: u64 },
}

/// One tensor of a file; offsets count from the end of the header.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct HeaderTensor {
    pub name: String,
    pub info: TensorInfo,
    pub start: u64,
    pub end: u64,
}

/// A parsed header; tensors in the order of their data, without holes.
#[derive(Debug, PartialEq)]
pub(crate) struct Header {
    pub metadata: BTreeMap<String, String>,
    pub tensors: Vec<HeaderTensor>,
}

impl Header {
    /// Bytes of all tensors.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.last().map_or(0, |tensor| tensor.end)
    }
}

struct Members {
    /// Inside: `null` is none, as the `safetensors` crate reads it.
    metadata: Option<Option<BTreeMap<String, String>>>,
    tensors: Vec<(String, StoredInfo)>,
}

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
        let mut members = Members {
            metadata: None,
            tensors: Vec::new(),
        };
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA_KEY {
                if members.metadata.replace(map.next_value()?).is_some() {
                    return Err(A::Error::custom("`__metadata__` is listed twice"));
                }
                continue;
            }
            let info = map
                .next_value::<StoredInfo>()
                .map_err(|error| A::Error::custom(format!("tensor `{name}`: {error}")))?;
            members.tensors.push((name, info));
        }
        Ok(members)
    }
}

/// Reads the JSON of a header, padding included.
pub(crate) fn parse(json: &[u8]) -> Result<Header, HeaderError> {
    let Members {
        metadata,
        mut tensors,
    } = serde_json::from_slice(json)?;
    refuse_duplicates(tensors.iter().map(|(name, _)| name.as_str()))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    Metadata::new(None, tensors.clone())?;
    Ok(Header {
        metadata: metadata.flatten().unwrap_or_default(),
        tensors: tensors
            .into_iter()
            .map(described)
            .collect::<Result<_, _>>()?,
    })
}

fn described((name, stored): (String, StoredInfo)) -> Result<HeaderTensor, HeaderError> {
    let stored_name = stored.dtype.to_string();
    let Some(dtype) = Dtype::from_safetensors_name(&stored_name) else {
        return Err(HeaderError::UnsupportedType {
            name,
            dtype: stored_name,
        });
    };
    Ok(HeaderTensor {
        name,
        info: TensorInfo {
            dtype,
            shape: stored.shape,
        },
        start: stored.data_offsets.0 as u64,
        end: stored.data_offsets.1 as u64,
    })
}

fn refuse_duplicates<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), HeaderError> {
    let mut seen = HashSet::new();
    for name in names {
        if !seen.insert(name) {
            return Err(HeaderError::Duplicate(name.to_string()));
        }
    }
    Ok(())
}

/// Bytes of a tensor, or none if they cannot be counted.
pub(crate) fn checked_bytes(info: &TensorInfo) -> Option<u64> {
    let elements = info
        .shape
        .iter()
        .try_fold(1usize, |product, &size| product.checked_mul(size))?;
    Some(elements.checked_mul(info.dtype.size())? as u64)
}

/// Places tensors one after the other and writes the header for them.
///
/// Larger elements come first, and otherwise the given order is kept: then every tensor is aligned
/// to its element size, without which torch refuses to view the bytes as that type.
pub(crate) fn place(tensors: &[(String, TensorInfo)]) -> Result<Vec<HeaderTensor>, HeaderError> {
    refuse_duplicates(tensors.iter().map(|(name, _)| name.as_str()))?;
    let mut order: Vec<&(String, TensorInfo)> = tensors.iter().collect();
    order.sort_by_key(|(_, info)| std::cmp::Reverse(info.dtype.size()));
    let mut start = 0u64;
    let mut placed = Vec::with_capacity(order.len());
    for (name, info) in order {
        if name == METADATA_KEY {
            return Err(HeaderError::ReservedName);
        }
        let end = checked_bytes(info)
            .and_then(|bytes| start.checked_add(bytes))
            .ok_or_else(|| HeaderError::Overflow(name.clone()))?;
        placed.push(HeaderTensor {
            name: name.clone(),
            info: info.clone(),
            start,
            end,
        });
        start = end;
    }
    Ok(placed)
}

/// The first bytes of the file: length, JSON, spaces up to a multiple of 8.
pub(crate) fn render(
    tensors: &[HeaderTensor],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>, HeaderError> {
    let json = serde_json::to_vec(&Rendered { tensors, metadata })?;
    let length = json.len().next_multiple_of(LENGTH_BYTES as usize);
    if length as u64 > MAX_HEADER_BYTES {
        return Err(HeaderError::TooLong {
            length: length as u64,
        });
    }
    let mut bytes = (length as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    bytes.resize(LENGTH_BYTES as usize + length, b' ');
    Ok(bytes)
}

struct Rendered<'a> {
    tensors: &'a [HeaderTensor],
    metadata: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct RenderedTensor<'a> {
    dtype: &'static str,
    shape: &'a [usize],
    data_offsets: [u64; 2],
}

impl Serialize for Rendered<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA_KEY, self.metadata)?;
        }
        for tensor in self.tensors {
            let rendered = RenderedTensor {
                dtype: tensor.info.dtype.safetensors_name(),
                shape: &tensor.info.shape,
                data_offsets: [tensor.start, tensor.end],
            };
            map.serialize_entry(&tensor.name, &rendered)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(dtype: Dtype, shape: &[usize]) -> TensorInfo {
        TensorInfo {
            dtype,
            shape: shape.to_vec(),
        }
    }

    #[test]
    fn a_rendered_header_is_these_bytes_and_parses_back() {
        let placed = place(&[
            ("b".to_string(), info(Dtype::F16, &[3])),
            ("a".to_string(), info(Dtype::I32, &[2, 1])),
        ])
        .unwrap();
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let bytes = render(&placed, &metadata).unwrap();
        let json = concat!(
            r#"{"__metadata__":{"format":"pt"},"#,
            r#""a":{"dtype":"I32","shape":[2,1],"data_offsets":[0,8]},"#,
            r#""b":{"dtype":"F16","shape":[3],"data_offsets":[8,14]}}"#,
        );
        assert_eq!(bytes.len() % 8, 0);
        assert_eq!(bytes[..8], (bytes.len() as u64 - 8).to_le_bytes());
        assert_eq!(std::str::from_utf8(&bytes[8..]).unwrap().trim_end(), json);
        let parsed = parse(&bytes[8..]).unwrap();
        assert_eq!(parsed.tensors, placed);
        assert_eq!(parsed.metadata, metadata);
    }

    #[test]
    fn repeated_names_are_refused() {
        let json = br#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
                        "a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        assert!(matches!(parse(json), Err(HeaderError::Duplicate(name)) if name == "a"));
        let twice = ("a".to_string(), info(Dtype::U8, &[1]));
        assert!(matches!(
            place(&[twice.clone(), twice]),
            Err(HeaderError::Duplicate(_))
        ));
    }

    #[test]
    fn metadata_of_null_is_none() {
        // refused once, though the safetensors crate itself reads such files
        let json = br#"{"__metadata__":null,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#;
        let header = parse(json).unwrap();
        assert!(header.metadata.is_empty());
        assert_eq!(header.tensors.len(), 1);
        let twice = br#"{"__metadata__":null,"__metadata__":{}}"#;
        assert!(matches!(parse(twice), Err(HeaderError::Json(_))));
    }

    #[test]
    fn holes_overlaps_and_wrong_sizes_are_refused() {
        for json in [
            r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            r#"{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}"#,
            r#"{"a":{"dtype":"F16","shape":[1],"data_offsets":[0,1]}}"#,
            r#"{"a":{"dtype":"F16","shape":[9223372036854775807,4],"data_offsets":[0,1]}}"#,
        ] {
            assert!(
                matches!(parse(json.as_bytes()), Err(HeaderError::Cover(_))),
                "{json}"
            );
        }
    }

    #[test]
    fn unknown_types_are_named() {
        let json = br#"{"a":{"dtype":"U32","shape":[1],"data_offsets":[0,4]}}"#;
        let error = parse(json).unwrap_err().to_string();
        assert_eq!(error, "tensor `a` has type U32, which is not supported");
        let json = br#"{"a":{"dtype":"Q4","shape":[1],"data_offsets":[0,4]}}"#;
        assert!(parse(json).unwrap_err().to_string().contains("tensor `a`"));
        assert!(matches!(parse(b"[]"), Err(HeaderError::Json(_))));
    }

    #[test]
    fn sizes_that_overflow_are_refused() {
        let huge = ("a".to_string(), info(Dtype::F16, &[usize::MAX, 2]));
        assert!(matches!(place(&[huge]), Err(HeaderError::Overflow(_))));
        let reserved = ("__metadata__".to_string(), info(Dtype::U8, &[1]));
        assert!(matches!(place(&[reserved]), Err(HeaderError::ReservedName)));
    }
}
