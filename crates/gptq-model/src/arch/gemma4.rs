//! Gemma 4 without experts (`Gemma4ForCausalLM`, and the text models of `Gemma4ForConditionalGeneration`
//! and `Gemma4UnifiedForConditionalGeneration`): wider heads in the blocks without a window, values that
//! are normed and in some models are the keys, last blocks that attend to keys of earlier ones, and inputs
//! of every block by token id.

mod heads;

use gptq_kernels::AttentionShape;

use super::gemma::{GEMMA, with_scaled_embedding};
use super::parts::{AttentionBias, attention_branch, gated_branch, step, whole};
use super::relative::Layout;
use super::rotaries::Rotaries;
use super::sizes::{Defaults, NormStyle, cap};
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::rope::{self, Kinds, Reads, RopeScaling};
use crate::spec::{
    AttentionSpec, BlockSpec, BranchSpec, HeadNormSpec, KeySource, Mixer, ModelSpec, NormSpec,
    PerBlockInputSpec, StepSpec,
};
use heads::Heads;

const HONOURED: Honoured = Honoured::reads(&[
    "attention_k_eq_v",
    "final_logit_softcapping",
    "global_head_dim",
    "hidden_activation",
    "hidden_size_per_layer_input",
    "num_global_key_value_heads",
    "num_kv_shared_layers",
    "per_layer_config",
    "use_bidirectional_attention",
    "use_double_wide_mlp",
    "vocab_size_per_layer_input",
]);

const DEFAULTS: Defaults = Defaults {
    positions: 131_072,
    kv_heads: Some(4),
    heads_and_vocab: Some((8, 262_144)),
    norm: NormStyle::RMS,
    ..GEMMA
};

/// Defaults that differ between the two families of the name.
struct Absent {
    window: usize,
    /// Columns that a block looks up by token id.
    input_width: usize,
}

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let absent = Absent {
        window: 512,
        input_width: 256,
    };
    read_with(reader, &absent)
}

pub(super) fn read_unified(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let absent = Absent {
        window: 1024,
        input_width: 0,
    };
    read_with(reader, &absent)
}

fn read_with(reader: &Reader<'_>, absent: &Absent) -> Result<ModelSpec, ConfigError> {
    refuse_looking_ahead(reader)?;
    let sizes = Sizes::read(reader, &HONOURED, &DEFAULTS)?;
    let mut windowed = windows::all_but_each(reader, sizes.blocks, "sliding_window_pattern", 6)?;
    // As transformers has it, whatever the file says.
    windowed[sizes.blocks - 1] = false;
    let windows = windows::by_block(reader, windowed, Some(absent.window))?;
    let heads = Heads::read(reader, &sizes, &windows)?;
    let kinds = read_kinds(reader, &sizes, &heads)?;
    let rotaries = Rotaries::by_kind(kinds, heads.widths_by_kind(&sizes)?, &windows);
    let input_width = reader.fields.optional_size("hidden_size_per_layer_input")?;
    let family = Family {
        reader,
        sizes: &sizes,
        bias: AttentionBias::all(reader.fields.flag("attention_bias", false)?),
        values_are_keys: reader.fields.flag("attention_k_eq_v", false)?,
        twice_as_wide: reader.fields.flag("use_double_wide_mlp", false)?,
        input_width: input_width.unwrap_or(absent.input_width),
        heads,
    };
    let mut model = sizes.model(reader);
    model.blocks = (0..sizes.blocks)
        .map(|index| family.block(index, &rotaries))
        .collect();
    model.unused = family.unused();
    model.rotaries = rotaries.tables;
    model.unread_keys.extend(rotaries.unread_keys);
    model.head.soft_cap = cap(&reader.fields, "final_logit_softcapping", None)?;
    model.embedding.per_block = family.per_block()?;
    Ok(with_scaled_embedding(model))
}

/// Refuses bidirectional attention: only causal attention over text is supported, so `all` is an error.
fn refuse_looking_ahead(reader: &Reader<'_>) -> Result<(), ConfigError> {
    const KEY: &str = "use_bidirectional_attention";
    match reader.fields.get(KEY) {
        Some(value) if *value != false && *value != "vision" => {
            let expected = "vision or none, since it changes the model";
            Err(ConfigError::unsupported(KEY, value, expected))
        }
        _ => Ok(()),
    }
}

/// Rotary settings by kind of layer. There is no older spelling.
fn read_kinds(reader: &Reader<'_>, sizes: &Sizes, heads: &Heads) -> Result<Kinds, ConfigError> {
    let fields = &reader.fields;
    for key in ["rope_theta", "rope_scaling"] {
        if let Some(value) = fields.get(key) {
            let expected = "rope_parameters by kind of layer";
            return Err(ConfigError::unsupported(key, value, expected));
        }
    }
    let widths = heads.widths_by_kind(sizes)?;
    let reads = |theta, width| Reads {
        theta,
        proportional: Some(width),
        ..Reads::LLAMA
    };
    let [sliding, full] = [reads(10_000.0, widths[0]), reads(1_000_000.0, widths[1])];
    let mut kinds = rope::read_kinds(fields, sizes.positions, [&sliding, &full], None)?;
    if fields.get("rope_parameters").is_none() {
        kinds.full.scaling = RopeScaling::Proportional {
            turning: widths[1] / 8,
            factor: 1.0,
        };
    }
    Ok(kinds)
}

struct Family<'a> {
    reader: &'a Reader<'a>,
    sizes: &'a Sizes,
    bias: AttentionBias,
    /// In blocks without a window.
    values_are_keys: bool,
    /// The feed-forward of blocks that attend to keys of earlier ones.
    twice_as_wide: bool,
    /// Columns that a block looks up by token id; 0 where there are none.
    input_width: usize,
    heads: Heads,
}

impl Family<'_> {
    fn block(&self, index: usize, rotaries: &Rotaries) -> BlockSpec {
        let (reader, sizes) = (self.reader, self.sizes);
        let shared = matches!(self.heads.keys[index], KeySource::Block(_));
        let width = sizes.intermediate * if shared && self.twice_as_wide { 2 } else { 1 };
        let branches = [
            self.attention(index, rotaries.of_block[index]),
            gated_branch(reader, sizes, index, width, false),
        ];
        let mut block = Layout::AROUND.block(reader, sizes, index, branches);
        if self.input_width > 0 {
            block.steps.push(self.input_by_token(index));
        }
        let has_factor = reader.paths.has_tensor(index, "layer_scalar");
        block.output_factor = has_factor.then(|| reader.paths.block(index, "layer_scalar"));
        block
    }

    fn attention(&self, index: usize, rotary: Option<usize>) -> BranchSpec {
        let (reader, sizes) = (self.reader, self.sizes);
        let (shape, keys) = (self.heads.shapes[index], self.heads.keys[index]);
        let norm = |name| Some(sizes.norm(reader, index, name, shape.head_dim));
        let own = !matches!(keys, KeySource::Block(_));
        let value = NormSpec {
            weight: None,
            ..sizes.norm(reader, index, "self_attn.v_norm", shape.head_dim)
        };
        let attention = AttentionSpec {
            shape,
            rotary,
            keys,
            norms: HeadNormSpec {
                query: norm("self_attn.q_norm"),
                key: norm("self_attn.k_norm").filter(|_| own),
                value: Some(value).filter(|_| own),
                after_rotation: false,
            },
        };
        let mut branch = attention_branch(reader, sizes, index, attention, self.bias);
        if !own {
            branch.input.truncate(1);
            branch.operands.truncate(1);
        } else if self.values_are_keys && shape.window.is_none() {
            branch.input.truncate(2);
            branch.operands[2] = branch.operands[1].clone();
        }
        branch
    }

    /// The step that adds what a block looks up by token id. Its linears are small and stay in float.
    fn input_by_token(&self, index: usize) -> StepSpec {
        let (reader, sizes) = (self.reader, self.sizes);
        let linear = |name: &str, shape: [usize; 2]| {
            let mut linear = reader.paths.linear(index, name, shape, false);
            linear.quantized = false;
            linear
        };
        let input = vec![linear(
            "per_layer_input_gate",
            [sizes.hidden, self.input_width],
        )];
        let branch = BranchSpec {
            mixer: Mixer::PerBlockInput(sizes.activation),
            operands: whole(&input),
            input,
            output: linear("per_layer_projection", [self.input_width, sizes.hidden]),
            after: Some(sizes.norm(reader, index, "post_per_layer_input_norm", sizes.hidden)),
        };
        step(None, branch)
    }

    fn per_block(&self) -> Result<Option<PerBlockInputSpec>, ConfigError> {
        const KEY: &str = "vocab_size_per_layer_input";
        if self.input_width == 0 {
            return Ok(None);
        }
        let (reader, sizes, width) = (self.reader, self.sizes, self.input_width);
        let vocab = reader.fields.optional_size(KEY)?.unwrap_or(262_144);
        if vocab < sizes.vocab {
            return Err(ConfigError::value(KEY, vocab, "at least vocab_size"));
        }
        Ok(Some(PerBlockInputSpec {
            table: reader.paths.outer("embed_tokens_per_layer.weight"),
            vocab,
            width,
            row_factor: (width as f64).sqrt() as f32,
            projection: reader.paths.outer("per_layer_model_projection.weight"),
            projection_factor: (sizes.hidden as f64).powf(-0.5) as f32,
            norm: sizes.outer_norm(reader, "per_layer_projection_norm", width),
            factor: 0.5f32.sqrt(),
        }))
    }

    /// Published files hold keys and values of blocks that attend to those of earlier ones.
    fn unused(&self) -> Vec<String> {
        let shared = self.heads.keys.iter().enumerate();
        let shared = shared.filter(|(_, keys)| matches!(keys, KeySource::Block(_)));
        let modules = |(index, _)| {
            let names = ["k_proj", "v_proj", "k_norm", "v_norm"];
            names.map(|name| self.reader.paths.block(index, &format!("self_attn.{name}")))
        };
        shared.flat_map(modules).collect()
    }
}
