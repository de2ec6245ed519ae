//! Phi-3, Phi-3.5 and Phi-4 (`Phi3ForCausalLM`, arXiv:2404.14219): one linear for queries, keys and
//! values, one for gate and up, rotary frequencies by LongRoPE in some.

use gptq_kernels::Pairing;

use super::parts::{fused_attention_branch, fused_gated_branch};
use super::relative::{Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::rope::Reads;
use crate::spec::ModelSpec;

const HONOURED: Honoured =
    Honoured::reads(&["original_max_position_embeddings", "partial_rotary_factor"]);

const READS: Reads = Reads {
    partial: Some(1.0),
    longrope: true,
    original: Some(4096),
    ..Reads::LLAMA
};

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let defaults = Defaults {
        eps: ("rms_norm_eps", 1e-5),
        positions: 4096,
        ..Defaults::LLAMA
    };
    let mut sizes = Sizes::read(reader, &HONOURED, &defaults)?;
    name_unlike(
        &mut sizes,
        reader,
        &[("attention_bias", false), ("mlp_bias", false)],
    )?;
    let rotaries = Rotaries::one_of(reader, &sizes, &READS, Pairing::Halves)?;
    let relative = Relative {
        attention: fused_attention_branch,
        feed_forward: fused_gated_branch,
        ..Relative::new(windows::everywhere(reader, &mut sizes, None)?)
    };
    Ok(relative.model(reader, &sizes, rotaries))
}

#[cfg(test)]
mod tests {
    use crate::arch;
    use crate::rope::RopeScaling;
    use crate::spec::ModelSpec;

    const SIZES: &str = r#""model_type": "phi3", "hidden_size": 16, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 8, "max_position_embeddings": 64"#;

    fn inputs(model: &ModelSpec) -> Vec<String> {
        let linears = model.block_linears(0);
        let names = linears.iter().map(|linear| linear.name.0.clone());
        names.collect()
    }

    #[test]
    fn linears_are_fused_unless_the_checkpoint_has_them_apart() {
        let text = format!("{{{SIZES}}}");
        let fused = arch::read(&text, &[]).unwrap();
        assert!(inputs(&fused).contains(&"model.layers.0.self_attn.qkv_proj".to_string()));
        let names = ["self_attn.q_proj.qweight", "mlp.gate_proj.qweight"];
        let names = names.map(|name| format!("model.layers.0.{name}"));
        let apart = arch::read(
            &text,
            &[&names[..], &["model.embed_tokens.weight".into()]].concat(),
        );
        let apart = inputs(&apart.unwrap());
        assert!(apart.contains(&"model.layers.0.self_attn.v_proj".to_string()));
        assert!(apart.contains(&"model.layers.0.mlp.up_proj".to_string()));
    }

    #[test]
    fn longrope_under_its_old_name() {
        let rope = r#""original_max_position_embeddings": 16, "rope_scaling":
            {"type": "su", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}"#;
        let model = arch::read(&format!("{{{SIZES}, {rope}}}"), &[]).unwrap();
        let RopeScaling::LongRope {
            long, original: 16, ..
        } = &model.rotaries[0].scaling
        else {
            panic!("{:?}", model.rotaries[0]);
        };
        assert_eq!(long, &[2.0, 3.0]);
    }
}
