//! Special tokens in text: where their literals stand, in one pass however many there are.

use std::{collections::HashMap, ops::Range};

use aho_corasick::{AhoCorasick, Input, MatchKind};

use super::TextError;

/// The special tokens of a vocabulary.
pub struct Special {
    /// Literal and id.
    tokens: Vec<(String, u32)>,
    /// Places in `tokens`.
    by_id: HashMap<u32, usize>,
    /// Patterns are `tokens`.
    finder: AhoCorasick,
}

/// A part of a text that may hold special tokens.
#[derive(Debug, PartialEq, Eq)]
pub enum Part {
    Text(Range<usize>),
    Token(u32),
}

impl Special {
    pub fn new(mut tokens: Vec<(String, u32)>) -> Result<Self, TextError> {
        tokens.retain(|(literal, _)| !literal.is_empty());
        let by_id = tokens.iter().enumerate().map(|(at, (_, id))| (*id, at)).collect();
        let finder = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|(literal, _)| literal))
            .map_err(|error| TextError::Tokenizer(format!("special tokens: {error}")))?;
        Ok(Self { tokens, by_id, finder })
    }

    pub fn contains(&self, id: u32) -> bool {
        self.by_id.contains_key(&id)
    }

    pub fn literal(&self, id: u32) -> Option<&str> {
        Some(&self.tokens[*self.by_id.get(&id)?].0)
    }

    pub fn id(&self, literal: &str) -> Option<u32> {
        self.tokens.iter().find(|(text, _)| text == literal).map(|(_, id)| *id)
    }

    /// The text's parts in order: the leftmost literal first, the longest of those at one place. One
    /// that `nonce` follows is text: it is how [`Self::defuse`] marks a literal of one character.
    pub fn split(&self, text: &str, nonce: char) -> Vec<Part> {
        let (mut parts, mut from) = (Vec::new(), 0);
        let found = self.finder.find_iter(text);
        for hit in found.filter(|hit| !text[hit.end()..].starts_with(nonce)) {
            if hit.start() > from {
                parts.push(Part::Text(from..hit.start()));
            }
            parts.push(Part::Token(self.tokens[hit.pattern().as_usize()].1));
            from = hit.end();
        }
        if from < text.len() {
            parts.push(Part::Text(from..text.len()));
        }
        parts
    }

    /// Puts `nonce` after the first character of every literal, also of those that overlap, and
    /// nowhere else.
    pub fn defuse(&self, text: &str, nonce: char) -> String {
        let text = text.replace(nonce, "");
        let (mut out, mut from) = (String::with_capacity(text.len()), 0);
        while let Some(hit) = self.finder.find(Input::new(&text).range(from..)) {
            let first = text[hit.start()..].chars().next().map_or(0, char::len_utf8);
            let end = hit.start() + first;
            out.push_str(&text[from..end]);
            out.push(nonce);
            from = end;
        }
        out + &text[from..]
    }
}
