//! Ministral 3 (`Ministral3ForCausalLM`, the text model of `Mistral3ForConditionalGeneration`): Mistral
//! with yarn and with queries that grow with their position.

use gptq_kernels::Pairing;

use super::relative::{Relative, name_unlike};
use super::rotaries::Rotaries;
use super::sizes::Defaults;
use super::{Reader, Sizes, windows};
use crate::config::ConfigError;
use crate::config_keys::Honoured;
use crate::rope::{Reads, RopeScaling};
use crate::spec::{ModelSpec, QueryFactor};

const DEFAULTS: Defaults = Defaults {
    eps: ("rms_norm_eps", 1e-5),
    positions: 262_144,
    head_dim: Some(128),
    kv_heads: Some(8),
    ..Defaults::LLAMA
};

/// Positions of the first training where the file has no rotary settings.
const ORIGINAL: usize = 16_384;

pub(super) fn read(reader: &Reader<'_>) -> Result<ModelSpec, ConfigError> {
    let mut sizes = Sizes::read(reader, &Honoured::NOTHING, &DEFAULTS)?;
    name_unlike(
        &mut sizes,
        reader,
        &[("attention_bias", false), ("mlp_bias", false)],
    )?;
    let reads = Reads {
        query_factor: true,
        ..Reads::LLAMA
    };
    let mut rotaries = Rotaries::one_of(reader, &sizes, &reads, Pairing::Halves)?;
    let given = |key| reader.fields.get(key).is_some();
    if !given("rope_parameters") && !given("rope_scaling") {
        let table = &mut rotaries.tables[0];
        table.theta = 1e6;
        table.scaling = RopeScaling::Yarn {
            factor: 16.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.0,
            original: ORIGINAL,
        };
        table.query_factor = Some(QueryFactor {
            beta: 0.1,
            original: ORIGINAL,
        });
    }
    let relative = Relative::new(windows::everywhere(reader, &mut sizes, None)?);
    Ok(relative.model(reader, &sizes, rotaries))
}
