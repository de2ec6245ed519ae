//! The rotary tables of a model, and which block uses which.

use gptq_kernels::Pairing;

use super::{Reader, Sizes};
use crate::config::ConfigError;
use crate::rope::{self, Kinds, Reads};
use crate::spec::RotarySpec;

/// Tables, and the place of each block's among them.
pub(crate) struct Rotaries {
    pub tables: Vec<RotarySpec>,
    /// None where positions are not told.
    pub of_block: Vec<Option<usize>>,
    /// Keys of the rotary settings that nobody knows.
    pub unread_keys: Vec<String>,
}

impl Rotaries {
    /// One table for all blocks over whole heads, the pairs in halves.
    pub fn one(reader: &Reader<'_>, sizes: &Sizes) -> Result<Self, ConfigError> {
        Self::one_of(reader, sizes, &Reads::LLAMA, Pairing::Halves)
    }

    /// One table for all blocks.
    pub fn one_of(
        reader: &Reader<'_>,
        sizes: &Sizes,
        reads: &Reads,
        pairing: Pairing,
    ) -> Result<Self, ConfigError> {
        let read = rope::read(&reader.fields, sizes.positions, reads)?;
        Ok(Rotaries {
            tables: vec![read.table(sizes.head_dim, pairing)],
            of_block: vec![Some(0); sizes.blocks],
            unread_keys: read.unread_keys,
        })
    }

    /// A table for blocks with a window and one for those without, for heads of these widths.
    pub fn by_kind(kinds: Kinds, [sliding, full]: [usize; 2], windows: &[Option<usize>]) -> Self {
        let place = |window: &Option<usize>| Some(usize::from(window.is_none()));
        let tables = vec![
            kinds.sliding.table(sliding, Pairing::Halves),
            kinds.full.table(full, Pairing::Halves),
        ];
        let mut unread_keys = kinds.sliding.unread_keys;
        unread_keys.extend(kinds.full.unread_keys);
        Rotaries {
            tables,
            of_block: windows.iter().map(place).collect(),
            unread_keys,
        }
    }

    /// Without positions in the blocks for which `has_rope` is false.
    pub fn only_where(mut self, has_rope: impl Iterator<Item = bool>) -> Self {
        for (place, has_rope) in self.of_block.iter_mut().zip(has_rope) {
            *place = place.filter(|_| has_rope);
        }
        self
    }
}
