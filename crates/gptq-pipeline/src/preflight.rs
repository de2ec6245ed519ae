//! What can be known before the first hour is spent.

use gptq_model::DecoderConfig;
use gptq_packer::{GPTQMODEL_GROUPS, QuantizeConfig};
use gptq_types::{
    Bits, CheckpointFormat, ColumnOrder, Dtype, GroupSize, QuantSpec, TensorSource, Warning,
};

use crate::PipelineError;

/// Refuses groups that no reader can use and names, as warnings, the readers that will refuse the
/// shapes of this model.
pub fn check_shapes(
    config: &DecoderConfig,
    spec: &QuantSpec,
) -> Result<Vec<Warning>, PipelineError> {
    let mut warnings = refused_settings(spec);
    let torch = match GPTQMODEL_GROUPS.contains(&i64::from(spec.group_size)) {
        true => ", GPTQModel's torch kernel reads it",
        false => "",
    };
    if !config.unread_keys.is_empty() {
        let keys = config.unread_keys.join(", ");
        warnings.push(Warning {
            module: String::new(),
            text: format!("config.json has keys that are not read, whatever they mean: {keys}"),
        });
    }
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
                     ExLlama, vLLM and TGI refuse it{torch}"
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
                 Marlin refuse it{torch}"
            );
            warnings.push(Warning {
                module: layer.to_string(),
                text,
            });
        }
    }
    Ok(warnings)
}

/// What readers refuse whatever the shapes are, by their source.
fn refused_settings(spec: &QuantSpec) -> Vec<Warning> {
    let group = i64::from(spec.group_size);
    let mut texts = Vec::new();
    if spec.order == ColumnOrder::ActOrder && spec.group_size != GroupSize::None {
        texts.push(
            "act-order with groups: vLLM 0.30 and later refuse it by their source, and read static \
             groups and group-aware order"
                .to_string(),
        );
    }
    if !matches!(spec.bits, Bits::Four | Bits::Eight) || !spec.sym {
        let kind = if spec.sym { "symmetric" } else { "asymmetric" };
        texts.push(format!(
            "{} bits, {kind}: vLLM and SGLang read 4 and 8 bits, symmetric, by their source",
            spec.bits
        ));
    }
    if !GPTQMODEL_GROUPS.contains(&group) {
        texts.push(format!(
            "groups of {group}: GPTQModel's torch kernel takes 16, 32, 64, 128, 256, 512, 1024 or none"
        ));
    }
    if spec.format == CheckpointFormat::GptqV2 {
        texts.push(
            "checkpoint_format gptq_v2 is read by GPTQModel, vLLM and ExLlamaV2, not by AutoGPTQ"
                .to_string(),
        );
    }
    let warning = |text| Warning {
        module: String::new(),
        text,
    };
    texts.into_iter().map(warning).collect()
}

/// What to know of a bf16 model, whose checkpoint is declared float16;
/// [`gptq_packer::config_json_with_quantization`] says why.
pub fn check_declared_type(source: &dyn TensorSource) -> Option<Warning> {
    let of = |name: &String| source.info(name).map(|info| info.dtype);
    let is_bf16 = source
        .names()
        .iter()
        .any(|name| of(name) == Some(Dtype::BF16));
    is_bf16.then(|| Warning {
        module: String::new(),
        text: "the weights are bf16, and config.json declares float16, in which readers compute: \
               activations beyond 65504 overflow there"
            .to_string(),
    })
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
