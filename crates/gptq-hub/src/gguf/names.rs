//! Tensor names of GGUF files and their Hugging Face counterparts, with the shapes they must have.

use std::collections::BTreeMap;

use crate::HubError;
use crate::gguf::config::{Architecture, Dimensions, Presence};
use crate::gguf::read::{GgufFile, GgufTensor};

/// The frequency divisors of Llama 3; they go into `config.json`, not among the weights.
pub(crate) const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// A tensor on its way from one name to the other.
#[derive(Debug)]
pub(crate) struct Move<'a> {
    pub source: &'a GgufTensor,
    pub target: String,
    /// Whether the rows of each head have to be put back in order.
    pub unrope: bool,
}

struct Expected {
    source: String,
    target: String,
    shape: Vec<usize>,
    unrope: bool,
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
    rest.remove(ROPE_DIVISORS);
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
        attention_bias: dims.architecture == Architecture::Qwen2 || any(".attn_"),
        feed_forward_bias: dims.architecture == Architecture::Llama && any(".ffn_"),
    }
}

fn expected_tensors(dims: &Dimensions, presence: Presence) -> Vec<Expected> {
    let plain = |source: &str, target: &str, shape: &[usize]| Expected {
        source: source.into(),
        target: target.into(),
        shape: shape.to_vec(),
        unrope: false,
    };
    let table = [dims.vocab, dims.hidden];
    let mut expected = vec![plain(
        "token_embd.weight",
        "model.embed_tokens.weight",
        &table,
    )];
    for layer in 0..dims.layers {
        expected.extend(layer_tensors(dims, presence, layer));
    }
    expected.push(plain(
        "output_norm.weight",
        "model.norm.weight",
        &[dims.hidden],
    ));
    if !presence.tied {
        expected.push(plain("output.weight", "lm_head.weight", &table));
    }
    expected
}

fn layer_tensors(dims: &Dimensions, presence: Presence, layer: usize) -> Vec<Expected> {
    let (hidden, wide) = (dims.hidden, dims.feed_forward);
    let (q, kv) = (dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim);
    let ropes = dims.architecture == Architecture::Llama;
    let output_bias = presence.attention_bias && dims.architecture != Architecture::Qwen2;
    let (attention, mlp) = (presence.attention_bias, presence.feed_forward_bias);
    // source, target, [out, in], whether its rows are roped, whether it has a bias
    let linears = [
        ("attn_q", "self_attn.q_proj", [q, hidden], ropes, attention),
        ("attn_k", "self_attn.k_proj", [kv, hidden], ropes, attention),
        ("attn_v", "self_attn.v_proj", [kv, hidden], false, attention),
        (
            "attn_output",
            "self_attn.o_proj",
            [hidden, q],
            false,
            output_bias,
        ),
        ("ffn_gate", "mlp.gate_proj", [wide, hidden], false, mlp),
        ("ffn_up", "mlp.up_proj", [wide, hidden], false, mlp),
        ("ffn_down", "mlp.down_proj", [hidden, wide], false, mlp),
    ];
    let mut norms = vec![
        ("attn_norm", "input_layernorm", hidden),
        ("ffn_norm", "post_attention_layernorm", hidden),
    ];
    if dims.architecture == Architecture::Qwen3 {
        norms.push(("attn_q_norm", "self_attn.q_norm", dims.head_dim));
        norms.push(("attn_k_norm", "self_attn.k_norm", dims.head_dim));
    }
    let named = |source: &str, target: &str, kind: &str, shape: Vec<usize>, unrope| Expected {
        source: format!("blk.{layer}.{source}.{kind}"),
        target: format!("model.layers.{layer}.{target}.{kind}"),
        shape,
        unrope,
    };
    let mut expected = Vec::new();
    for (source, target, size) in norms {
        expected.push(named(source, target, "weight", vec![size], false));
    }
    for (source, target, shape, unrope, has_bias) in linears {
        expected.push(named(source, target, "weight", shape.to_vec(), unrope));
        if has_bias {
            expected.push(named(source, target, "bias", vec![shape[0]], unrope));
        }
    }
    expected
}
