//! Rotary embeddings: the row order that llama.cpp gives to `q` and `k`, and scaled frequencies.

use serde_json::{Value as Json, json};

use crate::HubError;
use crate::gguf::architecture::Architecture;
use crate::gguf::dequant::dequantize;
use crate::gguf::read::GgufFile;

/// The frequency divisors of Llama 3.
const DIVISORS: &str = "rope_freqs.weight";
/// The two lists of longrope, for texts beyond the original context and for shorter ones.
const LONG_FACTORS: &str = "rope_factors_long.weight";
const SHORT_FACTORS: &str = "rope_factors_short.weight";

/// RoPE settings that a file stores as tensors; they go into `config.json`, not into the
/// weights.
#[derive(Debug, PartialEq)]
pub(crate) enum RopeTensors {
    None,
    /// A divisor for each frequency.
    Divisors(Vec<f32>),
    /// Factors for each frequency, for long texts and for short ones.
    Factors {
        long: Vec<f32>,
        short: Vec<f32>,
    },
}

impl RopeTensors {
    /// Their names in a file of this architecture.
    pub(crate) fn names(architecture: Architecture) -> &'static [&'static str] {
        match architecture {
            Architecture::Phi3 => &[LONG_FACTORS, SHORT_FACTORS],
            _ => &[DIVISORS],
        }
    }

    /// Reads them, `[count]` each.
    pub(crate) fn read(
        file: &GgufFile,
        architecture: Architecture,
        count: usize,
    ) -> Result<Self, HubError> {
        let list = |name: &str| list(file, name, count);
        if architecture != Architecture::Phi3 {
            let divisors = list(DIVISORS)?;
            return Ok(divisors.map_or(RopeTensors::None, RopeTensors::Divisors));
        }
        match (list(LONG_FACTORS)?, list(SHORT_FACTORS)?) {
            (None, None) => Ok(RopeTensors::None),
            (Some(long), Some(short)) => Ok(RopeTensors::Factors { long, short }),
            (None, _) => Err(file.tensor_error(LONG_FACTORS, "is missing")),
            (_, None) => Err(file.tensor_error(SHORT_FACTORS, "is missing")),
        }
    }

    /// The name of one that is there.
    pub(crate) fn name(&self) -> Option<&'static str> {
        match self {
            RopeTensors::None => None,
            RopeTensors::Divisors(_) => Some(DIVISORS),
            RopeTensors::Factors { .. } => Some(LONG_FACTORS),
        }
    }
}

fn list(file: &GgufFile, name: &str, count: usize) -> Result<Option<Vec<f32>>, HubError> {
    let Some(tensor) = file.tensors().iter().find(|tensor| tensor.name == name) else {
        return Ok(None);
    };
    if tensor.shape != [count] {
        let reason = format!("has shape {:?}, expected [{count}]", tensor.shape);
        return Err(file.tensor_error(name, reason));
    }
    let mut values = vec![0.0; count];
    dequantize(tensor.block_type, &file.read(tensor)?, &mut values);
    match values.iter().find(|value| !value.is_finite()) {
        Some(value) => Err(file.tensor_error(name, format!("holds {value}"))),
        None => Ok(Some(values)),
    }
}

/// Puts the rows of a llama `attn_q` or `attn_k` back into the order of the Hugging Face layout.
///
/// `data` is `[heads * head_dim, ...]` row-major. llama.cpp rotates neighbouring rows, so its
/// converter stored the pair (i, i + head_dim / 2) of each head as rows 2i and 2i + 1; this is the
/// inverse. A bias is the case of one element per row.
pub(crate) fn unrope(data: &[u8], head_dim: usize, row_bytes: usize) -> Vec<u8> {
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(data.len());
    for head in data.chunks_exact(head_dim * row_bytes) {
        for row in 0..head_dim {
            let source = row % half * 2 + row / half;
            out.extend_from_slice(&head[source * row_bytes..][..row_bytes]);
        }
    }
    out
}

/// `rope_scaling` of `config.json` out of the `ARCH.rope.scaling.*` keys; `null` for none.
///
/// Fails on methods and parameters that have no counterpart there.
pub(crate) fn scaling_from_keys(file: &GgufFile, arch: &str) -> Result<Json, HubError> {
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    let legacy = format!("{arch}.rope.scale_linear");
    let method = file.optional_str(&key("type"))?;
    let factor = match file.optional_f64(&key("factor"))? {
        None if method.is_none() => file.optional_f64(&legacy)?,
        factor => factor,
    };
    let method = method.unwrap_or(match factor {
        Some(factor) if factor != 1.0 => "linear",
        _ => "none",
    });
    match method {
        "none" => Ok(Json::Null),
        "linear" => {
            let factor = file.require(&key("factor"), factor)?;
            Ok(json!({"rope_type": "linear", "type": "linear", "factor": factor}))
        }
        "yarn" => yarn(file, &key, factor),
        other => Err(file.metadata_error(&key("type"), format!("`{other}` is not supported"))),
    }
}

fn yarn(
    file: &GgufFile,
    key: &dyn Fn(&str) -> String,
    factor: Option<f64>,
) -> Result<Json, HubError> {
    let factor = file.require(&key("factor"), factor)?;
    let original = key("original_context_length");
    let original = file.require(&original, file.optional_u64(&original)?)?;
    let mut scaling = json!({
        "rope_type": "yarn",
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    });
    for (name, field) in [
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ] {
        if let Some(value) = file.optional_f64(&key(name))? {
            scaling[field] = json!(value);
        }
    }
    Ok(scaling)
}

/// The attention factor is a square root that the converter computed in f64 and stored as f32.
const ATTENTION_TOLERANCE: f64 = 1e-6;

/// `rope_scaling` of type `longrope`. `attention` is what scores are multiplied by, twice; it is
/// left out where it is what `context` and the original context imply, as on the hub.
pub(crate) fn longrope_scaling(
    long: &[f32],
    short: &[f32],
    context: u64,
    original: u64,
    attention: Option<f64>,
) -> Json {
    // the shortest decimal of an f32: 1.1 stays 1.1
    let decimals = |factors: &[f32]| -> Vec<f64> {
        let decimal = |factor: &f32| factor.to_string().parse().unwrap_or(f64::from(*factor));
        factors.iter().map(decimal).collect()
    };
    let mut scaling = json!({
        "type": "longrope",
        "long_factor": decimals(long),
        "short_factor": decimals(short),
    });
    let ratio = context as f64 / original as f64;
    let implied = match ratio > 1.0 {
        true => (1.0 + ratio.ln() / (original as f64).ln()).sqrt(),
        false => 1.0,
    };
    if let Some(factor) = attention.filter(|factor| (factor - implied).abs() > ATTENTION_TOLERANCE)
    {
        scaling["attention_factor"] = json!(factor);
    }
    scaling
}

/// The parameters that every published Llama 3.1 and 3.2 model shares.
const LLAMA3_LOW: f64 = 1.0;
const LLAMA3_HIGH: f64 = 4.0;
const LLAMA3_ORIGINAL_CONTEXT: u64 = 8192;
/// The converter computed in f32 from f32 frequencies: a few units in the last place of a value
/// that the interpolation spreads by at most `factor`.
const LLAMA3_TOLERANCE: f64 = 1e-4;

/// `rope_scaling` of type `llama3` out of `rope_freqs.weight`, which holds the divisor of each
/// rotary frequency (`head_dim / 2` of them).
///
/// The file keeps only the divisors, not the four parameters behind them. The largest divisor is
/// the factor; the other three are taken as Llama 3 publishes them, and all divisors are computed
/// anew: the answer is `None` unless every one agrees.
pub(crate) fn llama3_scaling(divisors: &[f32], theta: f64) -> Option<Json> {
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    let agrees = llama3_divisors(divisors.len(), theta, factor)
        .zip(divisors)
        .all(|(expected, &found)| {
            (f64::from(found) - expected).abs() <= LLAMA3_TOLERANCE * expected
        });
    (agrees && factor > 1.0).then(|| {
        json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
        })
    })
}

/// Long waves are divided by the factor, short ones are left, those between are interpolated.
fn llama3_divisors(count: usize, theta: f64, factor: f64) -> impl Iterator<Item = f64> {
    let context = LLAMA3_ORIGINAL_CONTEXT as f64;
    (0..count).map(move |i| {
        let frequency = theta.powf(-(i as f64) / count as f64);
        let wavelength = std::f64::consts::TAU / frequency;
        if wavelength < context / LLAMA3_HIGH {
            1.0
        } else if wavelength > context / LLAMA3_LOW {
            factor
        } else {
            let smooth = (context / wavelength - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unrope_inverts_the_order_of_llama_cpp() {
        // one head of 6 rows: pairs (0,3) (1,4) (2,5) were stored next to each other
        assert_eq!(unrope(&[0, 3, 1, 4, 2, 5], 6, 1), [0, 1, 2, 3, 4, 5]);
        // two heads of 4 rows with 2 bytes each
        let stored = [0, 0, 2, 2, 1, 1, 3, 3, 10, 10, 12, 12, 11, 11, 13, 13];
        let plain = [0, 0, 1, 1, 2, 2, 3, 3, 10, 10, 11, 11, 12, 12, 13, 13];
        assert_eq!(unrope(&stored, 4, 2), plain);
    }

    #[test]
    fn llama3_divisors_are_recognized_and_others_are_not() {
        let divisors: Vec<f32> = llama3_divisors(64, 500_000.0, 8.0)
            .map(|d| d as f32)
            .collect();
        // Llama 3.1: 29 short waves, 6 between, 29 long ones; computed with the published formula
        assert_eq!(divisors.iter().filter(|&&d| d == 1.0).count(), 29);
        assert_eq!(divisors.iter().filter(|&&d| d == 8.0).count(), 29);
        let scaling = llama3_scaling(&divisors, 500_000.0).unwrap();
        assert_eq!(scaling["factor"], 8.0);
        assert_eq!(scaling["original_max_position_embeddings"], 8192);

        // Llama 3.2 1B: head size 64, factor 32; the middle as numpy computes it in f32
        let mut small = vec![1.0f32; 15];
        small.extend([1.651329, 3.292263, 9.666731]);
        small.extend([32.0f32; 14]);
        assert_eq!(llama3_scaling(&small, 500_000.0).unwrap()["factor"], 32.0);

        assert!(llama3_scaling(&divisors, 10_000.0).is_none());
        let mut changed = divisors.clone();
        changed[32] *= 1.001;
        assert!(llama3_scaling(&changed, 500_000.0).is_none());
        assert!(llama3_scaling(&[1.0; 64], 500_000.0).is_none());
    }
}
