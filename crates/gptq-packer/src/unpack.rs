//! The four tensors of the file become a solved layer again.

use gptq_types::{CheckpointFormat, SolvedLayer};

use crate::pack::{
    PackError, PackedLayer, expect_finite, expect_length, group_count, weight_count, zero_offset,
};
use crate::words::{unpack_columns, unpack_rows, word_count};

/// The inverse of [`crate::pack()`].
///
/// A v1 field of all ones reads as a zero of `2^bits`, one above the largest code; ExLlama and the
/// AutoGPTQ kernels do the same, while GPTQModel and AutoGPTQ's old CUDA path wrap it to 0. Padding
/// in a last word that is not full is not looked at: GPTQModel leaves borrowed ones there.
///
/// # Errors
/// Lengths that disagree, group indices outside `0..G`, scales that are not finite.
pub fn unpack(layer: &PackedLayer, format: CheckpointFormat) -> Result<SolvedLayer, PackError> {
    let (inputs, outputs) = (layer.in_features, layer.out_features);
    weight_count(inputs, outputs)?;
    let groups = group_count(layer.scales.len(), outputs)?;
    expect_length("g_idx", layer.g_idx.len(), inputs)?;
    let rows = word_count(inputs, layer.bits);
    expect_length("qweight", layer.qweight.len(), rows * outputs)?;
    let zero_words = word_count(outputs, layer.bits);
    expect_length("qzeros", layer.qzeros.len(), groups * zero_words)?;
    expect_finite(&layer.scales, outputs)?;
    let g_idx = checked_group_indices(&layer.g_idx, groups)?;
    let offset = zero_offset(format) as u16;
    Ok(SolvedLayer {
        bits: layer.bits,
        in_features: inputs,
        out_features: outputs,
        codes: unpack_rows(&layer.qweight, inputs, outputs, layer.bits),
        scales: layer.scales.clone(),
        zeros: unpack_columns(&layer.qzeros, outputs, layer.bits)
            .into_iter()
            .map(|field| u16::from(field) + offset)
            .collect(),
        g_idx,
    })
}

fn checked_group_indices(g_idx: &[i32], groups: usize) -> Result<Vec<u32>, PackError> {
    g_idx
        .iter()
        .enumerate()
        .map(|(input, &group)| match u32::try_from(group) {
            Ok(index) if (index as usize) < groups => Ok(index),
            _ => Err(PackError::GroupIndex {
                input,
                group: i64::from(group),
                groups,
            }),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use gptq_types::Bits;
    use half::f16;
    use proptest::prelude::*;

    use super::*;
    use crate::pack::pack;

    /// Any layer that `format` can hold; `K` and `N` from 1 to 100, `g_idx` in any order.
    fn layers() -> impl Strategy<Value = (SolvedLayer, CheckpointFormat)> {
        let formats = prop::sample::select(vec![CheckpointFormat::Gptq, CheckpointFormat::GptqV2]);
        let bits = prop::sample::select(Bits::ALL.to_vec());
        (bits, formats, 1usize..=100, 1usize..=100, 1usize..=5).prop_flat_map(
            |(bits, format, inputs, outputs, groups)| {
                let max = bits.max_code() as u8;
                let offset = zero_offset(format) as u16;
                (
                    prop::collection::vec(0..=max, inputs * outputs),
                    prop::collection::vec(0..=u16::from(max), groups * outputs),
                    prop::collection::vec(-8.0f32..8.0, groups * outputs),
                    prop::collection::vec(0..groups as u32, inputs),
                )
                    .prop_map(move |(codes, zeros, scales, g_idx)| {
                        let layer = SolvedLayer {
                            bits,
                            in_features: inputs,
                            out_features: outputs,
                            codes,
                            scales: scales.into_iter().map(f16::from_f32).collect(),
                            zeros: zeros.into_iter().map(|zero| zero + offset).collect(),
                            g_idx,
                        };
                        (layer, format)
                    })
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn unpack_undoes_pack((layer, format) in layers()) {
            let packed = pack(&layer, format).unwrap();
            prop_assert_eq!(&unpack(&packed, format).unwrap(), &layer);
        }

        /// Field by field, by the definition of the stream.
        #[test]
        fn field_i_is_at_bit_b_times_i((layer, format) in layers()) {
            let packed = pack(&layer, format).unwrap();
            let (n, width) = (layer.out_features, layer.bits.width() as usize);
            for k in 0..layer.in_features {
                for output in 0..n {
                    let bit = |i: usize| packed.qweight[i / 32 * n + output] >> (i % 32) & 1;
                    let code: i32 = (0..width).map(|b| bit(k * width + b) << b).sum();
                    prop_assert_eq!(code, i32::from(layer.codes[k * n + output]));
                }
            }
        }
    }

    fn packed() -> PackedLayer {
        PackedLayer {
            bits: Bits::Two,
            in_features: 2,
            out_features: 1,
            qweight: vec![0b1110],
            qzeros: vec![0b11, 0b01],
            scales: vec![f16::ONE; 2],
            g_idx: vec![1, 0],
        }
    }

    #[test]
    fn a_field_of_all_ones_stays_above_the_largest_code_in_v1() {
        let v1 = unpack(&packed(), CheckpointFormat::Gptq).unwrap();
        assert_eq!(v1.zeros, [4, 2]);
        assert_eq!(v1.codes, [2, 3]);
        assert_eq!(v1.dequantize(), [0.0, -1.0]);
        let v2 = unpack(&packed(), CheckpointFormat::GptqV2).unwrap();
        assert_eq!(v2.zeros, [3, 1]);
    }

    #[test]
    fn tensors_that_disagree_are_refused() {
        let fault = |change: fn(&mut PackedLayer)| {
            let mut layer = packed();
            change(&mut layer);
            unpack(&layer, CheckpointFormat::Gptq).unwrap_err()
        };
        let length = |tensor, found, expected| PackError::Length {
            tensor,
            found,
            expected,
        };
        assert_eq!(fault(|l| l.qweight.push(0)), length("qweight", 2, 1));
        assert_eq!(fault(|l| l.qzeros.push(0)), length("qzeros", 3, 2));
        assert_eq!(fault(|l| l.g_idx.push(0)), length("g_idx", 3, 2));
        assert_eq!(
            fault(|l| l.g_idx[0] = -1),
            PackError::GroupIndex {
                input: 0,
                group: -1,
                groups: 2
            }
        );
        assert!(matches!(
            fault(|l| l.scales[1] = f16::NAN),
            PackError::Scale { group: 1, .. }
        ));
        assert!(matches!(
            fault(|l| l.in_features = usize::MAX),
            PackError::Length {
                tensor: "g_idx",
                ..
            }
        ));
    }
}
