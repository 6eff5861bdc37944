//! From tokens to raw bytes, one token at a time, as the decoder of a `tokenizer.json` says.

use std::collections::HashMap;

use serde_json::Value;

use super::TextError;

/// What a decoder does with a token, and with the start of a text.
pub struct Pieces {
    kind: Kind,
    /// What the start of a text loses.
    pub lead: Lead,
}

enum Kind {
    /// Characters are GPT-2's stand-ins for bytes.
    ByteLevel(HashMap<char, u8>),
    Steps(Vec<Step>),
}

enum Step {
    Replace(String, String),
    /// `<0xHH>` is one byte.
    Bytes,
}

/// What is yet to be taken off the start of a text: SentencePiece puts a space there that nobody
/// wrote.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lead {
    #[default]
    Nothing,
    /// At most so many spaces.
    Spaces(usize),
    /// This character, everywhere in the first token.
    FirstToken(char),
}

impl Pieces {
    /// Reads the `decoder` of a document.
    pub fn new(decoder: &Value) -> Result<Self, TextError> {
        let kind = |decoder: &Value| decoder["type"].as_str().unwrap_or("(none)").to_owned();
        let steps = match decoder["decoders"].as_array() {
            Some(steps) if kind(decoder) == "Sequence" => &steps[..],
            _ => std::slice::from_ref(decoder),
        };
        let mut pieces = Self { kind: Kind::Steps(Vec::new()), lead: Lead::Nothing };
        let mut is_fused = false;
        for step in steps {
            let name = kind(step);
            match (name.as_str(), &mut pieces.kind) {
                ("ByteLevel", _) if steps.len() == 1 => {
                    pieces.kind = Kind::ByteLevel(byte_alphabet());
                }
                ("Replace", Kind::Steps(list)) => list.push(replace(step)?),
                ("ByteFallback", Kind::Steps(list)) => list.push(Step::Bytes),
                ("Metaspace", Kind::Steps(list)) => {
                    let stand_in = step["replacement"].as_str().and_then(|s| s.chars().next());
                    let stand_in = stand_in.unwrap_or('▁');
                    list.push(Step::Replace(stand_in.into(), " ".into()));
                    if step["prepend_scheme"] != "never" && step["add_prefix_space"] != false {
                        pieces.lead = Lead::FirstToken(stand_in);
                    }
                }
                ("Fuse", _) => is_fused = true,
                // Before fusing it would strip every token.
                ("Strip", _) if is_fused && step["content"] == " " && step["stop"] == 0 => {
                    pieces.lead = Lead::Spaces(step["start"].as_u64().unwrap_or(0) as usize);
                }
                _ => {
                    let what = format!("the tokenizer's decoder {name}, as it is set");
                    return Err(TextError::Unsupported(what));
                }
            }
        }
        Ok(pieces)
    }

    /// Raw bytes of a token of the vocabulary.
    pub fn bytes(&self, token: &str) -> Vec<u8> {
        match &self.kind {
            Kind::ByteLevel(alphabet) => {
                let bytes: Option<_> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Kind::Steps(steps) => {
                let mut text = token.to_owned();
                for step in steps {
                    match step {
                        Step::Replace(from, to) => text = text.replace(from, to),
                        Step::Bytes => {
                            if let Some(byte) = byte_token(&text) {
                                return vec![byte];
                            }
                        }
                    }
                }
                text.into_bytes()
            }
        }
    }

    /// Raw bytes of a token that was added to the vocabulary, which is written as it is unless a
    /// step of the decoder changes it.
    pub fn added_bytes(&self, token: &str) -> Vec<u8> {
        match &self.kind {
            Kind::ByteLevel(_) => token.as_bytes().to_vec(),
            Kind::Steps(_) => self.bytes(token),
        }
    }
}

fn replace(step: &Value) -> Result<Step, TextError> {
    match (step["pattern"]["String"].as_str(), step["content"].as_str()) {
        (Some(from), Some(to)) if !from.is_empty() => Ok(Step::Replace(from.into(), to.into())),
        _ => Err(TextError::Unsupported("a tokenizer's decoder that replaces a pattern".into())),
    }
}

/// The byte that `<0xHH>` stands for.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// GPT-2's printable stand-ins for bytes (Radford et al., 2019), reversed.
fn byte_alphabet() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut next = 256u32;
    (0..=255u8)
        .filter_map(|byte| {
            let stand_in = if printable(byte) {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            Some((char::from_u32(stand_in)?, byte))
        })
        .collect()
}
