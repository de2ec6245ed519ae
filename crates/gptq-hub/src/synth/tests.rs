use std::fs;

use gptq_packer::SafetensorsFile;
use gptq_types::TensorSource;
use half::{bf16, f16};

use super::*;
use crate::Checkpoint;

fn tiny(dtype: HalfType) -> SynthSpec {
    SynthSpec {
        shape: "tiny".parse().unwrap(),
        layers: None,
        seed: 3,
        dtype,
        windows: None,
    }
}

fn made(spec: &SynthSpec) -> (tempfile::TempDir, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("model");
    let report = synth(spec, &out, &mut |_, _| {}).unwrap();
    let checkpoint = Checkpoint::open(&report.folder).unwrap();
    assert_eq!(report.tensors, checkpoint.names().len());
    assert_eq!(report.weight_bytes, checkpoint.weight_bytes());
    (folder, checkpoint)
}

fn values(checkpoint: &Checkpoint, name: &str, dtype: HalfType) -> Vec<f64> {
    let bytes = checkpoint.bytes(name).unwrap();
    let value = |pair: &[u8; 2]| match dtype {
        HalfType::F16 => f16::from_le_bytes(*pair).to_f64(),
        HalfType::Bf16 => bf16::from_le_bytes(*pair).to_f64(),
    };
    bytes.as_chunks::<2>().0.iter().map(value).collect()
}

fn deviation(values: &[f64]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    // five standard errors of a mean
    assert!(mean.abs() < 5.0 * shape::DEVIATION / count.sqrt(), "{mean}");
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / count).sqrt()
}

#[test]
fn a_tiny_model_has_every_tensor_in_its_shape() {
    let (_folder, model) = made(&tiny(HalfType::F16));
    let shape = |name: &str| {
        let info = model.info(name).unwrap();
        assert_eq!(info.dtype, Dtype::F16);
        info.shape
    };
    assert_eq!(model.names().len(), 3 + 2 * 9);
    assert_eq!(shape("model.embed_tokens.weight"), [512, 128]);
    assert_eq!(shape("lm_head.weight"), [512, 128]);
    assert_eq!(shape("model.norm.weight"), [128]);
    for index in 0..2 {
        let at = |name: &str| shape(&format!("model.layers.{index}.{name}.weight"));
        assert_eq!(at("input_layernorm"), [128]);
        assert_eq!(at("post_attention_layernorm"), [128]);
        assert_eq!(at("self_attn.q_proj"), [128, 128]);
        assert_eq!(at("self_attn.k_proj"), [64, 128]);
        assert_eq!(at("self_attn.v_proj"), [64, 128]);
        assert_eq!(at("self_attn.o_proj"), [128, 128]);
        assert_eq!(at("mlp.gate_proj"), [344, 128]);
        assert_eq!(at("mlp.up_proj"), [344, 128]);
        assert_eq!(at("mlp.down_proj"), [128, 344]);
    }
    let config: serde_json::Value = serde_json::from_str(&model.config_json().unwrap()).unwrap();
    assert_eq!(config["num_hidden_layers"], 2);
    assert_eq!(config["torch_dtype"], "float16");
    assert_eq!(config["rope_scaling"], serde_json::Value::Null);
}

#[test]
fn weights_have_the_deviation_of_the_family_and_norms_are_one() {
    for dtype in [HalfType::F16, HalfType::Bf16] {
        let (_folder, model) = made(&tiny(dtype));
        for name in model.names() {
            let values = values(&model, &name, dtype);
            if name.contains("norm") {
                assert!(values.iter().all(|&value| value == 1.0), "{name}");
                continue;
            }
            let found = deviation(&values);
            // 8192 weights or more: 2 % is over two standard errors
            assert!(
                (found / shape::DEVIATION - 1.0).abs() < 0.02,
                "{name}: {found}"
            );
            assert!(values.iter().all(|value| value.abs() < 0.09), "{name}");
        }
        let name = |index| format!("model.layers.{index}.mlp.up_proj.weight");
        let (first, second) = (model.bytes(&name(0)), model.bytes(&name(1)));
        assert_ne!(first.unwrap(), second.unwrap());
    }
}

/// The shape of Gemma 3 27B, narrower and with as many blocks as show a whole period of windows.
fn small_gemma() -> SynthSpec {
    let shape = ModelShape {
        hidden: 128,
        intermediate: 256,
        heads: 4,
        kv_heads: 2,
        vocab: 512,
        ..("gemma-3-27b".parse().unwrap())
    };
    SynthSpec {
        shape,
        layers: NonZeroU16::new(7),
        ..tiny(HalfType::Bf16)
    }
}

#[test]
fn gemma_has_norms_around_zero_and_no_head() {
    let (_folder, model) = made(&small_gemma());
    let shape = |name: &str| model.info(&format!("{name}.weight")).unwrap().shape;
    assert_eq!(model.names().len(), 2 + 7 * 13);
    assert_eq!(model.info("lm_head.weight"), None);
    // heads are wider together than the hidden states
    assert_eq!(shape("model.layers.6.self_attn.q_proj"), [512, 128]);
    assert_eq!(shape("model.layers.6.self_attn.k_proj"), [256, 128]);
    assert_eq!(shape("model.layers.6.self_attn.o_proj"), [128, 512]);
    assert_eq!(shape("model.layers.0.self_attn.q_norm"), [128]);
    for name in [
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ] {
        let name = format!("model.layers.0.{name}.weight");
        let values = values(&model, &name, HalfType::Bf16);
        // 128 values: 30 % is over four standard errors
        let found = deviation(&values);
        assert!(
            (found / shape::DEVIATION - 1.0).abs() < 0.3,
            "{name}: {found}"
        );
    }
    let config: serde_json::Value = serde_json::from_str(&model.config_json().unwrap()).unwrap();
    assert_eq!(config["model_type"], "gemma3_text");
    assert_eq!(config["head_dim"], 128);
    assert_eq!(config["query_pre_attn_scalar"], 168);
    assert_eq!(config["torch_dtype"], "bfloat16");
    assert_eq!(config["rope_scaling"]["factor"], 8.0);
    let kinds = config["layer_types"].as_array().unwrap();
    let full: Vec<usize> = (0..kinds.len())
        .filter(|&block| kinds[block] == "full_attention")
        .collect();
    assert_eq!((kinds.len(), full), (7, vec![5]));
}

#[test]
fn threads_change_no_byte() {
    let mut spec = tiny(HalfType::F16);
    // an embedding of several parts, the last one short
    spec.shape.vocab = 3 * PART_ELEMENTS / 128 + 5;
    // whole files: a failed comparison of megabytes should not be printed
    let bytes = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let (_folder, model) = pool.build().unwrap().install(|| made(&spec));
        fs::read(model.dir().join("model.safetensors")).unwrap()
    };
    assert!(bytes(1) == bytes(3));
}

#[test]
fn the_tokenizer_knows_every_word() {
    let (_folder, model) = made(&tiny(HalfType::F16));
    let file = model.dir().join("tokenizer.json");
    let tokenizer = tokenizers::Tokenizer::from_file(file).unwrap();
    assert_eq!(tokenizer.get_vocab_size(true), 512);
    let ids = |text: &str| tokenizer.encode(text, true).unwrap().get_ids().to_vec();
    assert_eq!(ids("<s> t0 t508 t509 </s>"), [1, 3, 511, 0, 2]);
    for name in ["generation_config.json", "tokenizer_config.json"] {
        assert!(model.dir().join(name).is_file(), "{name}");
    }
}

#[test]
fn windows_are_ordinary_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("ids.safetensors");
    let mut spec = tiny(HalfType::F16);
    spec.windows = Some(SynthWindows {
        path: path.clone(),
        samples: 8,
        seq_len: 500,
    });
    made(&spec);
    let file = SafetensorsFile::open(&path).unwrap();
    let info = file.info("input_ids").unwrap();
    assert_eq!((info.dtype, &info.shape[..]), (Dtype::I32, &[8, 500][..]));
    let bytes = file.read("input_ids").unwrap();
    let words = bytes.as_chunks::<4>().0.iter();
    let ids: Vec<i32> = words.map(|word| i32::from_le_bytes(*word)).collect();
    let range = (ids.iter().min(), ids.iter().max());
    assert_eq!(range, (Some(&3), Some(&511)));

    let refused = |path: &str, samples, seq_len| {
        let windows = SynthWindows {
            path: folder.path().join(path),
            samples,
            seq_len,
        };
        let spec = SynthSpec {
            windows: Some(windows),
            ..tiny(HalfType::F16)
        };
        let out = folder.path().join("deep/out");
        let error = synth(&spec, &out, &mut |_, _| {}).unwrap_err();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "{error}");
        error.to_string()
    };
    let error = refused("ids.bin", 1, 1);
    assert!(error.ends_with("ids.bin` does not end in `.safetensors`"));
    let error = refused("x.safetensors", 0, 9);
    assert!(error.starts_with("0 windows of 9 tokens"), "{error}");
    assert!(refused("x.safetensors", usize::MAX, 2).contains("134217728"));
    let error = refused("absent/x.safetensors", 1, 1);
    assert!(error.contains("absent/x.safetensors"), "{error}");
}

#[test]
fn a_shape_is_known_by_name() {
    let error = "llama-3".parse::<ModelShape>().unwrap_err();
    assert_eq!(
        error.to_string(),
        "shape `llama-3` is not one of `llama-2-7b`, `llama-2-7b-32k`, `llama-2-70b`, `llama-3-8b`, \
         `gemma-3-27b`, `tiny`"
    );
    let shape: ModelShape = "llama-2-7b-32k".parse().unwrap();
    let texts = shape.texts(HalfType::Bf16);
    let config = &texts[0].1;
    assert_eq!(config["max_position_embeddings"], 32768);
    assert_eq!(config["rope_scaling"]["type"], "linear");
    assert_eq!(config["rope_scaling"]["factor"], 8.0);
    assert_eq!(config["torch_dtype"], "bfloat16");
    let elements = |shape: &ModelShape| -> usize {
        let tensors = shape.tensors(HalfType::F16);
        tensors.iter().map(|(_, info)| info.elements()).sum()
    };
    // as these models have them, without what Gemma sees images with
    assert_eq!(elements(&shape), 6_738_415_616);
    let shape: ModelShape = "llama-2-70b".parse().unwrap();
    assert_eq!(elements(&shape), 68_976_648_192);
    let shape: ModelShape = "gemma-3-27b".parse().unwrap();
    assert_eq!(elements(&shape), 27_009_346_304);
    let shape: ModelShape = "llama-3-8b".parse().unwrap();
    assert_eq!(elements(&shape), 8_030_261_248);
    assert_eq!(shape.texts(HalfType::Bf16)[0].1["rope_theta"], 500_000.0);
}

#[test]
fn layers_replace_those_of_the_shape() {
    let mut spec = tiny(HalfType::F16);
    spec.layers = NonZeroU16::new(1);
    let (_folder, model) = made(&spec);
    assert_eq!(model.names().len(), 3 + 9);
    let config: serde_json::Value = serde_json::from_str(&model.config_json().unwrap()).unwrap();
    assert_eq!(config["num_hidden_layers"], 1);
}
