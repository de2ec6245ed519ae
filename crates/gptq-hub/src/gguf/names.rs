//! Tensor names of GGUF files and their Hugging Face counterparts, with the shapes they must have.

use std::collections::BTreeMap;

use crate::HubError;
use crate::gguf::architecture::Architecture;
use crate::gguf::config::{Dimensions, Presence};
use crate::gguf::read::{GgufFile, GgufTensor};
use crate::gguf::rope::RopeTensors;

/// A tensor on its way from one name to the other.
#[derive(Debug)]
pub(crate) struct Move<'a> {
    pub source: &'a GgufTensor,
    pub target: String,
    /// Whether the rows of each head must be restored to their original order.
    pub unrope: bool,
    /// Added to every value.
    pub shift: f32,
}

struct Expected {
    source: String,
    target: String,
    shape: Vec<usize>,
    unrope: bool,
    shift: f32,
}

/// Pairs every tensor of the file with its new name.
///
/// Fails when one is missing, has another shape, or is not part of the architecture.
pub(crate) fn plan_moves<'a>(
    file: &'a GgufFile,
    dims: &Dimensions,
) -> Result<(Vec<Move<'a>>, Presence), HubError> {
    let mut rest: BTreeMap<&str, &GgufTensor> = file
        .tensors()
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor))
        .collect();
    for name in RopeTensors::names(dims.architecture) {
        rest.remove(name);
    }
    let presence = presence(&rest, dims);
    let mut moves = Vec::new();
    for expected in expected_tensors(dims, presence) {
        let source = rest
            .remove(expected.source.as_str())
            .ok_or_else(|| file.tensor_error(&expected.source, "is missing"))?;
        if source.shape != expected.shape {
            let reason = format!(
                "has shape {:?}, expected {:?}",
                source.shape, expected.shape
            );
            return Err(file.tensor_error(&source.name, reason));
        }
        moves.push(Move {
            source,
            target: expected.target,
            unrope: expected.unrope,
            shift: expected.shift,
        });
    }
    match rest.keys().next() {
        Some(unknown) => Err(file.tensor_error(
            unknown,
            format!("is not part of `{}`", dims.architecture.name()),
        )),
        None => Ok((moves, presence)),
    }
}

/// A model has a kind of bias in all of its layers or in none, so one tensor decides.
fn presence(tensors: &BTreeMap<&str, &GgufTensor>, dims: &Dimensions) -> Presence {
    let any = |part: &str| {
        tensors
            .keys()
            .any(|name| name.starts_with("blk.") && name.contains(part) && name.ends_with(".bias"))
    };
    Presence {
        tied: !tensors.contains_key("output.weight"),
        attention_bias: match dims.architecture {
            Architecture::Qwen2 => true,
            // has no biases, and no config key for them
            Architecture::Phi3 => false,
            _ => any(".attn_"),
        },
        feed_forward_bias: dims.architecture == Architecture::Llama && any(".ffn_"),
    }
}

fn expected_tensors(dims: &Dimensions, presence: Presence) -> Vec<Expected> {
    let plain = |source: &str, target: &str, shape: &[usize], shift| Expected {
        source: source.into(),
        target: target.into(),
        shape: shape.to_vec(),
        unrope: false,
        shift,
    };
    let table = [dims.vocab, dims.hidden];
    let embedding = ("token_embd.weight", "model.embed_tokens.weight");
    let mut expected = vec![plain(embedding.0, embedding.1, &table, 0.0)];
    for layer in 0..dims.layers {
        expected.extend(layer_tensors(dims, presence, layer));
    }
    let norm = ("output_norm.weight", "model.norm.weight");
    expected.push(plain(norm.0, norm.1, &[dims.hidden], norm_shift(dims)));
    if !presence.tied {
        expected.push(plain("output.weight", "lm_head.weight", &table, 0.0));
    }
    expected
}

fn norm_shift(dims: &Dimensions) -> f32 {
    -dims.architecture.added_to_norms()
}

fn layer_tensors(dims: &Dimensions, presence: Presence, layer: usize) -> Vec<Expected> {
    let named = |source: &str, target: &str, kind: &str, shape: Vec<usize>| Expected {
        source: format!("blk.{layer}.{source}.{kind}"),
        target: format!("model.layers.{layer}.{target}.{kind}"),
        shape,
        unrope: false,
        shift: 0.0,
    };
    let mut expected = Vec::new();
    for (source, target, size) in norms(dims) {
        expected.push(Expected {
            shift: norm_shift(dims),
            ..named(source, target, "weight", vec![size])
        });
    }
    for linear in linears(dims, presence) {
        let (source, target, unrope) = (linear.source, linear.target, linear.unrope);
        expected.push(Expected {
            unrope,
            ..named(source, target, "weight", linear.shape.to_vec())
        });
        if linear.bias {
            expected.push(Expected {
                unrope,
                ..named(source, target, "bias", vec![linear.shape[0]])
            });
        }
    }
    expected
}

/// Source, target and width of each norm of a block.
fn norms(dims: &Dimensions) -> Vec<(&'static str, &'static str, usize)> {
    let (hidden, head) = (dims.hidden, dims.head_dim);
    let heads = [
        ("attn_q_norm", "self_attn.q_norm", head),
        ("attn_k_norm", "self_attn.k_norm", head),
    ];
    let before = ("attn_norm", "input_layernorm", hidden);
    let between = ("ffn_norm", "post_attention_layernorm", hidden);
    match dims.architecture {
        Architecture::Llama | Architecture::Qwen2 | Architecture::Phi3 => vec![before, between],
        Architecture::Qwen3 => vec![before, between, heads[0], heads[1]],
        Architecture::Gemma3 => vec![
            before,
            ("post_attention_norm", "post_attention_layernorm", hidden),
            ("ffn_norm", "pre_feedforward_layernorm", hidden),
            ("post_ffw_norm", "post_feedforward_layernorm", hidden),
            heads[0],
            heads[1],
        ],
        Architecture::Glm4 => vec![
            before,
            ("post_attention_norm", "post_self_attn_layernorm", hidden),
            between,
            ("post_ffw_norm", "post_mlp_layernorm", hidden),
        ],
    }
}

/// A linear of a block.
struct Linear {
    source: &'static str,
    target: &'static str,
    /// `[out, in]`.
    shape: [usize; 2],
    /// Whether its rows are in llama.cpp's order.
    unrope: bool,
    bias: bool,
}

fn linears(dims: &Dimensions, presence: Presence) -> Vec<Linear> {
    let (hidden, wide) = (dims.hidden, dims.feed_forward);
    let (q, kv) = (dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim);
    let architecture = dims.architecture;
    let fused_attention = architecture == Architecture::Phi3;
    let fused_feed_forward = matches!(architecture, Architecture::Phi3 | Architecture::Glm4);
    let unrope = architecture == Architecture::Llama;
    let bias = presence.attention_bias;
    let output_bias = bias && !matches!(architecture, Architecture::Qwen2 | Architecture::Glm4);
    let linear = |source, target, shape, unrope, bias| Linear {
        source,
        target,
        shape,
        unrope,
        bias,
    };
    let mut linears = match fused_attention {
        true => {
            let rows = [q + 2 * kv, hidden];
            vec![linear("attn_qkv", "self_attn.qkv_proj", rows, false, bias)]
        }
        false => vec![
            linear("attn_q", "self_attn.q_proj", [q, hidden], unrope, bias),
            linear("attn_k", "self_attn.k_proj", [kv, hidden], unrope, bias),
            linear("attn_v", "self_attn.v_proj", [kv, hidden], false, bias),
        ],
    };
    let output = [hidden, q];
    linears.push(linear(
        "attn_output",
        "self_attn.o_proj",
        output,
        false,
        output_bias,
    ));
    let bias = presence.feed_forward_bias;
    match fused_feed_forward {
        // rows of the gate, then those of `up`
        true => {
            let rows = [2 * wide, hidden];
            linears.push(linear("ffn_up", "mlp.gate_up_proj", rows, false, bias));
        }
        false => linears.extend([
            linear("ffn_gate", "mlp.gate_proj", [wide, hidden], false, bias),
            linear("ffn_up", "mlp.up_proj", [wide, hidden], false, bias),
        ]),
    }
    let down = [hidden, wide];
    linears.push(linear("ffn_down", "mlp.down_proj", down, false, bias));
    linears
}
