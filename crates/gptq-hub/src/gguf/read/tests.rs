use super::*;
use crate::gguf::fixture::GgufBuilder;

fn open(bytes: &[u8]) -> Result<GgufFile, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, bytes).unwrap();
    GgufFile::open(&path).map_err(|error| error.to_string())
}

fn small() -> GgufBuilder {
    let mut builder = GgufBuilder::new();
    builder.key("general.architecture", Value::String("llama".into()));
    builder.f32_tensor("a", &[2, 3], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    builder.f32_tensor("b", &[1], &[7.0]);
    builder
}

#[test]
fn every_kind_of_value_is_read() {
    let values = [
        Value::U8(200),
        Value::I8(-3),
        Value::U16(60000),
        Value::I16(-300),
        Value::U32(70000),
        Value::I32(-70000),
        Value::F32(1e-5),
        Value::Bool(true),
        Value::String("ä".into()),
        Value::Array(vec![Value::I32(-1), Value::I32(2)]),
        Value::U64(1 << 40),
        Value::I64(-(1 << 40)),
        Value::F64(0.1),
    ];
    let mut builder = small();
    for (i, value) in values.iter().enumerate() {
        builder.key(&format!("k{i}"), value.clone());
    }
    let file = open(&builder.bytes()).unwrap();
    for (i, value) in values.iter().enumerate() {
        assert_eq!(&file.metadata()[&format!("k{i}")], value);
    }
    assert_eq!(Value::F32(1e-5).as_f64(), Some(1e-5));
    assert_eq!(Value::I8(-3).as_u64(), None);
}

#[test]
fn shapes_are_turned_and_bytes_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    std::fs::write(&path, small().bytes()).unwrap();
    let file = GgufFile::open(&path).unwrap();
    assert_eq!(file.tensors()[0].shape, [2, 3]);
    let bytes = file.read(&file.tensors()[1]).unwrap();
    assert_eq!(bytes, 7.0f32.to_le_bytes());
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let bytes = small().bytes();
    for length in 0..bytes.len() {
        let error = open(&bytes[..length]).expect_err("a cut file was accepted");
        assert!(error.contains("not a readable GGUF file"), "{error}");
    }
    let error = open(&bytes[..bytes.len() - 1]).unwrap_err();
    assert!(error.contains("tensor `b` ends at byte"), "{error}");
}

#[test]
fn no_single_byte_makes_the_reader_panic() {
    let mut builder = small();
    builder.key("list", Value::Array(vec![Value::String("x".into())]));
    let bytes = builder.bytes();
    for position in 0..bytes.len() {
        for value in [0, 1, 9, 127, 255] {
            let mut damaged = bytes.clone();
            damaged[position] = value;
            let _ = open(&damaged);
        }
    }
}

fn refused(change: impl FnOnce(&mut GgufBuilder), expected: &str) {
    let mut builder = small();
    change(&mut builder);
    let error = open(&builder.bytes()).unwrap_err();
    assert!(error.contains(expected), "{error}");
}

#[test]
fn each_kind_of_damage_is_named() {
    refused(|b| b.version = 1, "version 1 is not 2 or 3");
    refused(|b| b.version = 3u32.swap_bytes(), "big-endian");
    refused(|b| b.claimed_tensors = Some(1 << 40), "tensor count");
    refused(|b| b.claimed_keys = Some(1 << 40), "key count");
    refused(
        |b| b.f32_tensor("a", &[1], &[0.0]),
        "tensor `a` occurs twice",
    );
    refused(
        |b| b.key("general.architecture", Value::Bool(true)),
        "`general.architecture` occurs twice",
    );
    refused(
        |b| b.key("general.alignment", Value::U32(12)),
        "general.alignment",
    );
    refused(
        |b| b.tensor("q", &[1, 256], 10, vec![0; 84]),
        "tensor `q` has type Q2_K, which is not read",
    );
    refused(
        |b| b.tensor("q", &[1, 256], 77, vec![0; 84]),
        "tensor `q` has type 77",
    );
    refused(
        |b| b.tensor("q", &[4, 16], 2, vec![0; 36]),
        "rows of 16, not a multiple of the 32",
    );
    refused(
        |b| b.tensor("q", &[1 << 40, 1 << 40], 0, vec![]),
        "impossible shape",
    );
    refused(|b| b.tensor("q", &[0], 0, vec![]), "impossible shape");
    refused(|b| b.tensor("q", &[1; 5], 0, vec![]), "5 dimensions");
    refused(|b| b.overlap = true, "overlap");
    refused(|b| b.key("deep", nested(3)), "arrays nest deeper than 2");
}

fn nested(depth: u32) -> Value {
    match depth {
        0 => Value::U8(1),
        _ => Value::Array(vec![nested(depth - 1)]),
    }
}
