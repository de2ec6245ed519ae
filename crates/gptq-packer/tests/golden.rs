//! Checkpoints written by GPTQModel 7.7.0, and configs published by others.

#[path = "../../../tests/support/data.rs"]
mod data;

use data::{fixture, shared};
use std::path::Path;

use gptq_packer::{
    DeclaredType, QuantizeConfig, SafetensorsFile, ZeroConvention, config_json_with_quantization,
    exclusions, pack, packed_layers, packed_tensors, read_layer, verify_layer, write_safetensors,
    zero_convention,
};
use gptq_types::{
    Bits, CheckpointFormat, GroupSize, LayerName, QuantSpec, SolvedLayer, TensorSource,
};
use half::f16;
use serde_json::{Map, Value};

struct Golden {
    file: SafetensorsFile,
    config: QuantizeConfig,
}

fn golden(name: &str) -> Option<Golden> {
    shared(&format!("golden/{name}")).map(|folder| open(&folder))
}

fn open(folder: &Path) -> Golden {
    let text = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
    let own = text("quantize_config.json");
    let model = text("config.json");
    let config = QuantizeConfig::from_files(Some(&own), Some(&model));
    Golden {
        file: SafetensorsFile::open(&folder.join("model.safetensors")).unwrap(),
        config: config.unwrap().unwrap(),
    }
}

fn words(file: &SafetensorsFile, name: &str) -> Vec<i32> {
    let bytes = file.read(name).unwrap();
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|&word| i32::from_le_bytes(word)).collect()
}

/// `[K, N]` as these files tell it: `g_idx` has an entry for each input.
fn shape(golden: &Golden, name: &LayerName) -> [usize; 2] {
    let shape = |suffix| golden.file.info(&name.tensor(suffix)).unwrap().shape;
    [shape("g_idx")[0], shape("scales")[1]]
}

fn convention(golden: &Golden) -> ZeroConvention {
    let layers: Vec<_> = (packed_layers(&golden.file).into_iter())
        .map(|name| (name.clone(), shape(golden, &name)))
        .collect();
    zero_convention(&golden.file, &layers, &golden.config).unwrap()
}

fn read(golden: &Golden, name: &LayerName) -> SolvedLayer {
    read_layer(&golden.file, name, shape(golden, name), &golden.config).unwrap()
}

fn layers(golden: &Golden) -> Vec<(LayerName, SolvedLayer)> {
    let names = packed_layers(&golden.file);
    assert_eq!(names.len(), 5 * 7);
    names
        .into_iter()
        .map(|name| {
            let layer = read(golden, &name);
            (name, layer)
        })
        .collect()
}

fn spec(config: &QuantizeConfig) -> QuantSpec {
    QuantSpec {
        bits: config.bits,
        group_size: config.group_size,
        format: config.format,
        ..QuantSpec::published()
    }
}

/// Every width, both formats, both grids, with and without act-order.
#[test]
fn fixtures_are_read_and_packed_again() {
    let folders = std::fs::read_dir(fixture("gptqmodel")).unwrap();
    let mut checked = 0;
    for folder in folders.map(|entry| entry.unwrap().path()) {
        let golden = open(&folder);
        let name = folder.file_name().unwrap().to_str().unwrap();
        let v2 = name.contains("-v2-");
        assert_eq!(golden.config.format == CheckpointFormat::GptqV2, v2);
        assert_eq!(golden.config.sym, !name.contains("-asym"), "{name}");
        assert_eq!(golden.config.desc_act, name.ends_with("-act"), "{name}");
        check(&golden);
        for (layer_name, layer) in layers(&golden) {
            let zeros = pack(&layer, golden.config.format).unwrap().qzeros;
            // 32, 64 and 160 outputs fill their words in every width: no padding can differ
            let stored = words(&golden.file, &layer_name.tensor("qzeros"));
            assert_eq!(zeros, stored, "{name}: {layer_name}");
        }
        let expected = match (golden.config.sym, v2) {
            (false, _) => ZeroConvention::Asymmetric,
            (true, false) => ZeroConvention::V1,
            (true, true) => ZeroConvention::V2,
        };
        assert_eq!(convention(&golden), expected, "{name}");
        checked += 1;
    }
    assert_eq!(checked, 16);
}

fn check(golden: &Golden) {
    for (name, layer) in layers(golden) {
        verify_layer(&golden.file, &name, &layer, golden.config.format).unwrap();
        let packed = pack(&layer, golden.config.format).unwrap();
        for (tensor, bytes) in packed.tensors(&name) {
            if tensor.ends_with("qzeros") {
                continue;
            }
            assert_eq!(bytes, golden.file.read(&tensor).unwrap(), "{tensor}");
        }
        let planned = packed_tensors(
            &name,
            layer.in_features,
            layer.out_features,
            &spec(&golden.config),
            false,
        );
        for (tensor, info) in planned {
            assert_eq!(golden.file.info(&tensor), Some(info), "{tensor}");
        }
    }
}

#[test]
fn the_symmetric_v1_checkpoint_is_read_and_packed_again() {
    let Some(golden) = golden("gptq-4bit-32g-act0-sym1") else {
        return;
    };
    assert_eq!(golden.config.format, CheckpointFormat::Gptq);
    assert_eq!(golden.config.damp_percent, Some(0.01));
    check(&golden);
    for (name, layer) in layers(&golden) {
        assert!(layer.zeros.iter().all(|&zero| zero == 8), "{name}");
        assert!(layer.has_trivial_g_idx(32), "{name}");
    }
    assert_eq!(convention(&golden), ZeroConvention::V1);
}

/// GPTQModel subtracts 1 from whole words, so fields past the last output borrow: 0xEEEF7777.
#[test]
fn padding_of_foreign_zero_words_is_not_read() {
    let Some(golden) = golden("gptq-4bit-32g-act0-sym1") else {
        return;
    };
    let name = LayerName("model.layers.0.mlp.gate_proj".into());
    let stored = words(&golden.file, &name.tensor("qzeros"));
    assert_eq!(stored[21] as u32, 0xEEEF_7777);
    let layer = read(&golden, &name);
    let ours = pack(&layer, CheckpointFormat::Gptq).unwrap();
    assert_eq!(ours.qzeros[21], 0x0000_7777);
    for (index, (ours, stored)) in ours.qzeros.iter().zip(&stored).enumerate() {
        let outputs = if index % 22 == 21 { 0xFFFF } else { -1 };
        assert_eq!(*ours, stored & outputs, "word {index}");
    }
}

/// The same test on a committed fixture: 44 outputs fill half of their last word.
#[test]
fn padding_that_other_tools_borrow_from_is_not_read() {
    let config = open(&fixture("gptqmodel/4bit-32g-v1-sym")).config;
    let name = LayerName("model.layers.0.mlp.gate_proj".into());
    let (k, n) = (64, 44);
    let layer = SolvedLayer {
        bits: Bits::Four,
        in_features: k,
        out_features: n,
        codes: (0..k * n).map(|at| (at % 16) as u8).collect(),
        scales: vec![f16::from_f32(0.25); 2 * n],
        zeros: vec![8; 2 * n],
        g_idx: (0..k as u32).map(|channel| channel / 32).collect(),
    };
    let mut packed = pack(&layer, CheckpointFormat::Gptq).unwrap();
    for row in packed.qzeros.chunks_exact_mut(6) {
        assert_eq!(row[5], 0x7777);
        row[5] = 0x8888_u32.wrapping_sub(0x1111_1111) as i32;
    }
    let infos = packed_tensors(&name, k, n, &spec(&config), false);
    let tensors: Vec<_> = packed.tensors(&name).into_iter().zip(infos).collect();
    let tensors: Vec<_> = (tensors.iter())
        .map(|((name, bytes), (_, info))| (name.as_str(), info.clone(), *bytes))
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    write_safetensors(&path, &tensors, &Default::default()).unwrap();
    let file = SafetensorsFile::open(&path).unwrap();
    let read = read_layer(&file, &name, [k, n], &config).unwrap();
    assert_eq!(read, layer);
}

#[test]
fn the_act_order_v2_checkpoint_is_read_and_packed_again() {
    let Some(golden) = golden("gptq_v2-4bit-64g-act1-sym0") else {
        return;
    };
    assert_eq!(golden.config.format, CheckpointFormat::GptqV2);
    assert!(golden.config.desc_act && !golden.config.sym);
    check(&golden);
    for (name, layer) in layers(&golden) {
        let packed = pack(&layer, CheckpointFormat::GptqV2).unwrap();
        assert_eq!(
            packed.qzeros,
            words(&golden.file, &name.tensor("qzeros")),
            "{name}"
        );
    }
    let down = LayerName("model.layers.0.mlp.down_proj".into());
    let layer = read(&golden, &down);
    assert_eq!(layer.g_idx[..8], [1, 1, 1, 1, 0, 2, 0, 2]);
    assert_eq!(layer.groups(), 3);
    assert_eq!(convention(&golden), ZeroConvention::Asymmetric);
}

#[test]
fn a_config_that_does_not_fit_the_tensors_is_refused() {
    let golden = open(&fixture("gptqmodel/4bit-32g-v1-sym"));
    let name = &packed_layers(&golden.file)[0];
    for (bits, group_size, tensor) in [
        (Bits::Two, GroupSize::Channels(32), "qweight"),
        (Bits::Four, GroupSize::Channels(64), "scales"),
    ] {
        let config = QuantizeConfig {
            bits,
            group_size,
            ..golden.config.clone()
        };
        let error = read_layer(&golden.file, name, shape(&golden, name), &config).unwrap_err();
        assert!(error.to_string().contains(tensor), "{error}");
    }
}

#[test]
fn published_configs_are_read() {
    for (model, damp) in [
        ("llama2-13b-chat-thebloke", 0.01),
        ("mythomax-l2-13b-gptq", 0.1),
        ("phi-2-gptq", 0.1),
        ("qwen-vl-chat-int4", 0.01),
    ] {
        let path = |suffix: &str| shared(&format!("data/gptq-configs/{model}.{suffix}"));
        let (Some(own), Some(model_config)) = (path("quantize_config.json"), path("config.json"))
        else {
            return;
        };
        let own = std::fs::read_to_string(own).unwrap();
        let model_config = std::fs::read_to_string(model_config).unwrap();
        let config = QuantizeConfig::from_files(Some(&own), Some(&model_config))
            .unwrap()
            .unwrap();
        assert_eq!(config.bits, Bits::Four, "{model}");
        assert_eq!(config.group_size, GroupSize::Channels(128), "{model}");
        assert_eq!(config.format, CheckpointFormat::Gptq, "{model}");
        assert_eq!(config.damp_percent, Some(damp), "{model}");
        assert!(config.sym && !config.desc_act && config.notes.is_empty());
        round_trip(&own);
        rewrite(&model_config);
    }
}

/// Reading a config and writing its raw settings loses nothing.
fn round_trip(own: &str) {
    let config = QuantizeConfig::from_quantize_config(own).unwrap();
    let written = Value::Object(config.raw.clone()).to_string();
    assert_eq!(
        serde_json::from_str::<Value>(&written).unwrap(),
        serde_json::from_str::<Value>(own).unwrap()
    );
    assert_eq!(
        QuantizeConfig::from_quantize_config(&written).unwrap(),
        config
    );
}

/// Only the settings and the element type of a model's config change.
fn rewrite(original: &str) {
    let spec = QuantSpec::published();
    let declared = DeclaredType::F16;
    let text = config_json_with_quantization(original, &spec, "t:1", &Map::new(), &[], declared);
    let text = text.unwrap();
    let mut before: Map<String, Value> = serde_json::from_str(original).unwrap();
    let mut after: Map<String, Value> = serde_json::from_str(&text).unwrap();
    for key in ["quantization_config", "torch_dtype"] {
        before.shift_remove(key);
        after.shift_remove(key);
    }
    assert_eq!(before, after);
    let config = QuantizeConfig::from_model_config(&text).unwrap().unwrap();
    assert_eq!(config.group_size, GroupSize::Channels(128));
}

/// The rules that GPTQModel's users write by hand for these families, and no rule where none is needed.
#[test]
fn what_stays_float_of_each_family_is_few_rules() {
    let ends = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "linear_attn.in_proj_qkv",
        "linear_attn.in_proj_z",
        "linear_attn.out_proj",
    ];
    let gated = [
        r"-:.*\.linear_attn\.in_proj_a$",
        r"-:.*\.linear_attn\.in_proj_b$",
        r"-:.*\.linear_attn\.in_proj_ba$",
        r"-:.*\.mlp\.gate$",
        r"-:.*\.mlp\.shared_expert_gate$",
        r"-:^(model\.)?mtp\.",
        r"-:^(model\.)?visual\.",
    ];
    for (folder, expected) in [
        ("gemma3_text", &[][..]),
        (
            "gemma3_hub",
            &[
                r"-:^(model\.)?multi_modal_projector\.",
                r"-:^(model\.)?vision_tower\.",
            ],
        ),
        (
            "gemma4_e_text",
            &[
                r"-:.*\.per_layer_input_gate$",
                r"-:.*\.per_layer_model_projection$",
                r"-:.*\.per_layer_projection$",
            ],
        ),
        ("gemma4_moe_text", &[r"-:.*\.router\.proj$"]),
        ("qwen3_5_moe_hub", &gated),
    ] {
        let path = format!("golden-arch/{folder}/model.safetensors");
        let Some(path) = shared(&path) else { return };
        let file = SafetensorsFile::open(&path).unwrap();
        let mut quantized: Vec<String> = (file.names().iter())
            .filter_map(|name| name.strip_suffix(".weight"))
            .filter(|name| !name.starts_with("mtp.") && !name.contains("vis"))
            .filter(|name| ends.iter().any(|end| name.ends_with(end)))
            .map(str::to_string)
            .collect();
        // stacked in the source
        for name in file.names() {
            if let Some(block) = name.strip_suffix(".experts.gate_up_proj")
                && !name.starts_with("mtp.")
            {
                quantized.push(format!("{block}.experts.0.gate_proj"));
            }
        }
        assert_eq!(exclusions(&file, &quantized), expected, "{folder}");
    }
}
