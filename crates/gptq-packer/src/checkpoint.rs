//! Quantised linears out of a checkpoint, with every shape and type checked against the others.

use bytemuck::Pod;
use gptq_types::{Bits, Dtype, LayerName, SolvedLayer, SourceError, TensorInfo, TensorSource};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::config::QuantizeConfig;
use crate::pack::{PackError, PackedLayer};
use crate::unpack::unpack;
use crate::words::{unpack_columns, word_count};

/// A quantised linear that could not be read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ReadError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error("scale {value} at element {index} of `{name}` in {place} is not an f16 number")]
    InexactScale {
        name: String,
        place: String,
        value: f32,
        index: usize,
    },
    #[error("layer `{layer}` in {place}: {source}")]
    Layer {
        layer: LayerName,
        place: String,
        source: PackError,
    },
}

/// Names of the quantised linears of a checkpoint, sorted: those that have a `qweight`.
pub fn packed_layers(source: &dyn TensorSource) -> Vec<LayerName> {
    source
        .names()
        .iter()
        .filter_map(|name| name.strip_suffix(".qweight"))
        .map(|name| LayerName(name.to_string()))
        .collect()
}

/// Reads one quantised linear.
///
/// A `g_idx` that is absent, or all zero though there are several groups, means `k / group_size`,
/// as in ExLlama. Scales in bf16 or f32 are taken if every one is an f16 number.
///
/// # Errors
/// Tensors that are missing or do not fit each other or `config`, group indices out of range,
/// scales that are not finite or not f16 numbers.
pub fn read_layer(
    source: &dyn TensorSource,
    name: &LayerName,
    config: &QuantizeConfig,
) -> Result<SolvedLayer, ReadError> {
    let shapes = Shapes::read(source, name, config.bits)?;
    let groups = config.group_size.count(shapes.inputs);
    if shapes.groups != groups {
        return Err(ReadError::Source(SourceError::Shape {
            name: name.tensor("scales"),
            place: source.place(),
            found: vec![shapes.groups, shapes.outputs],
            expected: vec![groups, shapes.outputs],
        }));
    }
    let mut packed = shapes.packed(source, name, config.bits)?;
    let silent = packed.g_idx.iter().all(|&group| group == 0);
    if packed.g_idx.is_empty() || (silent && groups > 1) {
        let size = config.group_size.resolve(shapes.inputs);
        packed.g_idx = (0..shapes.inputs).map(|k| (k / size) as i32).collect();
    }
    unpack(&packed, config.format).map_err(|error| ReadError::Layer {
        layer: name.clone(),
        place: source.place(),
        source: error,
    })
}

/// `K`, `N` and `G` of a stored layer whose tensors agree in them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shapes {
    pub inputs: usize,
    pub outputs: usize,
    pub groups: usize,
    pub has_g_idx: bool,
}

impl Shapes {
    pub(crate) fn read(
        source: &dyn TensorSource,
        name: &LayerName,
        bits: Bits,
    ) -> Result<Self, ReadError> {
        let [rows, outputs] = matrix(source, &name.tensor("qweight"), Dtype::I32)?;
        let g_idx = match source.info(&name.tensor("g_idx")) {
            Some(_) => Some(vector(source, &name.tensor("g_idx"), Dtype::I32)?),
            None => None,
        };
        let inputs = match g_idx {
            Some(inputs) => inputs,
            None => inputs_of_rows(name, rows, bits)?,
        };
        expect_shape(
            source,
            name.tensor("qweight"),
            [rows, outputs],
            [word_count(inputs, bits), outputs],
        )?;
        let [groups, scale_outputs] = scales_shape(source, &name.tensor("scales"))?;
        expect_shape(
            source,
            name.tensor("scales"),
            [groups, scale_outputs],
            [groups.max(1), outputs],
        )?;
        let zeros = matrix(source, &name.tensor("qzeros"), Dtype::I32)?;
        expect_shape(
            source,
            name.tensor("qzeros"),
            zeros,
            [groups, word_count(outputs, bits)],
        )?;
        Ok(Shapes {
            inputs,
            outputs,
            groups,
            has_g_idx: g_idx.is_some(),
        })
    }

    /// The stored tensors; `g_idx` is empty when the checkpoint has none.
    pub(crate) fn packed(
        self,
        source: &dyn TensorSource,
        name: &LayerName,
        bits: Bits,
    ) -> Result<PackedLayer, ReadError> {
        let g_idx = match self.has_g_idx {
            true => numbers(source, &name.tensor("g_idx"))?,
            false => Vec::new(),
        };
        Ok(PackedLayer {
            bits,
            in_features: self.inputs,
            out_features: self.outputs,
            qweight: numbers(source, &name.tensor("qweight"))?,
            qzeros: numbers(source, &name.tensor("qzeros"))?,
            scales: exact_scales(source, &name.tensor("scales"))?,
            g_idx,
        })
    }
}

/// Without `g_idx` nothing tells how far the last word is filled, so it must be full.
fn inputs_of_rows(name: &LayerName, rows: usize, bits: Bits) -> Result<usize, ReadError> {
    let width = bits.width() as usize;
    match rows.checked_mul(32) {
        Some(stored) if stored % width == 0 => Ok(stored / width),
        _ => Err(ReadError::Source(SourceError::Invalid {
            name: name.tensor("qweight"),
            reason: format!("{rows} rows are no whole number of {bits}-bit inputs"),
        })),
    }
}

fn expect_shape(
    source: &dyn TensorSource,
    name: String,
    found: [usize; 2],
    expected: [usize; 2],
) -> Result<(), ReadError> {
    if found == expected {
        return Ok(());
    }
    Err(ReadError::Source(SourceError::Shape {
        name,
        place: source.place(),
        found: found.to_vec(),
        expected: expected.to_vec(),
    }))
}

fn typed(source: &dyn TensorSource, name: &str, dtype: Dtype) -> Result<TensorInfo, SourceError> {
    let info = source.require(name)?;
    if info.dtype != dtype {
        return Err(SourceError::Type {
            name: name.to_string(),
            place: source.place(),
            found: info.dtype,
            expected: dtype.safetensors_name(),
        });
    }
    Ok(info)
}

fn matrix(source: &dyn TensorSource, name: &str, dtype: Dtype) -> Result<[usize; 2], SourceError> {
    dimensions(name, typed(source, name, dtype)?)
}

fn vector(source: &dyn TensorSource, name: &str, dtype: Dtype) -> Result<usize, SourceError> {
    dimensions(name, typed(source, name, dtype)?).map(|[length]: [usize; 1]| length)
}

fn scales_shape(source: &dyn TensorSource, name: &str) -> Result<[usize; 2], SourceError> {
    let info = source.require(name)?;
    if !info.dtype.is_weight() {
        return Err(SourceError::Type {
            name: name.to_string(),
            place: source.place(),
            found: info.dtype,
            expected: "F16, BF16 or F32",
        });
    }
    dimensions(name, info)
}

fn dimensions<const D: usize>(name: &str, info: TensorInfo) -> Result<[usize; D], SourceError> {
    <[usize; D]>::try_from(info.shape.as_slice()).map_err(|_| SourceError::Invalid {
        name: name.to_string(),
        reason: format!("shape {:?} has not {D} dimensions", info.shape),
    })
}

/// Bytes that one task reads.
const PIECE: usize = 4 << 20;

/// Read side by side, each piece to its place.
fn numbers<T: Pod + Send>(source: &dyn TensorSource, name: &str) -> Result<Vec<T>, SourceError> {
    let bytes = source.require(name)?.bytes();
    if bytes % size_of::<T>() != 0 {
        return Err(SourceError::Invalid {
            name: name.to_string(),
            reason: format!("{bytes} bytes are no whole number of elements"),
        });
    }
    let mut numbers = vec![T::zeroed(); bytes / size_of::<T>()];
    bytemuck::cast_slice_mut(&mut numbers)
        .par_chunks_mut(PIECE)
        .enumerate()
        .try_for_each(|(index, piece)| source.read_at(name, index * PIECE, piece))?;
    Ok(numbers)
}

fn exact_scales(source: &dyn TensorSource, name: &str) -> Result<Vec<f16>, ReadError> {
    let wide: Vec<f32> = match source.require(name)?.dtype {
        Dtype::F16 => return Ok(numbers(source, name)?),
        Dtype::BF16 => numbers::<bf16>(source, name)?
            .into_iter()
            .map(bf16::to_f32)
            .collect(),
        _ => numbers(source, name)?,
    };
    let narrow = |(index, &value): (usize, &f32)| {
        let scale = f16::from_f32(value);
        if scale.to_f32().to_bits() == value.to_bits() {
            return Ok(scale);
        }
        Err(ReadError::InexactScale {
            name: name.to_string(),
            place: source.place(),
            value,
            index,
        })
    };
    wide.iter().enumerate().map(narrow).collect()
}

/// The zero convention as the stored zeros show it, whatever a config says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroConvention {
    /// Every zero is the middle code less one: symmetric, v1.
    V1,
    /// Every zero is the middle code: symmetric, v2.
    V2,
    /// Zeros vary, so they do not show the convention.
    Asymmetric,
    /// Some layers are [`ZeroConvention::V1`] and others [`ZeroConvention::V2`]: a broken file.
    Mixed,
    /// No layer was looked at.
    Unknown,
}

impl ZeroConvention {
    fn join(self, other: ZeroConvention) -> ZeroConvention {
        match (self, other) {
            (ZeroConvention::Unknown, known) | (known, ZeroConvention::Unknown) => known,
            (left, right) if left == right => left,
            (ZeroConvention::Asymmetric, _) | (_, ZeroConvention::Asymmetric) => {
                ZeroConvention::Asymmetric
            }
            _ => ZeroConvention::Mixed,
        }
    }
}

/// Reads the zeros of the named layers. Padding in partly filled words is not looked at.
///
/// # Errors
/// Tensors that are missing or do not fit each other.
pub fn zero_convention(
    source: &dyn TensorSource,
    names: &[LayerName],
    bits: Bits,
) -> Result<ZeroConvention, ReadError> {
    let mut joined = ZeroConvention::Unknown;
    for name in names {
        let shapes = Shapes::read(source, name, bits)?;
        let words: Vec<i32> = numbers(source, &name.tensor("qzeros"))?;
        if shapes.outputs == 0 {
            continue;
        }
        let fields = unpack_columns(&words, shapes.outputs, bits);
        joined = joined.join(convention_of(&fields, bits));
        if joined == ZeroConvention::Asymmetric {
            break;
        }
    }
    Ok(joined)
}

fn convention_of(fields: &[u8], bits: Bits) -> ZeroConvention {
    let middle = bits.max_code().div_ceil(2) as u8;
    let all = |value| fields.iter().all(|&field| field == value);
    match () {
        () if all(middle - 1) => ZeroConvention::V1,
        () if all(middle) => ZeroConvention::V2,
        () => ZeroConvention::Asymmetric,
    }
}
