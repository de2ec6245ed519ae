//! Weights as the forward pass wants them: f32, linears input channel first.

use std::sync::Arc;

use gptq_kernels::transpose;
use gptq_types::{Dtype, LayerName, SourceError, TensorSource};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// A linear ready for `x [tokens, K] * weight [K, N] + bias [N]`.
pub struct LinearWeights {
    /// `[in_features, out_features]` row-major.
    pub weight: Vec<f32>,
    /// `[out_features]`.
    pub bias: Option<Vec<f32>>,
}

/// Weights by name, converted to f32 and checked to be finite.
pub trait WeightSource: Send + Sync {
    /// Where they lie, for error messages.
    fn place(&self) -> String;

    /// All stored names.
    fn names(&self) -> Vec<String>;

    /// A tensor that is never quantised, row-major as stored.
    fn plain(&self, name: &str) -> Result<Vec<f32>, SourceError>;

    /// A linear, quantised or not.
    fn linear(&self, layer: &LayerName, bias: bool) -> Result<LinearWeights, SourceError>;

    /// The stored names that make up a linear.
    fn linear_tensors(&self, layer: &LayerName, bias: bool) -> Vec<String>;

    /// Presence and shape of a plain tensor, from headers alone.
    fn check_plain(&self, name: &str, shape: &[usize]) -> Result<(), SourceError>;

    /// Presence and shape of a linear, from headers alone.
    fn check_linear(
        &self,
        layer: &LayerName,
        in_features: usize,
        out_features: usize,
        bias: bool,
    ) -> Result<(), SourceError>;
}

/// An unquantised checkpoint: f16, bf16 or f32.
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

    fn linear(&self, layer: &LayerName, bias: bool) -> Result<LinearWeights, SourceError> {
        let name = layer.tensor("weight");
        let shape = self.0.require(&name)?.shape;
        let &[out_features, in_features] = shape.as_slice() else {
            return Err(SourceError::Shape {
                name,
                place: self.place(),
                found: shape,
                expected: vec![0, 0],
            });
        };
        let stored = self.plain(&name)?;
        Ok(LinearWeights {
            weight: transpose(&stored, out_features, in_features),
            bias: match bias {
                true => Some(self.plain(&layer.tensor("bias"))?),
                false => None,
            },
        })
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
        in_features: usize,
        out_features: usize,
        bias: bool,
    ) -> Result<(), SourceError> {
        self.check_plain(&layer.tensor("weight"), &[out_features, in_features])?;
        if bias {
            self.check_plain(&layer.tensor("bias"), &[out_features])?;
        }
        Ok(())
    }
}

fn read_finite(source: &dyn TensorSource, name: &str) -> Result<Vec<f32>, SourceError> {
    let info = source.require(name)?;
    let values = to_f32(info.dtype, &source.bytes(name)?).ok_or_else(|| SourceError::Type {
        name: name.to_string(),
        place: source.place(),
        found: info.dtype,
        expected: "F16, BF16 or F32",
    })?;
    match values.par_iter().position_first(|value| !value.is_finite()) {
        Some(index) => Err(SourceError::NotFinite {
            name: name.to_string(),
            place: source.place(),
            value: values[index],
            index,
        }),
        None => Ok(values),
    }
}

/// Refuses a float tensor with a value that is not finite; tensors of other types pass.
pub fn check_finite(source: &dyn TensorSource, name: &str) -> Result<(), SourceError> {
    if source.require(name)?.dtype.is_weight() {
        read_finite(source, name)?;
    }
    Ok(())
}

/// Nothing for a type that holds no weights.
fn to_f32(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    // Long enough to amortise a task, short enough to stay in cache between the two casts.
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
    use gptq_types::TensorInfo;

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
            let weight = source.linear(&layer, false).unwrap().weight;
            assert_eq!(weight, [1.0, 3.0, -2.5, 0.5]);
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
}
