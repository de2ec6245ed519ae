//! Texts of records, plans and cards inside Markdown: shown as they are, never read as markup.

/// Text that Markdown shows as it is, on one line.
pub(crate) fn plain(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut before = None;
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let word = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            // Inside a word it is no emphasis, and names are full of it.
            '_' if word(before) && word(rest.peek().copied()) => out.push('_'),
            '\\' | '`' | '*' | '_' | '[' | ']' | '|' | '#' | '~' => out.extend(['\\', c]),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
        before = Some(c);
    }
    out
}

/// Parts of a text, those between backticks marked as code.
pub(crate) fn parts(text: &str) -> Vec<(bool, &str)> {
    let parts: Vec<&str> = text.split('`').collect();
    match parts.len() % 2 {
        // An even number of parts: one backtick stands alone and means nothing.
        0 => vec![(false, text)],
        _ => (parts.into_iter().enumerate())
            .map(|(index, part)| (index % 2 == 1, part))
            .filter(|(_, part)| !part.is_empty())
            .collect(),
    }
}

/// Text with its code in the type of code.
pub(crate) fn prose(text: &str) -> String {
    let parts = parts(text).into_iter();
    parts
        .map(|(is_code, part)| if is_code { code(part) } else { plain(part) })
        .collect()
}

/// A name as inline code, also inside a table. Characters special to HTML become entities: not every
/// Markdown renderer leaves code alone.
pub(crate) fn code(name: &str) -> String {
    let name = name.replace(char::is_control, " ");
    if name.contains(['<', '>', '&']) {
        let spelled = |c: char| match c.is_ascii_punctuation() {
            true => format!("&#{};", u32::from(c)),
            false => c.to_string(),
        };
        let inner: String = name.chars().map(spelled).collect();
        return format!("<code>{inner}</code>");
    }
    let name = name.replace('|', "\\|");
    let fence = "`".repeat(longest_run(&name, '`') + 1);
    match name.starts_with('`') || name.ends_with('`') || name.is_empty() {
        true => format!("{fence} {name} {fence}"),
        false => format!("{fence}{name}{fence}"),
    }
}

/// Lines of code in a block of their own.
pub(crate) fn block(language: &str, text: &str) -> String {
    if text.contains(['<', '>']) {
        let text = text.replace('&', "&amp;");
        let text = text.replace('<', "&lt;").replace('>', "&gt;");
        return format!("<pre><code>{text}\n</code></pre>\n");
    }
    let fence = "`".repeat(longest_run(text, '`').max(2) + 1);
    format!("{fence}{language}\n{text}\n{fence}\n")
}

fn longest_run(text: &str, wanted: char) -> usize {
    let runs = text.split(|c| c != wanted);
    runs.map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(plain("a|b\n<i>_x_"), "a\\|b &lt;i&gt;\\_x\\_");
        assert_eq!(plain("actorder_True"), "actorder_True");
        assert_eq!(code("a`b|c"), "``a`b\\|c``");
        assert_eq!(code("`"), "`` ` ``");
        assert_eq!(code("<b>|`"), "<code>&#60;b&#62;&#124;&#96;</code>");
        assert_eq!(block("shell", "a ``` b"), "````shell\na ``` b\n````\n");
        assert_eq!(
            block("", "</code><script>"),
            "<pre><code>&lt;/code&gt;&lt;script&gt;\n</code></pre>\n"
        );
    }
}
