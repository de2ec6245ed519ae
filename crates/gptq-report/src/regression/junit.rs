//! A verdict as JUnit XML, which CI systems show as tests.

use super::verdict::{Case, Finding, Standing, Verdict};

/// One test case a linear, one a figure of the whole model; `seconds` is what all took.
pub fn junit(verdict: &Verdict, seconds: f64) -> String {
    let counts = format!(
        "tests=\"{}\" failures=\"{}\" errors=\"0\" skipped=\"{}\" time=\"{seconds:.3}\"",
        verdict.cases.len(),
        verdict.count(Standing::Worse),
        verdict.count(Standing::NotRun),
    );
    let suite = escape(&verdict.baseline);
    let mut out = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuites name=\"gptq regress\" {counts}>\n  \
         <testsuite name=\"{suite}\" {counts}>\n"
    );
    for case in &verdict.cases {
        out += &test_case(case, &suite);
    }
    out + "  </testsuite>\n</testsuites>\n"
}

fn test_case(case: &Case, suite: &str) -> String {
    let name = escape(&case.subject);
    let body = match case.standing {
        Standing::Worse => failure(case),
        Standing::NotRun => "      <skipped message=\"the run stopped before it\"/>\n".to_string(),
        Standing::Better | Standing::Within => said(case),
    };
    let head = format!("    <testcase classname=\"{suite}\" name=\"{name}\"");
    match body.is_empty() {
        true => head + "/>\n",
        false => format!("{head}>\n{body}    </testcase>\n"),
    }
}

fn failure(case: &Case) -> String {
    let worse: Vec<&Finding> = case.findings.iter().filter(|f| f.worse).collect();
    let texts: Vec<String> = worse.iter().map(|finding| escape(&finding.text)).collect();
    let kind = worse.first().map_or("", |finding| finding.measure.name());
    format!(
        "      <failure type=\"{}\" message=\"{}\">{}</failure>\n",
        escape(kind),
        texts.join("; "),
        texts.join("\n")
    )
}

/// The output of a passed case.
fn said(case: &Case) -> String {
    let mut lines: Vec<String> = case.findings.iter().map(|f| escape(&f.text)).collect();
    if case.same_bytes == Some(false) {
        lines.push("other bytes than the baseline".to_string());
    }
    match lines.is_empty() {
        true => String::new(),
        false => format!("      <system-out>{}</system-out>\n", lines.join("\n")),
    }
}

/// For text and attributes alike. Characters that XML 1.0 cannot hold become U+FFFD, since even a
/// reference to them is refused.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&apos;",
            '\t' | '\n' | '\r' => out += &format!("&#{};", character as u32),
            c if c < ' ' || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_can_leave_its_place() {
        assert_eq!(
            escape("a<b> & \"c\" 'd'\n\u{1b}[0m\u{0}é"),
            "a&lt;b&gt; &amp; &quot;c&quot; &apos;d&apos;&#10;\u{fffd}[0m\u{fffd}é"
        );
    }
}
