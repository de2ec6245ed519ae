//! Sizes in bytes.

use gptq_types::outside_name::shown;

use crate::failure::Failure;

/// `8GB`, `6000MB`, `8GiB` or a number of bytes.
pub(super) fn parse_size(text: &str) -> Result<usize, String> {
    let bytes = bytes(text, 1.0).ok_or("expected a size such as 8GB")?;
    usize::try_from(bytes).map_err(|_| "more than this machine can address".to_string())
}

/// Bytes of a size whose number is in `unit`s where it names none. Nothing for what is no size, or
/// more than 64 bits hold.
fn bytes(text: &str, unit: f64) -> Option<u64> {
    let units = [
        ("GiB", (1u64 << 30) as f64),
        ("MiB", (1u64 << 20) as f64),
        ("GB", 1e9),
        ("MB", 1e6),
        ("", unit),
    ];
    let (number, unit) =
        (units.iter()).find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, unit)))?;
    let number: f64 = number.trim().parse().ok()?;
    let bytes = number * unit;
    // 2^64 as f64: the first value that does not fit.
    (number > 0.0 && bytes < 18_446_744_073_709_551_616.0).then_some(bytes as u64)
}

/// A file of 1 MB: smaller limits come from a wrong unit.
const MIN_SHARD_BYTES: u64 = 1_000_000;

/// Bytes of the largest weight file: `4GB`, `500MB`; a bare number is in GB.
pub fn shard_bytes(text: &str) -> Result<u64, Failure> {
    match bytes(text, 1e9).filter(|&bytes| bytes >= MIN_SHARD_BYTES) {
        Some(bytes) => Ok(bytes),
        None => Err(Failure::with_hint(
            format!(
                "--max-shard-size `{}` is not a size of 0.001 GB or more",
                shown(text, 40)
            ),
            "sizes are written 4GB, 500MB or, in GB, 4",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_fit() {
        let shard = |text: &str| shard_bytes(text).map_err(|failure| failure.text);
        assert_eq!(shard("4"), Ok(4_000_000_000));
        assert_eq!(shard("0.001"), Ok(1_000_000));
        assert_eq!(shard("4GB"), Ok(4_000_000_000));
        assert_eq!(shard("500MB"), Ok(500_000_000));
        assert_eq!(shard("2GiB"), Ok(1 << 31));
        assert_eq!(parse_size("8GB"), Ok(8_000_000_000));
        assert_eq!(parse_size("12345"), Ok(12345));
        for text in [
            "",
            "GB",
            "-1",
            "0",
            "nan",
            "inf",
            "1e30",
            "4TB",
            "0.0001",
            "99999999999GB",
        ] {
            assert!(shard(text).is_err(), "{text}");
        }
        for text in ["", "0GB", "nan", "inf", "1e30GB", "-1MB"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
