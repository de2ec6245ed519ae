//! Rotary frequencies and their scalings, as `modeling_rope_utils.py` of transformers has them.

use std::f64::consts::PI;

use gptq_kernels::Pairing;
use gptq_types::outside_name::shown;

use crate::config::{ConfigError, Fields};
use crate::config_keys;
use crate::spec::{QueryFactor, RotarySpec};

/// RoPE scaling: how frequencies are derived from `theta^(-2i/d)`.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595).
    Linear { factor: f64 },
    /// Base grown with the window beyond the trained length (NTK-aware).
    Dynamic { factor: f64, original: usize },
    /// Low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1).
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original: usize,
    },
    /// Interpolation by wavelength and a temperature (Peng et al. 2023, arXiv:2309.00071).
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        attention_factor: f64,
        original: usize,
    },
    /// A factor for each frequency, others beyond the trained length (Ding et al. 2024, arXiv:2402.13753).
    LongRope {
        short: Vec<f64>,
        long: Vec<f64>,
        attention_factor: f64,
        original: usize,
    },
    /// The first `turning` frequencies of a whole head, the others 0 (Gemma 4); divided by `factor`.
    Proportional { turning: usize, factor: f64 },
}

/// The rotary settings of a file.
#[derive(Debug)]
pub(crate) struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
    /// The part of a head that is rotated.
    pub partial: f64,
    /// `llama_4_scaling_beta`, and the positions that go with it.
    pub query_factor: Option<QueryFactor>,
    /// Keys of the block that its kind does not read.
    pub unread_keys: Vec<String>,
}

/// Rotary keys that a family reads beyond base and scaling, with defaults; for other families they are errors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reads {
    /// The base where the file has none.
    pub theta: f64,
    /// `partial_rotary_factor`, in the file or its block of rotary settings, and its default.
    pub partial: Option<f64>,
    /// `llama_4_scaling_beta`.
    pub query_factor: bool,
    /// `longrope`; `su` and `yarn` are its old names.
    pub longrope: bool,
    /// `original_max_position_embeddings` where the file has none.
    pub original: Option<usize>,
    /// `proportional`, of heads of this width.
    pub proportional: Option<usize>,
    /// `alpha` of `dynamic`, for heads of this width.
    pub alpha: Option<usize>,
}

impl Reads {
    /// Base and scaling alone.
    pub const LLAMA: Reads = Reads {
        theta: 10_000.0,
        partial: None,
        query_factor: false,
        longrope: false,
        original: None,
        proportional: None,
        alpha: None,
    };
}

/// `rope_theta` and the scaling from either spelling: `rope_theta` + `rope_scaling`, or the
/// `rope_parameters` of transformers 5. Where a file has both, or one setting twice, they must agree:
/// readers differ in which they take.
pub(crate) fn read(
    fields: &Fields<'_>,
    max_positions: usize,
    reads: &Reads,
) -> Result<Rope, ConfigError> {
    let outer = Outer::read(fields)?;
    let around = original(fields)?.or(reads.original);
    let mut found: Option<(Rope, &'static str)> = None;
    for place in ["rope_parameters", "rope_scaling"] {
        let Some(block) = block(fields, place)? else {
            continue;
        };
        refuse_blocks_of_layers(&block, place)?;
        // Each by itself: transformers takes the second whole, whatever the first one says.
        let mut rope = outer.rope(reads);
        outer.agrees(&block, place)?;
        read_block(&mut rope, &block, (around, max_positions), reads)?;
        if let Some((earlier, first)) = found {
            earlier.is_same(&rope, [first, place])?;
            rope.unread_keys.extend(earlier.unread_keys);
        }
        found = Some((rope, place));
    }
    Ok(found.map_or_else(|| outer.rope(reads), |(rope, _)| rope))
}

/// The block of rotary settings of this name; an empty one says nothing.
fn block<'a>(fields: &Fields<'a>, place: &'static str) -> Result<Option<Fields<'a>>, ConfigError> {
    let says_something =
        |block: &Fields<'_>| block.0.as_object().is_some_and(|map| !map.is_empty());
    Ok(fields.object(place)?.filter(says_something))
}

/// What stands beside the blocks of rotary settings, and may stand in them once more.
struct Outer {
    theta: Option<f64>,
    partial: Option<f64>,
}

impl Outer {
    fn read(fields: &Fields<'_>) -> Result<Self, ConfigError> {
        Ok(Outer {
            theta: base(fields)?,
            partial: partial(fields)?,
        })
    }

    /// What it says, with the family's defaults.
    fn rope(&self, reads: &Reads) -> Rope {
        let mut rope = Rope::plain(self.theta.unwrap_or(reads.theta));
        if let Some(default) = reads.partial {
            rope.partial = self.partial.unwrap_or(default);
        }
        rope
    }

    /// A setting that a block repeats has the same value there.
    fn agrees(&self, block: &Fields<'_>, place: &'static str) -> Result<(), ConfigError> {
        let same = |key, outer: Option<f64>, inner: Option<f64>| match outer.zip(inner) {
            Some((outer, inner)) if outer != inner => {
                let values = [outer.to_string(), inner.to_string()];
                Err(conflict(key, values, ["the file", place]))
            }
            _ => Ok(()),
        };
        same("rope_theta", self.theta, base(block)?)?;
        same("partial_rotary_factor", self.partial, partial(block)?)
    }
}

/// Rotary settings by kind of layer.
pub(crate) struct Kinds {
    pub sliding: Rope,
    pub full: Rope,
}

/// The rotary settings of a family whose `rope_parameters` hold them by kind of layer
/// (`sliding_attention`, `full_attention`). In the older spelling `rope_theta` and `rope_scaling` are of
/// full attention, and `local_key` is the base of sliding attention.
pub(crate) fn read_kinds(
    fields: &Fields<'_>,
    max_positions: usize,
    [sliding, full]: [&Reads; 2],
    local_key: Option<&'static str>,
) -> Result<Kinds, ConfigError> {
    const PLACE: &str = "rope_parameters";
    let kinds = block(fields, PLACE)?;
    let read_kind = |kind, outer: &Outer, reads: &Reads| -> Result<_, ConfigError> {
        let mut rope = outer.rope(reads);
        let block = kinds.map_or(Ok(None), |kinds| kinds.object(kind))?;
        if let Some(block) = &block {
            outer.agrees(block, PLACE)?;
            read_block(&mut rope, block, (None, max_positions), reads)?;
        }
        Ok((rope, block))
    };
    let outer = Outer::read(fields)?;
    let local = Outer {
        theta: local_key.map_or(Ok(None), |key| base_of(fields, key))?,
        partial: outer.partial,
    };
    let (sliding, of_sliding) = read_kind("sliding_attention", &local, sliding)?;
    let (mut rope, of_full) = read_kind("full_attention", &outer, full)?;
    // One kind alone leaves the other without settings; what stands beside both would be lost.
    let known = |key: &str| matches!(key, "sliding_attention" | "full_attention");
    let members = kinds.and_then(|kinds| kinds.0.as_object());
    if let Some(members) = members
        && (of_sliding.is_none() || of_full.is_none() || members.keys().any(|key| !known(key)))
    {
        let found = members.keys().cloned().collect::<Vec<_>>().join(", ");
        let expected = "settings for full_attention and sliding_attention";
        return Err(ConfigError::unsupported(PLACE, found, expected));
    }
    if let Some(block) = block(fields, "rope_scaling")? {
        refuse_blocks_of_layers(&block, "rope_scaling")?;
        outer.agrees(&block, "rope_scaling")?;
        let mut beside = Rope {
            theta: rope.theta,
            ..outer.rope(full)
        };
        read_block(&mut beside, &block, (None, max_positions), full)?;
        if of_full.is_some() {
            rope.is_same(&beside, [PLACE, "rope_scaling"])?;
        }
        beside.unread_keys.extend(rope.unread_keys);
        rope = beside;
    }
    Ok(Kinds {
        sliding,
        full: rope,
    })
}

impl Rope {
    /// Base `theta` and nothing else.
    pub fn plain(theta: f64) -> Self {
        Rope {
            theta,
            scaling: RopeScaling::None,
            partial: 1.0,
            query_factor: None,
            unread_keys: Vec::new(),
        }
    }

    /// Two blocks of settings make the same table.
    fn is_same(&self, other: &Rope, places: [&'static str; 2]) -> Result<(), ConfigError> {
        let differ = |key, first: String, second: String| match first == second {
            true => Ok(()),
            false => Err(conflict(key, [first, second], places)),
        };
        let (theta, scaling) = (self.theta, &self.scaling);
        differ("rope_theta", theta.to_string(), other.theta.to_string())?;
        let (partial, others) = (self.partial.to_string(), other.partial.to_string());
        differ("partial_rotary_factor", partial, others)?;
        differ(
            "rope_type",
            format!("{scaling:?}"),
            format!("{:?}", other.scaling),
        )?;
        let factors = [self.query_factor, other.query_factor].map(|factor| format!("{factor:?}"));
        let [first, second] = factors;
        differ("llama_4_scaling_beta", first, second)
    }

    /// The table for heads of a width.
    pub fn table(&self, head_dim: usize, pairing: Pairing) -> RotarySpec {
        let rotary_dim = match self.scaling {
            RopeScaling::Proportional { .. } => head_dim,
            _ => (head_dim as f64 * self.partial) as usize / 2 * 2,
        };
        RotarySpec {
            head_dim,
            rotary_dim,
            pairing,
            theta: self.theta,
            scaling: self.scaling.clone(),
            query_factor: self.query_factor,
        }
    }
}

fn partial(fields: &Fields<'_>) -> Result<Option<f64>, ConfigError> {
    const KEY: &str = "partial_rotary_factor";
    match fields.optional_number(KEY)? {
        Some(part) if !(part > 0.0 && part <= 1.0) => {
            Err(ConfigError::value(KEY, part, "a number above 0, at most 1"))
        }
        part => Ok(part),
    }
}

fn original(fields: &Fields<'_>) -> Result<Option<usize>, ConfigError> {
    const KEY: &str = "original_max_position_embeddings";
    match fields.optional_size(KEY)? {
        Some(0) => Err(ConfigError::value(KEY, 0, "at least 1")),
        original => Ok(original),
    }
}

fn conflict(
    key: &'static str,
    [first, second]: [String; 2],
    [first_place, second_place]: [&'static str; 2],
) -> ConfigError {
    let found = format!("{first} in {first_place}, {second} in {second_place}");
    ConfigError::Conflict { key, found }
}

fn base(fields: &Fields<'_>) -> Result<Option<f64>, ConfigError> {
    base_of(fields, "rope_theta")
}

fn base_of(fields: &Fields<'_>, key: &'static str) -> Result<Option<f64>, ConfigError> {
    // A base of 1 rotates all channels alike; yarn divides by its logarithm.
    match fields.optional_number(key)? {
        Some(theta) if theta <= 1.0 => Err(ConfigError::value(key, theta, "a number above 1")),
        theta => Ok(theta),
    }
}

/// `rope_type`, or `type` as it was called before.
fn kind_of<'a>(block: &Fields<'a>, reads: &Reads) -> Result<Option<&'a str>, ConfigError> {
    let [newer, older] = [block.text("rope_type")?, block.text("type")?];
    let own_name = |kind| match kind {
        "su" | "yarn" if reads.longrope => "longrope",
        other => other,
    };
    match newer.zip(older) {
        Some((newer, older)) if own_name(newer) != own_name(older) => {
            let values = [newer, older].map(|kind| shown(kind, 40));
            Err(conflict("rope_type", values, ["`rope_type`", "`type`"]))
        }
        _ => Ok(newer.or(older)),
    }
}

/// Reads one block of settings. `around` is `original_max_position_embeddings` of the file, if it has one,
/// and the positions of the model.
fn read_block(
    rope: &mut Rope,
    block: &Fields<'_>,
    (around, max_positions): (Option<usize>, usize),
    reads: &Reads,
) -> Result<(), ConfigError> {
    rope.theta = base(block)?.unwrap_or(rope.theta);
    let kind = kind_of(block, reads)?;
    let own = original(block)?;
    if let (Some(own), Some(around)) = (own, around)
        && own != around
    {
        // transformers takes the file's, other readers the block's.
        let values = [around.to_string(), own.to_string()];
        let places = ["the file", "its rotary settings"];
        return Err(conflict("original_max_position_embeddings", values, places));
    }
    let original = own.or(around).unwrap_or(max_positions.max(1));
    let factor = || above_zero(block, "factor")?.ok_or(ConfigError::Missing("factor"));
    if reads.partial.is_some() {
        rope.partial = partial(block)?.unwrap_or(rope.partial);
    }
    rope.scaling = match kind {
        // A factor of an unknown kind must not be dropped.
        None if block.optional_number("factor")?.is_some() => {
            return Err(ConfigError::Missing("rope_type"));
        }
        None | Some("default") => RopeScaling::None,
        Some("longrope" | "su" | "yarn") if reads.longrope => {
            read_longrope(block, original, max_positions)?
        }
        Some("linear") => RopeScaling::Linear { factor: factor()? },
        Some("dynamic") if has_alpha(block, reads)? => {
            rope.theta *= growth_by_alpha(block, reads)?;
            RopeScaling::None
        }
        Some("dynamic") => RopeScaling::Dynamic {
            factor: factor()?,
            original,
        },
        Some("llama3") => read_llama3(block, factor()?, original)?,
        Some("yarn") => read_yarn(block, factor()?, original)?,
        Some("proportional") if reads.proportional.is_some() => {
            let head_dim = reads.proportional.unwrap_or(0);
            let part = partial(block)?.unwrap_or(1.0);
            RopeScaling::Proportional {
                turning: ((part * head_dim as f64) as usize / 2).min(head_dim / 2),
                factor: above_zero(block, "factor")?.unwrap_or(1.0),
            }
        }
        Some(other) => {
            let expected = "linear, dynamic, llama3 or yarn";
            return Err(ConfigError::unsupported("rope_scaling", other, expected));
        }
    };
    if reads.query_factor {
        const KEY: &str = "llama_4_scaling_beta";
        let beta = match block.optional_number(KEY)? {
            Some(beta) if !(0.0..=1e3).contains(&beta) => {
                return Err(ConfigError::value(KEY, beta, "a number from 0 to 1000"));
            }
            beta => beta,
        };
        rope.query_factor = beta.map(|beta| QueryFactor { beta, original });
    }
    let unread = config_keys::check_rope(block, &keys_of(&rope.scaling, reads))?;
    rope.unread_keys.extend(unread);
    Ok(())
}

/// The keys that a kind of scaling reads.
fn keys_of(scaling: &RopeScaling, reads: &Reads) -> Vec<&'static str> {
    let mut keys = vec![
        "rope_type",
        "type",
        "rope_theta",
        "original_max_position_embeddings",
    ];
    keys.extend(match scaling {
        RopeScaling::None => &[][..],
        RopeScaling::Linear { .. } | RopeScaling::Dynamic { .. } => &["factor"],
        RopeScaling::Llama3 { .. } => &["factor", "low_freq_factor", "high_freq_factor"],
        RopeScaling::Yarn { .. } => &[
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        ],
        RopeScaling::LongRope { .. } => {
            &["factor", "long_factor", "short_factor", "attention_factor"]
        }
        RopeScaling::Proportional { .. } => &["factor", "partial_rotary_factor"],
    });
    if reads.partial.is_some() {
        keys.push("partial_rotary_factor");
    }
    if reads.query_factor {
        keys.extend(["llama_4_scaling_beta", "max_position_embeddings"]);
    }
    if reads.alpha.is_some() {
        // Beside `alpha` the others stand in every file and say nothing.
        keys.extend([
            "alpha",
            "factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
        ]);
    }
    keys
}

fn read_longrope(
    block: &Fields<'_>,
    original: usize,
    max_positions: usize,
) -> Result<RopeScaling, ConfigError> {
    let list = |key: &'static str| -> Result<Vec<f64>, ConfigError> {
        let value = block.get(key).ok_or(ConfigError::Missing(key))?;
        let numbers = value.as_array().map(|list| {
            let number =
                |value: &serde_json::Value| value.as_f64().filter(|x| (1e-6..=1e9).contains(x));
            list.iter().map(number).collect::<Option<Vec<f64>>>()
        });
        (numbers.flatten())
            .ok_or_else(|| ConfigError::value(key, value, "a list of numbers above 0"))
    };
    let factor = match above_zero(block, "factor")? {
        Some(factor) => factor,
        None => max_positions as f64 / original as f64,
    };
    let attention_factor = match above_zero(block, "attention_factor")? {
        Some(given) => given,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original.max(2) as f64).ln()).sqrt(),
    };
    Ok(RopeScaling::LongRope {
        short: list("short_factor")?,
        long: list("long_factor")?,
        attention_factor,
        original,
    })
}

/// `alpha` of 0 is as good as none.
fn has_alpha(block: &Fields<'_>, reads: &Reads) -> Result<bool, ConfigError> {
    let alpha = block.optional_number("alpha")?;
    Ok(reads.alpha.is_some() && alpha.is_some_and(|alpha| alpha != 0.0))
}

/// The factor that Hunyuan applies to the base: `alpha^(d / (d - 2))`, whatever the length of the text.
fn growth_by_alpha(block: &Fields<'_>, reads: &Reads) -> Result<f64, ConfigError> {
    let alpha = above_zero(block, "alpha")?.unwrap_or(1.0);
    let width = reads.alpha.unwrap_or(0).max(4) as f64;
    Ok(alpha.powf(width / (width - 2.0)))
}

/// Settings by kind of layer are blocks inside the block; the one in force is not said by them.
fn refuse_blocks_of_layers(block: &Fields<'_>, place: &'static str) -> Result<(), ConfigError> {
    let mut members = block.0.as_object().into_iter().flatten();
    match members.find(|(_, value)| value.is_object()) {
        None => Ok(()),
        Some((name, _)) => Err(ConfigError::unsupported(
            place,
            format!("{{\"{name}\": {{...}}}}"),
            "one set of rotary settings for all layers",
        )),
    }
}

/// So far from 0 and from the largest number that no frequency is lost.
pub(crate) fn above_zero(
    block: &Fields<'_>,
    key: &'static str,
) -> Result<Option<f64>, ConfigError> {
    match block.optional_number(key)? {
        Some(number) if !(1e-6..=1e9).contains(&number) => {
            Err(ConfigError::value(key, number, "a number from 1e-6 to 1e9"))
        }
        number => Ok(number),
    }
}

fn read_llama3(
    block: &Fields<'_>,
    factor: f64,
    original: usize,
) -> Result<RopeScaling, ConfigError> {
    let number = |key| above_zero(block, key)?.ok_or(ConfigError::Missing(key));
    let low_freq_factor = number("low_freq_factor")?;
    let high_freq_factor = number("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        let expected = "more than low_freq_factor";
        return Err(ConfigError::value(
            "high_freq_factor",
            high_freq_factor,
            expected,
        ));
    }
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor,
        high_freq_factor,
        original,
    })
}

fn read_yarn(block: &Fields<'_>, factor: f64, original: usize) -> Result<RopeScaling, ConfigError> {
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: above_zero(block, "beta_fast")?.unwrap_or(32.0),
        beta_slow: above_zero(block, "beta_slow")?.unwrap_or(1.0),
        attention_factor: yarn_attention_factor(block, factor)?,
        original,
    })
}

fn yarn_attention_factor(block: &Fields<'_>, factor: f64) -> Result<f64, ConfigError> {
    if let Some(given) = above_zero(block, "attention_factor")? {
        return Ok(given);
    }
    let temperature = |mscale: f64| match factor > 1.0 {
        true => 0.1 * mscale * factor.ln() + 1.0,
        false => 1.0,
    };
    let unless_zero = |key| match block.optional_number(key)? {
        Some(0.0) => Ok(None),
        _ => above_zero(block, key),
    };
    Ok(
        match (unless_zero("mscale")?, unless_zero("mscale_all_dim")?) {
            (Some(mscale), Some(all_dim)) => temperature(mscale) / temperature(all_dim),
            _ => temperature(1.0),
        },
    )
}

impl RopeScaling {
    /// A frequency for each pair of rotated components, and the factor of cosines and sines, for texts
    /// that are `tokens` long.
    pub(crate) fn frequencies(
        &self,
        rotary_dim: usize,
        theta: f64,
        tokens: usize,
    ) -> (Vec<f32>, f32) {
        let frequencies = self.inverse_frequencies(rotary_dim, theta, tokens);
        let scale = match self {
            RopeScaling::Yarn {
                attention_factor, ..
            }
            | RopeScaling::LongRope {
                attention_factor, ..
            } => *attention_factor as f32,
            _ => 1.0,
        };
        (frequencies.into_iter().map(|f| f as f32).collect(), scale)
    }

    /// `[rotary_dim / 2]`.
    fn inverse_frequencies(&self, head_dim: usize, theta: f64, tokens: usize) -> Vec<f64> {
        let d = head_dim as f64;
        let plain = |theta: f64| -> Vec<f64> {
            (0..head_dim / 2)
                .map(|i| theta.powf(-2.0 * i as f64 / d))
                .collect()
        };
        match *self {
            RopeScaling::LongRope {
                ref short,
                ref long,
                original,
                ..
            } => {
                let factors = if tokens > original { long } else { short };
                let pairs = plain(theta).into_iter().zip(factors);
                pairs
                    .map(|(frequency, factor)| frequency / factor)
                    .collect()
            }
            RopeScaling::Proportional { turning, factor } => (plain(theta).into_iter().enumerate())
                .map(|(at, frequency)| {
                    if at < turning {
                        frequency / factor
                    } else {
                        0.0
                    }
                })
                .collect(),
            RopeScaling::None => plain(theta),
            RopeScaling::Linear { factor } => {
                plain(theta).into_iter().map(|f| f / factor).collect()
            }
            RopeScaling::Dynamic { factor, original } => {
                let reach = tokens.max(original) as f64 / original as f64;
                let growth = factor * reach - (factor - 1.0);
                plain(theta * growth.powf(d / (d - 2.0)))
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original,
            } => plain(theta)
                .into_iter()
                .map(|f| {
                    let turns = original as f64 * f / (2.0 * PI);
                    let keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    let keep = keep.clamp(0.0, 1.0);
                    (1.0 - keep) * f / factor + keep * f
                })
                .collect(),
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original,
                ..
            } => {
                let dimension_of = |turns: f64| {
                    d * (original as f64 / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
                };
                let low = dimension_of(beta_fast).floor().max(0.0);
                let high = dimension_of(beta_slow).ceil().min(d - 1.0);
                let high = if high == low { low + 0.001 } else { high };
                let ramp = |i: usize| ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                plain(theta)
                    .into_iter()
                    .enumerate()
                    .map(|(i, f)| f / factor * ramp(i) + f * (1.0 - ramp(i)))
                    .collect()
            }
        }
    }
}

#[cfg(test)]
mod tests;
