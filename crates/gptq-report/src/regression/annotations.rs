//! Workflow commands of GitHub Actions: lines on stdout that become annotations of a run.

use super::verdict::{Standing, Verdict};

/// An `::error` line for each case that got worse, a `::notice` for each that got better.
pub fn annotations(verdict: &Verdict) -> String {
    let line = |case: &super::Case| {
        let level = match case.standing {
            Standing::Worse => "error",
            Standing::Better => "notice",
            Standing::Within | Standing::NotRun => return None,
        };
        let texts: Vec<&str> = (case.findings.iter())
            .map(|finding| finding.text.as_str())
            .collect();
        let text = texts.join("\n");
        Some(annotation(level, &verdict.baseline, &case.subject, &text))
    };
    verdict.cases.iter().filter_map(line).collect()
}

/// One such line about `file`; `level` is `error`, `warning` or `notice`.
pub fn annotation(level: &str, file: &str, title: &str, text: &str) -> String {
    let (file, title) = (property(file), property(&format!("gptq regress: {title}")));
    format!("::{level} file={file},title={title}::{}\n", message(text))
}

/// Escapes a message as the runner expects (actions/toolkit, `command.ts`), the percent sign first.
fn message(text: &str) -> String {
    text.replace('%', "%25")
        .replace('\r', "%0D")
        .replace('\n', "%0A")
}

fn property(text: &str) -> String {
    message(text).replace(':', "%3A").replace(',', "%2C")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_end_a_line_or_a_property_is_escaped() {
        let line = annotation("error", "a,b:c.json", "100%\r\nof q_proj", "12 %: a, b\nc");
        assert_eq!(
            line,
            "::error file=a%2Cb%3Ac.json,title=gptq regress%3A 100%25%0D%0Aof q_proj\
             ::12 %25: a, b%0Ac\n"
        );
    }

    /// Each escape is undone once: `%250A` is a text with `%0A` in it, not a line's end.
    #[test]
    fn an_escape_in_the_text_stays_text() {
        assert_eq!(message("%0A"), "%250A");
    }
}
