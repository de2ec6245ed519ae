//! `config.json` of a decoder, read strictly: what cannot be honoured is refused by name.

use gptq_kernels::Rotation;
use gptq_types::outside_name::shown;
use gptq_types::{LayerName, Stage};
use serde_json::Value;

use crate::weights::WeightSource;
use crate::{ModelError, RopeScaling, arch, config_keys};

/// A configuration that this crate cannot run.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum ConfigError {
    #[error("config.json is not valid: {0}")]
    Json(#[from] serde_json::Error),
    #[error("config.json has no `{0}`")]
    Missing(&'static str),
    #[error("config.json has `{key}` = {value}, expected {expected}")]
    Value {
        key: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error("config.json has `{key}` = {value}, expected {expected}")]
    Unsupported {
        key: &'static str,
        value: String,
        expected: &'static str,
    },
    #[error("config.json has `{key}` twice: {found}")]
    Conflict { key: &'static str, found: String },
    #[error("architecture `{0}` is not one of {known}", known = arch::KNOWN)]
    UnknownArchitecture(String),
}

/// Characters of a value from the file that an error repeats.
const SHOWN_CHARACTERS: usize = 80;

impl ConfigError {
    /// The file is sound, but describes a model that is not computed here.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            ConfigError::Unsupported { .. } | ConfigError::UnknownArchitecture(_)
        )
    }

    pub(crate) fn unsupported(
        key: &'static str,
        value: impl std::fmt::Display,
        expected: &'static str,
    ) -> Self {
        ConfigError::Unsupported {
            key,
            value: shown(&value.to_string(), SHOWN_CHARACTERS),
            expected,
        }
    }

    pub(crate) fn value(
        key: &'static str,
        value: impl std::fmt::Display,
        expected: &'static str,
    ) -> Self {
        ConfigError::Value {
            key,
            value: shown(&value.to_string(), SHOWN_CHARACTERS),
            expected,
        }
    }
}

/// More blocks than any published decoder has, few enough that nothing counted by them overflows.
const MAX_BLOCKS: usize = 4096;
/// Likewise for the width of a tensor: the product of two, over all linears and blocks, in f32, is
/// less than 2^63 bytes.
const MAX_WIDTH: usize = 1 << 23;
/// Kernels count positions in i32.
const MAX_POSITIONS: usize = i32::MAX as usize;

/// A decoder of the Llama family.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// `model_type`.
    pub architecture: String,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Width of the gated product.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head; `hidden_size / num_attention_heads` unless given.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub max_position_embeddings: usize,
    /// Added to the mean square in norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the rotary frequencies for long contexts.
    pub rope_scaling: RopeScaling,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// `q_proj`, `k_proj`, `v_proj` have a bias.
    pub qkv_bias: bool,
    /// `o_proj` has a bias.
    pub o_bias: bool,
    /// `gate_proj`, `up_proj`, `down_proj` have a bias.
    pub mlp_bias: bool,
    /// Queries and keys are normed per head.
    pub qk_norm: bool,
    /// Tokens that attention looks back, where limited in any block.
    pub sliding_window: Option<usize>,
    /// Keys of the file that nobody here knows: whether they change the model is not known either.
    pub unread_keys: Vec<String>,
}

impl DecoderConfig {
    /// Reads the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let json: Value = serde_json::from_str(text)?;
        let fields = Fields(&json);
        let model_type = fields
            .text("model_type")?
            .ok_or(ConfigError::Missing("model_type"))?;
        let config = arch::read(model_type, &fields)?;
        config.check()?;
        config.check_head_width(&fields)?;
        Ok(config)
    }

    /// Sizes within bounds that no product of them leaves; [`DecoderConfig::check_tensors`] compares
    /// them with what there is.
    fn check(&self) -> Result<(), ConfigError> {
        let within = |key, value: usize, most: usize, expected| match value {
            1.. if value <= most => Ok(()),
            _ => Err(ConfigError::value(key, value, expected)),
        };
        const WIDTH: &str = "1 to 8388608";
        within("hidden_size", self.hidden_size, MAX_WIDTH, WIDTH)?;
        within(
            "intermediate_size",
            self.intermediate_size,
            MAX_WIDTH,
            WIDTH,
        )?;
        within("vocab_size", self.vocab_size, MAX_WIDTH, WIDTH)?;
        let (layers, positions) = (self.num_hidden_layers, self.max_position_embeddings);
        within("num_hidden_layers", layers, MAX_BLOCKS, "1 to 4096")?;
        let key = "max_position_embeddings";
        within(key, positions, MAX_POSITIONS, "1 to 2147483647")?;
        if let Some(window) = self.sliding_window {
            within("sliding_window", window, MAX_POSITIONS, "1 to 2147483647")?;
        }
        let heads = self.num_attention_heads;
        within("num_attention_heads", heads, MAX_WIDTH, WIDTH)?;
        within("head_dim", self.head_dim, MAX_WIDTH, WIDTH)?;
        if !self.head_dim.is_multiple_of(2) {
            return Err(ConfigError::value(
                "head_dim",
                self.head_dim,
                "an even width",
            ));
        }
        if !heads.is_multiple_of(self.num_key_value_heads) {
            let expected = "a multiple of num_key_value_heads";
            return Err(ConfigError::value("num_attention_heads", heads, expected));
        }
        let queries = heads.checked_mul(self.head_dim);
        if queries.is_none_or(|width| width > MAX_WIDTH) {
            let expected = "heads that are together at most 8388608 wide";
            return Err(ConfigError::value("num_attention_heads", heads, expected));
        }
        if !(0.0..1.0).contains(&self.rms_norm_eps) {
            let (key, eps) = ("rms_norm_eps", self.rms_norm_eps);
            return Err(ConfigError::value(key, eps, "a number from 0 to 1"));
        }
        Ok(())
    }

    /// Two keys of Llama's relatives that change nothing where they repeat the width of a head.
    fn check_head_width(&self, fields: &Fields<'_>) -> Result<(), ConfigError> {
        for key in ["query_pre_attn_scalar", "v_head_dim"] {
            match fields.optional_number(key)? {
                Some(number) if number != self.head_dim as f64 => {
                    return Err(ConfigError::unsupported(key, number, "the width of a head"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Names and shapes `(name, in_features, out_features)` of the linears of `stage` in block
    /// `index`.
    pub fn linears(&self, index: usize, stage: Stage) -> Vec<(LayerName, usize, usize)> {
        let (hidden, ffn) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (
            self.num_attention_heads * self.head_dim,
            self.num_key_value_heads * self.head_dim,
        );
        let list: &[(&str, usize, usize)] = match stage {
            Stage::AttentionIn => &[
                ("self_attn.q_proj", hidden, q),
                ("self_attn.k_proj", hidden, kv),
                ("self_attn.v_proj", hidden, kv),
            ],
            Stage::AttentionOut => &[("self_attn.o_proj", q, hidden)],
            Stage::MlpIn => &[("mlp.gate_proj", hidden, ffn), ("mlp.up_proj", hidden, ffn)],
            Stage::MlpOut => &[("mlp.down_proj", ffn, hidden)],
        };
        list.iter()
            .map(|&(name, k, n)| (LayerName(format!("{}{name}", prefix(index))), k, n))
            .collect()
    }

    /// All linears of block `index` in true-sequential order.
    pub fn block_linears(&self, index: usize) -> Vec<(LayerName, usize, usize)> {
        Stage::ALL
            .into_iter()
            .flat_map(|stage| self.linears(index, stage))
            .collect()
    }

    /// Whether the linears of `stage` have a bias.
    pub fn has_bias(&self, stage: Stage) -> bool {
        match stage {
            Stage::AttentionIn => self.qkv_bias,
            Stage::AttentionOut => self.o_bias,
            Stage::MlpIn | Stage::MlpOut => self.mlp_bias,
        }
    }

    /// Bytes of one block's weights in f32.
    pub fn block_bytes(&self) -> usize {
        let elements = |(_, k, n): (LayerName, usize, usize)| k * n;
        self.block_linears(0)
            .into_iter()
            .map(elements)
            .sum::<usize>()
            * 4
    }

    /// Floating-point operations of one block for windows of `tokens`: linears, and the half of
    /// the score matrix that causal attention needs, twice.
    pub fn block_flop(&self, windows: usize, tokens: usize) -> f64 {
        let all = (windows * tokens) as f64;
        let linears: usize = self.block_linears(0).iter().map(|(_, k, n)| k * n).sum();
        let width = (self.num_attention_heads * self.head_dim) as f64;
        2.0 * all * linears as f64 + 2.0 * all * (tokens as f64 + 1.0) * width
    }

    /// Rotary cosines and sines for `positions` of texts that are `tokens` long.
    pub fn rotation(&self, positions: std::ops::Range<usize>, tokens: usize) -> Rotation {
        self.rope_scaling
            .rotation(self.head_dim, self.rope_theta, positions, tokens)
    }

    /// Names and shapes of the plain tensors outside of blocks.
    fn outer_tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut list = vec![
            (EMBEDDING.to_string(), vec![self.vocab_size, hidden]),
            ("model.norm.weight".to_string(), vec![hidden]),
        ];
        if !self.tie_word_embeddings {
            list.push((LM_HEAD.to_string(), vec![self.vocab_size, hidden]));
        }
        list
    }

    /// Names and lengths of the plain tensors of block `index`.
    fn block_vectors(&self, index: usize) -> Vec<(String, Vec<usize>)> {
        let at = prefix(index);
        let mut list = vec![
            (
                format!("{at}input_layernorm.weight"),
                vec![self.hidden_size],
            ),
            (
                format!("{at}post_attention_layernorm.weight"),
                vec![self.hidden_size],
            ),
        ];
        if self.qk_norm {
            list.push((format!("{at}self_attn.q_norm.weight"), vec![self.head_dim]));
            list.push((format!("{at}self_attn.k_norm.weight"), vec![self.head_dim]));
        }
        list
    }

    /// Everything the architecture needs is there in its shape, and nothing is there that it
    /// would ignore. Stops at the first tensor that is not, so a number of blocks that nothing backs
    /// costs nothing.
    pub fn check_tensors(&self, source: &dyn WeightSource) -> Result<(), ModelError> {
        let mut known = std::collections::HashSet::new();
        let mut plain = |list: Vec<(String, Vec<usize>)>| -> Result<(), ModelError> {
            for (name, shape) in list {
                source.check_plain(&name, &shape)?;
                known.insert(name);
            }
            Ok(())
        };
        plain(self.outer_tensors())?;
        for index in 0..self.num_hidden_layers {
            plain(self.block_vectors(index))?;
        }
        for index in 0..self.num_hidden_layers {
            for stage in Stage::ALL {
                for (layer, k, n) in self.linears(index, stage) {
                    source.check_linear(&layer, [k, n], self.has_bias(stage))?;
                    known.extend(source.linear_tensors(&layer, self.has_bias(stage)));
                }
            }
        }
        for name in source.names() {
            // Older exporters stored the rotary frequencies, and a tied head beside its embedding.
            let derived = name.ends_with("rotary_emb.inv_freq")
                || (self.tie_word_embeddings && name == LM_HEAD);
            if !derived && !known.contains(&name) {
                return Err(ModelError::Unexpected {
                    name,
                    place: source.place(),
                    architecture: self.architecture.clone(),
                });
            }
        }
        self.refuse_another_head(source)
    }

    /// A head beside the embedding that it is tied to has to be the same: readers differ in which of
    /// two they take.
    fn refuse_another_head(&self, source: &dyn WeightSource) -> Result<(), ModelError> {
        if !self.tie_word_embeddings || source.dtype(LM_HEAD).is_none() {
            return Ok(());
        }
        if source.plain_as_stored(LM_HEAD)? == source.plain_as_stored(EMBEDDING)? {
            return Ok(());
        }
        Err(ModelError::AnotherHead {
            place: source.place(),
        })
    }
}

const LM_HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// `model.layers.INDEX.`
pub(crate) fn prefix(index: usize) -> String {
    format!("model.layers.{index}.")
}

/// Typed access to `config.json`; a present value of the wrong type is an error, never a default.
pub(crate) struct Fields<'a>(pub &'a Value);

impl Fields<'_> {
    /// `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn wrong(key: &'static str, value: &Value, expected: &'static str) -> ConfigError {
        ConfigError::value(key, value, expected)
    }

    pub fn optional_size(&self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_u64()
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or_else(|| Self::wrong(key, value, "a whole number"))
            })
            .transpose()
    }

    pub fn size(&self, key: &'static str) -> Result<usize, ConfigError> {
        self.optional_size(key)?.ok_or(ConfigError::Missing(key))
    }

    pub fn optional_number(&self, key: &'static str) -> Result<Option<f64>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_f64()
                    .filter(|number| number.is_finite())
                    .ok_or_else(|| Self::wrong(key, value, "a number"))
            })
            .transpose()
    }

    pub fn flag(&self, key: &'static str, default: bool) -> Result<bool, ConfigError> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| Self::wrong(key, value, "true or false")),
        }
    }

    pub fn text(&self, key: &'static str) -> Result<Option<&str>, ConfigError> {
        self.get(key)
            .map(|value| {
                value
                    .as_str()
                    .ok_or_else(|| Self::wrong(key, value, "a string"))
            })
            .transpose()
    }

    pub fn object(&self, key: &'static str) -> Result<Option<Fields<'_>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) if value.is_object() => Ok(Some(Fields(value))),
            Some(value) => Err(Self::wrong(key, value, "an object")),
        }
    }
}

/// The part that all families share, with Llama's defaults. `own` are keys that the family means
/// otherwise than Llama, with the only value that it has for them.
pub(crate) fn read_common(
    fields: &Fields<'_>,
    own: &[(&'static str, bool)],
) -> Result<DecoderConfig, ConfigError> {
    let activation = fields.text("hidden_act")?.unwrap_or("silu");
    // "swish" is transformers' other name of the same function.
    if !matches!(activation, "silu" | "swish") {
        return Err(ConfigError::unsupported("hidden_act", activation, "silu"));
    }
    let mut unread_keys = config_keys::check(fields, own)?;
    let heads = fields.size("num_attention_heads")?;
    let hidden_size = fields.size("hidden_size")?;
    let max_position_embeddings = fields
        .optional_size("max_position_embeddings")?
        .unwrap_or(2048);
    let head_dim = match fields.optional_size("head_dim")? {
        Some(width) => width,
        None => hidden_size / heads.max(1),
    };
    let rope = crate::rope::read(fields, max_position_embeddings)?;
    unread_keys.extend(rope.unread_keys);
    Ok(DecoderConfig {
        architecture: fields.text("model_type")?.unwrap_or_default().to_string(),
        hidden_size,
        intermediate_size: fields.size("intermediate_size")?,
        num_hidden_layers: fields.size("num_hidden_layers")?,
        num_attention_heads: heads,
        num_key_value_heads: fields
            .optional_size("num_key_value_heads")?
            .unwrap_or(heads),
        head_dim,
        vocab_size: fields.size("vocab_size")?,
        max_position_embeddings,
        rms_norm_eps: fields.optional_number("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta: rope.theta,
        rope_scaling: rope.scaling,
        tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        sliding_window: None,
        unread_keys,
    })
}
