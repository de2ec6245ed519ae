//! `{% generation %}`: transformers marks the assistant's text with it, for loss masks in training.

/// `source` with each `generation` tag as a `with` block, which renders what is inside and keeps, as
/// the tag does, what is set there inside. minijinja knows no tags but its own. Bytes between tags
/// stay where they are, and so do lines and the signs that control white space.
pub(super) fn replace_generation_tags(source: &str) -> String {
    let mut replaced = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        replaced.push_str(before);
        let (length, instead) = match tag.as_bytes().get(1) {
            Some(b'#') => (tag.find("#}").map_or(tag.len(), |end| end + 2), None),
            Some(b'{') => (expression_end(tag), None),
            Some(b'%') => block(tag),
            _ => (1, None),
        };
        let (tag, after) = tag.split_at(length);
        match instead {
            Some((name, keyword)) => replaced.push_str(&tag.replacen(name, keyword, 1)),
            None => replaced.push_str(tag),
        }
        rest = after;
    }
    replaced + rest
}

type Instead = Option<(&'static str, &'static str)>;

/// The length of the tag at `{%`; a raw block counts up to its end, since nothing in it is a tag.
fn block(tag: &str) -> (usize, Instead) {
    let end = expression_end(tag);
    match statement(&tag[..end]) {
        "raw" => (raw_end(tag, end), None),
        "generation" => (end, Some(("generation", "with"))),
        "endgeneration" => (end, Some(("endgeneration", "endwith"))),
        _ => (end, None),
    }
}

/// The statement of a tag, without its delimiters.
fn statement(tag: &str) -> &str {
    let inside = tag.strip_prefix("{%").unwrap_or(tag);
    let inside = inside.strip_suffix("%}").unwrap_or(inside);
    inside
        .trim_start_matches(['-', '+'])
        .trim_end_matches(['-', '+'])
        .trim()
}

fn raw_end(tag: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(start) = tag[at..].find("{%") {
        let start = at + start;
        let Some(end) = tag[start..].find("%}") else {
            break;
        };
        if statement(&tag[start..start + end + 2]) == "endraw" {
            return start + end + 2;
        }
        at = start + 2;
    }
    tag.len()
}

/// The end of a `{{` or `{%`; end signs inside strings and brackets do not count.
fn expression_end(tag: &str) -> usize {
    let bytes = tag.as_bytes();
    let sign = if bytes[1] == b'{' { b'}' } else { b'%' };
    let (mut depth, mut at) = (0_usize, 2);
    while at < bytes.len() {
        match bytes[at] {
            byte if byte == sign && depth == 0 && bytes.get(at + 1) == Some(&b'}') => {
                return at + 2;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            quote @ (b'"' | b'\'') => at = string_end(bytes, at, quote),
            _ => {}
        }
        at += 1;
    }
    bytes.len()
}

/// The place of the closing quote.
fn string_end(bytes: &[u8], start: usize, quote: u8) -> usize {
    let mut at = start + 1;
    while at < bytes.len() && bytes[at] != quote {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_become_blocks_and_nothing_else_changes() {
        let cases = [
            (
                "a{% generation %}b{% endgeneration %}c",
                "a{% with %}b{% endwith %}c",
            ),
            (
                "{%- generation -%}\n{%+ endgeneration +%}",
                "{%- with -%}\n{%+ endwith +%}",
            ),
            (
                "{%generation%}x{%-endgeneration-%}",
                "{%with%}x{%-endwith-%}",
            ),
            ("{%\n generation\n%}", "{%\n with\n%}"),
        ];
        for (source, want) in cases {
            assert_eq!(replace_generation_tags(source), want);
        }
        let untouched = [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{{ \"\\\"}} {% generation %}\" }}",
            "{{ {'a': {}}['{% generation %}'] }}",
            "{% set generation = 1 %}{{ generation }}",
            "{% if '%}' == \"{% generation %}\" %}{% endif %}",
            "{% raw %}{% generation %}{{ ' {%- endraw %}",
            "{% raw %}{% generation %}",
            "generation { % generation % } {",
            "{{ 'é' }}{",
            "{%",
            "{{ '\\",
            "{#",
        ];
        for source in untouched {
            assert_eq!(replace_generation_tags(source), source);
        }
        let after = "{% raw %}{%- generation %}{% endraw %}{% generation %}";
        let want = "{% raw %}{%- generation %}{% endraw %}{% with %}";
        assert_eq!(replace_generation_tags(after), want);
    }
}
