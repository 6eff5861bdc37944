//! Tokens to text, one at a time, whole characters only.

use super::{Lead, Tokenizer};

/// Bytes that do not yet make a character, and the tokenizer.
pub struct Detokenizer {
    tokenizer: Tokenizer,
    lead: Lead,
    pending: Vec<u8>,
}

impl Detokenizer {
    /// For tokens that follow `prompt`, whose text it does not give.
    pub fn after(tokenizer: &Tokenizer, prompt: &[u32]) -> Self {
        let lead = tokenizer.lead_after(prompt);
        Self { tokenizer: tokenizer.clone(), lead, pending: Vec::new() }
    }

    /// For tokens at the start of a text.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self::after(tokenizer, &[])
    }

    /// Text that `id` completes. Bytes that cannot become valid UTF-8 come out as U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        let piece = self.tokenizer.piece(id, &mut self.lead);
        self.pending.extend_from_slice(&piece);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let Some(bad) = error.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending.drain(..valid + bad);
                }
            }
        }
    }

    /// What is left when no token follows.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}
