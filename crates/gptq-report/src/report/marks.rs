//! Shapes of marks and dashes of lines, which distinguish series without colour.

use std::fmt::Write;

/// Shapes before they repeat, hollow.
const SHAPES: usize = 6;
/// Colours of the page's style.
const COLOURS: usize = 8;
const DASHES: [&str; 6] = ["", "6 2", "2 2", "8 2 2 2", "10 3", "4 1.5"];

/// Coordinates with one decimal, which is a third of a pixel at most.
pub(super) fn n(value: f64) -> String {
    let text = format!("{value:.1}");
    match text.strip_suffix(".0") {
        Some("-0") => "0".to_string(),
        Some(whole) => whole.to_string(),
        None => text,
    }
}

/// Text inside of markup.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            // Control characters are errors in markup.
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Class that gives a series its colour.
pub(super) fn class(series: usize) -> String {
    format!("s{}", series % COLOURS)
}

/// Dashes of its line.
pub(super) fn dashes(series: usize) -> String {
    match DASHES[series % DASHES.len()] {
        "" => String::new(),
        pattern => format!(r#" stroke-dasharray="{pattern}""#),
    }
}

/// The mark of a series around a point; `r` is half its width.
pub(super) fn mark(series: usize, x: f64, y: f64, r: f64) -> String {
    let hollow = (series / SHAPES) % 2 == 1;
    let paint = match hollow {
        true => r#"class="hollow""#,
        false => r#"class="solid""#,
    };
    // Corners that make shapes look equally large.
    let corners: &[(f64, f64)] = match series % SHAPES {
        0 => {
            return format!(
                r#"<circle {paint} cx="{}" cy="{}" r="{}"/>"#,
                n(x),
                n(y),
                n(r)
            );
        }
        1 => &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        2 => &[(0.0, -1.2), (1.15, 0.85), (-1.15, 0.85)],
        3 => &[(0.0, -1.35), (1.35, 0.0), (0.0, 1.35), (-1.35, 0.0)],
        4 => &[(0.0, 1.2), (1.15, -0.85), (-1.15, -0.85)],
        _ => &[
            (-1.1, -0.5),
            (-0.5, -1.1),
            (0.0, -0.6),
            (0.5, -1.1),
            (1.1, -0.5),
            (0.6, 0.0),
            (1.1, 0.5),
            (0.5, 1.1),
            (0.0, 0.6),
            (-0.5, 1.1),
            (-1.1, 0.5),
            (-0.6, 0.0),
        ],
    };
    let mut points = String::new();
    for (dx, dy) in corners {
        let _ = write!(points, "{},{} ", n(x + r * dx), n(y + r * dy));
    }
    format!(r#"<polygon {paint} points="{}"/>"#, points.trim_end())
}

/// A piece of the line with its mark, for a key.
pub(super) fn sample(series: usize) -> String {
    format!(
        r#"<svg class="key {}" viewBox="0 0 36 12" width="36" height="12" aria-hidden="true"><path class="line" d="M0 6H36"{}/>{}</svg>"#,
        class(series),
        dashes(series),
        mark(series, 18.0, 6.0, 3.6)
    )
}

/// The mark alone, for a table whose row names the series.
pub(super) fn mark_alone(series: usize) -> String {
    format!(
        r#"<svg class="key {}" viewBox="0 0 12 12" width="12" height="12" aria-hidden="true">{}</svg>"#,
        class(series),
        mark(series, 6.0, 6.0, 4.0)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coordinates_are_short() {
        assert_eq!(
            [n(12.0), n(0.25), n(-0.01), n(3.96)],
            ["12", "0.2", "0", "4"]
        );
    }

    #[test]
    fn twelve_series_have_marks_of_their_own() {
        let marks: std::collections::BTreeSet<String> =
            (0..12).map(|series| mark(series, 5.0, 5.0, 4.0)).collect();
        assert_eq!(marks.len(), 12);
    }

    #[test]
    fn markup_in_text_is_text() {
        assert_eq!(
            escape("<a b=\"c\">&'\u{1b}"),
            "&lt;a b=&quot;c&quot;&gt;&amp;&#39; "
        );
    }
}
