//! Text to token ids and back, from a `tokenizer.json` or GGUF metadata.

use std::{collections::HashMap, sync::Arc};

use serde_json::json;

use super::TextError;

/// GGUF token types that are not ordinary text.
const GGUF_CONTROL: i32 = 3;
const GGUF_USER_DEFINED: i32 = 4;

/// What GGUF metadata says of a vocabulary.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    pub model: String,
    pub pre: String,
    pub tokens: Vec<String>,
    pub merges: Vec<String>,
    pub token_types: Vec<i32>,
    pub bos: Option<u32>,
    pub add_bos: bool,
}

/// Clones share one vocabulary.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    plain: tokenizers::Tokenizer,
    /// Special tokens, longest first.
    special: Vec<(String, u32)>,
    /// Raw bytes of every token; empty for special ones.
    bytes: Vec<Vec<u8>>,
    prefix: Vec<u32>,
}

impl Tokenizer {
    /// A `tokenizer.json`. `bos` is put before plain text where the model wants it.
    pub fn from_json(json: &[u8], bos: Option<u32>) -> Result<Self, TextError> {
        let failed = |error: tokenizers::Error| TextError::Tokenizer(error.to_string());
        let mut plain = tokenizers::Tokenizer::from_bytes(json).map_err(failed)?;
        plain.set_encode_special_tokens(true);
        let added = plain.get_added_tokens_decoder();
        let mut special: Vec<(String, u32)> = added
            .iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (token.content.clone(), *id))
            .collect();
        special.sort_by_key(|(text, _)| std::cmp::Reverse(text.len()));
        let alphabet = byte_alphabet();
        let bytes = (0..plain.get_vocab_size(true) as u32)
            .map(|id| match (added.get(&id), plain.id_to_token(id)) {
                (Some(token), _) if token.special => Vec::new(),
                (Some(token), _) => token.content.clone().into_bytes(),
                (None, Some(token)) => raw_bytes(&token, &alphabet),
                (None, None) => Vec::new(),
            })
            .collect();
        Ok(Self(Arc::new(Inner { plain, special, bytes, prefix: bos.into_iter().collect() })))
    }

    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, TextError> {
        if vocab.model != "gpt2" {
            return Err(TextError::Unsupported(format!("GGUF tokenizer {}", vocab.model)));
        }
        let byte_level = |use_regex| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
        let split = |pattern: &str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let common = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        let pre = match vocab.pre.as_str() {
            "smollm" => {
                vec![json!({"type": "Digits", "individual_digits": true}), byte_level(true)]
            }
            "gpt-2" | "default" => vec![byte_level(true)],
            "llama-bpe" | "llama3" => {
                vec![split(&common.replace("DIGITS", "{1,3}")), byte_level(false)]
            }
            "qwen2" => vec![split(&common.replace("DIGITS", "")), byte_level(false)],
            other => return Err(TextError::Unsupported(format!("GGUF pre-tokenizer {other}"))),
        };
        let ids: HashMap<&str, usize> =
            vocab.tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect();
        let kinds = vocab.tokens.iter().zip(&vocab.token_types).enumerate();
        let added: Vec<_> = kinds
            .filter(|(_, (_, kind))| matches!(**kind, GGUF_CONTROL | GGUF_USER_DEFINED))
            .map(|(id, (token, kind))| {
                json!({"id": id, "content": token, "special": *kind == GGUF_CONTROL,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
            })
            .collect();
        let document = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": added, "post_processor": null,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre},
            "decoder": byte_level(true),
            "model": {"type": "BPE", "vocab": ids, "merges": vocab.merges, "byte_fallback": false,
                "ignore_merges": vocab.pre.starts_with("llama")},
        });
        Self::from_json(document.to_string().as_bytes(), vocab.bos.filter(|_| vocab.add_bos))
    }

    pub fn vocab_size(&self) -> usize {
        self.0.bytes.len()
    }

    /// Ids of plain text; special tokens written in it are ordinary text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let mut ids = if add_special { self.0.prefix.clone() } else { Vec::new() };
        let encoding = self.0.plain.encode_fast(text, false);
        ids.extend(encoding.map_err(|error| TextError::Tokenizer(error.to_string()))?.get_ids());
        Ok(ids)
    }

    /// Ids of a rendered template: its special tokens count, those marked with `nonce` do not.
    pub fn encode_with_special(&self, text: &str, nonce: char) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        let plain = |text: &str, ids: &mut Vec<u32>| -> Result<(), TextError> {
            if !text.is_empty() {
                ids.extend(self.encode(&text.replace(nonce, ""), false)?);
            }
            Ok(())
        };
        let mut rest = text;
        loop {
            let next = self.0.special.iter().filter_map(|(token, id)| {
                rest.find(token.as_str()).map(|at| (at, std::cmp::Reverse(token.len()), *id))
            });
            let Some((at, std::cmp::Reverse(len), id)) = next.min() else {
                plain(rest, &mut ids)?;
                return Ok(ids);
            };
            plain(&rest[..at], &mut ids)?;
            ids.push(id);
            rest = &rest[at + len..];
        }
    }

    /// Breaks special-token literals with `nonce`, after their first character.
    pub fn defuse(&self, text: &str, nonce: char) -> String {
        let mut text = text.replace(nonce, "");
        for (token, _) in &self.0.special {
            let mut characters = token.chars();
            if let Some(first) = characters.next() {
                text = text.replace(token, &format!("{first}{nonce}{}", characters.as_str()));
            }
        }
        text
    }

    /// Raw bytes of a token; empty for special ones and unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.0.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// A token as text: its bytes where they are valid, the literal of a special token.
    pub fn token_text(&self, id: u32) -> String {
        match self.0.special.iter().find(|(_, special)| *special == id) {
            Some((text, _)) => text.clone(),
            None => String::from_utf8_lossy(self.token_bytes(id)).into_owned(),
        }
    }

    /// The id of a special token's literal.
    pub fn special_id(&self, literal: &str) -> Option<u32> {
        self.0.special.iter().find(|(text, _)| text == literal).map(|(_, id)| *id)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.iter().any(|(_, special)| *special == id)
    }

    /// Text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.token_bytes(*id)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }
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

fn raw_bytes(token: &str, alphabet: &HashMap<char, u8>) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}
