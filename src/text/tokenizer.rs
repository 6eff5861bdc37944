//! Text to token ids and back, from a `tokenizer.json` or GGUF metadata.

use std::{borrow::Cow, sync::Arc};

use serde::Deserialize;
use serde_json::Value;

use super::{
    GgufVocab, TextError,
    pieces::{Lead, Pieces},
    special::{Part, Special},
};

/// Clones share one vocabulary.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

struct Inner {
    plain: tokenizers::Tokenizer,
    /// For text after a special token, where only the start of a text gets a space before it.
    continued: Option<tokenizers::Tokenizer>,
    special: Special,
    pieces: Pieces,
    /// Raw bytes of every token; empty for special ones.
    bytes: Vec<Vec<u8>>,
    prefix: Vec<u32>,
}

/// What is read of a `tokenizer.json` beside what the `tokenizers` crate does.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

fn failed(error: impl std::fmt::Display) -> TextError {
    TextError::Tokenizer(error.to_string())
}

impl Tokenizer {
    /// A `tokenizer.json`. `bos` is put before plain text where the model wants it; without it,
    /// what the document puts there.
    pub fn from_json(json: &[u8], bos: Option<u32>) -> Result<Self, TextError> {
        let document: Document = serde_json::from_slice(json).map_err(failed)?;
        let mut plain = tokenizers::Tokenizer::from_bytes(json).map_err(failed)?;
        plain.set_encode_special_tokens(true);
        let mut pre_tokenizer = document.pre_tokenizer;
        let continued = match never_prepend(&mut pre_tokenizer) {
            true => {
                let mut continued = plain.clone();
                let step: tokenizers::PreTokenizerWrapper =
                    serde_json::from_value(pre_tokenizer).map_err(failed)?;
                continued.with_pre_tokenizer(Some(step));
                Some(continued)
            }
            false => None,
        };
        let added = plain.get_added_tokens_decoder();
        let special = added.iter().filter(|(_, token)| token.special);
        let special = Special::new(special.map(|(id, t)| (t.content.clone(), *id)).collect())?;
        let pieces = Pieces::new(&document.decoder)?;
        let bytes = (0..plain.get_vocab_size(true) as u32)
            .map(|id| match (added.get(&id), plain.id_to_token(id)) {
                (Some(token), _) if token.special => Vec::new(),
                (Some(token), _) => pieces.added_bytes(&token.content),
                (None, Some(token)) => pieces.bytes(&token),
                (None, None) => Vec::new(),
            })
            .collect();
        let prefix = bos.map_or_else(|| template_prefix(&document.post_processor), |bos| vec![bos]);
        Ok(Self(Arc::new(Inner { plain, continued, special, pieces, bytes, prefix })))
    }

    pub fn from_gguf(vocab: &GgufVocab) -> Result<Self, TextError> {
        let (document, bos) = vocab.document()?;
        Self::from_json(document.to_string().as_bytes(), bos)
    }

    pub fn vocab_size(&self) -> usize {
        self.0.bytes.len()
    }

    /// Ids of plain text; special tokens written in it are ordinary text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TextError> {
        let mut ids = if add_special { self.0.prefix.clone() } else { Vec::new() };
        ids.extend(self.0.plain.encode_fast(text, false).map_err(failed)?.get_ids());
        Ok(ids)
    }

    /// Ids of a rendered template: its special tokens count, those marked with `nonce` do not.
    pub fn encode_with_special(&self, text: &str, nonce: char) -> Result<Vec<u32>, TextError> {
        let mut ids = Vec::new();
        for part in self.0.special.split(text, nonce) {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(range) => {
                    let continued = self.0.continued.as_ref().filter(|_| range.start > 0);
                    let tokenizer = continued.unwrap_or(&self.0.plain);
                    let encoding = tokenizer.encode_fast(text[range].replace(nonce, ""), false);
                    ids.extend(encoding.map_err(failed)?.get_ids());
                }
            }
        }
        Ok(ids)
    }

    /// Breaks special-token literals with `nonce`, after their first character.
    pub fn defuse(&self, text: &str, nonce: char) -> String {
        self.0.special.defuse(text, nonce)
    }

    /// Raw bytes of a token; empty for special ones and unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.0.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// A token as text: its bytes where they are valid, the literal of a special token.
    pub fn token_text(&self, id: u32) -> String {
        match self.0.special.literal(id) {
            Some(literal) => literal.to_owned(),
            None => String::from_utf8_lossy(self.token_bytes(id)).into_owned(),
        }
    }

    /// The id of a special token's literal.
    pub fn special_id(&self, literal: &str) -> Option<u32> {
        self.0.special.id(literal)
    }

    pub fn is_special(&self, id: u32) -> bool {
        self.0.special.contains(id)
    }

    /// Text of ids, special tokens left out.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut lead = self.lead_after(&[]);
        let mut bytes = Vec::new();
        for id in ids {
            bytes.extend_from_slice(&self.piece(*id, &mut lead));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What is yet to be taken off what follows `prompt`: it is lost once, to the first text.
    pub fn lead_after(&self, prompt: &[u32]) -> Lead {
        let has_text = prompt.iter().any(|id| !self.token_bytes(*id).is_empty());
        if has_text { Lead::Nothing } else { self.0.pieces.lead }
    }

    /// Raw bytes of a token in its place: `lead` is what the text may still lose before it.
    pub fn piece(&self, id: u32, lead: &mut Lead) -> Cow<'_, [u8]> {
        let bytes = self.token_bytes(id);
        match *lead {
            Lead::Nothing => {}
            _ if bytes.is_empty() => {}
            Lead::Spaces(most) => {
                let spaces = bytes.iter().take(most).take_while(|byte| **byte == b' ').count();
                *lead = match most - spaces {
                    left if left > 0 && spaces == bytes.len() => Lead::Spaces(left),
                    _ => Lead::Nothing,
                };
                return Cow::Borrowed(&bytes[spaces..]);
            }
            Lead::FirstToken(stand_in) => {
                *lead = Lead::Nothing;
                let token = self.0.plain.id_to_token(id).unwrap_or_default();
                return Cow::Owned(self.0.pieces.bytes(&token.replace(stand_in, "")));
            }
        }
        Cow::Borrowed(bytes)
    }
}

/// Turns a space before the start of a text alone into none; says whether there was one.
fn never_prepend(pre_tokenizer: &mut Value) -> bool {
    if let Some(steps) = pre_tokenizer["pretokenizers"].as_array_mut() {
        return steps.iter_mut().fold(false, |found, step| never_prepend(step) | found);
    }
    let found = pre_tokenizer["prepend_scheme"] == "first";
    if found {
        pre_tokenizer["prepend_scheme"] = "never".into();
        pre_tokenizer["add_prefix_space"] = false.into();
    }
    found
}

/// The special tokens that a document's template puts before a text.
fn template_prefix(post_processor: &Value) -> Vec<u32> {
    let steps = post_processor["processors"].as_array();
    let mut steps = steps.map_or(std::slice::from_ref(post_processor), Vec::as_slice).iter();
    let Some(template) = steps.find(|step| step["type"] == "TemplateProcessing") else {
        return Vec::new();
    };
    let parts = template["single"].as_array().into_iter().flatten();
    let names = parts.map_while(|part| part["SpecialToken"]["id"].as_str());
    let ids = names.flat_map(|name| template["special_tokens"][name]["ids"].as_array());
    ids.flatten().filter_map(|id| id.as_u64()?.try_into().ok()).collect()
}
