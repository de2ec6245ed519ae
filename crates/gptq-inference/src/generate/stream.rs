//! Text of tokens as they come: never half a character, never a space too few or too many.

/// Earlier tokens that are decoded again with new ones. A tokenizer may strip the space before its first
/// token or join the bytes of several, so new text is the difference between decoding a longer and a
/// shorter run of tokens.
const CONTEXT: usize = 5;

/// A character that bytes do not make yet.
const UNFINISHED: char = '\u{fffd}';

/// Text of token ids, as a tokenizer has it; fails with the tokenizer's words.
pub type Decode<'a> = dyn Fn(&[u32]) -> Result<String, String> + 'a;

/// Turns tokens into pieces of text that together are the text of all of them.
pub(super) struct TextStream {
    tokens: Vec<u32>,
    from: usize,  // the run that is decoded begins here
    shown: usize, // text of tokens before this one is out
}

impl TextStream {
    /// After `before`, whose text is known to the reader.
    pub fn after(before: &[u32]) -> Self {
        let tokens = before[before.len().saturating_sub(CONTEXT)..].to_vec();
        TextStream {
            shown: tokens.len(),
            tokens,
            from: 0,
        }
    }

    /// The text that `token` completes, often of this token alone, sometimes none yet.
    pub fn push(&mut self, token: u32, decode: &Decode<'_>) -> Result<String, String> {
        self.tokens.push(token);
        let text = self.unshown(decode)?;
        if text.is_empty() || text.ends_with(UNFINISHED) {
            return Ok(String::new());
        }
        self.from = self.shown;
        self.shown = self.tokens.len();
        Ok(text)
    }

    /// The text that is still held back when no more tokens come.
    pub fn finish(&mut self, decode: &Decode<'_>) -> Result<String, String> {
        let text = self.unshown(decode)?;
        self.from = self.shown;
        self.shown = self.tokens.len();
        Ok(text)
    }

    fn unshown(&self, decode: &Decode<'_>) -> Result<String, String> {
        if self.shown == self.tokens.len() {
            return Ok(String::new());
        }
        let shorter = decode(&self.tokens[self.from..self.shown])?;
        let longer = decode(&self.tokens[self.from..])?;
        // A first token in the middle of a character may read otherwise with more behind it.
        let same = (shorter.char_indices().zip(longer.chars()))
            .find(|((_, a), b)| a != b)
            .map_or(shorter.len().min(longer.len()), |((at, _), _)| at);
        Ok(longer[same..].to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes as tokens, but for 300: a word with a space that is stripped at the start.
    fn decode(ids: &[u32]) -> Result<String, String> {
        let mut bytes = Vec::new();
        for &id in ids {
            match id {
                300 => bytes.extend(b" word"),
                301 => {}
                byte => bytes.push(byte as u8),
            }
        }
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Ok(text.strip_prefix(' ').unwrap_or(&text).to_string())
    }

    fn pieces(before: &[u32], tokens: &[u32]) -> Vec<String> {
        let mut stream = TextStream::after(before);
        let mut pieces: Vec<String> = (tokens.iter())
            .map(|&token| stream.push(token, &decode).unwrap())
            .collect();
        pieces.push(stream.finish(&decode).unwrap());
        pieces
    }

    #[test]
    fn characters_come_whole() {
        let snowman: Vec<u32> = "a☃b".bytes().map(u32::from).collect();
        assert_eq!(pieces(&[], &snowman), ["a", "", "", "☃", "b", ""]);
        // An incomplete character is shown at the end, as in the whole text.
        assert_eq!(pieces(&[], &snowman[..3]), ["a", "", "", "\u{fffd}"]);
    }

    #[test]
    fn a_space_is_kept_between_words_and_stripped_at_the_start() {
        assert_eq!(pieces(&[], &[300, 300]), ["word", " word", ""]);
        assert_eq!(pieces(&[301], &[300, 300]), ["word", " word", ""]);
        assert_eq!(pieces(&[300], &[300, 301, 300]), [" word", "", " word", ""]);
    }

    /// The context may begin inside a character.
    #[test]
    fn a_prompt_that_is_cut_inside_a_character_changes_nothing_after_it() {
        let before: Vec<u32> = "é☃☃".bytes().map(u32::from).collect();
        assert_eq!(pieces(&before, &[300, 98]), [" word", "b", ""]);
        assert_eq!(pieces(&before[..7], &[131, 98]), ["☃", "b", ""]);
    }
}
