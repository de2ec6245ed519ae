//! Weights as the forward pass wants them: f32, linears input channel first.

use std::sync::Arc;

use gptq_kernels::transpose;
use gptq_types::{
    ContentHash, ContentHasher, Dtype, LayerName, SolvedLayer, SourceError, TensorInfo,
    TensorSource,
};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use crate::spec::ModelSpec;

/// A linear: `x [tokens, K] * weight [K, N] + bias [N]`.
pub struct LinearWeights {
    /// The weight.
    pub weight: LinearValues,
    /// `[out_features]`.
    pub bias: Option<Vec<f32>>,
}

/// The values of a linear's weight.
pub enum LinearValues {
    /// `[in_features, out_features]` row-major.
    InputMajor(Vec<f32>),
    /// `[out_features, in_features]` row-major, little-endian, as checkpoints have them; finite.
    Stored {
        /// F16, BF16 or F32.
        dtype: Dtype,
        /// All of them.
        bytes: Vec<u8>,
    },
    /// Codes, to be dequantized where they are used.
    Packed(SolvedLayer),
}

impl From<(Dtype, Vec<u8>)> for LinearValues {
    fn from((dtype, bytes): (Dtype, Vec<u8>)) -> Self {
        LinearValues::Stored { dtype, bytes }
    }
}

impl LinearValues {
    /// `[in_features, out_features]` in f32.
    pub fn input_major(self, in_features: usize, out_features: usize) -> Vec<f32> {
        match self {
            LinearValues::InputMajor(values) => values,
            LinearValues::Stored { dtype, bytes } => {
                let values = to_f32(dtype, &bytes).expect("stored weights are floats");
                transpose(&values, out_features, in_features)
            }
            LinearValues::Packed(layer) => layer.dequantize(),
        }
    }
}

/// Weights by name, converted to f32 and checked to be finite.
pub trait WeightSource: Send + Sync {
    /// Where they lie, for error messages.
    fn place(&self) -> String;

    /// All stored names.
    fn names(&self) -> Vec<String>;

    /// A tensor that is never quantized, row-major as stored.
    fn plain(&self, name: &str) -> Result<Vec<f32>, SourceError>;

    /// The bias of a linear that has one, `[out_features]`.
    fn bias(&self, layer: &LayerName, has_bias: bool) -> Result<Option<Vec<f32>>, SourceError> {
        match has_bias {
            true => Ok(Some(self.plain(&layer.tensor("bias"))?)),
            false => Ok(None),
        }
    }

    /// A linear of `[in_features, out_features]`, quantized or not. The shape is the architecture's;
    /// tensors that do not have it are an error.
    fn linear(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError>;

    /// A linear in the cheapest form for a device that converts it itself.
    fn linear_as_stored(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError> {
        self.linear(layer, shape, bias)
    }

    /// A tensor that is never quantized, in its stored type: F16, BF16 or F32, finite.
    fn plain_as_stored(&self, name: &str) -> Result<(Dtype, Vec<u8>), SourceError>;

    /// Some rows of a plain tensor of rows of `columns`, in f32.
    fn rows(&self, name: &str, rows: &[u32], columns: usize) -> Result<Vec<f32>, SourceError> {
        let all = self.plain(name)?;
        let row = |&row: &u32| &all[row as usize * columns..][..columns];
        Ok(rows.iter().flat_map(row).copied().collect())
    }

    /// The type of a plain tensor.
    fn dtype(&self, name: &str) -> Option<Dtype>;

    /// The type that the checkpoint declares and its readers run it in, where it says so.
    fn declared_type(&self) -> Option<Dtype> {
        None
    }

    /// The type that a GPU computes in, BF16 or else F16: what the checkpoint declares, else that of the
    /// embedding.
    fn computing_type(&self, spec: &ModelSpec) -> Option<Dtype> {
        (self.declared_type()).or_else(|| self.dtype(&spec.embedding.name))
    }

    /// The stored names that make up a linear.
    fn linear_tensors(&self, layer: &LayerName, bias: bool) -> Vec<String>;

    /// Presence and shape of a plain tensor, from headers alone.
    fn check_plain(&self, name: &str, shape: &[usize]) -> Result<(), SourceError>;

    /// Presence, type and shape of all tensors of a linear of `[in_features, out_features]`, from
    /// headers alone.
    fn check_linear(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<(), SourceError>;
}

/// An unquantized checkpoint: f16, bf16 or f32.
#[derive(Clone)]
pub struct FloatWeights(Arc<dyn TensorSource>);

impl FloatWeights {
    /// Over any tensor source.
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        FloatWeights(source)
    }
}

impl WeightSource for FloatWeights {
    fn place(&self) -> String {
        self.0.place()
    }

    fn names(&self) -> Vec<String> {
        self.0.names()
    }

    fn plain(&self, name: &str) -> Result<Vec<f32>, SourceError> {
        read_finite(self.0.as_ref(), name)
    }

    fn linear(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError> {
        self.check_linear(layer, shape, bias)?;
        let [in_features, out_features] = shape;
        let stored = self.plain(&layer.tensor("weight"))?;
        Ok(LinearWeights {
            weight: LinearValues::InputMajor(transpose(&stored, out_features, in_features)),
            bias: self.bias(layer, bias)?,
        })
    }

    fn linear_as_stored(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError> {
        self.check_linear(layer, shape, bias)?;
        let (dtype, bytes) = read_checked(self.0.as_ref(), &layer.tensor("weight"))?;
        Ok(LinearWeights {
            weight: LinearValues::Stored { dtype, bytes },
            bias: self.bias(layer, bias)?,
        })
    }

    fn plain_as_stored(&self, name: &str) -> Result<(Dtype, Vec<u8>), SourceError> {
        read_checked(self.0.as_ref(), name)
    }

    fn rows(&self, name: &str, rows: &[u32], columns: usize) -> Result<Vec<f32>, SourceError> {
        let info = float_info(self.0.as_ref(), name)?;
        let bytes = columns * info.dtype.size();
        let mut all = vec![0u8; rows.len() * bytes];
        let read = |(row, out): (&u32, &mut [u8])| {
            let start = *row as usize * bytes;
            self.0.read_at(name, start, out)?;
            match first_not_finite(info.dtype, out) {
                Some(at) => Err(not_finite(
                    self.0.as_ref(),
                    name,
                    info.dtype,
                    out,
                    start,
                    at,
                )),
                None => Ok(()),
            }
        };
        (rows.par_iter().zip(all.par_chunks_mut(bytes))).try_for_each(read)?;
        Ok(to_f32(info.dtype, &all).expect("its type was checked"))
    }

    fn dtype(&self, name: &str) -> Option<Dtype> {
        self.0.info(name).map(|info| info.dtype)
    }

    fn linear_tensors(&self, layer: &LayerName, bias: bool) -> Vec<String> {
        let mut names = vec![layer.tensor("weight")];
        if bias {
            names.push(layer.tensor("bias"));
        }
        names
    }

    fn check_plain(&self, name: &str, shape: &[usize]) -> Result<(), SourceError> {
        let info = self.0.require(name)?;
        if !info.dtype.is_weight() {
            return Err(SourceError::Type {
                name: name.to_string(),
                place: self.place(),
                found: info.dtype,
                expected: "F16, BF16 or F32",
            });
        }
        if info.shape != shape {
            return Err(SourceError::Shape {
                name: name.to_string(),
                place: self.place(),
                found: info.shape,
                expected: shape.to_vec(),
            });
        }
        Ok(())
    }

    fn check_linear(
        &self,
        layer: &LayerName,
        [in_features, out_features]: [usize; 2],
        bias: bool,
    ) -> Result<(), SourceError> {
        self.check_plain(&layer.tensor("weight"), &[out_features, in_features])?;
        if bias {
            self.check_plain(&layer.tensor("bias"), &[out_features])?;
        }
        Ok(())
    }
}

/// Bytes read and checked by one task: enough to hide its cost, few enough that all threads
/// together hold little.
const PIECE: usize = 4 << 20;

/// The bytes of a float tensor, every value of which is finite. Pieces are read side by side.
fn read_checked(source: &dyn TensorSource, name: &str) -> Result<(Dtype, Vec<u8>), SourceError> {
    let info = float_info(source, name)?;
    let mut bytes = vec![0u8; info.bytes()];
    check_pieces(source, name, info.dtype, bytes.par_chunks_mut(PIECE))?;
    Ok((info.dtype, bytes))
}

fn float_info(source: &dyn TensorSource, name: &str) -> Result<TensorInfo, SourceError> {
    let info = source.require(name)?;
    match info.dtype.is_weight() {
        true => Ok(info),
        false => Err(SourceError::Type {
            name: name.to_string(),
            place: source.place(),
            found: info.dtype,
            expected: "F16, BF16 or F32",
        }),
    }
}

/// Reads a tensor into `pieces` of `PIECE` bytes; the first value that is not finite is an error.
fn check_pieces<P: AsMut<[u8]> + Send>(
    source: &dyn TensorSource,
    name: &str,
    dtype: Dtype,
    pieces: impl IndexedParallelIterator<Item = P>,
) -> Result<(), SourceError> {
    let read = |(piece, mut out): (usize, P)| {
        let (start, out) = (piece * PIECE, out.as_mut());
        source.read_at(name, start, out)?;
        match first_not_finite(dtype, out) {
            Some(at) => Err(not_finite(source, name, dtype, out, start, at)),
            None => Ok(()),
        }
    };
    let pieces: Vec<Result<(), SourceError>> = pieces.enumerate().map(read).collect();
    pieces.into_iter().collect()
}

/// Index of the first infinity or NaN, found by its exponent without a conversion.
fn first_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    let exponent = match dtype {
        Dtype::F16 => 0x7c00,
        Dtype::BF16 => 0x7f80,
        _ => 0x7f80_0000,
    };
    if dtype == Dtype::F32 {
        let bad = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) & exponent == exponent;
        return bytes.chunks_exact(4).position(bad);
    }
    let bad = |b: &[u8]| u32::from(u16::from_le_bytes([b[0], b[1]])) & exponent == exponent;
    // Without an early end the scan is a vector operation; the index is sought only where there
    // is one to find.
    let any = bytes.chunks_exact(2).fold(false, |any, b| any | bad(b));
    any.then(|| bytes.chunks_exact(2).position(bad)).flatten()
}

fn read_finite(source: &dyn TensorSource, name: &str) -> Result<Vec<f32>, SourceError> {
    let (dtype, bytes) = read_checked(source, name)?;
    Ok(to_f32(dtype, &bytes).expect("its type was checked"))
}

/// The sha256 of a tensor's stored bytes, in the one pass that refuses a float tensor with a value
/// that is not finite; other types hold no such values. Keeps a piece, never the tensor.
///
/// One thread, since sha256 is a chain: callers take several tensors side by side.
pub fn hash_checked(source: &dyn TensorSource, name: &str) -> Result<ContentHash, SourceError> {
    let info = source.require(name)?;
    let bytes = info.bytes();
    let mut hasher = ContentHasher::default();
    let mut buffer = vec![0u8; PIECE.min(bytes)];
    for start in (0..bytes).step_by(PIECE) {
        let piece = &mut buffer[..PIECE.min(bytes - start)];
        source.read_at(name, start, piece)?;
        if info.dtype.is_weight()
            && let Some(at) = first_not_finite(info.dtype, piece)
        {
            return Err(not_finite(source, name, info.dtype, piece, start, at));
        }
        hasher.update(piece);
    }
    Ok(hasher.finish())
}

fn not_finite(
    source: &dyn TensorSource,
    name: &str,
    dtype: Dtype,
    piece: &[u8],
    start: usize,
    at: usize,
) -> SourceError {
    let value = to_f32(dtype, &piece[at * dtype.size()..][..dtype.size()]);
    SourceError::NotFinite {
        name: name.to_string(),
        place: source.place(),
        value: value.map_or(f32::NAN, |value| value[0]),
        index: start / dtype.size() + at,
    }
}

/// Nothing for a type that holds no weights.
pub(crate) fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    // Long enough to amortize a task, short enough to stay in cache between the two casts.
    const CHUNK: usize = 1 << 16;
    let mut out = vec![0.0f32; bytes.len() / dtype.size()];
    let parts = || bytes.par_chunks(CHUNK * dtype.size());
    match dtype {
        Dtype::F32 => out.par_chunks_mut(CHUNK).zip(parts()).for_each(|(out, b)| {
            for (out, b) in out.iter_mut().zip(b.chunks_exact(4)) {
                *out = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }),
        Dtype::F16 => out.par_chunks_mut(CHUNK).zip(parts()).for_each(|(out, b)| {
            let halves: Vec<half::f16> = b
                .chunks_exact(2)
                .map(|b| half::f16::from_le_bytes([b[0], b[1]]))
                .collect();
            halves.convert_to_f32_slice(out);
        }),
        Dtype::BF16 => out.par_chunks_mut(CHUNK).zip(parts()).for_each(|(out, b)| {
            for (out, b) in out.iter_mut().zip(b.chunks_exact(2)) {
                *out = half::bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }),
        _ => return None,
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct One(TensorInfo, Vec<u8>);

    impl TensorSource for One {
        fn place(&self) -> String {
            "memory".into()
        }
        fn names(&self) -> Vec<String> {
            vec!["x.weight".into()]
        }
        fn info(&self, _: &str) -> Option<TensorInfo> {
            Some(self.0.clone())
        }
        fn bytes(&self, _: &str) -> Result<Vec<u8>, SourceError> {
            Ok(self.1.clone())
        }
    }

    fn source(dtype: Dtype, bytes: Vec<u8>) -> FloatWeights {
        let shape = vec![2, bytes.len() / dtype.size() / 2];
        FloatWeights::new(Arc::new(One(TensorInfo { dtype, shape }, bytes)))
    }

    #[test]
    fn every_float_type_reads_and_linears_are_transposed() {
        let values = [1.0f32, -2.5, 3.0, 0.5];
        let f32s = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f16s = values
            .iter()
            .flat_map(|&v| half::f16::from_f32(v).to_le_bytes());
        let bf16s = values
            .iter()
            .flat_map(|&v| half::bf16::from_f32(v).to_le_bytes());
        let layer = LayerName("x".into());
        for source in [
            source(Dtype::F32, f32s),
            source(Dtype::F16, f16s.collect()),
            source(Dtype::BF16, bf16s.collect()),
        ] {
            for linear in [
                source.linear(&layer, [2, 2], false),
                source.linear_as_stored(&layer, [2, 2], false),
            ] {
                let weight = linear.unwrap().weight.input_major(2, 2);
                assert_eq!(weight, [1.0, 3.0, -2.5, 0.5]);
            }
        }
    }

    #[test]
    fn a_nan_is_named_with_its_place() {
        let bytes = [1.0f32, f32::NAN, 1.0, 1.0];
        let bytes = bytes.iter().flat_map(|v| v.to_le_bytes()).collect();
        let error = source(Dtype::F32, bytes).plain("x.weight").unwrap_err();
        assert_eq!(
            error.to_string(),
            "tensor `x.weight` in memory holds NaN at element 1"
        );
    }

    #[test]
    fn a_tensor_of_several_pieces_is_hashed_whole_and_checked_to_its_last_value() {
        let mut bytes: Vec<u8> = (0..PIECE / 2 + 3).flat_map(|i| [i as u8, 0x3c]).collect();
        let info = TensorInfo {
            dtype: Dtype::F16,
            shape: vec![bytes.len() / 2],
        };
        let hash = hash_checked(&One(info.clone(), bytes.clone()), "x.weight").unwrap();
        assert_eq!(hash, ContentHash::of(&bytes));
        *bytes.last_mut().unwrap() = 0x7c;
        let last = bytes.len() / 2 - 1;
        let error = hash_checked(&One(info, bytes), "x.weight").unwrap_err();
        let SourceError::NotFinite { index, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(index, last);
    }
}
