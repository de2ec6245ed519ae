//! Numbers as people read them.

/// Placeholder for an absent value.
pub(super) const ABSENT: &str = "–";
/// In front of negative numbers.
const MINUS: &str = "\u{2212}";

/// Three decimals, fewer where the number is large.
pub(super) fn perplexity(value: f64) -> String {
    match value {
        v if v < 1_000.0 => format!("{v:.3}"),
        v if v < 100_000.0 => format!("{v:.0}"),
        v => format!("{v:.2e}"),
    }
}

/// A perplexity with one standard error.
pub(super) fn perplexity_with_error(value: f64, nll_stderr: f64) -> String {
    let spread = value * nll_stderr;
    format!("{} ± {}", perplexity(value), perplexity(spread))
}

/// Four decimals, or two digits where those would be lost.
pub(super) fn nats(value: f64) -> String {
    let text = match value.abs() {
        0.0 => "0".to_string(),
        size if size < 1e-3 => format!("{value:.1e}"),
        _ => format!("{value:.4}"),
    };
    text.replacen('-', if value < 0.0 { MINUS } else { "-" }, 1)
}

/// Nats with a sign.
pub(super) fn signed_nats(value: f64) -> String {
    match value > 0.0 {
        true => format!("+{}", nats(value)),
        false => nats(value),
    }
}

/// A share, 0 to 1, in percent.
pub(super) fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// Tokens a second.
pub(super) fn rate(value: f64) -> String {
    match value {
        v if v < 100.0 => format!("{v:.1}"),
        v => thousands(v.round() as u64),
    }
}

/// Seconds, or minutes and hours where there are many.
pub(super) fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 600.0 => format!("{s:.0} s"),
        s if s < 36_000.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3_600.0),
    }
}

/// Digits in threes.
pub(super) fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_value_looks_like_none() {
        assert_eq!(nats(0.0123456), "0.0123");
        assert_eq!(nats(0.0000123), "1.2e-5");
        assert_eq!(nats(-0.000012), "\u{2212}1.2e-5");
        assert_eq!(signed_nats(0.5), "+0.5000");
        assert_eq!(signed_nats(-0.5), "\u{2212}0.5000");
        assert_eq!(nats(0.0), "0");
    }

    #[test]
    fn large_numbers_stay_short() {
        assert_eq!(perplexity(24.0193), "24.019");
        assert_eq!(perplexity(4321.6), "4322");
        assert_eq!(perplexity(123_456.0), "1.23e5");
        assert_eq!(rate(1234.4), "1,234");
        assert_eq!(rate(62.04), "62.0");
        assert_eq!(thousands(1_048_576), "1,048,576");
        assert_eq!(duration(313.4), "313 s");
        assert_eq!(duration(5_400.0), "90 min");
    }
}
