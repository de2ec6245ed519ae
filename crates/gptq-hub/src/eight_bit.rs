//! FP8 checkpoints: linears of F8_E4M3 values with a scale for each block of them, dequantized to
//! wider floats on reading, `value * scale`.
//!
//! `NAME.weight` `[N, K]` comes with `NAME.weight_scale_inv`, `[ceil(N/rows), ceil(K/columns)]` for
//! the `weight_block_size` of config.json (default 128 x 128) or one value, or with
//! `NAME.weight_scale`, one value or a value per row. Scales of activations are dropped: floats need
//! none.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use gptq_packer::{SafetensorsFile, declared_settings};
use gptq_types::{Dtype, TensorInfo};
use half::{bf16, f16};
use rayon::prelude::*;
use serde_json::Value;

use crate::HubError;
use crate::checkpoint::Stored;

/// The published recipe of such checkpoints.
const DEFAULT_BLOCK: [usize; 2] = [128, 128];
/// Elements decoded at a time.
const CHUNK: usize = 1 << 14;
const SCALES: [&str; 2] = ["_scale_inv", "_scale"];
const ACTIVATION_SCALES: [&str; 3] = ["input_scale", "activation_scale", "input_scale_inv"];

/// The scales of one tensor and the type that it is read in.
#[derive(Debug)]
pub(crate) struct Widening {
    pub dtype: Dtype,
    /// `[row_blocks, column_blocks]`, row-major.
    scales: Vec<f32>,
    column_blocks: usize,
    /// Rows and columns of a block.
    block: [usize; 2],
    /// K.
    columns: usize,
}

/// Pairs every F8 tensor with its scales, which leave the listing; returns how many there are.
///
/// Fails where a scale is missing, has another shape or another type than float.
pub(crate) fn widen(
    tensors: &mut BTreeMap<String, Stored>,
    shards: &[SafetensorsFile],
    config: &Value,
) -> Result<usize, HubError> {
    let names: Vec<String> = (tensors.iter())
        .filter(|(_, stored)| stored.info.dtype == Dtype::F8E4M3)
        .map(|(name, _)| name.clone())
        .collect();
    let dtype = declared_type(config);
    let block = block_size(config);
    for name in &names {
        let bad = |reason: String| HubError::EightBit {
            tensor: name.clone(),
            reason,
        };
        let key = SCALES.iter().map(|end| format!("{name}{end}"));
        let key = key.into_iter().find(|key| tensors.contains_key(key));
        let key =
            key.ok_or_else(|| bad("has no `weight_scale_inv` and no `weight_scale`".into()))?;
        let scale = &tensors[&key];
        let values = scale_values(scale, shards).map_err(bad)?;
        let widening = paired(&tensors[name].info, &scale.info.shape, values, block, dtype);
        let widening = widening.map_err(bad)?;
        tensors.remove(&key);
        if let Some(module) = name.strip_suffix("weight") {
            for scale in ACTIVATION_SCALES {
                tensors.remove(&format!("{module}{scale}"));
            }
        }
        if let Some(stored) = tensors.get_mut(name) {
            stored.info.dtype = dtype;
            stored.widening = Some(widening);
        }
    }
    Ok(names.len())
}

/// The type that config.json declares, for the whole model or else for its decoder; bf16 by
/// default.
fn declared_type(config: &Value) -> Dtype {
    let keys = ["torch_dtype", "dtype"];
    let places = [Some(config), config.get("text_config")];
    let mut declared = places.into_iter().flatten().flat_map(|place| {
        let named = |key: &str| place.get(key).and_then(Value::as_str);
        keys.iter().filter_map(move |key| named(key))
    });
    match declared.next() {
        Some("float16") => Dtype::F16,
        Some("float32") => Dtype::F32,
        _ => Dtype::BF16,
    }
}

fn block_size(config: &Value) -> [usize; 2] {
    let declared = (declared_settings(config).into_iter())
        .map(|settings| &settings["weight_block_size"])
        .find(|size| !size.is_null())
        .unwrap_or(&Value::Null);
    let side = |at: usize| {
        declared[at]
            .as_u64()
            .and_then(|side| usize::try_from(side).ok())
    };
    match (side(0), side(1)) {
        (Some(rows @ 1..), Some(columns @ 1..)) => [rows, columns],
        _ => DEFAULT_BLOCK,
    }
}

fn scale_values(scale: &Stored, shards: &[SafetensorsFile]) -> Result<Vec<f32>, String> {
    let bytes = shards[scale.shard].read(&scale.name);
    let bytes = bytes.map_err(|error| error.to_string())?;
    let halves = || bytes.as_chunks::<2>().0.iter().copied();
    Ok(match scale.info.dtype {
        Dtype::F32 => (bytes.as_chunks::<4>().0.iter())
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect(),
        Dtype::BF16 => halves().map(|b| bf16::from_le_bytes(b).to_f32()).collect(),
        Dtype::F16 => halves().map(|b| f16::from_le_bytes(b).to_f32()).collect(),
        other => return Err(format!("has scales of type {other}")),
    })
}

fn paired(
    info: &TensorInfo,
    scale_shape: &[usize],
    scales: Vec<f32>,
    block: [usize; 2],
    dtype: Dtype,
) -> Result<Widening, String> {
    let &[rows, columns] = &info.shape[..] else {
        return Err(format!("has shape {:?}, not two sides", info.shape));
    };
    let blocks = [rows.div_ceil(block[0]), columns.div_ceil(block[1])];
    let (block, column_blocks) = match scale_shape {
        _ if scales.len() == 1 => ([rows, columns], 1),
        shape if *shape == blocks => (block, blocks[1]),
        &[n] | &[n, 1] if n == rows => ([1, columns], 1),
        other => {
            return Err(format!(
                "has shape {:?} and scales {other:?}, expected {blocks:?} for blocks of {block:?}",
                info.shape
            ));
        }
    };
    Ok(Widening {
        dtype,
        scales,
        column_blocks,
        block,
        columns,
    })
}

impl Widening {
    /// The F8 values `codes`, of which the first is element `first` of the tensor, as bytes of
    /// [`Widening::dtype`].
    pub(crate) fn decode(&self, codes: &[u8], first: usize) -> Vec<u8> {
        let size = self.dtype.size();
        let mut bytes = vec![0; codes.len() * size];
        bytes
            .par_chunks_mut(CHUNK * size)
            .zip(codes.par_chunks(CHUNK))
            .enumerate()
            .for_each(|(chunk, (out, codes))| {
                let first = first + chunk * CHUNK;
                for (at, (out, &code)) in out.chunks_exact_mut(size).zip(codes).enumerate() {
                    self.put(VALUES[usize::from(code)] * self.scale(first + at), out);
                }
            });
        bytes
    }

    fn scale(&self, element: usize) -> f32 {
        let (row, column) = (element / self.columns, element % self.columns);
        self.scales[row / self.block[0] * self.column_blocks + column / self.block[1]]
    }

    fn put(&self, value: f32, out: &mut [u8]) {
        match self.dtype {
            Dtype::F16 => out.copy_from_slice(&f16::from_f32(value).to_le_bytes()),
            Dtype::F32 => out.copy_from_slice(&value.to_le_bytes()),
            _ => out.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        }
    }
}

/// The value of each byte: sign, four bits of exponent with a bias of 7, three of mantissa; no
/// infinities, and one NaN of each sign.
static VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| {
    std::array::from_fn(|byte| {
        let (exponent, mantissa) = ((byte >> 3 & 15) as i32, (byte & 7) as f32);
        let magnitude = match (exponent, byte & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa / 8.0 * 2f32.powi(-6),
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
        };
        if byte < 128 { magnitude } else { -magnitude }
    })
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_mean_what_the_standard_says() {
        // Micikevicius et al., FP8 formats for deep learning, table 1
        let of = |byte: usize| VALUES[byte];
        assert_eq!(
            (of(0), of(0x01), of(0x07)),
            (0.0, 2f32.powi(-9), 0.875 * 2f32.powi(-6))
        );
        assert_eq!((of(0x08), of(0x38), of(0x7e)), (2f32.powi(-6), 1.0, 448.0));
        assert_eq!(of(0xb8), -1.0);
        assert!(of(0x7f).is_nan() && of(0xff).is_nan());
    }

    #[test]
    fn each_block_has_its_own_scale() {
        let info = TensorInfo {
            dtype: Dtype::F8E4M3,
            shape: vec![3, 4],
        };
        let scales = vec![1.0, 2.0, 3.0, 4.0];
        let widening = paired(&info, &[2, 2], scales, [2, 3], Dtype::F32).unwrap();
        let values: Vec<f32> = (widening.decode(&[0x38; 7], 5).as_chunks::<4>().0.iter())
            .map(|bytes| f32::from_le_bytes(*bytes))
            .collect();
        // elements 5 to 11: rows 1 and 2, columns of 3 and 1
        assert_eq!(values, [1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.0]);
        for shape in [vec![2, 1], vec![4], vec![1, 2]] {
            let scales = vec![1.0; shape.iter().product()];
            let refused = paired(&info, &shape, scales, [2, 3], Dtype::F32);
            assert!(refused.unwrap_err().contains("expected [2, 2]"));
        }
        let rows = paired(&info, &[3, 1], vec![1.0, 2.0, 4.0], [2, 3], Dtype::BF16).unwrap();
        assert_eq!(rows.decode(&[0x38], 8), bf16::from_f32(4.0).to_le_bytes());
    }
}
