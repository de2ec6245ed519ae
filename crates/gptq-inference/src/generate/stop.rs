//! Stop strings, wherever tokens cut them.

/// Holds text back that may be the beginning of a stop string.
pub(super) struct StopStrings<'a> {
    stops: &'a [String],
    held: String,
}

/// Text that may be shown, and the stop string that came after it.
#[derive(Debug, PartialEq)]
pub(super) struct Shown {
    pub text: String,
    pub stopped_by: Option<String>,
}

impl<'a> StopStrings<'a> {
    /// Empty strings stop nothing.
    pub fn new(stops: &'a [String]) -> Self {
        StopStrings {
            stops,
            held: String::new(),
        }
    }

    /// Takes text in; what no longer can belong to a stop string is shown.
    pub fn push(&mut self, text: &str) -> Shown {
        self.held.push_str(text);
        let stops = self.stops.iter().filter(|stop| !stop.is_empty());
        let found = stops
            .clone()
            .filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)))
            .min_by_key(|(at, _)| *at);
        if let Some((at, stop)) = found {
            let text = self.held[..at].to_string();
            self.held.clear();
            return Shown {
                text,
                stopped_by: Some(stop.clone()),
            };
        }
        let begun = |at: &usize| {
            let rest = &self.held[*at..];
            stops.clone().any(|stop| stop.starts_with(rest))
        };
        let keep = (self.held.char_indices().map(|(at, _)| at))
            .find(begun)
            .unwrap_or(self.held.len());
        let held = self.held.split_off(keep);
        Shown {
            text: std::mem::replace(&mut self.held, held),
            stopped_by: None,
        }
    }

    /// The text that is still held back when the reply ends.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let stops: Vec<String> = stops.iter().map(|stop| stop.to_string()).collect();
        let mut strings = StopStrings::new(&stops);
        let mut texts = Vec::new();
        for piece in pieces {
            let shown = strings.push(piece);
            texts.push(shown.text);
            if shown.stopped_by.is_some() {
                return (texts, shown.stopped_by);
            }
        }
        texts.push(strings.finish());
        (texts, None)
    }

    fn texts(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| text.to_string()).collect()
    }

    #[test]
    fn a_stop_string_is_found_across_pieces() {
        let (shown, stopped) = run(&["###"], &["one #", "#", "# two", "three"]);
        assert_eq!(shown, texts(&["one ", "", ""]));
        assert_eq!(stopped.as_deref(), Some("###"));
    }

    #[test]
    fn what_only_looked_like_one_is_shown() {
        let (shown, stopped) = run(&["\n\nQ:"], &["A", "\n", "\n", "Q", ". B", "\n"]);
        assert_eq!(shown, texts(&["A", "", "", "", "\n\nQ. B", "", "\n"]));
        assert_eq!(stopped, None);
    }

    #[test]
    fn the_first_in_the_text_counts_and_empty_ones_do_not() {
        let (shown, stopped) = run(&["", "late", "é!"], &["xé", "! late"]);
        assert_eq!(shown, texts(&["x", ""]));
        assert_eq!(stopped.as_deref(), Some("é!"));
    }
}
