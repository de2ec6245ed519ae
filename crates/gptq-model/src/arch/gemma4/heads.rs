//! The heads of each block, and whose keys it attends to.

use super::*;
use crate::spec::{MAX_WIDTH, WIDTH, within};

/// Attention shapes and key sources of each block.
pub(super) struct Heads {
    pub shapes: Vec<AttentionShape>,
    pub keys: Vec<KeySource>,
}

impl Heads {
    pub fn read(
        reader: &Reader<'_>,
        sizes: &Sizes,
        windows: &[Option<usize>],
    ) -> Result<Self, ConfigError> {
        let keys = read_key_sources(reader, windows)?;
        let widths = read_widths(reader, sizes, windows)?;
        for (source, [_, kv_heads]) in keys.iter().zip(&widths) {
            if let KeySource::Block(donor) = source
                && widths[*donor][1] != *kv_heads
            {
                let expected = "those of the block whose keys are shared";
                return Err(ConfigError::value(
                    "num_key_value_heads",
                    kv_heads,
                    expected,
                ));
            }
        }
        let shape = |([head_dim, kv_heads], window): ([usize; 2], &Option<usize>)| {
            let mut shape = AttentionShape::new(sizes.heads, kv_heads, head_dim);
            // The norms of queries and keys do what the root of the width does elsewhere.
            shape.scale = 1.0;
            shape.window = *window;
            shape
        };
        Ok(Heads {
            shapes: widths.into_iter().zip(windows).map(shape).collect(),
            keys,
        })
    }

    /// Widths of heads with a window and without, each the same in all blocks of its kind.
    pub fn widths_by_kind(&self, sizes: &Sizes) -> Result<[usize; 2], ConfigError> {
        let width = |windowed: bool| {
            let kind = self
                .shapes
                .iter()
                .filter(|shape| shape.window.is_some() == windowed);
            let mut widths = kind.map(|shape| shape.head_dim);
            let first = widths.next().unwrap_or(sizes.head_dim);
            match widths.find(|width| *width != first) {
                Some(other) => {
                    let expected = "one width for all blocks of a kind";
                    Err(ConfigError::unsupported("head_dim", other, expected))
                }
                None => Ok(first),
            }
        };
        Ok([width(true)?, width(false)?])
    }
}

/// Width of a head and number of heads of keys, of each block: by block in `per_layer_config`, or in the
/// older spelling with keys of their own for blocks without a window.
fn read_widths(
    reader: &Reader<'_>,
    sizes: &Sizes,
    windows: &[Option<usize>],
) -> Result<Vec<[usize; 2]>, ConfigError> {
    let fields = &reader.fields;
    let mut widths = vec![[sizes.head_dim, sizes.kv_heads]; sizes.blocks];
    if fields.0.get("per_layer_config").is_some() {
        read_by_block(reader, &mut widths)?;
    } else {
        let width = fields.optional_size("global_head_dim")?.unwrap_or(512);
        let kv_heads = match fields.flag("attention_k_eq_v", false)? {
            true => fields.optional_size("num_global_key_value_heads")?,
            false => None,
        };
        for (at, _) in windows
            .iter()
            .enumerate()
            .filter(|(_, window)| window.is_none())
        {
            widths[at] = [width, kv_heads.unwrap_or(sizes.kv_heads)];
        }
    }
    for [width, kv_heads] in &widths {
        within("head_dim", *width, MAX_WIDTH, WIDTH)?;
        within("num_key_value_heads", *kv_heads, MAX_WIDTH, WIDTH)?;
    }
    Ok(widths)
}

/// `{"5": {"head_dim": 512, "num_key_value_heads": 1}}`.
fn read_by_block(reader: &Reader<'_>, widths: &mut [[usize; 2]]) -> Result<(), ConfigError> {
    const KEY: &str = "per_layer_config";
    let blocks = reader.fields.object(KEY)?;
    for (name, value) in blocks
        .iter()
        .flat_map(|blocks| blocks.0.as_object())
        .flatten()
    {
        let block = (name.parse::<usize>().ok()).and_then(|index| widths.get_mut(index));
        let (Some(block), Some(settings)) = (block, value.as_object()) else {
            let expected = "settings under numbers of blocks";
            return Err(ConfigError::value(
                KEY,
                format!("{{\"{name}\": {value}}}"),
                expected,
            ));
        };
        if let Some(other) = (settings.keys())
            .find(|key| !["head_dim", "num_key_value_heads"].contains(&key.as_str()))
        {
            let expected = "head_dim and num_key_value_heads alone";
            return Err(ConfigError::unsupported(KEY, other, expected));
        }
        let settings = crate::config::Fields(value);
        block[0] = settings.optional_size("head_dim")?.unwrap_or(block[0]);
        block[1] = settings
            .optional_size("num_key_value_heads")?
            .unwrap_or(block[1]);
    }
    Ok(())
}

/// The last `num_kv_shared_layers` blocks attend to keys of the last block of their kind before them.
fn read_key_sources(
    reader: &Reader<'_>,
    windows: &[Option<usize>],
) -> Result<Vec<KeySource>, ConfigError> {
    const KEY: &str = "num_kv_shared_layers";
    let shared = reader.fields.optional_size(KEY)?.unwrap_or(0);
    let refused = || {
        let expected = "fewer than the blocks, with a block of each kind before them";
        ConfigError::value(KEY, shared, expected)
    };
    let own = windows.len().checked_sub(shared).ok_or_else(refused)?;
    let mut keys = vec![KeySource::Own; windows.len()];
    for at in own..windows.len() {
        let is_same_kind = |&other: &usize| windows[other].is_some() == windows[at].is_some();
        let donor = (0..own).rev().find(is_same_kind).ok_or_else(refused)?;
        keys[donor] = KeySource::Donor;
        keys[at] = KeySource::Block(donor);
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use crate::arch;
    use crate::config::ConfigError;
    use crate::spec::{KeySource, ModelSpec};

    /// Six blocks, the third and the last without a window.
    fn read(settings: &str) -> Result<ModelSpec, ConfigError> {
        let text = format!(
            r#"{{"model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
                "head_dim": 16, "vocab_size": 64, "hidden_size_per_layer_input": 0,
                "layer_types": ["sliding_attention", "sliding_attention", "full_attention",
                    "sliding_attention", "sliding_attention", "full_attention"]{settings}}}"#
        );
        arch::read(&text, &[])
    }

    fn heads(settings: &str) -> Vec<[usize; 2]> {
        let model = read(settings).unwrap();
        (model.blocks.iter().flat_map(|block| block.attention()))
            .map(|attention| [attention.shape.head_dim, attention.shape.kv_heads])
            .collect()
    }

    #[test]
    fn both_spellings_of_heads_by_block() {
        let (sliding, full) = ([16, 2], [32, 1]);
        let wanted = [sliding, sliding, full, sliding, sliding, full];
        let by_block = r#", "per_layer_config": {"02": {"head_dim": 32, "num_key_value_heads": 1},
            "05": {"head_dim": 32, "num_key_value_heads": 1}}"#;
        assert_eq!(heads(by_block), wanted);
        let by_kind = r#", "global_head_dim": 32, "num_global_key_value_heads": 1,
            "attention_k_eq_v": true"#;
        assert_eq!(heads(by_kind), wanted);
        // Without keys that are values, the second number is not read.
        let unread = r#", "global_head_dim": 32, "num_global_key_value_heads": 1"#;
        assert_eq!(heads(unread)[2], [32, 2]);
        assert_eq!(heads("")[2], [512, 2]);
    }

    #[test]
    fn the_last_blocks_attend_to_keys_of_their_kind() {
        let model = read(r#", "num_kv_shared_layers": 2"#).unwrap();
        let keys: Vec<KeySource> = (model.blocks.iter().flat_map(|block| block.attention()))
            .map(|attention| attention.keys)
            .collect();
        use KeySource::{Block, Donor, Own};
        assert_eq!(keys, [Own, Own, Donor, Donor, Block(3), Block(2)]);
        assert!(
            model
                .unused
                .contains(&"model.layers.4.self_attn.v_proj".to_string())
        );
        for count in [4, 5, 6, 7] {
            let text = format!(r#", "num_kv_shared_layers": {count}"#);
            let error = read(&text).unwrap_err().to_string();
            assert!(error.contains("num_kv_shared_layers"), "{count}: {error}");
        }
    }
}
