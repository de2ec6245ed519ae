//! Sizes within bounds, and a spec against the tensors that there are.

use std::collections::HashSet;

use super::beside::is_of_another_part;
use super::{
    AttentionSpec, BlockSpec, KeySource, LinearSpec, Mixer, ModelSpec, NormSpec, RotarySpec,
};
use crate::weights::WeightSource;
use crate::{ConfigError, ModelError, RopeScaling};

/// More blocks than any published decoder has, few enough that nothing counted by them overflows.
pub(crate) const MAX_BLOCKS: usize = 4096;
/// Likewise for the width of a tensor: the product of two, over all linears and blocks, in f32, is
/// less than 2^63 bytes.
pub(crate) const MAX_WIDTH: usize = 1 << 23;
/// Kernels count positions in i32.
pub(crate) const MAX_POSITIONS: usize = i32::MAX as usize;

/// A size from outside, from 1 to `most`.
pub(crate) fn within(
    key: &'static str,
    value: usize,
    most: usize,
    expected: &'static str,
) -> Result<(), ConfigError> {
    match value {
        1.. if value <= most => Ok(()),
        _ => Err(ConfigError::value(key, value, expected)),
    }
}

impl ModelSpec {
    /// Everything the spec needs is there in its shape, and nothing is there that it would ignore.
    /// Stops at the first tensor that is not, so a number of blocks that nothing backs costs nothing.
    pub fn check_tensors(&self, source: &dyn WeightSource) -> Result<(), ModelError> {
        let mut known = HashSet::new();
        for (name, shape) in self.outer_tensors() {
            source.check_plain(&name, &shape)?;
            known.insert(name);
        }
        for block in &self.blocks {
            for (name, shape) in block.plain_tensors() {
                source.check_plain(&name, &shape)?;
                known.insert(name);
            }
            for linear in block.linears() {
                source.check_linear(&linear.name, linear.shape(), linear.bias)?;
                known.extend(source.linear_tensors(&linear.name, linear.bias));
            }
        }
        let unknown = |name: &String| {
            !self.is_derived(name) && !known.contains(name) && !self.is_carried(name)
        };
        match source.names().into_iter().find(unknown) {
            Some(name) => Err(ModelError::Unexpected {
                name,
                place: source.place(),
                architecture: self.architecture.clone(),
            }),
            None => self.refuse_another_head(source),
        }
    }

    /// Names and shapes of the tensors outside of blocks.
    pub fn outer_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut list = vec![(self.embedding.name.clone(), vec![self.vocab_size, hidden])];
        list.extend(self.final_norm.tensors());
        if !self.head.tied {
            list.push((self.head.name.clone(), vec![self.vocab_size, hidden]));
        }
        if let Some(inputs) = &self.embedding.per_block {
            let columns = self.blocks.len() * inputs.width;
            list.push((inputs.table.clone(), vec![inputs.vocab, columns]));
            list.push((inputs.projection.clone(), vec![columns, hidden]));
            list.extend(inputs.norm.tensors());
        }
        list
    }

    /// A tensor that nothing needs: older exporters stored the rotary frequencies, and a tied head beside
    /// its embedding; a family may leave modules in its files that its model does not use.
    pub fn is_derived(&self, name: &str) -> bool {
        name.ends_with("rotary_emb.inv_freq")
            || (self.head.tied && name == self.head.own_name)
            || (name.rsplit_once('.'))
                .is_some_and(|(module, _)| self.unused.iter().any(|unused| unused == module))
    }

    /// A tensor beside the decoder of a multimodal checkpoint: vision, audio, projectors, and blocks that
    /// predict further tokens.
    fn is_carried(&self, name: &str) -> bool {
        self.multimodal && is_of_another_part(name, self.decoder_prefix())
    }

    /// The prefix of the names of the decoder's tensors.
    fn decoder_prefix(&self) -> &str {
        let name = &self.embedding.name;
        &name[..name.len() - EMBEDDING.len()]
    }

    /// A head beside the embedding that it is tied to has to be the same: readers differ in which of
    /// two they take.
    fn refuse_another_head(&self, source: &dyn WeightSource) -> Result<(), ModelError> {
        if !self.head.tied || source.dtype(&self.head.own_name).is_none() {
            return Ok(());
        }
        let head = source.plain_as_stored(&self.head.own_name)?;
        if head == source.plain_as_stored(&self.embedding.name)? {
            return Ok(());
        }
        Err(ModelError::AnotherHead {
            place: source.place(),
        })
    }

    /// Sizes within bounds that no product of them leaves; [`ModelSpec::check_tensors`] compares them with
    /// what there is.
    pub(crate) fn check_sizes(&self) -> Result<(), ConfigError> {
        for (index, block) in self.blocks.iter().enumerate() {
            check_block(block)?;
            self.check_shared_keys(index)?;
        }
        for table in &self.rotaries {
            check_rotary(table)?;
        }
        if let Some(inputs) = &self.embedding.per_block {
            within("vocab_size_per_layer_input", inputs.vocab, MAX_WIDTH, WIDTH)?;
            let columns = inputs.width.saturating_mul(self.blocks.len());
            within("hidden_size_per_layer_input", columns, MAX_WIDTH, WIDTH)?;
        }
        Ok(())
    }
}

impl ModelSpec {
    /// A block that reads the keys of another one has as many heads, as wide, and comes behind it.
    fn check_shared_keys(&self, index: usize) -> Result<(), ConfigError> {
        let heads = |attention: &AttentionSpec| {
            let shape = &attention.shape;
            [shape.heads, shape.kv_heads, shape.head_dim]
        };
        for attention in self.blocks[index].attention() {
            let KeySource::Block(donor) = attention.keys else {
                continue;
            };
            let mut donors = self.blocks[..index]
                .get(donor)
                .into_iter()
                .flat_map(BlockSpec::attention);
            let alike = |other: &AttentionSpec| {
                other.keys == KeySource::Donor && heads(other) == heads(attention)
            };
            if !donors.any(alike) {
                let expected = "blocks with the heads of the one whose keys they read";
                return Err(ConfigError::value("num_kv_shared_layers", index, expected));
            }
        }
        Ok(())
    }
}

/// The end of the embedding's name.
pub(crate) const EMBEDDING: &str = "embed_tokens.weight";
pub(crate) const WIDTH: &str = "1 to 8388608";

fn check_block(block: &BlockSpec) -> Result<(), ConfigError> {
    for branch in block.branches() {
        if let Mixer::Attention(attention) = &branch.mixer {
            let shape = &attention.shape;
            within("num_attention_heads", shape.heads, MAX_WIDTH, WIDTH)?;
            within("head_dim", shape.head_dim, MAX_WIDTH, WIDTH)?;
            if !shape.head_dim.is_multiple_of(2) {
                return Err(ConfigError::value(
                    "head_dim",
                    shape.head_dim,
                    "an even width",
                ));
            }
            if shape.kv_heads == 0 || !shape.heads.is_multiple_of(shape.kv_heads) {
                let expected = "a multiple of num_key_value_heads";
                return Err(ConfigError::value(
                    "num_attention_heads",
                    shape.heads,
                    expected,
                ));
            }
            if let Some(window) = shape.window {
                within("sliding_window", window, MAX_POSITIONS, "1 to 2147483647")?;
            }
        }
        for linear in branch.input.iter().chain([&branch.output]) {
            check_linear(linear)?;
        }
    }
    match block.norms().find(|norm| !(0.0..1.0).contains(&norm.eps)) {
        Some(NormSpec { eps, .. }) => Err(ConfigError::value(
            "rms_norm_eps",
            eps,
            "a number from 0 to 1",
        )),
        None => Ok(()),
    }
}

fn check_rotary(table: &RotarySpec) -> Result<(), ConfigError> {
    let pairs = table.rotary_dim / 2;
    if pairs == 0 || table.rotary_dim > table.head_dim {
        let expected = "a part of a head that is rotated";
        return Err(ConfigError::value(
            "partial_rotary_factor",
            table.rotary_dim,
            expected,
        ));
    }
    match &table.scaling {
        RopeScaling::LongRope { short, long, .. }
            if [short, long].iter().any(|l| l.len() != pairs) =>
        {
            let found = format!("{} and {}", short.len(), long.len());
            Err(ConfigError::value(
                "long_factor",
                found,
                "a factor for each pair that is rotated",
            ))
        }
        _ => Ok(()),
    }
}

fn check_linear(linear: &LinearSpec) -> Result<(), ConfigError> {
    let widest = linear.in_features.max(linear.out_features);
    let least = linear.in_features.min(linear.out_features);
    match (1..=MAX_WIDTH).contains(&least) && widest <= MAX_WIDTH {
        true => Ok(()),
        false => {
            let expected = "linears with sides from 1 to 8388608";
            Err(ConfigError::value("intermediate_size", widest, expected))
        }
    }
}
