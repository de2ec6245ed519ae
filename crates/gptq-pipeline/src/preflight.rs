//! What can be known before the first hour is spent.

use gptq_model::DecoderConfig;
use gptq_packer::QuantizeConfig;
use gptq_types::{Bits, CheckpointFormat, GroupSize, QuantSpec, TensorSource, Warning};

use crate::PipelineError;

/// Refuses groups that no reader can use and names, as warnings, the readers that will refuse the
/// shapes of this model.
pub fn check_shapes(
    config: &DecoderConfig,
    spec: &QuantSpec,
) -> Result<Vec<Warning>, PipelineError> {
    let mut warnings = Vec::new();
    // All blocks have the shapes of the first.
    for (layer, in_features, out_features) in config.block_linears(0) {
        if let GroupSize::Channels(group_size) = spec.group_size {
            if group_size > in_features {
                return Err(PipelineError::GroupTooLarge {
                    group_size,
                    in_features,
                    layer,
                });
            }
            if !in_features.is_multiple_of(group_size) {
                let text = format!(
                    "in_features {in_features} is not a multiple of group size {group_size}: \
                     ExLlama, vLLM and TGI refuse it, GPTQModel's torch kernel reads it"
                );
                warnings.push(Warning {
                    module: layer.to_string(),
                    text,
                });
            }
        }
        if !in_features.is_multiple_of(32) || !out_features.is_multiple_of(32) {
            // GPTQModel 7.7.0 on such files: "3-bit GPTQ qzeros expects columns divisible by 3".
            if spec.bits == Bits::Three {
                return Err(PipelineError::Unpackable {
                    in_features,
                    out_features,
                    layer,
                });
            }
            let text = format!(
                "{in_features} x {out_features} is not a multiple of 32: AutoGPTQ, ExLlama and \
                 Marlin refuse it, GPTQModel's torch kernel reads it"
            );
            warnings.push(Warning {
                module: layer.to_string(),
                text,
            });
        }
    }
    if spec.format == CheckpointFormat::GptqV2 {
        warnings.push(Warning {
            module: String::new(),
            text: "checkpoint_format gptq_v2 is read by GPTQModel, vLLM and ExLlamaV2, not by AutoGPTQ"
                .to_string(),
        });
    }
    Ok(warnings)
}

/// Refuses a model that is packed, or whose `config.json` (valid JSON) says that it is quantized and
/// whose tensors are not all float. Floats beside such a declaration are what merging an adapter
/// into a quantized model leaves: they are quantized, and the source's notes say so.
pub fn check_unquantised(
    source: &dyn TensorSource,
    config_json: &str,
) -> Result<(), PipelineError> {
    let names = source.names();
    let is_packed = |name: &String| name.ends_with(".qweight");
    let is_float = |name: &String| source.info(name).is_none_or(|info| info.dtype.is_weight());
    let declared = !matches!(QuantizeConfig::from_model_config(config_json), Ok(None));
    if names.iter().any(is_packed) || (declared && !names.iter().all(is_float)) {
        return Err(PipelineError::AlreadyQuantised(source.place()));
    }
    Ok(())
}
