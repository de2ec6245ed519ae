//! Runtimes that load a checkpoint, judged by its settings and shapes alone.
//!
//! The rules come from the runtimes' own sources; docs/FORMAT.md names the files. Two runtimes were also
//! run, in the versions named here: their rows were tried on files of this tool, though not with every
//! setting and shape.

use gptq_types::{Bits, CheckpointFormat, GroupSize, QuantSpec, Reading};

/// Sizes of groups, or -1 for none, that GPTQModel's Torch kernel takes.
pub const GPTQMODEL_GROUPS: [i64; 8] = [-1, 16, 32, 64, 128, 256, 512, 1024];

/// A linear's input and output channels.
type Shape = (usize, usize);

/// Each runtime, with the reason where it refuses `spec` on linears of `shapes`.
pub fn readings(spec: &QuantSpec, shapes: &[Shape]) -> Vec<Reading> {
    let file = File { spec, shapes };
    let vllm = file.marlin();
    let all = [
        ("AutoGPTQ", file.autogptq(), None),
        (
            "GPTQModel, Transformers",
            file.gptqmodel(),
            Some("GPTQModel 7.7.0"),
        ),
        ("ExLlama", file.exllama(), None),
        ("ExLlamaV2", file.exllamav2(), None),
        ("vLLM before 0.30", vllm.clone(), Some("vLLM 0.26.0")),
        (
            "vLLM 0.30 and later",
            file.no_permuted_groups().or_else(|| vllm.clone()),
            None,
        ),
        ("SGLang", vllm, None),
        ("TGI", file.tgi(), None),
    ];
    (all.into_iter())
        .map(|(reader, refusal, run)| Reading {
            reader: reader.to_string(),
            refusal,
            run: run.map(str::to_string),
        })
        .collect()
}

struct File<'a> {
    spec: &'a QuantSpec,
    shapes: &'a [Shape],
}

fn because(refused: bool, reason: impl Into<String>) -> Option<String> {
    refused.then(|| reason.into())
}

impl File<'_> {
    fn autogptq(&self) -> Option<String> {
        self.not_v1().or_else(|| self.sides(32, 32))
    }

    /// GPTQModel's Torch kernel, the one that accepts most checkpoints.
    fn gptqmodel(&self) -> Option<String> {
        let size = i64::from(self.spec.group_size);
        let known = GPTQMODEL_GROUPS.contains(&size);
        because(!known, format!("group size {size}"))
    }

    /// Since 0.30: "GPTQ group activation ordering (desc_act=True) is no longer supported". Without
    /// groups the permutation means nothing and is accepted.
    fn no_permuted_groups(&self) -> Option<String> {
        let grouped = self.spec.group_size != GroupSize::None;
        because(self.permuted() && grouped, "act-order with groups")
    }

    fn exllama(&self) -> Option<String> {
        let single_group = self.permuted() && self.spec.group_size == GroupSize::None;
        self.not_4_bits()
            .or_else(|| self.not_v1())
            .or_else(|| self.sides(32, 32))
            .or_else(|| self.uneven_groups())
            .or_else(|| because(single_group, "act-order without groups"))
    }

    fn exllamav2(&self) -> Option<String> {
        let size = i64::from(self.spec.group_size);
        let power = size < 0 || (size as u64).is_power_of_two();
        let wide = self.shapes.iter().any(|&(k, _)| k > 65535);
        self.not_4_bits()
            .or_else(|| because(!power, format!("group size {size} is no power of two")))
            .or_else(|| because(wide, "more than 65535 input channels"))
            .or_else(|| self.sides(32, 1))
            .or_else(|| self.uneven_groups())
    }

    /// The Marlin kernels of vLLM and SGLang; the older kernel for 2 and 3 bits was dropped in 2026.
    fn marlin(&self) -> Option<String> {
        let size = i64::from(self.spec.group_size);
        let wide = matches!(self.spec.bits, Bits::Four | Bits::Eight);
        // Shapes are padded there, but not together with a permutation.
        let (k, n) = if self.permuted() { (128, 64) } else { (1, 1) };
        because(!wide, format!("{} bits", self.spec.bits))
            .or_else(|| because(!self.spec.sym, "asymmetric"))
            .or_else(|| {
                let known = [-1, 32, 64, 128].contains(&size);
                because(!known, format!("group size {size}"))
            })
            .or_else(|| self.uneven_groups())
            .or_else(|| self.sides(k, n))
    }

    fn tgi(&self) -> Option<String> {
        self.not_v1()
            .or_else(|| self.uneven_groups())
            .or_else(|| self.sides(32, 32))
    }

    /// Whether `g_idx` is a permutation.
    fn permuted(&self) -> bool {
        self.spec.permutes_g_idx()
    }

    fn not_v1(&self) -> Option<String> {
        because(self.spec.format != CheckpointFormat::Gptq, "gptq_v2")
    }

    fn not_4_bits(&self) -> Option<String> {
        because(
            self.spec.bits != Bits::Four,
            format!("{} bits", self.spec.bits),
        )
    }

    fn sides(&self, of_k: usize, of_n: usize) -> Option<String> {
        let odd =
            (self.shapes.iter()).find(|(k, n)| !k.is_multiple_of(of_k) || !n.is_multiple_of(of_n));
        odd.map(|(k, n)| format!("{k} x {n} is no multiple of {of_k} x {of_n}"))
    }

    fn uneven_groups(&self) -> Option<String> {
        let size = self.spec.group_size;
        let odd = (self.shapes.iter()).find(|(k, _)| !k.is_multiple_of(size.resolve(*k)));
        odd.map(|(k, _)| format!("groups of {size} do not divide {k} channels"))
    }
}

#[cfg(test)]
mod tests {
    use gptq_types::ColumnOrder;

    use super::*;

    const LLAMA: [Shape; 3] = [(4096, 4096), (4096, 11008), (11008, 4096)];

    fn refusing(spec: &QuantSpec, shapes: &[Shape]) -> Vec<String> {
        (readings(spec, shapes).into_iter())
            .filter(|reading| reading.refusal.is_some())
            .map(|reading| reading.reader)
            .collect()
    }

    #[test]
    fn the_published_settings_load_everywhere() {
        assert!(refusing(&QuantSpec::published(), &LLAMA).is_empty());
    }

    #[test]
    fn what_a_runtime_does_not_know_is_named() {
        let eight = QuantSpec {
            bits: Bits::Eight,
            order: ColumnOrder::ActOrder,
            group_size: GroupSize::None,
            ..QuantSpec::published()
        };
        assert_eq!(refusing(&eight, &LLAMA), ["ExLlama", "ExLlamaV2"]);
        let asym = QuantSpec {
            sym: false,
            format: CheckpointFormat::GptqV2,
            ..QuantSpec::published()
        };
        let marlin = ["vLLM before 0.30", "vLLM 0.30 and later", "SGLang"];
        let refused = [&["AutoGPTQ", "ExLlama"][..], &marlin, &["TGI"]].concat();
        assert_eq!(refusing(&asym, &LLAMA), refused);
        let single = QuantSpec {
            order: ColumnOrder::ActOrder,
            group_size: GroupSize::None,
            ..QuantSpec::published()
        };
        // g_idx is all zero then, and the file has `desc_act: false`.
        assert!(refusing(&single, &LLAMA).is_empty());
    }

    /// The card called such a branch readable by vLLM, which has refused it since 0.30.
    #[test]
    fn act_order_with_groups_is_not_for_later_vllm() {
        let mut spec = QuantSpec {
            order: ColumnOrder::ActOrder,
            ..QuantSpec::published()
        };
        assert_eq!(refusing(&spec, &LLAMA), ["vLLM 0.30 and later"]);
        for order in [ColumnOrder::ActOrderStaticGroups, ColumnOrder::GroupAware] {
            spec.order = order;
            assert!(refusing(&spec, &LLAMA).is_empty());
        }
        let run: Vec<String> = (readings(&spec, &LLAMA).into_iter())
            .filter_map(|reading| reading.run)
            .collect();
        assert_eq!(run, ["GPTQModel 7.7.0", "vLLM 0.26.0"]);
    }

    #[test]
    fn groups_that_gptqmodel_refuses_are_named() {
        let spec = QuantSpec {
            group_size: GroupSize::Channels(48),
            ..QuantSpec::published()
        };
        let refused = refusing(&spec, &[(96, 96)]);
        assert!(refused.contains(&"GPTQModel, Transformers".to_string()));
    }

    #[test]
    fn odd_shapes_are_left_to_gptqmodel() {
        let spec = QuantSpec {
            group_size: GroupSize::Channels(64),
            ..QuantSpec::published()
        };
        let readers = readings(&spec, &[(64, 172), (172, 64)]);
        let loads = readers.iter().filter(|reading| reading.refusal.is_none());
        let names: Vec<&str> = loads.map(|reading| reading.reader.as_str()).collect();
        assert_eq!(names, ["GPTQModel, Transformers"]);
    }
}
