//! Which runtimes load a checkpoint, from its settings and shapes alone.
//!
//! The rules are those of the runtimes' own sources; docs/FORMAT.md names the files.

use gptq_types::{Bits, CheckpointFormat, GroupSize, QuantSpec, Reading};

/// A linear's input and output channels.
type Shape = (usize, usize);

/// Each runtime, with the reason where it refuses `spec` on linears of `shapes`.
pub fn readings(spec: &QuantSpec, shapes: &[Shape]) -> Vec<Reading> {
    let file = File { spec, shapes };
    let all = [
        ("AutoGPTQ", file.autogptq()),
        ("GPTQModel, Transformers", file.gptqmodel()),
        ("ExLlama", file.exllama()),
        ("ExLlamaV2", file.exllamav2()),
        ("vLLM, SGLang", file.vllm()),
        ("TGI", file.tgi()),
    ];
    (all.into_iter())
        .map(|(reader, refusal)| Reading {
            reader: reader.to_string(),
            refusal,
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

    fn gptqmodel(&self) -> Option<String> {
        let size = i64::from(self.spec.group_size);
        let known = [-1, 16, 32, 64, 128, 256, 512, 1024];
        because(!known.contains(&size), format!("group size {size}"))
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

    /// Their Marlin kernels; the older kernel for 2 and 3 bits was dropped in 2026.
    fn vllm(&self) -> Option<String> {
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
        let refused = ["AutoGPTQ", "ExLlama", "vLLM, SGLang", "TGI"];
        assert_eq!(refusing(&asym, &LLAMA), refused);
        let single = QuantSpec {
            order: ColumnOrder::ActOrder,
            group_size: GroupSize::None,
            ..QuantSpec::published()
        };
        assert_eq!(refusing(&single, &LLAMA), ["ExLlama"]);
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
