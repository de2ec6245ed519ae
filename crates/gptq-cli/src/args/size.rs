//! Sizes in bytes.

use crate::failure::Failure;

/// `8GB`, `6000MB`, `8GiB` or a number of bytes.
pub(super) fn parse_size(text: &str) -> Result<usize, String> {
    let units = [
        ("GiB", (1u64 << 30) as f64),
        ("MiB", (1u64 << 20) as f64),
        ("GB", 1e9),
        ("MB", 1e6),
        ("", 1.0),
    ];
    let (number, unit) = (units.iter())
        .find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))
        .expect("the last suffix is empty");
    match number.trim().parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok((number * unit) as usize),
        _ => Err("expected a size such as 8GB".to_string()),
    }
}

/// A file of 1 MB: smaller limits come from a wrong unit.
const MIN_SHARD_GB: f64 = 1e-3;

/// Bytes of the largest weight file.
pub fn shard_bytes(gb: f64) -> Result<u64, Failure> {
    match gb >= MIN_SHARD_GB {
        true => Ok((gb * 1e9) as u64),
        false => Err(Failure::new(format!(
            "--max-shard-size {gb} is not {MIN_SHARD_GB} GB or more"
        ))),
    }
}
