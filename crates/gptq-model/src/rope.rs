//! Rotary frequencies and their scalings, as `modeling_rope_utils.py` of transformers has them.

use std::f64::consts::PI;

use gptq_kernels::Rotation;

use crate::config::{ConfigError, Fields};
use crate::config_keys;

/// How the rotary frequencies differ from `theta^(-2i/d)`.
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
}

/// The rotary settings of a file.
#[derive(Debug)]
pub(crate) struct Rope {
    pub theta: f64,
    pub scaling: RopeScaling,
    /// Keys of the block that its kind does not read.
    pub unread_keys: Vec<String>,
}

/// `rope_theta` and the scaling from either spelling: `rope_theta` + `rope_scaling`, or the
/// `rope_parameters` of transformers 5. Where a file has both, or the base twice, they must agree:
/// readers differ in which they take.
pub(crate) fn read(fields: &Fields<'_>, max_positions: usize) -> Result<Rope, ConfigError> {
    const DEFAULT_THETA: f64 = 10_000.0;
    let outer = base(fields)?;
    let mut rope = Rope {
        theta: outer.unwrap_or(DEFAULT_THETA),
        scaling: RopeScaling::None,
        unread_keys: Vec::new(),
    };
    let mut read_before = None;
    for place in ["rope_parameters", "rope_scaling"] {
        let Some(block) = fields.object(place)? else {
            continue;
        };
        if let Some(inner) = base(&block)? {
            if let Some(outer) = outer.filter(|outer| *outer != inner) {
                let values = [outer.to_string(), inner.to_string()];
                return Err(conflict("rope_theta", values, ["the file", place]));
            }
            rope.theta = inner;
        }
        let (scaling, unread_keys) = read_scaling(&block, place, max_positions)?;
        if let Some(before) = read_before.filter(|_| scaling != rope.scaling) {
            let values = [format!("{:?}", rope.scaling), format!("{scaling:?}")];
            return Err(conflict("rope_type", values, [before, place]));
        }
        rope.scaling = scaling;
        rope.unread_keys.extend(unread_keys);
        read_before = Some(place);
    }
    Ok(rope)
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
    // A base of 1 turns all channels alike; yarn divides by its logarithm.
    match fields.optional_number("rope_theta")? {
        Some(theta) if theta <= 1.0 => {
            Err(ConfigError::value("rope_theta", theta, "a number above 1"))
        }
        theta => Ok(theta),
    }
}

/// The scaling, and the keys that it does not read.
fn read_scaling(
    block: &Fields<'_>,
    place: &'static str,
    max_positions: usize,
) -> Result<(RopeScaling, Vec<String>), ConfigError> {
    refuse_blocks_of_layers(block, place)?;
    let kind = match block.text("rope_type")? {
        Some(kind) => Some(kind),
        None => block.text("type")?,
    };
    let original = match block.optional_size("original_max_position_embeddings")? {
        Some(0) => {
            let key = "original_max_position_embeddings";
            return Err(ConfigError::value(key, 0, "at least 1"));
        }
        Some(original) => original,
        None => max_positions.max(1),
    };
    let factor = || above_zero(block, "factor")?.ok_or(ConfigError::Missing("factor"));
    let scaling = match kind {
        // A factor of an unknown kind must not be dropped.
        None if block.optional_number("factor")?.is_some() => {
            return Err(ConfigError::Missing("rope_type"));
        }
        None | Some("default") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: factor()? },
        Some("dynamic") => RopeScaling::Dynamic {
            factor: factor()?,
            original,
        },
        Some("llama3") => read_llama3(block, factor()?, original)?,
        Some("yarn") => read_yarn(block, factor()?, original)?,
        Some(other) => {
            let expected = "linear, dynamic, llama3 or yarn";
            return Err(ConfigError::unsupported("rope_scaling", other, expected));
        }
    };
    let mut read = vec![
        "rope_type",
        "type",
        "rope_theta",
        "original_max_position_embeddings",
    ];
    read.extend(match scaling {
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
    });
    Ok((scaling, config_keys::check_rope(block, &read)?))
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
fn above_zero(block: &Fields<'_>, key: &'static str) -> Result<Option<f64>, ConfigError> {
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
    /// Tables for `positions` of windows `tokens` long.
    pub(crate) fn rotation(
        &self,
        head_dim: usize,
        theta: f64,
        positions: std::ops::Range<usize>,
        tokens: usize,
    ) -> Rotation {
        let frequencies: Vec<f32> = self
            .inverse_frequencies(head_dim, theta, tokens)
            .into_iter()
            .map(|f| f as f32)
            .collect();
        let scale = match self {
            RopeScaling::Yarn {
                attention_factor, ..
            } => *attention_factor as f32,
            _ => 1.0,
        };
        Rotation::new(&frequencies, positions, scale)
    }

    /// `[head_dim / 2]`.
    fn inverse_frequencies(&self, head_dim: usize, theta: f64, tokens: usize) -> Vec<f64> {
        let d = head_dim as f64;
        let plain = |theta: f64| -> Vec<f64> {
            (0..head_dim / 2)
                .map(|i| theta.powf(-2.0 * i as f64 / d))
                .collect()
        };
        match *self {
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
mod tests {
    use super::*;

    fn scaling(json: &str) -> (f64, RopeScaling) {
        let json: serde_json::Value = serde_json::from_str(json).unwrap();
        let rope = read(&Fields(&json), 4096).unwrap();
        (rope.theta, rope.scaling)
    }

    /// Half a head was turned whole, the base of a block inside the block fell back to 10000, and a
    /// factor of 0 made frequencies that are not finite.
    #[test]
    fn settings_that_would_be_lost_or_divide_by_zero_are_refused() {
        for (json, named) in [
            (
                r#"{"rope_parameters": {"partial_rotary_factor": 0.5}}"#,
                "partial_rotary_factor",
            ),
            (
                r#"{"rope_parameters": {"full_attention": {"rope_theta": 500000.0}}}"#,
                "full_attention",
            ),
            (r#"{"rope_theta": 0}"#, "rope_theta"),
            (r#"{"rope_theta": -1e4}"#, "rope_theta"),
            (
                r#"{"rope_scaling": {"type": "linear", "factor": 0.0}}"#,
                "factor",
            ),
            (
                r#"{"rope_scaling": {"type": "yarn", "factor": 4, "truncate": false}}"#,
                "truncate",
            ),
            (
                r#"{"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1,
                    "high_freq_factor": 1}}"#,
                "high_freq_factor",
            ),
            (
                r#"{"rope_scaling": {"type": "dynamic", "factor": 2,
                    "original_max_position_embeddings": 0}}"#,
                "original_max_position_embeddings",
            ),
            (
                r#"{"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 500000.0}}"#,
                "rope_theta",
            ),
            (
                r#"{"rope_scaling": {"type": "linear", "factor": 2},
                    "rope_parameters": {"rope_type": "default"}}"#,
                "rope_type",
            ),
        ] {
            let json: serde_json::Value = serde_json::from_str(json).unwrap();
            let error = read(&Fields(&json), 4096).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }

    /// Values of transformers 4.46 `ROPE_INIT_FUNCTIONS`, recomputed from their formulas in
    /// arbitrary precision; head width 8.
    #[test]
    fn frequencies_of_every_scaling() {
        let (theta, linear) = scaling(
            r#"{"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_theta": 10000.0}"#,
        );
        let got = linear.inverse_frequencies(8, theta, 2048);
        for (got, want) in got.iter().zip([0.125, 0.0125, 0.00125, 0.000125]) {
            assert!((got / want - 1.0).abs() < 1e-12);
        }

        let (theta, dynamic) = scaling(r#"{"rope_scaling": {"type": "dynamic", "factor": 2.0}}"#);
        assert_eq!(
            dynamic.inverse_frequencies(8, theta, 4096),
            RopeScaling::None.inverse_frequencies(8, theta, 4096)
        );
        let grown = dynamic.inverse_frequencies(8, theta, 8192);
        let base: f64 = 10_000.0 * 3.0f64.powf(8.0 / 6.0);
        assert!((grown[1] / base.powf(-0.25) - 1.0).abs() < 1e-12);

        let (theta, llama3) = scaling(
            r#"{"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}}"#,
        );
        let plain = RopeScaling::None.inverse_frequencies(8, theta, 0);
        let got = llama3.inverse_frequencies(8, theta, 0);
        assert_eq!(theta, 500_000.0);
        assert_eq!(got[0], plain[0]);
        assert!((got[3] * 8.0 / plain[3] - 1.0).abs() < 1e-12);
        let turns = 8192.0 * plain[2] / (2.0 * PI);
        let smooth = (turns - 1.0) / 3.0;
        let want = (1.0 - smooth) * plain[2] / 8.0 + smooth * plain[2];
        assert!((got[2] / want - 1.0).abs() < 1e-12, "{turns}");

        let (theta, yarn) = scaling(
            r#"{"rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                "original_max_position_embeddings": 32768}, "rope_theta": 1000000.0}"#,
        );
        let got = yarn.inverse_frequencies(128, theta, 0);
        let plain = RopeScaling::None.inverse_frequencies(128, theta, 0);
        assert_eq!(got[0], plain[0]);
        assert!((got[63] * 4.0 / plain[63] - 1.0).abs() < 1e-12);
        let RopeScaling::Yarn {
            attention_factor, ..
        } = yarn
        else {
            panic!("not yarn");
        };
        assert!((attention_factor - (0.1 * 4.0f64.ln() + 1.0)).abs() < 1e-12);
    }

    #[test]
    fn an_unknown_scaling_is_refused_by_name() {
        let json: serde_json::Value =
            serde_json::from_str(r#"{"rope_scaling": {"rope_type": "longrope"}}"#).unwrap();
        let error = read(&Fields(&json), 4096).unwrap_err().to_string();
        assert!(error.contains("longrope"), "{error}");
    }
}
