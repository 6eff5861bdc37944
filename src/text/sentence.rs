//! Where a sentence ends, as well as one can tell without the text that follows.

/// Characters of text that are kept to judge its end by.
const TAIL_CHARS: usize = 32;
/// Letters before a full stop that make it the end of a word rather than of an abbreviation.
const WORD_LETTERS_MIN: usize = 3;

/// The end of a growing text.
#[derive(Debug, Default)]
pub struct SentenceEnd {
    tail: String,
}

impl SentenceEnd {
    pub fn push(&mut self, text: &str) {
        self.tail.push_str(text);
        let excess = self.tail.chars().count().saturating_sub(TAIL_CHARS);
        if excess > 0 {
            self.tail = self.tail.chars().skip(excess).collect();
        }
    }

    /// Whether the text may end here: after a mark that ends sentences, with quotes or brackets
    /// closed after it, or after a paragraph. A full stop after a digit, a single letter or a short
    /// word is taken for a number or an abbreviation.
    pub fn is_here(&self) -> bool {
        if self.tail.ends_with("\n\n") {
            return true;
        }
        let closed =
            |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '”' | '’' | ')' | ']' | '*');
        let text = self.tail.trim_end_matches(closed);
        let Some(mark) = text.chars().next_back() else { return false };
        match mark {
            '!' | '?' | '…' | '。' | '！' | '？' => true,
            '.' => {
                let before = text[..text.len() - 1].trim_end_matches([')', '"', '”', ']']);
                let letters = before.chars().rev().take_while(|c| c.is_alphabetic()).count();
                letters >= WORD_LETTERS_MIN
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_end_where_a_reader_would_say_so() {
        for (text, ends) in [
            ("It is done.", true),
            ("It is done. ", true),
            ("He said \"go now!\"", true),
            ("Really?", true),
            ("(See the notes.)", true),
            ("完了しました。", true),
            ("A paragraph without a stop\n\n", true),
            ("", false),
            ("   ", false),
            ("It is done", false),
            ("version 3.", false),
            ("version 3.1", false),
            ("e.g.", false),
            ("Mr.", false),
            ("J.", false),
            ("a, b,", false),
            ("line\n", false),
            ("list:", false),
        ] {
            let mut end = SentenceEnd::default();
            text.chars().for_each(|c| end.push(&c.to_string()));
            assert_eq!(end.is_here(), ends, "{text:?}");
        }
    }

    #[test]
    fn only_the_end_of_a_long_text_is_kept() {
        let mut end = SentenceEnd::default();
        (0..10_000).for_each(|_| end.push("ää. "));
        assert!(end.tail.len() < 4 * TAIL_CHARS && !end.is_here());
        end.push("The very end.");
        assert!(end.is_here());
    }
}
