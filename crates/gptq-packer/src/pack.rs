//! A solved layer becomes the four tensors of the file.

use gptq_types::{Bits, CheckpointFormat, LayerName, SolvedLayer};
use half::f16;

use crate::words::{pack_columns, pack_rows, word_count};

/// A layer that does not fit the format, or a file whose tensors do not fit each other.
#[derive(Debug, PartialEq, thiserror::Error)]
#[allow(missing_docs)]
pub enum PackError {
    #[error("the layer has {inputs} inputs and {outputs} outputs")]
    Dimensions { inputs: usize, outputs: usize },
    #[error("`{tensor}` has {found} elements, expected {expected}")]
    Length {
        tensor: &'static str,
        found: usize,
        expected: usize,
    },
    #[error("code {code} at input {input}, output {output} is above {max}")]
    Code {
        input: usize,
        output: usize,
        code: u8,
        max: u32,
    },
    #[error("zero {zero} of group {group}, output {output} is outside {min}..={max} of `{format}`")]
    Zero {
        group: usize,
        output: usize,
        zero: u16,
        min: u32,
        max: u32,
        format: CheckpointFormat,
    },
    #[error("scale {scale} of group {group}, output {output} is not finite")]
    Scale {
        group: usize,
        output: usize,
        scale: f32,
    },
    #[error("input {input} is in group {group} of {groups}")]
    GroupIndex {
        input: usize,
        group: i64,
        groups: usize,
    },
}

/// The tensors of one quantized linear as they lie in the file; `docs/FORMAT.md` draws the bits.
///
/// `K` = in_features, `N` = out_features, `G` = groups, `b` = bits; all row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedLayer {
    /// Width of a code.
    pub bits: Bits,
    /// `K`.
    pub in_features: usize,
    /// `N`.
    pub out_features: usize,
    /// `[ceil(K*b/32), N]`: each column is a bit stream over the inputs.
    pub qweight: Vec<i32>,
    /// `[G, ceil(N*b/32)]`: each row is a bit stream over the outputs; `zero - 1` in v1.
    pub qzeros: Vec<i32>,
    /// `[G, N]`.
    pub scales: Vec<f16>,
    /// `[K]`: the group of each input.
    pub g_idx: Vec<i32>,
}

impl PackedLayer {
    /// `G`.
    pub fn groups(&self) -> usize {
        self.scales.len() / self.out_features.max(1)
    }

    /// Name and stored bytes of each tensor, in the order of [`crate::packed_tensors`].
    pub fn tensors(&self, name: &LayerName) -> [(String, &[u8]); 4] {
        [
            (name.tensor("qweight"), bytemuck::cast_slice(&self.qweight)),
            (name.tensor("qzeros"), bytemuck::cast_slice(&self.qzeros)),
            (name.tensor("scales"), bytemuck::cast_slice(&self.scales)),
            (name.tensor("g_idx"), bytemuck::cast_slice(&self.g_idx)),
        ]
    }
}

/// Packs the solver's integers; nothing is re-derived or rounded here.
///
/// v1 stores `zero - 1` field by field. A zero of 0 has no v1 field (other tools borrow from the
/// neighbour), so it is an error; a zero of `2^bits` has none in v2.
///
/// # Errors
/// Codes, zeros, scales or group indices that the format cannot hold, and lengths that disagree.
pub fn pack(layer: &SolvedLayer, format: CheckpointFormat) -> Result<PackedLayer, PackError> {
    let (inputs, outputs) = (layer.in_features, layer.out_features);
    let weights = weight_count(inputs, outputs)?;
    expect_length("codes", layer.codes.len(), weights)?;
    expect_length("g_idx", layer.g_idx.len(), inputs)?;
    let groups = group_count(layer.scales.len(), outputs)?;
    expect_length("zeros", layer.zeros.len(), layer.scales.len())?;
    expect_finite(&layer.scales, outputs)?;
    let g_idx = packed_group_indices(&layer.g_idx, groups)?;
    let fields = stored_zeros(layer, format)?;
    let qweight =
        pack_rows(&layer.codes, outputs, layer.bits).map_err(|index| PackError::Code {
            input: index / outputs,
            output: index % outputs,
            code: layer.codes[index],
            max: layer.bits.max_code(),
        })?;
    debug_assert_eq!(qweight.len(), word_count(inputs, layer.bits) * outputs);
    Ok(PackedLayer {
        bits: layer.bits,
        in_features: inputs,
        out_features: outputs,
        qweight,
        qzeros: pack_columns(&fields, outputs, layer.bits),
        scales: layer.scales.clone(),
        g_idx,
    })
}

/// `K * N`, neither of them 0.
pub(crate) fn weight_count(inputs: usize, outputs: usize) -> Result<usize, PackError> {
    match inputs.checked_mul(outputs) {
        Some(count) if count > 0 => Ok(count),
        _ => Err(PackError::Dimensions { inputs, outputs }),
    }
}

/// `G` from the number of scales.
pub(crate) fn group_count(scales: usize, outputs: usize) -> Result<usize, PackError> {
    let groups = scales / outputs;
    expect_length("scales", scales, groups.max(1) * outputs)?;
    Ok(groups)
}

pub(crate) fn expect_length(
    tensor: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), PackError> {
    if found == expected {
        return Ok(());
    }
    Err(PackError::Length {
        tensor,
        found,
        expected,
    })
}

pub(crate) fn expect_finite(scales: &[f16], outputs: usize) -> Result<(), PackError> {
    match scales.iter().position(|scale| !scale.is_finite()) {
        None => Ok(()),
        Some(index) => Err(PackError::Scale {
            group: index / outputs,
            output: index % outputs,
            scale: scales[index].to_f32(),
        }),
    }
}

fn packed_group_indices(g_idx: &[u32], groups: usize) -> Result<Vec<i32>, PackError> {
    g_idx
        .iter()
        .enumerate()
        .map(|(input, &group)| match i32::try_from(group) {
            Ok(stored) if (group as usize) < groups => Ok(stored),
            _ => Err(PackError::GroupIndex {
                input,
                group: i64::from(group),
                groups,
            }),
        })
        .collect()
}

fn stored_zeros(layer: &SolvedLayer, format: CheckpointFormat) -> Result<Vec<u8>, PackError> {
    let offset = zero_offset(format);
    let (min, max) = (offset, offset + layer.bits.max_code());
    let store = |(index, &zero): (usize, &u16)| {
        let value = u32::from(zero);
        if (min..=max).contains(&value) {
            return Ok((value - offset) as u8);
        }
        Err(PackError::Zero {
            group: index / layer.out_features,
            output: index % layer.out_features,
            zero,
            min,
            max,
            format,
        })
    };
    layer.zeros.iter().enumerate().map(store).collect()
}

/// The number that readers add to a stored zero.
pub(crate) fn zero_offset(format: CheckpointFormat) -> u32 {
    match format {
        CheckpointFormat::Gptq => 1,
        CheckpointFormat::GptqV2 => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> SolvedLayer {
        SolvedLayer {
            bits: Bits::Four,
            in_features: 3,
            out_features: 2,
            codes: vec![0, 1, 2, 3, 14, 15],
            scales: vec![f16::ONE; 4],
            zeros: vec![8, 1, 16, 8],
            g_idx: vec![0, 0, 1],
        }
    }

    #[test]
    fn a_layer_is_these_words() {
        let packed = pack(&layer(), CheckpointFormat::Gptq).unwrap();
        assert_eq!(packed.qweight, [0xE20, 0xF31]);
        assert_eq!(packed.qzeros, [0x07, 0x7F]);
        assert_eq!(packed.g_idx, [0, 0, 1]);
        let tensors = packed.tensors(&LayerName("x".into()));
        assert_eq!(
            tensors[0],
            (
                "x.qweight".into(),
                &[0x20, 0x0E, 0, 0, 0x31, 0x0F, 0, 0][..]
            )
        );
        assert_eq!(tensors[2].1, [0, 0x3C, 0, 0x3C, 0, 0x3C, 0, 0x3C]);
    }

    #[test]
    fn a_zero_without_a_field_is_an_error_and_never_a_borrow() {
        let mut bad = layer();
        bad.zeros[1] = 0;
        let error = pack(&bad, CheckpointFormat::Gptq).unwrap_err();
        assert_eq!(
            error.to_string(),
            "zero 0 of group 0, output 1 is outside 1..=16 of `gptq`"
        );
        assert!(matches!(
            pack(&layer(), CheckpointFormat::GptqV2),
            Err(PackError::Zero {
                group: 1,
                output: 0,
                zero: 16,
                ..
            })
        ));
    }

    #[test]
    fn each_fault_has_its_own_error() {
        let fault = |change: fn(&mut SolvedLayer)| {
            let mut layer = layer();
            change(&mut layer);
            pack(&layer, CheckpointFormat::Gptq).unwrap_err()
        };
        assert_eq!(
            fault(|layer| layer.codes[3] = 16),
            PackError::Code {
                input: 1,
                output: 1,
                code: 16,
                max: 15
            }
        );
        assert_eq!(
            fault(|layer| layer.g_idx[2] = 2),
            PackError::GroupIndex {
                input: 2,
                group: 2,
                groups: 2
            }
        );
        assert_eq!(
            fault(|layer| layer.g_idx[2] = u32::MAX),
            PackError::GroupIndex {
                input: 2,
                group: i64::from(u32::MAX),
                groups: 2
            }
        );
        assert_eq!(
            fault(|layer| layer.in_features = 4),
            PackError::Length {
                tensor: "codes",
                found: 6,
                expected: 8
            }
        );
        assert_eq!(
            fault(|layer| layer.out_features = 0),
            PackError::Dimensions {
                inputs: 3,
                outputs: 0
            }
        );
        assert_eq!(
            fault(|layer| layer.scales.truncate(3)),
            PackError::Length {
                tensor: "scales",
                found: 3,
                expected: 2
            }
        );
        assert_eq!(
            fault(|layer| layer.scales.clear()),
            PackError::Length {
                tensor: "scales",
                found: 0,
                expected: 2
            }
        );
        assert_eq!(
            fault(|layer| layer.zeros.truncate(2)),
            PackError::Length {
                tensor: "zeros",
                found: 2,
                expected: 4
            }
        );
        assert_eq!(
            fault(|layer| layer.scales[2] = f16::INFINITY),
            PackError::Scale {
                group: 1,
                output: 0,
                scale: f32::INFINITY
            }
        );
    }
}
