//! From a folder's tensors and configs to a decoder.

use std::sync::Arc;

use gptq_model::{
    ConfigError, Decoder, DeviceContext, FloatWeights, ModelError, ModelSpec, Streams, WeightSource,
};
use gptq_packer::QuantizeConfig;
use gptq_types::TensorSource;

use crate::PackedWeights;

/// A checkpoint that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum OpenError {
    #[error("{place}: {source}")]
    Config { place: String, source: ConfigError },
    #[error("{place}: {source}")]
    Quantization {
        place: String,
        source: gptq_packer::ConfigError,
    },
    #[error("{0} holds packed linears, but neither quantize_config.json nor config.json says how")]
    NoSettings(String),
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl OpenError {
    /// Advice, apart from the cause.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            OpenError::Model(error) => error.hint(),
            _ => None,
        }
    }

    /// The files are sound, but nothing here computes or reads what they hold.
    pub fn is_unsupported(&self) -> bool {
        match self {
            OpenError::Config { source, .. } => source.is_unsupported(),
            OpenError::Quantization { source, .. } => source.is_unsupported(),
            OpenError::NoSettings(_) => false,
            OpenError::Model(error) => error.is_unsupported(),
        }
    }
}

/// A checkpoint whose kind is known.
pub struct OpenedModel {
    /// Weights, dequantized on reading where packed.
    pub weights: Arc<dyn WeightSource>,
    /// The same weights as codes, for a packed checkpoint.
    pub packed: Option<Arc<PackedWeights>>,
    /// The architecture.
    pub spec: ModelSpec,
    /// The packing; absent for a float checkpoint.
    pub quantization: Option<QuantizeConfig>,
}

/// Reads the configs of a checkpoint, picks the reader for its weights, and compares the headers of
/// all tensors with what the architecture needs.
pub fn open(
    source: Arc<dyn TensorSource>,
    config_json: &str,
    quantize_config_json: Option<&str>,
) -> Result<OpenedModel, OpenError> {
    let place = source.place();
    let names = source.names();
    let spec = ModelSpec::read(config_json, &names).map_err(|source| OpenError::Config {
        place: place.clone(),
        source,
    })?;
    let packed = names.iter().any(|name| name.ends_with(".qweight"));
    if !packed {
        let opened = OpenedModel {
            weights: Arc::new(FloatWeights::new(source)),
            packed: None,
            spec,
            quantization: None,
        };
        opened.check()?;
        return Ok(opened);
    }
    let settings = QuantizeConfig::from_files(quantize_config_json, Some(config_json))
        .map_err(|source| OpenError::Quantization {
            place: place.clone(),
            source,
        })?
        .ok_or(OpenError::NoSettings(place))?;
    let weights = PackedWeights::new(source, settings.clone());
    let weights = Arc::new(weights.declared_by(config_json));
    let opened = OpenedModel {
        weights: weights.clone(),
        packed: Some(weights),
        spec,
        quantization: Some(settings),
    };
    opened.check()?;
    Ok(opened)
}

impl OpenedModel {
    /// A decoder over the weights; every tensor is checked.
    pub fn decoder(&self, device: &DeviceContext) -> Result<Box<dyn Decoder>, OpenError> {
        Ok(gptq_model::open(
            self.weights.clone(),
            self.spec.clone(),
            device,
            Streams::One,
        )?)
    }

    /// `fp16`-like or `4-bit g64 sym` and so on, for tables.
    pub fn kind(&self) -> String {
        let Some(quantization) = &self.quantization else {
            return "unquantised".to_string();
        };
        let group = match quantization.group_size {
            gptq_types::GroupSize::None => "no group".to_string(),
            size => format!("g{size}"),
        };
        let symmetry = if quantization.sym { "sym" } else { "asym" };
        let order = if quantization.desc_act {
            " act-order"
        } else {
            ""
        };
        format!("{}-bit {group} {symmetry}{order}", quantization.bits)
    }
}
