//! Reads a body strictly: every field checked, every refusal names its field.

use serde_json::{Map, Value};

use crate::{engine::StopParams, sampling::SamplingParams, text::ChatMessage};

use super::ApiError;

type Result<T> = std::result::Result<T, ApiError>;

/// Fields that would change the answer and are not there yet.
const UNSUPPORTED: [&str; 12] = [
    "tools",
    "functions",
    "response_format",
    "audio",
    "prediction",
    "modalities",
    "best_of",
    "suffix",
    "logprobs",
    "top_logprobs",
    "echo",
    "function_call",
];

/// A JSON object of a request.
pub struct Body(Map<String, Value>);

impl Body {
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(map)) => Ok(Self(map)),
            Ok(_) => Err(ApiError::invalid(None, "the body must be a JSON object")),
            Err(error) => Err(ApiError::invalid(None, format!("the body is not JSON: {error}"))),
        }
    }

    /// A field that is present and not null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key).map(|value| value.as_str().ok_or_else(|| wrong(key, "a string"))).transpose()
    }

    pub fn flag(&self, key: &str) -> Result<bool> {
        let value = self.get(key).map(|v| v.as_bool().ok_or_else(|| wrong(key, "true or false")));
        Ok(value.transpose()?.unwrap_or(false))
    }

    pub fn number(&self, key: &str, range: std::ops::RangeInclusive<f64>) -> Result<Option<f32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let expected =
            || wrong(key, &format!("a number from {} to {}", range.start(), range.end()));
        let number = value.as_f64().filter(|number| range.contains(number)).ok_or_else(expected)?;
        Ok(Some(number as f32))
    }

    pub fn integer(&self, key: &str, range: std::ops::RangeInclusive<u64>) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let expected =
            || wrong(key, &format!("an integer from {} to {}", range.start(), range.end()));
        Ok(Some(value.as_u64().filter(|number| range.contains(number)).ok_or_else(expected)?))
    }

    /// Refuses what is not supported, so that it is never silently ignored.
    pub fn check_supported(&self) -> Result<()> {
        for key in UNSUPPORTED {
            let idle = self.get(key).is_none_or(|value| match value {
                Value::Array(list) => list.is_empty(),
                Value::Bool(on) => !on,
                Value::Object(map) => {
                    key == "response_format" && map.get("type") == Some(&"text".into())
                }
                Value::Number(number) => key == "best_of" && number.as_u64() == Some(1),
                _ => false,
            });
            if !idle {
                return Err(ApiError::invalid(
                    Some(key),
                    format!("`{key}` is not supported yet; leave it out"),
                ));
            }
        }
        Ok(())
    }

    pub fn sampling(&self, vocab: usize) -> Result<SamplingParams> {
        let default = SamplingParams::default();
        let seed = match self.get("seed") {
            Some(value) => value.as_i64().ok_or_else(|| wrong("seed", "an integer"))? as u64,
            None => rand::random(),
        };
        Ok(SamplingParams {
            temperature: self.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
            top_p: self.number("top_p", 0.0..=1.0)?.unwrap_or(1.0).max(1e-6),
            top_k: self.integer("top_k", 0..=u64::from(u32::MAX))?.unwrap_or(0) as u32,
            min_p: self.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
            presence_penalty: self.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: self.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            repetition_penalty: self.number("repetition_penalty", 0.01..=10.0)?.unwrap_or(1.0),
            logit_bias: self.logit_bias(vocab)?.into(),
            seed,
            ..default
        })
    }

    fn logit_bias(&self, vocab: usize) -> Result<Vec<(u32, f32)>> {
        let expected = || wrong("logit_bias", "an object of token ids to numbers from -100 to 100");
        let Some(value) = self.get("logit_bias") else { return Ok(Vec::new()) };
        let entries = value.as_object().ok_or_else(expected)?.iter();
        entries
            .map(|(id, bias)| {
                let id = id.parse::<u32>().ok().filter(|id| (*id as usize) < vocab);
                let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
                Ok((id.ok_or_else(expected)?, bias.ok_or_else(expected)? as f32))
            })
            .collect()
    }

    /// `max_tokens` falls back to `default`.
    pub fn stop(&self, max_keys: &[&str], default: usize) -> Result<StopParams> {
        let mut max_tokens = default as u64;
        for key in max_keys {
            if let Some(value) = self.integer(key, 1..=u64::from(u32::MAX))? {
                max_tokens = value;
            }
        }
        let expected = || wrong("stop", "a string or a list of up to 4 strings");
        let strings = match self.get("stop") {
            None => Vec::new(),
            Some(Value::String(stop)) => vec![stop.clone()],
            Some(Value::Array(list)) if list.len() <= 4 => list
                .iter()
                .map(|stop| stop.as_str().map(str::to_owned).ok_or_else(expected))
                .collect::<Result<_>>()?,
            Some(_) => return Err(expected()),
        };
        let min_tokens = self.integer("min_tokens", 0..=max_tokens)?.unwrap_or(0) as u32;
        Ok(StopParams {
            max_tokens: max_tokens.min(u64::from(u32::MAX)) as u32,
            min_tokens,
            ignore_eos: self.flag("ignore_eos")?,
            strings,
        })
    }

    pub fn messages(&self) -> Result<Vec<ChatMessage>> {
        let expected = || wrong("messages", "a list of at least one {role, content}");
        let list = self.get("messages").and_then(Value::as_array).ok_or_else(expected)?;
        if list.is_empty() {
            return Err(expected());
        }
        list.iter()
            .map(|message| {
                let text = |key: &str| message.get(key).and_then(Value::as_str).map(str::to_owned);
                Ok(ChatMessage {
                    role: text("role").ok_or_else(expected)?,
                    content: content(message.get("content")).ok_or_else(|| {
                        wrong(
                            "messages",
                            "a list whose contents are strings or lists of text parts",
                        )
                    })?,
                    name: text("name"),
                })
            })
            .collect()
    }
}

/// A string, or text parts joined.
fn content(value: Option<&Value>) -> Option<String> {
    match value? {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| (part.get("type")? == "text").then(|| part.get("text")?.as_str())?)
            .collect(),
        _ => None,
    }
}

fn wrong(key: &str, expected: &str) -> ApiError {
    ApiError::invalid(Some(key), format!("`{key}` must be {expected}"))
}
