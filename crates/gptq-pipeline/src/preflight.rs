//! Checks before a run begins, so that an error costs no computing time.

use std::collections::BTreeSet;

use gptq_model::ModelSpec;
use gptq_packer::{DeclaredType, GPTQMODEL_GROUPS, declared_settings};
use gptq_types::{
    Bits, CheckpointFormat, ColumnOrder, Dtype, GroupSize, QuantSpec, TensorSource, Warning,
};

use crate::PipelineError;
use crate::small_files::declared_type;

/// Refuses groups that no reader can use and names, as warnings, the readers that will refuse the
/// shapes of this model.
pub fn check_shapes(model: &ModelSpec, spec: &QuantSpec) -> Result<Vec<Warning>, PipelineError> {
    let mut warnings = refused_settings(spec);
    let torch = match GPTQMODEL_GROUPS.contains(&i64::from(spec.group_size)) {
        true => ", GPTQModel's torch kernel reads it",
        false => "",
    };
    if !model.unread_keys.is_empty() {
        let keys = model.unread_keys.join(", ");
        warnings.push(Warning {
            module: String::new(),
            text: format!("config.json has keys that are not read, whatever they mean: {keys}"),
        });
    }
    let mut seen = BTreeSet::new();
    for linear in (0..model.blocks.len()).flat_map(|index| model.block_linears(index)) {
        let [in_features, out_features] = linear.shape();
        let layer = linear.name;
        // Once for each kind of linear: blocks mostly have the shapes of the first.
        if !seen.insert((kind_of(&layer.0).to_string(), in_features, out_features)) {
            continue;
        }
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

/// The end of a linear's path, without what is its block's: `self_attn.q_proj`.
fn kind_of(path: &str) -> &str {
    let parts = path.rmatch_indices('.').nth(1);
    parts.map_or(path, |(at, _)| &path[at + 1..])
}

/// Settings that readers refuse whatever the shapes are, according to their sources.
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

/// A warning for a bf16 model, whose checkpoint is declared float16; for the reason see
/// [`gptq_packer::config_json_with_quantization`].
pub fn check_declared_type(source: &dyn TensorSource, model: &ModelSpec) -> Option<Warning> {
    if declared_type(source, model) == DeclaredType::Bf16 {
        return None;
    }
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

/// Refuses a packed model, and one whose `config.json` (valid JSON) declares it or a part of it quantized
/// while not all tensors are float. A declaration with float tensors only is left by merging an adapter
/// into a quantized model: such a model is accepted, with a note from its source.
pub fn check_unquantized(
    source: &dyn TensorSource,
    config_json: &str,
) -> Result<(), PipelineError> {
    let names = source.names();
    let is_packed = |name: &String| name.ends_with(".qweight");
    let is_float = |name: &String| source.info(name).is_none_or(|info| info.dtype.is_weight());
    let config = serde_json::from_str(config_json).unwrap_or_default();
    let declared = !declared_settings(&config).is_empty();
    if names.iter().any(is_packed) || (declared && !names.iter().all(is_float)) {
        return Err(PipelineError::AlreadyQuantized(source.place()));
    }
    Ok(())
}
