//! Reads a body strictly: every field checked, every refusal names its field.

use serde_json::{Map, Value};

use crate::{
    engine::{ENOUGH_TOKENS, StopParams},
    price::usd,
    sampling::{LOGIT_BIAS_MAX, SamplingParams},
    text::{ChatMessage, Tokenizer},
    types::NanoUsd,
};

use super::{ApiError, ServedModel, answer::Shape};

type Result<T> = std::result::Result<T, ApiError>;

/// Fields that would change the answer and are not there yet.
const UNSUPPORTED: [&str; 10] = [
    "tools",
    "functions",
    "response_format",
    "audio",
    "prediction",
    "modalities",
    "best_of",
    "suffix",
    "function_call",
    "web_search_options",
];

/// Fields that are read, or that change nothing here.
const KNOWN: [&str; 37] = [
    "add_generation_prompt",
    "echo",
    "frequency_penalty",
    "ignore_eos",
    "logit_bias",
    "logprobs",
    "max_completion_tokens",
    "max_cost_usd",
    "max_tokens",
    "messages",
    "metadata",
    "min_p",
    "min_tokens",
    "model",
    "n",
    "natural_stop",
    "parallel_tool_calls",
    "presence_penalty",
    "prompt",
    "repetition_penalty",
    "return_token_strs",
    "safety_identifier",
    "seed",
    "service_tier",
    "stop",
    "store",
    "stream",
    "stream_options",
    "temperature",
    "tokens",
    "tool_choice",
    "top_k",
    "top_logprobs",
    "top_p",
    "user",
    "verbosity",
    "add_special_tokens",
];

/// What `metadata` may hold, as OpenAI bounds it.
const METADATA_ENTRIES_MAX: usize = 16;
/// Longest `user`.
const USER_BYTES_MAX: usize = 256;

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
        self.flag_or(key, false)
    }

    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        let value = self.get(key).map(|v| v.as_bool().ok_or_else(|| wrong(key, "true or false")));
        Ok(value.transpose()?.unwrap_or(default))
    }

    /// An amount in USD: a decimal string, or a number as it was written.
    pub fn amount(&self, key: &str) -> Result<Option<NanoUsd>> {
        let text = match self.get(key) {
            None => return Ok(None),
            Some(Value::String(text)) => text.clone(),
            // Display of a float is the shortest decimal that reads as the same float, which is what
            // was written unless that had more digits than an amount may have.
            Some(Value::Number(number)) => number
                .as_u64()
                .map_or_else(|| format!("{}", number.as_f64().unwrap_or(-1.0)), |n| n.to_string()),
            Some(_) => return Err(wrong(key, "an amount in USD, such as \"0.05\"")),
        };
        usd::parse(&text).map(Some).map_err(|error| ApiError::invalid(Some(key), error.to_string()))
    }

    /// The labels that cost is allocated by: `user`, and `metadata` as JSON.
    pub fn labels(&self) -> Result<(String, String)> {
        let user = self.text("user")?.unwrap_or_default();
        if user.len() > USER_BYTES_MAX {
            return Err(wrong("user", &format!("at most {USER_BYTES_MAX} bytes")));
        }
        if user.contains('\0') {
            // PostgreSQL has no text with it.
            return Err(wrong("user", "text without NUL"));
        }
        let metadata = self.get("metadata").map_or_else(|| "{}".to_owned(), Value::to_string);
        Ok((user.to_owned(), metadata))
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
    pub fn check_supported(&self, shape: Shape) -> Result<()> {
        let known = |key: &str| KNOWN.contains(&key) || UNSUPPORTED.contains(&key);
        let unknown: Vec<&String> = self.0.keys().filter(|key| !known(key)).collect();
        if !unknown.is_empty() {
            tracing::debug!(?unknown, ?shape, "fields of the body that are not read");
        }
        self.text("user")?;
        if let Some(metadata) = self.get("metadata") {
            let strings = |map: &Map<String, Value>| {
                map.len() <= METADATA_ENTRIES_MAX && map.values().all(Value::is_string)
            };
            if !metadata.as_object().is_some_and(strings) {
                let expected = format!("an object of up to {METADATA_ENTRIES_MAX} strings");
                return Err(wrong("metadata", &expected));
            }
        }
        for key in UNSUPPORTED {
            let idle = self.get(key).is_none_or(|value| match value {
                Value::Array(list) => {
                    list.is_empty() || (key == "modalities" && list == &[Value::from("text")])
                }
                Value::Bool(on) => !on,
                Value::String(choice) => key == "function_call" && choice == "none",
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
        let entries = value.as_object().ok_or_else(expected)?;
        if entries.len() > LOGIT_BIAS_MAX {
            return Err(wrong(
                "logit_bias",
                &format!("an object of up to {LOGIT_BIAS_MAX} tokens"),
            ));
        }
        entries
            .iter()
            .map(|(id, bias)| {
                let id = id.parse::<u32>().ok().filter(|id| (*id as usize) < vocab);
                let bias = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
                Ok((id.ok_or_else(expected)?, bias.ok_or_else(expected)? as f32))
            })
            .collect()
    }

    /// The longest output is the last of `max_keys` that is there, or `default`, if less than the
    /// end of `max_range`.
    pub fn stop(
        &self,
        max_keys: &[&str],
        max_range: std::ops::RangeInclusive<u32>,
        default: usize,
    ) -> Result<StopParams> {
        let mut max_tokens = (default as u64).min(u64::from(*max_range.end()));
        for key in max_keys {
            let range = u64::from(*max_range.start())..=u64::from(*max_range.end());
            max_tokens = self.integer(key, range)?.unwrap_or(max_tokens);
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
            enough_tokens: self.natural_stop()?,
        })
    }

    /// `natural_stop`: true, false, or an object with `enough_tokens`.
    fn natural_stop(&self) -> Result<Option<u32>> {
        let expected =
            || wrong("natural_stop", "true, false or an object with `enough_tokens`, at least 1");
        match self.get("natural_stop") {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(if *on { ENOUGH_TOKENS } else { 0 })),
            Some(value) => {
                let enough = value.get("enough_tokens").and_then(Value::as_u64);
                let enough = enough.filter(|enough| *enough > 0).ok_or_else(expected)?;
                Ok(Some(u32::try_from(enough).unwrap_or(u32::MAX)))
            }
        }
    }

    /// Whether a stream ends with its usage, and whether every chunk says what was used so far.
    pub fn usage_options(&self, stream: bool) -> Result<(bool, bool)> {
        let Some(options) = self.get("stream_options") else { return Ok((false, false)) };
        if !stream {
            return Err(wrong("stream_options", "left out unless `stream` is true"));
        }
        let object = options.as_object();
        let object = object.ok_or_else(|| wrong("stream_options", "an object"))?;
        let flag = |key: &str| match object.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(value) => value.as_bool().ok_or_else(|| {
                wrong("stream_options", &format!("an object whose `{key}` is true or false"))
            }),
        };
        Ok((flag("include_usage")?, flag("continuous_usage_stats")?))
    }

    /// How many alternatives to report beside each token, if any.
    pub fn logprobs(&self, shape: Shape, top_max: u32) -> Result<Option<u32>> {
        let range = 0..=u64::from(top_max);
        if shape == Shape::Completion {
            let off = self.get("logprobs") == Some(&Value::Bool(false));
            return Ok(if off { None } else { self.integer("logprobs", range)?.map(|k| k as u32) });
        }
        let top = self.integer("top_logprobs", range)?.map(|k| k as u32);
        match (self.flag("logprobs")?, top) {
            (true, top) => Ok(Some(top.unwrap_or(0))),
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => Err(wrong("top_logprobs", "left out unless `logprobs` is true")),
        }
    }

    /// One prompt or a list, each as text or as token ids; the text is kept for `echo`.
    pub fn prompts(&self, tokenizer: &Tokenizer) -> Result<Vec<(Vec<u32>, Option<String>)>> {
        let expected = || {
            wrong(
                "prompt",
                "a string, a list of strings, a list of token ids, or a list of such lists, none of them empty",
            )
        };
        let one = |prompt: &Value| {
            let (ids, text) = match prompt {
                Value::String(text) => (tokenizer.encode(text, true)?, Some(text.clone())),
                list => (token_ids(list, tokenizer).ok_or_else(expected)?, None),
            };
            if ids.is_empty() { Err(expected()) } else { Ok((ids, text)) }
        };
        match self.get("prompt").ok_or_else(expected)? {
            Value::Array(list) if list.is_empty() => Err(expected()),
            Value::Array(list) if !list[0].is_number() => list.iter().map(one).collect(),
            prompt => Ok(vec![one(prompt)?]),
        }
    }

    /// Token ids of the messages, ready for an answer.
    pub fn chat_prompt(&self, model: &ServedModel) -> Result<Vec<u32>> {
        self.chat_prompt_with(model, true)
    }

    pub fn chat_prompt_with(&self, model: &ServedModel, generate: bool) -> Result<Vec<u32>> {
        let messages = self.messages()?;
        let template = model.template.as_ref().ok_or_else(|| {
            ApiError::invalid(None, "this model has no chat template; use /v1/completions")
        })?;
        Ok(template.encode(&model.tokenizer, &messages, generate)?)
    }

    fn messages(&self) -> Result<Vec<ChatMessage>> {
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

/// A list of ids that the vocabulary has.
pub fn token_ids(value: &Value, tokenizer: &Tokenizer) -> Option<Vec<u32>> {
    let id = |id: &Value| id.as_u64().filter(|id| (*id as usize) < tokenizer.vocab_size());
    value.as_array()?.iter().map(|value| id(value).map(|id| id as u32)).collect()
}
