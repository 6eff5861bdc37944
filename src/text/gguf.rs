//! From a vocabulary in GGUF metadata to the `tokenizer.json` that reads text the same way.
//! The reference is llama.cpp, which most of these files are made for.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::TextError;

/// GGUF token types; the others are written as they are.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

/// GPT-2's words (Radford et al., 2019).
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// What GGUF metadata says of a vocabulary.
#[derive(Clone, Debug, Default)]
pub struct GgufVocab {
    pub model: String,
    pub pre: String,
    pub tokens: Vec<String>,
    pub merges: Vec<String>,
    /// SentencePiece's; the highest is merged first.
    pub scores: Vec<f32>,
    pub token_types: Vec<i32>,
    pub bos: Option<u32>,
    /// Where the file does not say, the kind of vocabulary does.
    pub add_bos: Option<bool>,
    pub add_space_prefix: Option<bool>,
}

/// How one kind of byte-level vocabulary splits text into words: by each pattern in turn.
struct Words {
    patterns: &'static [&'static str],
    /// A word that is a token is not merged from its parts.
    ignore_merges: bool,
    add_bos: bool,
}

fn words(pre: &str) -> Option<Words> {
    let plain = |patterns| Words { patterns, ignore_merges: false, add_bos: false };
    let whole = |patterns| Words { patterns, ignore_merges: true, add_bos: true };
    Some(match pre {
        "gpt-2" => plain(&[GPT2]),
        "default" => plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9]{3}"]),
        "smollm" => plain(&[r"\p{N}", GPT2]),
        "qwen2" | "deepseek-r1-qwen" => plain(&[QWEN2]),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => whole(&[LLAMA3]),
        "tekken" => whole(&[TEKKEN]),
        "deepseek-coder" => plain(&[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            "[一-龥\u{800}-一가-\u{d7ff}]+",
            r"\p{N}",
        ]),
        _ => return None,
    })
}

impl GgufVocab {
    /// The document, and the token that goes before plain text.
    pub fn document(&self) -> Result<(Value, Option<u32>), TextError> {
        let (document, add_bos) = match self.model.as_str() {
            "gpt2" => self.byte_level()?,
            "llama" => (self.sentencepiece()?, true),
            other => return Err(TextError::Unsupported(format!("GGUF tokenizer {other:?}"))),
        };
        Ok((document, self.bos.filter(|_| self.add_bos.unwrap_or(add_bos))))
    }

    fn byte_level(&self) -> Result<(Value, bool), TextError> {
        let Some(words) = words(&self.pre) else {
            return Err(TextError::Unsupported(format!("GGUF pre-tokenizer {:?}", self.pre)));
        };
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false,
        });
        let split = |pattern: &&str| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        let steps = words.patterns.iter().map(split).chain([byte_level.clone()]);
        let model = json!({
            "type": "BPE", "vocab": self.ids(), "merges": self.merges, "byte_fallback": false,
            "ignore_merges": words.ignore_merges,
        });
        let document = json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null,
            "added_tokens": self.added(), "post_processor": null, "decoder": byte_level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps.collect::<Vec<_>>()},
            "model": model,
        });
        Ok((document, words.add_bos))
    }

    /// SentencePiece's BPE: spaces as `▁`, one before the text, bytes for unknown characters. Its
    /// scores become ranks of merges, as Hugging Face's converter derives them.
    fn sentencepiece(&self) -> Result<Value, TextError> {
        if self.scores.len() != self.tokens.len() {
            let (scores, tokens) = (self.scores.len(), self.tokens.len());
            return Err(TextError::Tokenizer(format!("{scores} GGUF scores for {tokens} tokens")));
        }
        let of_kind =
            |kind| self.tokens.iter().zip(&self.token_types).filter(move |t| *t.1 == kind);
        let unknown = of_kind(UNKNOWN).map(|(token, _)| token).next();
        if unknown.is_none() && of_kind(BYTE).count() < 256 {
            let what = "the GGUF vocabulary has neither all bytes nor a token for the unknown";
            return Err(TextError::Tokenizer(what.into()));
        }
        let space = json!({"String": " "});
        let mut normalizers = vec![json!({"type": "Replace", "pattern": space, "content": "▁"})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.add_space_prefix.unwrap_or(true) {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let model = json!({
            "type": "BPE", "vocab": self.ids(), "merges": self.ranked_merges(), "unk_token": unknown,
            "fuse_unk": true, "byte_fallback": true,
        });
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null,
            "added_tokens": self.added(), "post_processor": null, "model": model,
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "decoder": {"type": "Sequence", "decoders": decoders},
        }))
    }

    /// Every way to make a normal token of two others, the token of the highest score first. A
    /// control token is never made: typed, it stays text.
    fn ranked_merges(&self) -> Vec<(&str, &str)> {
        let kinds = self.token_types.iter().copied().chain(std::iter::repeat(NORMAL));
        let tokens = self.tokens.iter().zip(&self.scores).zip(kinds).enumerate();
        let normal: HashMap<&str, (f32, usize)> = tokens
            .filter(|(_, (_, kind))| *kind == NORMAL)
            .map(|(id, ((token, score), _))| (token.as_str(), (*score, id)))
            .collect();
        let mut merges = Vec::new();
        for (token, rank) in &normal {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if normal.contains_key(left) && normal.contains_key(right) {
                    merges.push((rank, left, right));
                }
            }
        }
        merges.sort_by(|((score_a, id_a), left_a, _), ((score_b, id_b), left_b, _)| {
            score_b.total_cmp(score_a).then(id_a.cmp(id_b)).then(left_a.cmp(left_b))
        });
        merges.into_iter().map(|(_, left, right)| (left, right)).collect()
    }

    fn ids(&self) -> HashMap<&str, usize> {
        self.tokens.iter().enumerate().map(|(id, token)| (token.as_str(), id)).collect()
    }

    /// Tokens that are found in the text before it is split into words.
    fn added(&self) -> Vec<Value> {
        let tokens = self.tokens.iter().zip(&self.token_types).enumerate();
        tokens
            .filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(id, (token, kind))| {
                json!({"id": id, "content": token, "special": *kind != USER_DEFINED,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false})
            })
            .collect()
    }
}
