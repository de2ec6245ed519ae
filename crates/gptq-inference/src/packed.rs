//! Packed linears as weights of the forward pass.

use std::sync::Arc;

use gptq_model::{FloatWeights, LinearValues, LinearWeights, WeightSource};
use gptq_packer::{QuantizeConfig, ReadError, check_layer, read_layer};
use gptq_types::{Dtype, LayerName, SolvedLayer, SourceError, TensorSource};

/// A GPTQ checkpoint: linears with a `qweight` are dequantized as they are read, everything else
/// is plain.
pub struct PackedWeights {
    source: Arc<dyn TensorSource>,
    float: FloatWeights,
    config: QuantizeConfig,
    declared: Option<Dtype>,
}

impl PackedWeights {
    /// Over a source and the settings it was written with.
    pub fn new(source: Arc<dyn TensorSource>, config: QuantizeConfig) -> Self {
        PackedWeights {
            float: FloatWeights::new(source.clone()),
            source,
            config,
            declared: None,
        }
    }

    /// Sets the element type that the text of `config.json` declares: readers compute in it, whatever type
    /// the plain tensors have. Quantizing a bf16 model leaves bf16 embeddings under `float16`.
    pub fn declared_by(mut self, config_json: &str) -> Self {
        let json: serde_json::Value = serde_json::from_str(config_json).unwrap_or_default();
        // The type of the whole model, else that of a multimodal checkpoint's text model.
        let declared = [&json, &json["text_config"]]
            .into_iter()
            .flat_map(|json| ["dtype", "torch_dtype"].map(|key| json[key].as_str()))
            .map(Option::unwrap_or_default)
            .collect::<Vec<_>>();
        self.declared = declared.iter().find_map(|name| match *name {
            "float16" => Some(Dtype::F16),
            "bfloat16" => Some(Dtype::BF16),
            _ => None,
        });
        self
    }

    /// Codes, scales, zeros and groups of a linear of `[in_features, out_features]`; nothing where it
    /// is stored as floats.
    pub fn layer(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
    ) -> Result<Option<SolvedLayer>, SourceError> {
        match self.is_packed(layer) {
            true => self.read(layer, shape).map(Some),
            false => Ok(None),
        }
    }

    fn is_packed(&self, layer: &LayerName) -> bool {
        self.source.info(&layer.tensor("qweight")).is_some()
    }

    fn read(&self, layer: &LayerName, shape: [usize; 2]) -> Result<SolvedLayer, SourceError> {
        read_layer(self.source.as_ref(), layer, shape, &self.config)
            .map_err(|error| unreadable(layer, error))
    }
}

impl WeightSource for PackedWeights {
    fn place(&self) -> String {
        self.source.place()
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn plain(&self, name: &str) -> Result<Vec<f32>, SourceError> {
        self.float.plain(name)
    }

    fn linear(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError> {
        if !self.is_packed(layer) {
            return self.float.linear(layer, shape, bias);
        }
        Ok(LinearWeights {
            weight: LinearValues::InputMajor(self.read(layer, shape)?.dequantize()),
            bias: self.bias(layer, bias)?,
        })
    }

    fn linear_as_stored(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<LinearWeights, SourceError> {
        if !self.is_packed(layer) {
            return self.float.linear_as_stored(layer, shape, bias);
        }
        Ok(LinearWeights {
            weight: LinearValues::Packed(self.read(layer, shape)?),
            bias: self.bias(layer, bias)?,
        })
    }

    fn plain_as_stored(&self, name: &str) -> Result<(Dtype, Vec<u8>), SourceError> {
        self.float.plain_as_stored(name)
    }

    fn dtype(&self, name: &str) -> Option<Dtype> {
        self.float.dtype(name)
    }

    fn declared_type(&self) -> Option<Dtype> {
        self.declared
    }

    fn rows(&self, name: &str, rows: &[u32], columns: usize) -> Result<Vec<f32>, SourceError> {
        self.float.rows(name, rows, columns)
    }

    fn linear_tensors(&self, layer: &LayerName, bias: bool) -> Vec<String> {
        if !self.is_packed(layer) {
            return self.float.linear_tensors(layer, bias);
        }
        let mut suffixes = vec!["qweight", "qzeros", "scales", "g_idx"];
        // AutoGPTQ writes an all-zero bias for linears that have none.
        if bias || self.source.info(&layer.tensor("bias")).is_some() {
            suffixes.push("bias");
        }
        suffixes.iter().map(|suffix| layer.tensor(suffix)).collect()
    }

    fn check_plain(&self, name: &str, shape: &[usize]) -> Result<(), SourceError> {
        self.float.check_plain(name, shape)
    }

    fn check_linear(
        &self,
        layer: &LayerName,
        shape: [usize; 2],
        bias: bool,
    ) -> Result<(), SourceError> {
        if !self.is_packed(layer) {
            return self.float.check_linear(layer, shape, bias);
        }
        check_layer(self.source.as_ref(), layer, shape, &self.config)
            .map_err(|error| unreadable(layer, error))?;
        if bias {
            self.check_plain(&layer.tensor("bias"), &shape[1..])?;
        } else if self.source.info(&layer.tensor("bias")).is_some() {
            self.check_plain(&layer.tensor("bias"), &shape[1..])?;
            self.refuse_lost_bias(&layer.tensor("bias"))?;
        }
        Ok(())
    }
}

/// The tensor's own error, where there is one.
fn unreadable(layer: &LayerName, error: ReadError) -> SourceError {
    match error {
        ReadError::Source(error) => error,
        error => SourceError::Invalid {
            name: layer.to_string(),
            reason: error.to_string(),
        },
    }
}

impl PackedWeights {
    /// A bias that the architecture does not add may only be zero.
    fn refuse_lost_bias(&self, name: &str) -> Result<(), SourceError> {
        match self.plain(name)?.iter().find(|&&value| value != 0.0) {
            None => Ok(()),
            Some(value) => Err(SourceError::Invalid {
                name: name.to_string(),
                reason: format!("holds {value}, but the architecture has no bias here"),
            }),
        }
    }
}
