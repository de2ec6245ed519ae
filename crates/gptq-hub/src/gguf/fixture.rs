//! Builds small GGUF files for tests.

use crate::gguf::Value;

const ALIGNMENT: usize = 32;

/// A GGUF file in the making; the public fields lie on purpose.
pub(crate) struct GgufBuilder {
    pub version: u32,
    pub claimed_tensors: Option<u64>,
    pub claimed_keys: Option<u64>,
    /// Puts every tensor at offset 0.
    pub overlap: bool,
    keys: Vec<(String, Value)>,
    tensors: Vec<Stored>,
}

struct Stored {
    name: String,
    shape: Vec<u64>,
    kind: u32,
    bytes: Vec<u8>,
}

impl GgufBuilder {
    pub fn new() -> Self {
        GgufBuilder {
            version: 3,
            claimed_tensors: None,
            claimed_keys: None,
            overlap: false,
            keys: Vec::new(),
            tensors: Vec::new(),
        }
    }

    pub fn key(&mut self, key: &str, value: Value) {
        self.keys.push((key.to_string(), value));
    }

    /// Replaces the value of a key that is there.
    pub fn set(&mut self, key: &str, value: Value) {
        self.keys.retain(|(name, _)| name != key);
        self.key(key, value);
    }

    pub fn remove_key(&mut self, key: &str) {
        self.keys.retain(|(name, _)| name != key);
    }

    pub fn remove_tensor(&mut self, name: &str) {
        self.tensors.retain(|tensor| tensor.name != name);
    }

    /// `shape` is row-major, outermost first.
    pub fn tensor(&mut self, name: &str, shape: &[u64], kind: u32, bytes: Vec<u8>) {
        self.tensors.push(Stored {
            name: name.to_string(),
            shape: shape.to_vec(),
            kind,
            bytes,
        });
    }

    pub fn f32_tensor(&mut self, name: &str, shape: &[u64], values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensor(name, shape, 0, bytes);
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        let tensors = self.claimed_tensors.unwrap_or(self.tensors.len() as u64);
        out.extend(tensors.to_le_bytes());
        let keys = self.claimed_keys.unwrap_or(self.keys.len() as u64);
        out.extend(keys.to_le_bytes());
        for (key, value) in &self.keys {
            write_string(&mut out, key);
            out.extend(kind(value).to_le_bytes());
            write_value(&mut out, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            write_string(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            for size in tensor.shape.iter().rev() {
                out.extend(size.to_le_bytes());
            }
            out.extend(tensor.kind.to_le_bytes());
            out.extend(if self.overlap { 0 } else { offset }.to_le_bytes());
            offset += (tensor.bytes.len().next_multiple_of(ALIGNMENT)) as u64;
        }
        out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
        let last = self.tensors.len().saturating_sub(1);
        for (i, tensor) in self.tensors.iter().enumerate() {
            out.extend(&tensor.bytes);
            if i < last {
                out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
            }
        }
        out
    }
}

pub(crate) fn strings(values: &[&str]) -> Value {
    Value::Array(
        values
            .iter()
            .map(|v| Value::String(v.to_string()))
            .collect(),
    )
}

pub(crate) fn text(value: &str) -> Value {
    Value::String(value.to_string())
}

fn kind(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}

fn write_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn write_value(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(v) => out.extend(v.to_le_bytes()),
        Value::I8(v) => out.extend(v.to_le_bytes()),
        Value::U16(v) => out.extend(v.to_le_bytes()),
        Value::I16(v) => out.extend(v.to_le_bytes()),
        Value::U32(v) => out.extend(v.to_le_bytes()),
        Value::I32(v) => out.extend(v.to_le_bytes()),
        Value::F32(v) => out.extend(v.to_le_bytes()),
        Value::Bool(v) => out.push(u8::from(*v)),
        Value::String(v) => write_string(out, v),
        Value::Array(values) => {
            out.extend(values.first().map_or(4, kind).to_le_bytes());
            out.extend((values.len() as u64).to_le_bytes());
            for value in values {
                write_value(out, value);
            }
        }
        Value::U64(v) => out.extend(v.to_le_bytes()),
        Value::I64(v) => out.extend(v.to_le_bytes()),
        Value::F64(v) => out.extend(v.to_le_bytes()),
    }
}
