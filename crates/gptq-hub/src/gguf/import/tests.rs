use super::*;
use crate::Checkpoint;
use crate::gguf::Value;
use crate::gguf::fixture::{GgufBuilder, strings, text};
use gptq_types::{Dtype, TensorSource};
use half::{bf16, f16};
use serde_json::Value as Json;
use std::fs;

const HIDDEN: u64 = 8;
const WIDE: u64 = 12;
const HEAD: u64 = 4;
const VOCAB: u64 = 5;

/// Every element of a tensor is its position over 64, so that order can be seen.
fn counted(builder: &mut GgufBuilder, name: &str, shape: &[u64]) {
    let count: u64 = shape.iter().product();
    let values: Vec<f32> = (0..count).map(|i| i as f32 / 64.0).collect();
    builder.f32_tensor(name, shape, &values);
}

/// One layer, two heads, one key-value head, tied, byte-level tokens.
fn tiny(arch: &str) -> GgufBuilder {
    let mut builder = without_tensors(arch);
    let (q, kv) = (2 * HEAD, HEAD);
    for (name, shape) in [
        ("token_embd.weight", vec![VOCAB, HIDDEN]),
        ("output_norm.weight", vec![HIDDEN]),
        ("blk.0.attn_norm.weight", vec![HIDDEN]),
        ("blk.0.ffn_norm.weight", vec![HIDDEN]),
        ("blk.0.attn_q.weight", vec![q, HIDDEN]),
        ("blk.0.attn_k.weight", vec![kv, HIDDEN]),
        ("blk.0.attn_v.weight", vec![kv, HIDDEN]),
        ("blk.0.attn_output.weight", vec![HIDDEN, q]),
        ("blk.0.ffn_gate.weight", vec![WIDE, HIDDEN]),
        ("blk.0.ffn_up.weight", vec![WIDE, HIDDEN]),
        ("blk.0.ffn_down.weight", vec![HIDDEN, WIDE]),
    ] {
        counted(&mut builder, name, &shape);
    }
    builder
}

/// The keys alone.
fn without_tensors(arch: &str) -> GgufBuilder {
    let mut builder = GgufBuilder::new();
    builder.key("general.architecture", text(arch));
    for (name, value) in [
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", WIDE),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ] {
        builder.key(&format!("{arch}.{name}"), Value::U32(value as u32));
    }
    let epsilon = format!("{arch}.attention.layer_norm_rms_epsilon");
    builder.key(&epsilon, Value::F32(1e-5));
    builder.key(&format!("{arch}.rope.freq_base"), Value::F32(100_000.0));
    builder.key("tokenizer.ggml.model", text("gpt2"));
    builder.key("tokenizer.ggml.pre", text("gpt-2"));
    builder.key(
        "tokenizer.ggml.tokens",
        strings(&["<s>", "</s>", "a", "b", "ab"]),
    );
    let types = [3, 3, 1, 1, 1].map(Value::I32).to_vec();
    builder.key("tokenizer.ggml.token_type", Value::Array(types));
    builder.key("tokenizer.ggml.merges", strings(&["a b"]));
    builder.key("tokenizer.ggml.bos_token_id", Value::U32(0));
    builder.key("tokenizer.ggml.eos_token_id", Value::U32(1));
    builder
}

struct Imported {
    _dir: tempfile::TempDir,
    report: ImportReport,
    checkpoint: Checkpoint,
    config: Json,
}

impl Imported {
    fn first_column(&self, name: &str) -> Vec<f32> {
        let bytes = self.checkpoint.bytes(name).unwrap();
        let shape = self.checkpoint.info(name).unwrap().shape;
        let width: usize = shape[1..].iter().product();
        bytes
            .chunks_exact(2 * width)
            .map(|row| f16::from_le_bytes([row[0], row[1]]).to_f32() * 64.0)
            .collect()
    }
}

fn imported(builder: &GgufBuilder) -> Result<Imported, String> {
    let dir = tempfile::tempdir().unwrap();
    let (src, out) = (dir.path().join("m.gguf"), dir.path().join("out"));
    fs::write(&src, builder.bytes()).unwrap();
    match import_gguf(&src, &out, &mut |_, _, _| {}) {
        Ok(report) => {
            let checkpoint = Checkpoint::open(&out).unwrap();
            let config = serde_json::from_str(&checkpoint.config_json().unwrap()).unwrap();
            Ok(Imported {
                _dir: dir,
                report,
                checkpoint,
                config,
            })
        }
        Err(error) => {
            let left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
            assert_eq!(left.len(), 1, "an error left files behind: {left:?}");
            Err(error.to_string())
        }
    }
}

#[test]
fn a_llama_comes_out_in_hugging_face_order() {
    let import = imported(&tiny("llama")).unwrap();
    assert_eq!(import.report.tensors, 11);
    assert_eq!(import.report.source_types["F32"], 11);
    let narrowed = import.report.narrowed["F32"];
    assert_eq!(
        (narrowed.values, narrowed.changed),
        (import.report.parameters, 0)
    );
    assert_eq!(import.report.weight_bytes, import.checkpoint.weight_bytes());
    // rows of 8: stored rows 0 1 2 3 of a head are its rows 0 2 1 3
    let q = import.first_column("model.layers.0.self_attn.q_proj.weight");
    assert_eq!(q, [0.0, 16.0, 8.0, 24.0, 32.0, 48.0, 40.0, 56.0]);
    let k = import.first_column("model.layers.0.self_attn.k_proj.weight");
    assert_eq!(k, [0.0, 16.0, 8.0, 24.0]);
    let v = import.first_column("model.layers.0.self_attn.v_proj.weight");
    assert_eq!(v, [0.0, 8.0, 16.0, 24.0]);

    let config = &import.config;
    assert_eq!(config["model_type"], "llama");
    assert_eq!(config["head_dim"], 4);
    assert_eq!(config["vocab_size"], 5);
    assert_eq!(config["rms_norm_eps"], 1e-5);
    assert_eq!(config["rope_theta"], 100_000.0);
    assert_eq!(config["rope_scaling"], Json::Null);
    assert_eq!(config["tie_word_embeddings"], true);
    assert_eq!(config["attention_bias"], false);
    assert_eq!(config["eos_token_id"], 1);
    for name in [
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ] {
        assert!(import.checkpoint.dir().join(name).is_file(), "{name}");
    }
}

#[test]
fn biases_of_llama_are_put_in_order_too() {
    let mut builder = tiny("llama");
    for (name, size) in [
        ("q", 2 * HEAD),
        ("k", HEAD),
        ("v", HEAD),
        ("output", HIDDEN),
    ] {
        counted(&mut builder, &format!("blk.0.attn_{name}.bias"), &[size]);
    }
    counted(&mut builder, "output.weight", &[VOCAB, HIDDEN]);
    let import = imported(&builder).unwrap();
    let q = import.first_column("model.layers.0.self_attn.q_proj.bias");
    assert_eq!(q, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(import.config["attention_bias"], true);
    assert_eq!(import.config["tie_word_embeddings"], false);
    assert!(import.checkpoint.info("lm_head.weight").is_some());

    builder.remove_tensor("blk.0.attn_output.bias");
    let error = imported(&builder).err().unwrap();
    assert!(
        error.contains("`blk.0.attn_output.bias` is missing"),
        "{error}"
    );
}

#[test]
fn qwen_keeps_its_rows() {
    let mut builder = tiny("qwen2");
    for (name, size) in [("q", 2 * HEAD), ("k", HEAD), ("v", HEAD)] {
        counted(&mut builder, &format!("blk.0.attn_{name}.bias"), &[size]);
    }
    let import = imported(&builder).unwrap();
    let q = import.first_column("model.layers.0.self_attn.q_proj.bias");
    assert_eq!(q, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    assert_eq!(import.config["architectures"][0], "Qwen2ForCausalLM");

    let mut builder = tiny("qwen3");
    for name in ["q", "k"] {
        counted(
            &mut builder,
            &format!("blk.0.attn_{name}_norm.weight"),
            &[HEAD],
        );
    }
    let import = imported(&builder).unwrap();
    let name = "model.layers.0.self_attn.k_norm.weight";
    assert_eq!(import.checkpoint.info(name).unwrap().shape, [4]);
    assert_eq!(import.config["attention_bias"], false);
}

#[test]
fn blocks_are_decoded_before_rows_are_ordered() {
    let mut builder = tiny("llama");
    // 32 columns now: everything that the hidden size touches becomes wider
    builder.set("llama.embedding_length", Value::U32(32));
    builder.set("llama.attention.key_length", Value::U32(4));
    let (q, kv) = (2 * HEAD, HEAD);
    for (name, shape) in [
        ("token_embd.weight", vec![VOCAB, 32]),
        ("output_norm.weight", vec![32]),
        ("blk.0.attn_norm.weight", vec![32]),
        ("blk.0.ffn_norm.weight", vec![32]),
        ("blk.0.attn_k.weight", vec![kv, 32]),
        ("blk.0.attn_v.weight", vec![kv, 32]),
        ("blk.0.attn_output.weight", vec![32, q]),
        ("blk.0.ffn_gate.weight", vec![WIDE, 32]),
        ("blk.0.ffn_up.weight", vec![WIDE, 32]),
        ("blk.0.ffn_down.weight", vec![32, WIDE]),
    ] {
        builder.remove_tensor(name);
        counted(&mut builder, name, &shape);
    }
    builder.remove_tensor("blk.0.attn_q.weight");
    // Q8_0 with scale 1/64 and row number as every code
    let rows = (0..8u8).flat_map(|row| [vec![0x00, 0x24], vec![row; 32]].concat());
    builder.tensor("blk.0.attn_q.weight", &[q, 32], 8, rows.collect());
    let import = imported(&builder).unwrap();
    let q = import.first_column("model.layers.0.self_attn.q_proj.weight");
    assert_eq!(q, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    assert_eq!(import.report.source_types["Q8_0"], 1);
}

fn refused(change: impl FnOnce(&mut GgufBuilder), expected: &str) {
    let mut builder = tiny("llama");
    change(&mut builder);
    let error = imported(&builder).err().expect("it was accepted");
    assert!(error.contains(expected), "{error}");
}

#[test]
fn nothing_is_dropped_and_nothing_is_left_behind() {
    refused(
        |b| counted(b, "blk.0.attn_sinks.weight", &[2]),
        "tensor `blk.0.attn_sinks.weight` is not part of `llama`",
    );
    refused(
        |b| b.remove_tensor("blk.0.ffn_up.weight"),
        "tensor `blk.0.ffn_up.weight` is missing",
    );
    refused(
        |b| {
            b.remove_tensor("output_norm.weight");
            b.f32_tensor("output_norm.weight", &[HIDDEN], &[1e6; HIDDEN as usize]);
        },
        "tensor `output_norm.weight` holds 1000000 at element 0",
    );
    refused(
        |b| b.set("llama.feed_forward_length", Value::U32(16)),
        "`blk.0.ffn_gate.weight` has shape [12, 8], expected [16, 8]",
    );
    refused(
        |b| b.set("general.architecture", text("gemma")),
        "`gemma` is not one of `llama`, `qwen2`, `qwen3`, `gemma3`, `phi3`, `glm4`",
    );
    // keys of one architecture mean nothing in another
    refused(
        |b| b.set("llama.attention.sliding_window", Value::U32(4)),
        "`llama.attention.sliding_window` is not supported",
    );
    refused(
        |b| counted(b, "rope_factors_long.weight", &[2]),
        "`rope_factors_long.weight` is not part of `llama`",
    );
    refused(
        |b| b.set("llama.logit_scale", Value::F32(2.0)),
        "`llama.logit_scale` is not supported",
    );
    refused(
        |b| b.set("llama.expert_count", Value::U32(8)),
        "mixtures of experts",
    );
    refused(
        |b| b.set("split.count", Value::U16(2)),
        "`split.count` is 2",
    );
    refused(
        |b| b.set("general.quantization_version", Value::U32(1)),
        "`general.quantization_version` 1 is not 2",
    );
    refused(
        |b| b.set("llama.attention.head_count_kv", Value::U32(3)),
        "3 does not divide 2 heads",
    );
    refused(
        |b| b.set("llama.rope.dimension_count", Value::U32(2)),
        "`llama.rope.dimension_count` differs from the head size 4",
    );
    refused(
        |b| b.remove_key("llama.block_count"),
        "`llama.block_count` is missing",
    );
    refused(
        |b| b.f32_tensor("rope_freqs.weight", &[2], &[1.0, 3.0]),
        "not those of Llama 3",
    );
    refused(
        |b| b.set("llama.rope.scaling.type", text("longrope")),
        "`longrope` is not supported",
    );
}

#[test]
fn rope_scaling_keeps_its_parameters() {
    let mut builder = tiny("llama");
    builder.set("llama.rope.scaling.type", text("linear"));
    builder.set("llama.rope.scaling.factor", Value::F32(2.5));
    let config = imported(&builder).unwrap().config;
    assert_eq!(config["rope_scaling"]["rope_type"], "linear");
    assert_eq!(config["rope_scaling"]["factor"], 2.5);

    builder.set("llama.rope.scaling.type", text("yarn"));
    builder.set("llama.rope.scaling.original_context_length", Value::U32(32));
    let config = imported(&builder).unwrap().config;
    assert_eq!(
        config["rope_scaling"]["original_max_position_embeddings"],
        32
    );
}

#[test]
fn a_folder_with_something_in_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let src = dir.path().join("m.gguf");
    fs::write(&src, tiny("llama").bytes()).unwrap();
    let out = dir.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(out.join("mine.txt"), "keep").unwrap();
    let error = import_gguf(&src, &out, &mut |_, _, _| {}).unwrap_err();
    assert!(error.to_string().contains("not an empty folder"), "{error}");
    assert!(error.hint().is_some());
    assert_eq!(fs::read_to_string(out.join("mine.txt")).unwrap(), "keep");
}

/// Gemma 3 of `layers` blocks: norms as the converter writes them, 1 above what they are.
fn gemma3(layers: u64) -> GgufBuilder {
    let mut builder = without_tensors("gemma3");
    builder.set("gemma3.block_count", Value::U32(layers as u32));
    builder.key("gemma3.attention.key_length", Value::U32(HEAD as u32));
    builder.key("gemma3.attention.value_length", Value::U32(HEAD as u32));
    builder.key("gemma3.attention.sliding_window", Value::U32(16));
    counted(&mut builder, "token_embd.weight", &[VOCAB, HIDDEN]);
    let norm = |builder: &mut GgufBuilder, name: &str, size: u64| {
        let values: Vec<f32> = (0..size).map(|i| 1.0 + (i as f32 - 2.0) / 1024.0).collect();
        builder.f32_tensor(name, &[size], &values);
    };
    norm(&mut builder, "output_norm.weight", HIDDEN);
    for layer in 0..layers {
        for (name, size) in [
            ("attn_norm", HIDDEN),
            ("post_attention_norm", HIDDEN),
            ("ffn_norm", HIDDEN),
            ("post_ffw_norm", HIDDEN),
            ("attn_q_norm", HEAD),
            ("attn_k_norm", HEAD),
        ] {
            norm(&mut builder, &format!("blk.{layer}.{name}.weight"), size);
        }
        for (name, shape) in [
            ("attn_q", [2 * HEAD, HIDDEN]),
            ("attn_k", [HEAD, HIDDEN]),
            ("attn_v", [HEAD, HIDDEN]),
            ("attn_output", [HIDDEN, 2 * HEAD]),
            ("ffn_gate", [WIDE, HIDDEN]),
            ("ffn_up", [WIDE, HIDDEN]),
            ("ffn_down", [HIDDEN, WIDE]),
        ] {
            counted(&mut builder, &format!("blk.{layer}.{name}.weight"), &shape);
        }
    }
    builder
}

#[test]
fn norms_of_gemma_lose_what_the_converter_added() {
    let import = imported(&gemma3(2)).unwrap();
    assert_eq!(import.report.dtype, HalfType::Bf16);
    assert_eq!(import.report.architecture, "gemma3");
    let values = |name: &str| -> Vec<f32> {
        assert_eq!(import.checkpoint.info(name).unwrap().dtype, Dtype::BF16);
        let bytes = import.checkpoint.bytes(name).unwrap();
        let halves = bytes.as_chunks::<2>().0.iter();
        halves
            .map(|half| bf16::from_le_bytes(*half).to_f32())
            .collect()
    };
    for name in [
        "model.norm",
        "model.layers.1.input_layernorm",
        "model.layers.1.post_attention_layernorm",
        "model.layers.1.pre_feedforward_layernorm",
        "model.layers.1.post_feedforward_layernorm",
        "model.layers.1.self_attn.q_norm",
        "model.layers.1.self_attn.k_norm",
    ] {
        let found = values(&format!("{name}.weight"));
        let expected: Vec<f32> = (0..found.len())
            .map(|i| (i as f32 - 2.0) / 1024.0)
            .collect();
        assert_eq!(found, expected, "{name}");
    }
    let up = values("model.layers.0.mlp.up_proj.weight");
    assert_eq!(up[..3], [0.0, 1.0 / 64.0, 2.0 / 64.0]);
    assert_eq!(import.report.narrowed["F32"].changed, 0);

    let config = &import.config;
    assert_eq!(config["architectures"][0], "Gemma3ForCausalLM");
    assert_eq!(config["model_type"], "gemma3_text");
    assert_eq!(config["torch_dtype"], "bfloat16");
    assert_eq!(config["hidden_activation"], "gelu_pytorch_tanh");
    assert_eq!(config.get("hidden_act"), None);
    assert_eq!(config["query_pre_attn_scalar"], 4);
    assert_eq!(config["rope_theta"], 100_000.0);
    assert_eq!(config["rope_local_base_freq"], 10_000.0);
    assert_eq!(config["sliding_window"], 16);
    assert_eq!(config["sliding_window_pattern"], 6);
    assert_eq!(config["final_logit_softcapping"], Json::Null);
    assert_eq!(config["tie_word_embeddings"], true);
}

#[test]
fn windows_of_gemma_are_by_period_or_by_list() {
    let types = |change: &dyn Fn(&mut GgufBuilder)| {
        let mut builder = gemma3(4);
        change(&mut builder);
        let config = imported(&builder)?.config;
        let types = config["layer_types"].as_array().unwrap();
        let first = |kind: &Json| kind.as_str().unwrap()[..1].to_string();
        let types: String = types.iter().map(first).collect();
        Ok::<_, String>((types, config))
    };
    let pattern = "gemma3.attention.sliding_window_pattern";
    assert_eq!(types(&|_| ()).unwrap().0, "ssss");
    let (kinds, config) = types(&|b| b.set(pattern, Value::U32(3))).unwrap();
    assert_eq!(
        (&kinds[..], &config["sliding_window_pattern"]),
        ("ssfs", &Json::from(3))
    );
    let flags = Value::Array([false, true, true, false].map(Value::Bool).to_vec());
    let (kinds, config) = types(&|b| b.set(pattern, flags.clone())).unwrap();
    assert_eq!(kinds, "fssf");
    assert_eq!(config.get("sliding_window_pattern"), None);
    let (kinds, config) = types(&|b| b.remove_key("gemma3.attention.sliding_window")).unwrap();
    assert_eq!(
        (&kinds[..], &config["sliding_window"]),
        ("ffff", &Json::Null)
    );
    let base = types(&|b| b.set("gemma3.rope.freq_base_swa", Value::F32(5000.0)));
    assert_eq!(base.unwrap().1["rope_local_base_freq"], 5000.0);

    let short = Value::Array(vec![Value::Bool(true)]);
    let error = types(&|b| b.set(pattern, short.clone())).unwrap_err();
    assert!(error.contains("has 1 values for 4 blocks"), "{error}");
    let error = types(&|b| b.set(pattern, text("x"))).unwrap_err();
    assert!(error.contains("no number and no list"), "{error}");
}

#[test]
fn the_largest_gemma_scales_scores_by_its_hidden_size() {
    // four heads of 4 in a hidden size of 8: a width of 2 each
    let mut builder = gemma3(62);
    builder.set("gemma3.attention.head_count", Value::U32(4));
    for layer in 0..62 {
        for (name, shape) in [("attn_q", [16, HIDDEN]), ("attn_output", [HIDDEN, 16])] {
            let name = format!("blk.{layer}.{name}.weight");
            builder.remove_tensor(&name);
            counted(&mut builder, &name, &shape);
        }
    }
    let config = imported(&builder).unwrap().config;
    assert_eq!(config["query_pre_attn_scalar"], 2);
    assert_eq!(config["layer_types"][5], "full_attention");
}

fn phi3() -> GgufBuilder {
    let mut builder = tiny("phi3");
    for name in ["attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"] {
        builder.remove_tensor(&format!("blk.0.{name}.weight"));
    }
    counted(&mut builder, "blk.0.attn_qkv.weight", &[4 * HEAD, HIDDEN]);
    counted(&mut builder, "blk.0.ffn_up.weight", &[2 * WIDE, HIDDEN]);
    counted(&mut builder, "output.weight", &[VOCAB, HIDDEN]);
    builder.key("phi3.rope.dimension_count", Value::U32(HEAD as u32));
    let original = "phi3.rope.scaling.original_context_length";
    builder.key(original, Value::U32(64));
    builder.key("phi3.attention.sliding_window", Value::U32(0));
    builder
}

#[test]
fn fused_linears_of_phi_stay_fused() {
    let import = imported(&phi3()).unwrap();
    let shape = |name: &str| import.checkpoint.info(name).unwrap().shape;
    let name = "model.layers.0.self_attn.qkv_proj.weight";
    assert_eq!(shape(name), [16, 8]);
    let rows: Vec<f32> = (0..16).map(|row| row as f32 * 8.0).collect();
    assert_eq!(import.first_column(name), rows);
    assert_eq!(shape("model.layers.0.mlp.gate_up_proj.weight"), [24, 8]);
    assert_eq!(shape("lm_head.weight"), [5, 8]);
    let config = &import.config;
    assert_eq!(config["model_type"], "phi3");
    assert_eq!(config["torch_dtype"], "float16");
    assert_eq!(config["rope_scaling"], Json::Null);
    assert_eq!(config["sliding_window"], Json::Null);
    assert_eq!(config["partial_rotary_factor"], 1.0);
    assert_eq!(config["original_max_position_embeddings"], 64);

    let mut builder = phi3();
    builder.set("phi3.rope.dimension_count", Value::U32(2));
    builder.set("phi3.attention.sliding_window", Value::U32(2047));
    let config = imported(&builder).unwrap().config;
    assert_eq!(config["partial_rotary_factor"], 0.5);
    assert_eq!(config["sliding_window"], 2047);
    builder.set("phi3.rope.dimension_count", Value::U32(6));
    let error = imported(&builder).err().unwrap();
    assert!(
        error.contains("6 is no even part of the head size 4"),
        "{error}"
    );
}

#[test]
fn two_lists_of_factors_are_longrope() {
    let mut builder = phi3();
    builder.set("phi3.context_length", Value::U32(512));
    builder.f32_tensor("rope_factors_long.weight", &[2], &[2.0, 5.5]);
    builder.f32_tensor("rope_factors_short.weight", &[2], &[1.0, 1.1]);
    let attention = "phi3.rope.scaling.attn_factor";
    builder.key(attention, Value::F32(1.5f32.sqrt()));
    let expected = serde_json::json!({
        "type": "longrope",
        "long_factor": [2.0, 5.5],
        "short_factor": [1.0, 1.1],
    });
    // sqrt(1 + ln 8 / ln 64) goes without saying
    assert_eq!(imported(&builder).unwrap().config["rope_scaling"], expected);
    builder.key("phi3.rope.scaling.type", text("longrope"));
    assert_eq!(imported(&builder).unwrap().config["rope_scaling"], expected);
    builder.set(attention, Value::F32(1.25));
    let config = imported(&builder).unwrap().config;
    assert_eq!(config["rope_scaling"]["attention_factor"], 1.25);

    builder.remove_tensor("rope_factors_short.weight");
    let error = imported(&builder).err().unwrap();
    assert!(
        error.contains("`rope_factors_short.weight` is missing"),
        "{error}"
    );
    builder.f32_tensor("rope_factors_short.weight", &[1], &[1.0]);
    let error = imported(&builder).err().unwrap();
    assert!(error.contains("has shape [1], expected [2]"), "{error}");
}

#[test]
fn glm_has_four_norms_and_turns_half_a_head() {
    let mut builder = tiny("glm4");
    for name in ["ffn_gate", "ffn_up"] {
        builder.remove_tensor(&format!("blk.0.{name}.weight"));
    }
    counted(&mut builder, "blk.0.ffn_up.weight", &[2 * WIDE, HIDDEN]);
    for name in ["post_attention_norm", "post_ffw_norm"] {
        counted(&mut builder, &format!("blk.0.{name}.weight"), &[HIDDEN]);
    }
    for (name, size) in [("q", 2 * HEAD), ("k", HEAD), ("v", HEAD)] {
        counted(&mut builder, &format!("blk.0.attn_{name}.bias"), &[size]);
    }
    builder.key("glm4.rope.dimension_count", Value::U32(2));
    let import = imported(&builder).unwrap();
    for name in [
        "input_layernorm.weight",
        "post_self_attn_layernorm.weight",
        "post_attention_layernorm.weight",
        "post_mlp_layernorm.weight",
        "self_attn.k_proj.bias",
        "mlp.gate_up_proj.weight",
    ] {
        let name = format!("model.layers.0.{name}");
        assert!(import.checkpoint.info(&name).is_some(), "{name}");
    }
    // pairs lie side by side on the hub as they do here
    let q = import.first_column("model.layers.0.self_attn.q_proj.bias");
    assert_eq!(q, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    let norm = import.first_column("model.layers.0.post_mlp_layernorm.weight");
    assert_eq!(norm[..2], [0.0, 1.0]);
    let config = &import.config;
    assert_eq!(config["architectures"][0], "Glm4ForCausalLM");
    assert_eq!(config["attention_bias"], true);
    assert_eq!(config["partial_rotary_factor"], 0.5);
    assert_eq!(config["head_dim"], 4);
}
