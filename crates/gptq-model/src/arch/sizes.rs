//! Settings that the config of every family has.

use gptq_kernels::{Activation, AttentionShape};

use super::Reader;
use crate::config::{ConfigError, Fields};
use crate::config_keys::Honoured;
use crate::rope::above_zero;
use crate::spec::{
    EmbeddingSpec, HeadSpec, MAX_BLOCKS, MAX_POSITIONS, MAX_WIDTH, ModelSpec, NormKind, NormSpec,
    WIDTH, within,
};

/// Sizes and numbers under the names that transformers gives them in most families.
pub(crate) struct Sizes {
    pub architecture: String,
    pub hidden: usize,
    /// Width of the gated product.
    pub intermediate: usize,
    pub blocks: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub vocab: usize,
    pub positions: usize,
    /// Epsilon of the norms.
    pub eps: f64,
    pub norm: NormStyle,
    pub activation: Activation,
    pub tied: bool,
    /// Keys of the file that nobody knows.
    pub unread_keys: Vec<String>,
}

/// Where families differ in names and defaults.
pub(crate) struct Defaults {
    /// The key of the norms' epsilon, and its default.
    pub eps: (&'static str, f64),
    /// The key of the activation, and its default.
    pub activation: (&'static str, &'static str),
    /// Whether the head is the embedding where the file does not say.
    pub tied: bool,
    /// Positions where the file does not say.
    pub positions: usize,
    /// Width of a head where the file does not say; else hidden states by heads.
    pub head_dim: Option<usize>,
    /// Heads of keys where the file does not say; else as many as of queries.
    pub kv_heads: Option<usize>,
    /// Heads of queries and rows of the embedding, in families whose published files leave them out.
    pub heads_and_vocab: Option<(usize, usize)>,
    pub norm: NormStyle,
}

/// The kind of a family's norms, and their differences from RMSNorm.
#[derive(Clone, Copy)]
pub(crate) struct NormStyle {
    pub kind: NormKind,
    /// Added to the stored weight.
    pub offset: f32,
    /// They have a bias.
    pub bias: bool,
}

impl NormStyle {
    pub const RMS: NormStyle = NormStyle {
        kind: NormKind::Rms,
        offset: 0.0,
        bias: false,
    };
}

impl Defaults {
    /// Llama's.
    pub const LLAMA: Defaults = Defaults {
        eps: ("rms_norm_eps", 1e-6),
        activation: ("hidden_act", "silu"),
        tied: false,
        positions: 2048,
        head_dim: None,
        kv_heads: None,
        heads_and_vocab: None,
        norm: NormStyle::RMS,
    };
}

impl Sizes {
    /// Reads the sizes; `honoured` are keys that the family reads itself or means otherwise than Llama.
    pub fn read(
        reader: &Reader<'_>,
        honoured: &Honoured,
        defaults: &Defaults,
    ) -> Result<Self, ConfigError> {
        let fields = &reader.fields;
        let (key, default) = defaults.activation;
        let activation = activation(key, fields.text(key)?.unwrap_or(default))?;
        let unread_keys = reader.check_keys(honoured)?;
        let hidden = fields.size("hidden_size")?;
        let or_default = |key, default: Option<usize>| match (fields.optional_size(key)?, default) {
            (Some(size), _) | (None, Some(size)) => Ok(size),
            (None, None) => Err(ConfigError::Missing(key)),
        };
        let (some_heads, some_vocab) = defaults.heads_and_vocab.unzip();
        let heads = or_default("num_attention_heads", some_heads)?;
        let head_dim = match fields.optional_size("head_dim")?.or(defaults.head_dim) {
            Some(width) => width,
            None => hidden / heads.max(1),
        };
        for key in ["query_pre_attn_scalar", "v_head_dim"] {
            if !honoured.reads.contains(&key) {
                repeats_head_width(fields, key, head_dim)?;
            }
        }
        let (key, default) = defaults.eps;
        let eps = fields.optional_number(key)?.unwrap_or(default);
        let positions = fields.optional_size("max_position_embeddings")?;
        let sizes = Sizes {
            architecture: fields.text("model_type")?.unwrap_or_default().to_string(),
            hidden,
            intermediate: fields.size("intermediate_size")?,
            blocks: fields.size("num_hidden_layers")?,
            heads,
            kv_heads: or_default("num_key_value_heads", defaults.kv_heads.or(Some(heads)))?,
            head_dim,
            vocab: or_default("vocab_size", some_vocab)?,
            positions: positions.unwrap_or(defaults.positions),
            eps,
            norm: defaults.norm,
            activation,
            tied: reader.flag("tie_word_embeddings", defaults.tied)?,
            unread_keys,
        };
        sizes.check()?;
        Ok(sizes)
    }

    fn check(&self) -> Result<(), ConfigError> {
        within("hidden_size", self.hidden, MAX_WIDTH, WIDTH)?;
        within("intermediate_size", self.intermediate, MAX_WIDTH, WIDTH)?;
        within("vocab_size", self.vocab, MAX_WIDTH, WIDTH)?;
        within("num_hidden_layers", self.blocks, MAX_BLOCKS, "1 to 4096")?;
        let (key, expected) = ("max_position_embeddings", "1 to 2147483647");
        within(key, self.positions, MAX_POSITIONS, expected)?;
        within("num_attention_heads", self.heads, MAX_WIDTH, WIDTH)?;
        within("num_key_value_heads", self.kv_heads, MAX_WIDTH, WIDTH)?;
        within("head_dim", self.head_dim, MAX_WIDTH, WIDTH)?;
        // Neither side of a product of a number of heads and their width overflows now.
        let queries = self.heads * self.head_dim;
        let expected = "heads that are together at most 8388608 wide";
        within("num_attention_heads", queries, MAX_WIDTH, expected)
    }

    /// Width of the queries.
    pub fn queries(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the keys, and of the values.
    pub fn keys(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Heads that see all before them, scores divided by the root of their width.
    pub fn shape(&self) -> AttentionShape {
        AttentionShape::new(self.heads, self.kv_heads, self.head_dim)
    }

    /// A norm of block `index`, in the family's style.
    pub fn norm(&self, reader: &Reader<'_>, index: usize, name: &str, width: usize) -> NormSpec {
        self.styled(reader.paths.block(index, name), width)
    }

    /// A norm of hidden states outside of blocks.
    pub fn outer_norm(&self, reader: &Reader<'_>, name: &str, width: usize) -> NormSpec {
        self.styled(reader.paths.outer(name), width)
    }

    fn styled(&self, path: String, width: usize) -> NormSpec {
        let NormStyle { kind, offset, bias } = self.norm;
        NormSpec {
            kind,
            offset,
            bias: bias.then(|| format!("{path}.bias")),
            ..NormSpec::rms(format!("{path}.weight"), width, self.eps)
        }
    }

    /// The model without blocks and rotary tables, as Llama has it.
    pub fn model(&self, reader: &Reader<'_>) -> ModelSpec {
        let embedding = reader.paths.outer("embed_tokens.weight");
        let own_name = reader.paths.head();
        ModelSpec {
            architecture: self.architecture.clone(),
            hidden_size: self.hidden,
            vocab_size: self.vocab,
            max_position_embeddings: self.positions,
            head: HeadSpec {
                name: if self.tied {
                    embedding.clone()
                } else {
                    own_name.clone()
                },
                tied: self.tied,
                own_name,
                factor: 1.0,
                soft_cap: None,
            },
            embedding: EmbeddingSpec {
                name: embedding,
                factor: 1.0,
                rounds_factor: false,
                per_block: None,
            },
            blocks: Vec::new(),
            rotaries: Vec::new(),
            final_norm: self.outer_norm(reader, "norm", self.hidden),
            begins_with_bos: false,
            overflows_f16: false,
            multimodal: false,
            unused: Vec::new(),
            unread_keys: self.unread_keys.clone(),
        }
    }
}

/// A factor above 0.
pub(crate) fn factor(
    fields: &Fields<'_>,
    key: &'static str,
    default: f64,
) -> Result<f32, ConfigError> {
    Ok(above_zero(fields, key)?.unwrap_or(default) as f32)
}

/// A cap: `default` where the file does not name it, none where it says `null`.
pub(crate) fn cap(
    fields: &Fields<'_>,
    key: &'static str,
    default: Option<f64>,
) -> Result<Option<f32>, ConfigError> {
    let value = match fields.0.get(key) {
        None => default,
        Some(_) => above_zero(fields, key)?,
    };
    Ok(value.map(|cap| cap as f32))
}

/// The activations that are computed here, under transformers' names.
fn activation(key: &'static str, name: &str) -> Result<Activation, ConfigError> {
    match name {
        // "swish" is transformers' other name of the same function.
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
        other => {
            let expected = "silu or gelu_pytorch_tanh";
            Err(ConfigError::unsupported(key, other, expected))
        }
    }
}

/// A key of Llama's relatives that changes nothing where it repeats the width of a head.
fn repeats_head_width(
    fields: &Fields<'_>,
    key: &'static str,
    head_dim: usize,
) -> Result<(), ConfigError> {
    match fields.optional_number(key)? {
        Some(number) if number != head_dim as f64 => {
            Err(ConfigError::unsupported(key, number, "the width of a head"))
        }
        _ => Ok(()),
    }
}
