//! The two matrices that published repositories have.

use gptq_types::{
    Bits, CalibrationRequest, ColumnOrder, GroupSize, Permutation, QuantSpec, branch_name, describe,
};

/// A published table of branches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Preset {
    /// Llama-2-7B-GPTQ: 4 bits in four branches, damp 0.01, wikitext2, 2048 tokens.
    Llama2,
    /// Llama-2-7B-32K-Instruct-GPTQ: the same four and two of 8 bits, damp 0.1, c4, 32768 tokens.
    LongContext,
}

impl Preset {
    /// The branches, `main` first.
    pub fn permutations(self) -> Vec<Permutation> {
        let four = [
            (Bits::Four, GroupSize::Channels(128), ColumnOrder::Natural),
            (Bits::Four, GroupSize::Channels(32), ColumnOrder::ActOrder),
            (Bits::Four, GroupSize::Channels(64), ColumnOrder::ActOrder),
            (Bits::Four, GroupSize::Channels(128), ColumnOrder::ActOrder),
        ];
        let eight = [
            (Bits::Eight, GroupSize::None, ColumnOrder::ActOrder),
            (Bits::Eight, GroupSize::Channels(128), ColumnOrder::ActOrder),
        ];
        let (damp_percent, dataset, seq_len, branches) = match self {
            Preset::Llama2 => (0.01, "wikitext2", 2048, four.to_vec()),
            Preset::LongContext => (0.1, "c4", 32768, [&four[..], &eight[..]].concat()),
        };
        let calibration = CalibrationRequest {
            dataset: dataset.to_string(),
            samples: 128,
            column: None,
            seq_len,
            seed: 0,
            window_bos: None,
        };
        let permutation = |(index, (bits, group_size, order))| {
            let spec = QuantSpec {
                bits,
                group_size,
                order,
                damp_percent,
                ..QuantSpec::published()
            };
            Permutation {
                branch: match index {
                    0 => "main".to_string(),
                    _ => branch_name(&spec),
                },
                desc: describe(&spec),
                spec,
                calibration: calibration.clone(),
            }
        };
        branches.into_iter().enumerate().map(permutation).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_branches_are_those_of_the_published_tables() {
        let names = |preset: Preset| -> Vec<String> {
            let branches = preset.permutations();
            branches.into_iter().map(|p| p.branch).collect()
        };
        let four = [
            "main",
            "gptq-4bit-32g-actorder_True",
            "gptq-4bit-64g-actorder_True",
            "gptq-4bit-128g-actorder_True",
        ];
        assert_eq!(names(Preset::Llama2), four);
        let long = names(Preset::LongContext);
        assert_eq!(long[..4], four);
        let eight = [
            "gptq-8bit--1g-actorder_True",
            "gptq-8bit-128g-actorder_True",
        ];
        assert_eq!(long[4..], eight);
        let main = &Preset::LongContext.permutations()[0];
        assert_eq!(main.spec.damp_percent, 0.1);
        assert_eq!(main.calibration.seq_len, 32768);
    }
}
