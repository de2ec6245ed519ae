//! The header of a GGUF file, versions 2 and 3, little-endian.
//!
//! The file is untrusted: every count is capped, every sum checked, and each tensor's bytes must
//! lie inside the file and apart from the other tensors' before any of them is read.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;

use crate::gguf::{BlockType, GgufTensor, Value};

const MAGIC: [u8; 4] = *b"GGUF";
/// A vocabulary of 256,000 tokens with scores, types and merges takes about 16 MiB.
const MAX_HEADER_BYTES: u64 = 256 << 20;
const MAX_KEYS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 17;
const MAX_KEY_BYTES: u64 = 1 << 16;
/// Over all arrays of a file; each element takes 32 bytes once read.
const MAX_ARRAY_ELEMENTS: u64 = 4 << 20;
const MAX_ARRAY_DEPTH: u32 = 2;
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;

pub(crate) type Parsed = (BTreeMap<String, Value>, Vec<GgufTensor>);

/// Reads a header from its first byte on; errors are reasons without the path.
pub(crate) struct Header<R> {
    input: R,
    position: u64,
    file_bytes: u64,
    array_elements: u64,
}

impl<R: Read> Header<R> {
    pub(crate) fn new(input: R, file_bytes: u64) -> Self {
        Header {
            input,
            position: 0,
            file_bytes,
            array_elements: 0,
        }
    }

    pub(crate) fn parse(&mut self) -> Result<Parsed, String> {
        if self.array::<4>()? != MAGIC {
            return Err("it does not begin with `GGUF`".into());
        }
        let version = self.u32()?;
        if version.swap_bytes() == 2 || version.swap_bytes() == 3 {
            return Err("big-endian files are not read".into());
        }
        if !(2..=3).contains(&version) {
            return Err(format!("version {version} is not 2 or 3"));
        }
        let tensors = capped("tensor count", self.u64()?, MAX_TENSORS)?;
        let keys = capped("key count", self.u64()?, MAX_KEYS)?;
        let metadata = self.metadata(keys)?;
        let infos = (0..tensors)
            .map(|_| self.tensor())
            .collect::<Result<Vec<_>, _>>()?;
        let alignment = alignment(&metadata)?;
        let data = self.position.next_multiple_of(alignment);
        let tensors = place_tensors(infos, data, alignment, self.file_bytes)?;
        Ok((metadata, tensors))
    }

    fn metadata(&mut self, keys: u64) -> Result<BTreeMap<String, Value>, String> {
        let mut metadata = BTreeMap::new();
        for _ in 0..keys {
            let key = self.string(MAX_KEY_BYTES, "a key")?;
            let kind = self.u32()?;
            let value = self
                .value(kind, 0)
                .map_err(|reason| format!("metadata `{key}`: {reason}"))?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(format!("metadata `{key}` occurs twice"));
            }
        }
        Ok(metadata)
    }

    fn value(&mut self, kind: u32, depth: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => match self.array::<1>()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("{other} is not a boolean")),
            },
            8 => Value::String(self.string(MAX_HEADER_BYTES, "a string")?),
            9 => self.array_value(depth)?,
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("value type {other} is unknown")),
        })
    }

    fn array_value(&mut self, depth: u32) -> Result<Value, String> {
        if depth >= MAX_ARRAY_DEPTH {
            return Err(format!("arrays nest deeper than {MAX_ARRAY_DEPTH}"));
        }
        let kind = self.u32()?;
        let count = self.u64()?;
        self.array_elements = self.array_elements.saturating_add(count);
        capped(
            "array element count",
            self.array_elements,
            MAX_ARRAY_ELEMENTS,
        )?;
        // no reservation: the count is a claim until its elements were read
        let mut values = Vec::new();
        for _ in 0..count {
            values.push(self.value(kind, depth + 1)?);
        }
        Ok(Value::Array(values))
    }

    fn tensor(&mut self) -> Result<TensorClaim, String> {
        let name = self.string(MAX_KEY_BYTES, "a tensor name")?;
        let dimensions = self.u32()?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(format!(
                "tensor `{name}` has {dimensions} dimensions, not 1 to {MAX_DIMENSIONS}"
            ));
        }
        let mut shape = (0..dimensions)
            .map(|_| self.u64())
            .collect::<Result<Vec<_>, _>>()?;
        shape.reverse();
        let kind = self.u32()?;
        let offset = self.u64()?;
        Ok(TensorClaim {
            name,
            shape,
            kind,
            offset,
        })
    }

    fn string(&mut self, limit: u64, what: &str) -> Result<String, String> {
        let length = self.u64()?;
        if length > limit || length > self.file_bytes - self.position {
            return Err(format!(
                "{what} of {length} bytes at byte {} goes past the end or the limit",
                self.position
            ));
        }
        let mut bytes = vec![0u8; length as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| format!("{what} is not UTF-8"))
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut bytes = [0u8; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), String> {
        let end = self.position + bytes.len() as u64;
        if end > self.file_bytes {
            return Err(format!(
                "the file ends at byte {} inside the header",
                self.file_bytes
            ));
        }
        if end > MAX_HEADER_BYTES {
            return Err(format!(
                "the header is larger than {MAX_HEADER_BYTES} bytes"
            ));
        }
        self.input
            .read_exact(bytes)
            .map_err(|error| format!("byte {}: {error}", self.position))?;
        self.position = end;
        Ok(())
    }
}

/// A tensor as the header has it, before anything was checked.
struct TensorClaim {
    name: String,
    shape: Vec<u64>,
    kind: u32,
    /// From the start of the data section.
    offset: u64,
}

fn capped(what: &str, count: u64, limit: u64) -> Result<u64, String> {
    if count > limit {
        return Err(format!("{what} {count} is over {limit}"));
    }
    Ok(count)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, String> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(value) => value
            .as_u64()
            .filter(|&a| a.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(&a))
            .ok_or_else(|| "metadata `general.alignment` is not a power of two from 8".into()),
    }
}

fn place_tensors(
    claims: Vec<TensorClaim>,
    data: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<Vec<GgufTensor>, String> {
    let mut names = HashSet::new();
    if let Some(twice) = claims.iter().find(|claim| !names.insert(&claim.name)) {
        return Err(format!("tensor `{}` occurs twice", twice.name));
    }
    let tensors = claims
        .into_iter()
        .map(|claim| place_tensor(claim, data, alignment, file_bytes))
        .collect::<Result<Vec<_>, _>>()?;
    let mut by_offset: Vec<&GgufTensor> = tensors.iter().collect();
    by_offset.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    for pair in by_offset.windows(2) {
        if pair[0].offset + pair[0].bytes > pair[1].offset {
            return Err(format!(
                "tensors `{}` and `{}` overlap",
                pair[0].name, pair[1].name
            ));
        }
    }
    Ok(tensors)
}

fn place_tensor(
    claim: TensorClaim,
    data: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<GgufTensor, String> {
    let name = &claim.name;
    let block_type = BlockType::from_id(claim.kind)
        .map_err(|kind| format!("tensor `{name}` has type {kind}, which is not read"))?;
    let too_large = || format!("tensor `{name}` has impossible shape {:?}", claim.shape);
    let elements = claim
        .shape
        .iter()
        .try_fold(1u64, |product, &size| product.checked_mul(size))
        .filter(|&elements| elements > 0)
        .ok_or_else(too_large)?;
    let row = *claim.shape.last().unwrap_or(&0);
    let per_block = block_type.block_elements() as u64;
    if !row.is_multiple_of(per_block) {
        return Err(format!(
            "tensor `{name}` has rows of {row}, not a multiple of the {per_block} elements of a {block_type} block"
        ));
    }
    let bytes = (elements / per_block)
        .checked_mul(block_type.block_bytes() as u64)
        .ok_or_else(too_large)?;
    if !claim.offset.is_multiple_of(alignment) {
        return Err(format!(
            "tensor `{name}` begins at {}, not at a multiple of {alignment}",
            claim.offset
        ));
    }
    let offset = data.checked_add(claim.offset).ok_or_else(too_large)?;
    let end = offset.checked_add(bytes).ok_or_else(too_large)?;
    if end > file_bytes {
        return Err(format!(
            "tensor `{name}` ends at byte {end}, but the file at {file_bytes}"
        ));
    }
    let shape = claim
        .shape
        .iter()
        .map(|&size| usize::try_from(size))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| too_large())?;
    Ok(GgufTensor {
        name: claim.name,
        shape,
        block_type,
        offset,
        bytes,
    })
}
