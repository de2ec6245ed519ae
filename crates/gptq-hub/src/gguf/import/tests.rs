use super::*;
use crate::Checkpoint;
use crate::gguf::Value;
use crate::gguf::fixture::{GgufBuilder, strings, text};
use gptq_types::TensorSource;
use half::f16;
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
        "`gemma` is not one of",
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
