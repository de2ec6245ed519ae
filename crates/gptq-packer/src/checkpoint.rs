//! Quantized linears out of a checkpoint, with every shape and type checked against the
//! architecture before a value is read.

use bytemuck::Pod;
use gptq_types::{Bits, Dtype, LayerName, SolvedLayer, SourceError, TensorSource};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::config::QuantizeConfig;
use crate::pack::{PackError, PackedLayer};
use crate::unpack::unpack;
use crate::words::{unpack_columns, word_count};

/// A quantized linear that could not be read.
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

/// Names of the quantized linears of a checkpoint, sorted: those that have a `qweight`.
pub fn packed_layers(source: &dyn TensorSource) -> Vec<LayerName> {
    source
        .names()
        .iter()
        .filter_map(|name| name.strip_suffix(".qweight"))
        .map(|name| LayerName(name.to_string()))
        .collect()
}

/// Checks the headers of one packed linear of `[in_features, out_features]`: presence, type and shape
/// of `qweight`, `qzeros`, `scales` and `g_idx`. Nothing is read but headers.
///
/// The shape comes from the architecture, since the tensors cannot prove it: a `g_idx` that is two channels
/// short has the same `qweight`.
///
/// # Errors
/// The first tensor that is missing or does not fit; an absent `g_idx` where the inputs do not fill words
/// and groups, which leaves the length of the last ones unknown.
pub fn check_layer(
    source: &dyn TensorSource,
    name: &LayerName,
    shape: [usize; 2],
    config: &QuantizeConfig,
) -> Result<(), ReadError> {
    let wanted = StoredShape::of(shape, config);
    if !wanted.check(source, name)? {
        let [inputs, _] = shape;
        let group = config.group_size.resolve(inputs);
        let (width, bits) = (config.bits.width() as usize, config.bits);
        if !inputs.is_multiple_of(group) || !(inputs % 32 * width).is_multiple_of(32) {
            return Err(ReadError::Source(SourceError::Invalid {
                name: name.tensor("g_idx"),
                reason: format!(
                    "is absent from {}, and {inputs} inputs do not fill {bits}-bit words and groups \
                     of {group}",
                    source.place()
                ),
            }));
        }
    }
    Ok(())
}

/// Reads one quantized linear of `[in_features, out_features]`, checked by [`check_layer`] first.
///
/// A `g_idx` that is absent, or all zero though there are several groups, means `k / group_size`,
/// as in ExLlama. Scales in bf16 or f32 are taken if every one is an f16 number.
///
/// # Errors
/// Those of [`check_layer`]; group indices out of range, scales that are not finite or not f16
/// numbers.
pub fn read_layer(
    source: &dyn TensorSource,
    name: &LayerName,
    shape: [usize; 2],
    config: &QuantizeConfig,
) -> Result<SolvedLayer, ReadError> {
    check_layer(source, name, shape, config)?;
    let wanted = StoredShape::of(shape, config);
    let mut packed = wanted.read(source, name)?;
    let silent = packed.g_idx.iter().all(|&group| group == 0);
    if packed.g_idx.is_empty() || (silent && wanted.groups > 1) {
        let size = config.group_size.resolve(wanted.inputs);
        packed.g_idx = (0..wanted.inputs).map(|k| (k / size) as i32).collect();
    }
    unpack(&packed, config.format).map_err(|error| ReadError::Layer {
        layer: name.clone(),
        place: source.place(),
        source: error,
    })
}

/// `K`, `N`, `G` and the width of codes that the tensors of a layer must have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StoredShape {
    pub bits: Bits,
    pub inputs: usize,
    pub outputs: usize,
    pub groups: usize,
}

impl StoredShape {
    fn of([inputs, outputs]: [usize; 2], config: &QuantizeConfig) -> Self {
        StoredShape {
            bits: config.bits,
            inputs,
            outputs,
            groups: config.group_size.count(inputs),
        }
    }

    /// Whether there is a `g_idx`; an error for a tensor of another type or shape.
    fn check(self, source: &dyn TensorSource, name: &LayerName) -> Result<bool, ReadError> {
        let words = |fields| word_count(fields, self.bits);
        let rows = [words(self.inputs), self.outputs];
        expect(source, &name.tensor("qweight"), Some(Dtype::I32), &rows)?;
        let scales = [self.groups, self.outputs];
        expect(source, &name.tensor("scales"), None, &scales)?;
        let zeros = [self.groups, words(self.outputs)];
        expect(source, &name.tensor("qzeros"), Some(Dtype::I32), &zeros)?;
        let g_idx = name.tensor("g_idx");
        if source.info(&g_idx).is_none() {
            return Ok(false);
        }
        expect(source, &g_idx, Some(Dtype::I32), &[self.inputs])?;
        Ok(true)
    }

    /// The stored tensors, checked; `g_idx` is empty when the checkpoint has none.
    pub(crate) fn read(
        self,
        source: &dyn TensorSource,
        name: &LayerName,
    ) -> Result<PackedLayer, ReadError> {
        let g_idx = match self.check(source, name)? {
            true => numbers(source, &name.tensor("g_idx"))?,
            false => Vec::new(),
        };
        Ok(PackedLayer {
            bits: self.bits,
            in_features: self.inputs,
            out_features: self.outputs,
            qweight: numbers(source, &name.tensor("qweight"))?,
            qzeros: numbers(source, &name.tensor("qzeros"))?,
            scales: exact_scales(source, &name.tensor("scales"))?,
            g_idx,
        })
    }
}

/// Presence, type and shape of a tensor; without a type, one of the float types.
fn expect(
    source: &dyn TensorSource,
    name: &str,
    dtype: Option<Dtype>,
    shape: &[usize],
) -> Result<(), SourceError> {
    let info = source.require(name)?;
    let fits = dtype.map_or(info.dtype.is_weight(), |dtype| info.dtype == dtype);
    if !fits {
        return Err(SourceError::Type {
            name: name.to_string(),
            place: source.place(),
            found: info.dtype,
            expected: dtype.map_or("F16, BF16 or F32", Dtype::safetensors_name),
        });
    }
    if info.shape != shape {
        return Err(SourceError::Shape {
            name: name.to_string(),
            place: source.place(),
            found: info.shape,
            expected: shape.to_vec(),
        });
    }
    Ok(())
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

/// Reads the zeros of the given layers, each with its `[in_features, out_features]`. Padding in partly
/// filled words is not looked at.
///
/// # Errors
/// Tensors that are missing or do not fit the architecture.
pub fn zero_convention(
    source: &dyn TensorSource,
    layers: &[(LayerName, [usize; 2])],
    config: &QuantizeConfig,
) -> Result<ZeroConvention, ReadError> {
    let mut joined = ZeroConvention::Unknown;
    for (name, shape) in layers {
        check_layer(source, name, *shape, config)?;
        let words: Vec<i32> = numbers(source, &name.tensor("qzeros"))?;
        let fields = unpack_columns(&words, shape[1], config.bits);
        joined = joined.join(convention_of(&fields, config.bits));
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
