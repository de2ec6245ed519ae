//! Reading and verifying layers, from files made here.

use std::collections::BTreeMap;
use std::path::Path;

use gptq_packer::{
    CheckpointLayout, PackedLayer, QuantizeConfig, ReadError, SafetensorsFile, StagedCheckpoint,
    VerifyError, ZeroConvention, pack, packed_layers, packed_tensors, quantize_config_json,
    read_layer, verify_layer, write_safetensors, zero_convention,
};
use gptq_types::{
    Bits, CheckpointFormat, Dtype, GroupSize, LayerName, QuantSpec, SolvedLayer, SourceError,
    TensorInfo,
};
use half::{bf16, f16};

const INPUTS: usize = 50;
const OUTPUTS: usize = 11;
const GROUP: usize = 16;

fn spec(bits: Bits) -> QuantSpec {
    QuantSpec {
        bits,
        group_size: GroupSize::Channels(GROUP),
        sym: false,
        ..QuantSpec::published()
    }
}

fn config(spec: &QuantSpec) -> QuantizeConfig {
    let text = quantize_config_json(spec, "t:1", "m", &serde_json::Map::new(), &[]);
    QuantizeConfig::from_quantize_config(&text).unwrap()
}

fn solved(bits: Bits) -> SolvedLayer {
    sized(bits, INPUTS, OUTPUTS)
}

fn sized(bits: Bits, inputs: usize, outputs: usize) -> SolvedLayer {
    let max = bits.max_code() as usize;
    let groups = inputs.div_ceil(GROUP);
    SolvedLayer {
        bits,
        in_features: inputs,
        out_features: outputs,
        codes: (0..inputs * outputs)
            .map(|i| (i * 7 % (max + 1)) as u8)
            .collect(),
        scales: (0..groups * outputs)
            .map(|i| f16::from_f32(0.25 * (i % 1000 + 1) as f32))
            .collect(),
        zeros: (0..groups * outputs)
            .map(|i| (i % (max + 1)) as u16 + 1)
            .collect(),
        g_idx: (0..inputs).map(|k| (k / GROUP) as u32).collect(),
    }
}

fn name() -> LayerName {
    LayerName("model.layers.0.mlp.up_proj".into())
}

type Tensors = BTreeMap<String, (TensorInfo, Vec<u8>)>;

fn tensors(packed: &PackedLayer, spec: &QuantSpec) -> Tensors {
    packed_tensors(&name(), INPUTS, OUTPUTS, spec, false)
        .into_iter()
        .zip(packed.tensors(&name()))
        .map(|((name, info), (_, bytes))| (name, (info, bytes.to_vec())))
        .collect()
}

fn written(folder: &Path, tensors: &Tensors) -> SafetensorsFile {
    let path = folder.join("model.safetensors");
    let list: Vec<_> = tensors
        .iter()
        .map(|(name, (info, bytes))| (name.as_str(), info.clone(), bytes.as_slice()))
        .collect();
    write_safetensors(&path, &list, &BTreeMap::new()).unwrap();
    SafetensorsFile::open(&path).unwrap()
}

fn read_changed(change: impl FnOnce(&mut Tensors)) -> Result<SolvedLayer, ReadError> {
    let spec = spec(Bits::Four);
    let mut tensors = tensors(&pack(&solved(Bits::Four), spec.format).unwrap(), &spec);
    change(&mut tensors);
    let folder = tempfile::tempdir().unwrap();
    let file = written(folder.path(), &tensors);
    read_layer(&file, &name(), [INPUTS, OUTPUTS], &config(&spec))
}

fn set_scales(tensors: &mut Tensors, dtype: Dtype, bytes: Vec<u8>) {
    let scales = tensors.get_mut(&name().tensor("scales")).unwrap();
    scales.0.dtype = dtype;
    scales.1 = bytes;
}

#[test]
fn a_staged_layer_is_verified_before_and_after_publishing() {
    for bits in Bits::ALL {
        for max_shard_bytes in [u64::MAX, 1] {
            let spec = spec(bits);
            let layer = solved(bits);
            let packed = pack(&layer, spec.format).unwrap();
            let planned = packed_tensors(&name(), INPUTS, OUTPUTS, &spec, false);
            let layout = CheckpointLayout::plan(planned, max_shard_bytes).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let out = folder.path().join("out");
            let staged = StagedCheckpoint::create(&out, &layout).unwrap();
            for (tensor, bytes) in packed.tensors(&name()) {
                staged.write(&tensor, bytes).unwrap();
            }
            verify_layer(&staged, &name(), &layer, spec.format).unwrap();
            let read = read_layer(&staged, &name(), [INPUTS, OUTPUTS], &config(&spec));
            assert_eq!(read.unwrap(), layer);
            let published = staged.publish().unwrap();
            if layout.shards().len() == 1 {
                let file = SafetensorsFile::open(&published.join("model.safetensors")).unwrap();
                assert_eq!(packed_layers(&file), [name()]);
                verify_layer(&file, &name(), &layer, spec.format).unwrap();
            }
        }
    }
}

/// Tensors of more than one piece are read and compared by several tasks: each byte must come from
/// its own place, staged and published.
#[test]
fn layers_of_several_pieces_are_read_whole() {
    let (inputs, outputs) = (2048, 4801); // 4.9 MB of codes, 9.8 M elements
    let spec = spec(Bits::Four);
    let mut layer = sized(Bits::Four, inputs, outputs);
    for (i, code) in layer.codes.iter_mut().enumerate() {
        *code = (i.wrapping_mul(2_654_435_761) >> 20) as u8 & 15;
    }
    let packed = pack(&layer, spec.format).unwrap();
    let planned = packed_tensors(&name(), inputs, outputs, &spec, false);
    let layout = CheckpointLayout::plan(planned, u64::MAX).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let staged = StagedCheckpoint::create(&folder.path().join("out"), &layout).unwrap();
    for (tensor, bytes) in packed.tensors(&name()) {
        staged.write(&tensor, bytes).unwrap();
    }
    verify_layer(&staged, &name(), &layer, spec.format).unwrap();
    let last = layer.codes.len() - 1;
    layer.codes[last] ^= 1;
    assert!(matches!(
        verify_layer(&staged, &name(), &layer, spec.format),
        Err(VerifyError::Mismatch { what: "code", row, column, .. })
            if (row, column) == (inputs - 1, outputs - 1)
    ));
    layer.codes[last] ^= 1;
    let file = SafetensorsFile::open(&staged.publish().unwrap().join("model.safetensors")).unwrap();
    let read = read_layer(&file, &name(), [inputs, outputs], &config(&spec));
    assert_eq!(read.unwrap(), layer);
}

#[test]
fn verifying_names_the_first_difference() {
    let spec = spec(Bits::Three);
    let layer = solved(Bits::Three);
    let folder = tempfile::tempdir().unwrap();
    let packed = pack(&layer, spec.format).unwrap();
    let file = written(folder.path(), &tensors(&packed, &spec));
    verify_layer(&file, &name(), &layer, spec.format).unwrap();
    let difference = |change: fn(&mut SolvedLayer)| {
        let mut other = layer.clone();
        change(&mut other);
        match verify_layer(&file, &name(), &other, CheckpointFormat::Gptq) {
            Err(VerifyError::Mismatch {
                what, row, column, ..
            }) => (what, row, column),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(
        difference(|l| l.codes[5 * OUTPUTS + 3] ^= 1),
        ("code", 5, 3)
    );
    assert_eq!(difference(|l| l.zeros[OUTPUTS + 2] += 1), ("zero", 1, 2));
    assert_eq!(difference(|l| l.g_idx[9] = 1), ("g_idx", 9, 0));
    assert_eq!(
        difference(|l| l.scales[4] = f16::from_f32(9.0)),
        ("scale", 0, 4)
    );
    let mut longer = layer.clone();
    longer.in_features += 1;
    let error = verify_layer(&file, &name(), &longer, spec.format).unwrap_err();
    let named = "up_proj.g_idx` in";
    assert!(error.to_string().contains(named), "{error}");
    let wrong_format = verify_layer(&file, &name(), &layer, CheckpointFormat::GptqV2);
    assert!(matches!(
        wrong_format,
        Err(VerifyError::Mismatch {
            what: "zero",
            row: 0,
            column: 0,
            ..
        })
    ));
}

#[test]
fn a_silent_g_idx_means_consecutive_groups() {
    let g_idx = name().tensor("g_idx");
    let zeroed = read_changed(|tensors| tensors.get_mut(&g_idx).unwrap().1.fill(0)).unwrap();
    assert_eq!(zeroed, solved(Bits::Four));
    // Without g_idx the lengths of the last word and the last group are unknown.
    let absent = read_changed(|tensors| drop(tensors.remove(&g_idx))).unwrap_err();
    let text = absent.to_string();
    assert!(text.contains("up_proj.g_idx`: is absent"), "{text}");
    assert!(text.contains("50 inputs do not fill"), "{text}");
}

/// A `g_idx` two channels short has the same words: K was taken from it, and a product asserted.
#[test]
fn a_layer_of_another_shape_than_the_architecture_is_refused() {
    for suffix in ["qweight", "qzeros", "scales", "g_idx"] {
        let key = name().tensor(suffix);
        for dimension in [0, 1] {
            for longer in [false, true] {
                let changed = read_changed(|tensors| {
                    let (info, bytes) = tensors.get_mut(&key).unwrap();
                    let Some(size) = info.shape.get_mut(dimension) else {
                        info.shape.push(1);
                        return;
                    };
                    *size = if longer { *size + 1 } else { *size - 1 };
                    bytes.resize(info.bytes(), 0);
                });
                let text = changed.unwrap_err().to_string();
                assert!(text.contains(&format!("`{key}` in")), "{text}");
                assert!(text.contains("expected ["), "{text}");
            }
        }
        let typed = read_changed(|tensors| {
            let (info, bytes) = tensors.get_mut(&key).unwrap();
            info.dtype = Dtype::I16;
            bytes.truncate(info.bytes());
            bytes.resize(info.bytes(), 0);
        });
        let text = typed.unwrap_err().to_string();
        assert!(
            text.contains(&format!("`{key}` in")) && text.contains("type I16"),
            "{text}"
        );
    }
}

#[test]
fn group_indices_out_of_range_are_refused() {
    let g_idx = name().tensor("g_idx");
    for bad in [-1i32, 4] {
        let error = read_changed(|tensors| {
            tensors.get_mut(&g_idx).unwrap().1[12..16].copy_from_slice(&bad.to_le_bytes());
        })
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(&format!("input 3 is in group {bad} of 4")),
            "{text}"
        );
        assert!(text.contains("up_proj"), "{text}");
    }
}

#[test]
fn wider_scales_are_taken_only_if_they_are_f16_numbers() {
    let exact: Vec<f32> = solved(Bits::Four)
        .scales
        .iter()
        .map(|s| s.to_f32())
        .collect();
    let wide = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let layer = read_changed(|t| set_scales(t, Dtype::F32, wide(&exact))).unwrap();
    assert_eq!(layer, solved(Bits::Four));
    let brain: Vec<u8> = exact
        .iter()
        .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
        .collect();
    assert!(read_changed(|t| set_scales(t, Dtype::BF16, brain)).is_ok());
    for bad in [0.1, 1e6, f32::NAN] {
        let mut values = exact.clone();
        values[2] = bad;
        let error = read_changed(|t| set_scales(t, Dtype::F32, wide(&values))).unwrap_err();
        assert!(!error.to_string().is_empty());
        assert!(matches!(
            error,
            ReadError::InexactScale { index: 2, .. } | ReadError::Layer { .. }
        ));
    }
    let error = read_changed(|t| set_scales(t, Dtype::I16, vec![0; exact.len() * 2])).unwrap_err();
    assert!(matches!(error, ReadError::Source(SourceError::Type { .. })));
}

#[test]
fn tensors_that_do_not_fit_each_other_are_refused() {
    for suffix in ["qweight", "qzeros", "scales"] {
        let key = name().tensor(suffix);
        let gone = read_changed(|tensors| drop(tensors.remove(&key))).unwrap_err();
        assert!(matches!(
            gone,
            ReadError::Source(SourceError::Missing { .. })
        ));
        let shorter = read_changed(|tensors| {
            let (info, bytes) = tensors.get_mut(&key).unwrap();
            info.shape[0] -= 1;
            bytes.truncate(info.bytes());
        })
        .unwrap_err();
        assert!(matches!(
            shorter,
            ReadError::Source(SourceError::Shape { .. })
        ));
        let flat = read_changed(|tensors| {
            let info = &mut tensors.get_mut(&key).unwrap().0;
            info.shape = vec![info.elements()];
        })
        .unwrap_err();
        assert!(matches!(flat, ReadError::Source(SourceError::Shape { .. })));
    }
}

#[test]
fn the_zeros_show_the_convention() {
    for bits in Bits::ALL {
        for (format, convention) in [
            (CheckpointFormat::Gptq, ZeroConvention::V1),
            (CheckpointFormat::GptqV2, ZeroConvention::V2),
        ] {
            let mut layer = solved(bits);
            layer.zeros.fill(bits.max_code().div_ceil(2) as u16);
            let packed = pack(&layer, format).unwrap();
            let folder = tempfile::tempdir().unwrap();
            let file = written(folder.path(), &tensors(&packed, &spec(bits)));
            let layers = [(name(), [INPUTS, OUTPUTS])];
            let config = config(&spec(bits));
            let found = |layers: &[_]| zero_convention(&file, layers, &config).unwrap();
            assert_eq!(found(&layers), convention);
            assert_eq!(found(&[]), ZeroConvention::Unknown);
        }
    }
}
