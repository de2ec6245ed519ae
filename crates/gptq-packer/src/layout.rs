//! The position of every byte of a checkpoint, computed before any is written.

use std::collections::{BTreeMap, HashMap, HashSet};

use gptq_types::{Dtype, LayerName, QuantSpec, TensorInfo};
use serde_json::{Map, Value};

use crate::header::{self, HeaderError, HeaderTensor, LENGTH_BYTES};
use crate::words::word_count;

/// The name of the file that maps tensors to shards.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// Tensors that cannot be laid out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum LayoutError {
    #[error("a checkpoint without tensors")]
    Empty,
    #[error("tensor `{0}` is listed twice")]
    Duplicate(String),
    #[error("tensor `{0}` is larger than this machine can address")]
    Overflow(String),
    #[error("`{file}`: {source}")]
    Header { file: String, source: HeaderError },
}

/// The place of one tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Index into [`CheckpointLayout::shards`].
    pub shard: usize,
    /// Bytes from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Number of the tensor in the whole checkpoint, in the order given to the plan.
    pub(crate) number: usize,
}

/// One file of the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Shard {
    /// `model.safetensors`, or `model-00001-of-00002.safetensors` and so on.
    pub file_name: String,
    /// The first bytes of the file, length field included; a multiple of 8 long.
    pub header: Vec<u8>,
    /// Length of the whole file.
    pub bytes: u64,
}

/// All files of a checkpoint, each with its header.
#[derive(Clone, Debug, PartialEq)]
pub struct CheckpointLayout {
    shards: Vec<Shard>,
    tensors: BTreeMap<String, TensorInfo>,
    placements: HashMap<String, Placement>,
    tensor_bytes: u64,
}

impl CheckpointLayout {
    /// Fills shards in the given order; a shard is closed before it would exceed `max_shard_bytes`
    /// of tensors, and a larger tensor gets a shard to itself.
    ///
    /// Within a shard, tensors with larger elements come first, so that all are aligned. The plan
    /// depends on its arguments only.
    ///
    /// # Errors
    /// No tensors, repeated names, sizes beyond 64 bits, a header over
    /// [`crate::MAX_HEADER_BYTES`].
    pub fn plan(
        tensors: Vec<(String, TensorInfo)>,
        max_shard_bytes: u64,
    ) -> Result<CheckpointLayout, LayoutError> {
        if tensors.is_empty() {
            return Err(LayoutError::Empty);
        }
        refuse_duplicates(&tensors)?;
        let groups = split_into_shards(&tensors, max_shard_bytes)?;
        let numbers: HashMap<&str, usize> = tensors
            .iter()
            .enumerate()
            .map(|(number, (name, _))| (name.as_str(), number))
            .collect();
        let mut shards = Vec::with_capacity(groups.len());
        let mut placements = HashMap::with_capacity(tensors.len());
        let mut tensor_bytes = 0u64;
        for (index, group) in groups.iter().enumerate() {
            let file_name = shard_file_name(index, groups.len());
            let (shard, placed) = lay_out_shard(file_name, group)?;
            for tensor in placed {
                let placement = Placement {
                    shard: index,
                    offset: shard.header.len() as u64 + tensor.start,
                    bytes: tensor.end - tensor.start,
                    number: numbers[tensor.name.as_str()],
                };
                tensor_bytes = tensor_bytes
                    .checked_add(placement.bytes)
                    .ok_or_else(|| LayoutError::Overflow(tensor.name.clone()))?;
                placements.insert(tensor.name, placement);
            }
            shards.push(shard);
        }
        Ok(CheckpointLayout {
            shards,
            tensors: tensors.into_iter().collect(),
            placements,
            tensor_bytes,
        })
    }

    /// The files, in order.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Type and shape of every tensor, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// The place of a tensor, if it is part of the checkpoint.
    pub fn placement(&self, name: &str) -> Option<Placement> {
        self.placements.get(name).copied()
    }

    /// Bytes of all tensors, headers not counted.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensor_bytes
    }

    /// Bytes of all shard files.
    pub fn file_bytes(&self) -> u64 {
        self.shards
            .iter()
            .fold(0, |sum, shard| sum.saturating_add(shard.bytes))
    }

    /// The text of `model.safetensors.index.json`; none when one file holds everything.
    pub fn index_json(&self) -> Option<String> {
        if self.shards.len() == 1 {
            return None;
        }
        let weight_map: Map<String, Value> = self
            .tensors
            .keys()
            .map(|name| {
                let shard = &self.shards[self.placements[name].shard];
                (name.clone(), Value::from(shard.file_name.as_str()))
            })
            .collect();
        let index = serde_json::json!({
            "metadata": { "total_size": self.tensor_bytes },
            "weight_map": weight_map,
        });
        Some(format!("{index:#}\n"))
    }
}

fn refuse_duplicates(tensors: &[(String, TensorInfo)]) -> Result<(), LayoutError> {
    let mut seen = HashSet::with_capacity(tensors.len());
    match tensors.iter().find(|(name, _)| !seen.insert(name)) {
        Some((name, _)) => Err(LayoutError::Duplicate(name.clone())),
        None => Ok(()),
    }
}

fn split_into_shards(
    tensors: &[(String, TensorInfo)],
    max_shard_bytes: u64,
) -> Result<Vec<&[(String, TensorInfo)]>, LayoutError> {
    let mut shards = Vec::new();
    let (mut first, mut filled) = (0, 0u64);
    for (index, (name, info)) in tensors.iter().enumerate() {
        let overflow = || LayoutError::Overflow(name.clone());
        let bytes = header::checked_bytes(info).ok_or_else(overflow)?;
        let together = filled.checked_add(bytes).ok_or_else(overflow)?;
        if together > max_shard_bytes && index > first {
            shards.push(&tensors[first..index]);
            (first, filled) = (index, bytes);
        } else {
            filled = together;
        }
    }
    shards.push(&tensors[first..]);
    Ok(shards)
}

fn shard_file_name(index: usize, count: usize) -> String {
    match count {
        1 => "model.safetensors".to_string(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    }
}

fn lay_out_shard(
    file_name: String,
    tensors: &[(String, TensorInfo)],
) -> Result<(Shard, Vec<HeaderTensor>), LayoutError> {
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    let rendered =
        header::place(tensors).and_then(|placed| Ok((header::render(&placed, &metadata)?, placed)));
    let (header, placed) = match rendered {
        Ok(rendered) => rendered,
        Err(source) => {
            return Err(LayoutError::Header {
                file: file_name,
                source,
            });
        }
    };
    debug_assert_eq!(header.len() as u64 % LENGTH_BYTES, 0);
    let data = placed.last().map_or(0, |tensor| tensor.end);
    let bytes = (header.len() as u64)
        .checked_add(data)
        .ok_or_else(|| LayoutError::Overflow(file_name.clone()))?;
    let shard = Shard {
        file_name,
        header,
        bytes,
    };
    Ok((shard, placed))
}

/// The tensors of every quantized linear, behind its name.
pub const PACKED_SUFFIXES: [&str; 4] = ["qweight", "qzeros", "scales", "g_idx"];

/// The tensors of one quantized linear: `qweight`, `qzeros`, `scales`, `g_idx` and, if it has one,
/// `bias` (f16 `[N]`). Shapes are those of [`crate::PackedLayer`].
pub fn packed_tensors(
    name: &LayerName,
    in_features: usize,
    out_features: usize,
    spec: &QuantSpec,
    has_bias: bool,
) -> Vec<(String, TensorInfo)> {
    let groups = spec.group_size.count(in_features);
    let tensor = |suffix, dtype, shape| (name.tensor(suffix), TensorInfo { dtype, shape });
    let weight_rows = word_count(in_features, spec.bits);
    let zero_words = word_count(out_features, spec.bits);
    let mut tensors = vec![
        tensor("qweight", Dtype::I32, vec![weight_rows, out_features]),
        tensor("qzeros", Dtype::I32, vec![groups, zero_words]),
        tensor("scales", Dtype::F16, vec![groups, out_features]),
        tensor("g_idx", Dtype::I32, vec![in_features]),
    ];
    if has_bias {
        tensors.push(tensor("bias", Dtype::F16, vec![out_features]));
    }
    tensors
}

#[cfg(test)]
mod tests {
    use gptq_types::{Bits, GroupSize};

    use super::*;

    fn bytes(name: &str, count: usize) -> (String, TensorInfo) {
        let info = TensorInfo {
            dtype: Dtype::U8,
            shape: vec![count],
        };
        (name.to_string(), info)
    }

    #[test]
    fn one_shard_has_the_plain_name_and_no_index() {
        let layout = CheckpointLayout::plan(vec![bytes("a", 3), bytes("b", 4)], 7).unwrap();
        assert_eq!(layout.shards().len(), 1);
        assert_eq!(layout.shards()[0].file_name, "model.safetensors");
        assert_eq!(layout.index_json(), None);
        let start = layout.shards()[0].header.len() as u64;
        let b = layout.placement("b").unwrap();
        assert_eq!((b.offset, b.bytes), (start + 3, 4));
        assert_eq!(layout.file_bytes(), start + 7);
    }

    #[test]
    fn shards_are_closed_before_the_limit_and_named_by_number() {
        let tensors = vec![
            bytes("d", 4),
            bytes("c", 4),
            bytes("big", 90),
            bytes("a", 1),
        ];
        let layout = CheckpointLayout::plan(tensors, 8).unwrap();
        let names: Vec<_> = layout.shards().iter().map(|s| &s.file_name[..]).collect();
        assert_eq!(
            names,
            [
                "model-00001-of-00003.safetensors",
                "model-00002-of-00003.safetensors",
                "model-00003-of-00003.safetensors"
            ]
        );
        assert_eq!(layout.placement("c").unwrap().shard, 0);
        assert_eq!(layout.placement("a").unwrap().shard, 2);
        let index: Value = serde_json::from_str(&layout.index_json().unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], 99);
        assert_eq!(
            index["weight_map"]["big"],
            "model-00002-of-00003.safetensors"
        );
        for shard in layout.shards() {
            assert_eq!(shard.header.len() % 8, 0);
        }
    }

    #[test]
    fn every_tensor_is_aligned_to_its_elements() {
        let name = LayerName("l".to_string());
        let spec = QuantSpec {
            group_size: GroupSize::None,
            bits: Bits::Three,
            ..QuantSpec::published()
        };
        let mut tensors = packed_tensors(&name, 33, 7, &spec, true);
        tensors.push((
            "norm".to_string(),
            TensorInfo {
                dtype: Dtype::F32,
                shape: vec![7],
            },
        ));
        let layout = CheckpointLayout::plan(tensors, u64::MAX).unwrap();
        for (name, info) in layout.tensors() {
            let offset = layout.placement(name).unwrap().offset;
            assert_eq!(offset % info.dtype.size() as u64, 0, "{name}");
        }
    }

    #[test]
    fn packed_shapes_count_partial_words_and_the_short_group() {
        let spec = QuantSpec {
            group_size: GroupSize::Channels(64),
            ..QuantSpec::published()
        };
        let name = LayerName("l".to_string());
        let shapes: Vec<_> = packed_tensors(&name, 172, 172, &spec, false)
            .into_iter()
            .map(|(name, info)| (name, info.shape))
            .collect();
        assert_eq!(
            shapes,
            [
                ("l.qweight".to_string(), vec![22, 172]),
                ("l.qzeros".to_string(), vec![3, 22]),
                ("l.scales".to_string(), vec![3, 172]),
                ("l.g_idx".to_string(), vec![172]),
            ]
        );
    }

    #[test]
    fn each_fault_has_its_own_error() {
        assert!(matches!(
            CheckpointLayout::plan(vec![], 1),
            Err(LayoutError::Empty)
        ));
        assert!(matches!(
            CheckpointLayout::plan(vec![bytes("a", 1), bytes("b", 1), bytes("a", 1)], 1),
            Err(LayoutError::Duplicate(name)) if name == "a"
        ));
        let mut huge = bytes("a", usize::MAX);
        huge.1.shape.push(2);
        assert!(matches!(
            CheckpointLayout::plan(vec![huge], 1),
            Err(LayoutError::Overflow(_))
        ));
        assert!(matches!(
            CheckpointLayout::plan(vec![bytes("__metadata__", 1)], 1),
            Err(LayoutError::Header { .. })
        ));
    }
}
