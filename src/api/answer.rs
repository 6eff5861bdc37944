//! What a client reads: chunks of a stream or the whole, in the shapes of OpenAI's chat completions
//! and (legacy) completions.

use serde_json::{Value, json};

use crate::{
    engine::{OutputToken, RequestUsage, SoFar, StreamEvent, books::Books},
    ledger::{Bill, EndCause},
    price::usd,
    sampling::TokenLogprobs,
    text::{Lead, Tokenizer},
    types::{NanoUsd, RequestId, TokenId},
};

use super::ApiError;

/// Stands for minus infinity, which JSON does not have.
const LOGPROB_MIN: f32 = -9999.0;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Shape {
    Chat,
    Completion,
}

impl Shape {
    /// The field of a body that makes the prompt.
    pub fn prompt_field(self) -> &'static str {
        match self {
            Self::Chat => "messages",
            Self::Completion => "prompt",
        }
    }
}

/// A prompt that is repeated before its completion.
pub struct Echo {
    pub text: String,
    pub ids: Vec<TokenId>,
}

/// What the answer repeats of the request.
pub struct Options {
    pub shape: Shape,
    pub created_unix_s: u64,
    pub model: String,
    pub tokenizer: Tokenizer,
    /// Of each prompt.
    pub prompt_tokens: Vec<u32>,
    /// Of each prompt.
    pub choices: u32,
    pub stream: bool,
    pub include_usage: bool,
    /// Every chunk says what its request has used and owes so far.
    pub continuous_usage: bool,
    pub logprobs: bool,
    /// One a prompt, if prompts are repeated.
    pub echoes: Option<Vec<Echo>>,
    /// One a prompt: what the text of its choices loses at its start.
    pub leads: Vec<Lead>,
    /// One a prompt, as the books know it.
    pub requests: Vec<RequestId>,
    /// Says what the device drew for a request.
    pub books: Books,
}

/// Follows the events of one request.
pub struct Answer {
    options: Options,
    id: String,
    choices: Vec<Choice>,
    usage: RequestUsage,
    /// One a prompt.
    bills: Vec<Bill>,
    /// Of the prompts that are done; `None` where nobody reads the device's energy.
    energy_uj: Option<u64>,
    so_far: Vec<SoFar>,
    prompts_done: usize,
    error: Option<String>,
}

/// One choice; choice `c` of prompt `p` has the index `p * n + c`.
#[derive(Default)]
struct Choice {
    text: String,
    tokens: Vec<OutputToken>,
    finish: Option<&'static str>,
    /// Where money or a rule of the tenant ended it.
    stop_cause: Option<EndCause>,
    /// Characters that tokens so far have begun.
    characters: usize,
    /// What their text may still lose.
    lead: Lead,
    echoed: bool,
}

impl Answer {
    pub fn new(options: Options) -> Self {
        let prefix = if options.shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{}", uuid::Uuid::new_v4().simple());
        let of_prompt = |lead: &Lead| {
            let choice = |_| Choice { lead: *lead, ..Choice::default() };
            (0..options.choices).map(choice).collect::<Vec<_>>()
        };
        let choices = options.leads.iter().flat_map(of_prompt).collect();
        Self {
            so_far: vec![SoFar::default(); options.prompt_tokens.len()],
            options,
            id,
            choices,
            usage: RequestUsage::default(),
            bills: Vec::new(),
            energy_uj: None,
            prompts_done: 0,
            error: None,
        }
    }

    pub fn model(&self) -> &str {
        &self.options.model
    }

    pub fn choices(&self) -> u32 {
        self.options.choices
    }

    pub fn is_streamed(&self) -> bool {
        self.options.stream
    }

    /// Whether nothing more is to come.
    pub fn is_complete(&self) -> bool {
        self.prompts_done == self.options.prompt_tokens.len() || self.error.is_some()
    }

    /// Why it ended early.
    pub fn error(&self) -> Option<&str> {
        self.error.as_deref()
    }

    /// Data of the chunks that come before anything is computed.
    pub fn opening(&self) -> Vec<String> {
        let roles = 0..if self.options.shape == Shape::Chat { self.choices.len() } else { 0 };
        roles
            .map(|index| {
                let delta = json!({"role": "assistant", "content": ""});
                self.chunk(index, delta, "", Value::Null, None)
            })
            .collect()
    }

    /// Data of the chunks that an event leads to; `[DONE]` comes last.
    pub fn chunks(&mut self, prompt: usize, event: StreamEvent) -> Vec<String> {
        if let StreamEvent::Error(error) = event {
            return self.fail(&ApiError::unavailable(error.to_string()));
        }
        let mut chunks = Vec::new();
        for index in self.take(prompt, event) {
            let choice = &mut self.choices[index];
            let (text, tokens) =
                (std::mem::take(&mut choice.text), std::mem::take(&mut choice.tokens));
            let finish = choice.finish;
            if !text.is_empty() || !tokens.is_empty() {
                let logprobs = self.logprobs(index, &tokens);
                chunks.push(self.chunk(index, json!({"content": text}), &text, logprobs, None));
            }
            if finish.is_some() {
                chunks.push(self.chunk(index, json!({}), "", Value::Null, finish));
            }
        }
        if self.is_complete() {
            if self.options.include_usage {
                let mut chunk = self.envelope(json!([]));
                chunk["usage"] = self.usage();
                chunks.push(chunk.to_string());
            }
            chunks.push("[DONE]".to_owned());
        }
        chunks
    }

    /// Ends a stream with an error that its client can read.
    pub fn fail(&mut self, error: &ApiError) -> Vec<String> {
        self.error = Some(error.message.clone());
        vec![error.body().to_string()]
    }

    /// Takes an event in; the choices that it changed.
    pub fn take(&mut self, prompt: usize, event: StreamEvent) -> std::ops::Range<usize> {
        let first = prompt * self.options.choices as usize;
        let all = first..first + self.options.choices as usize;
        match event {
            StreamEvent::PromptLogprobs(scores) => {
                all.clone().for_each(|index| self.echo(prompt, index, Some(&scores)));
                all
            }
            StreamEvent::Delta { choice, text, tokens, so_far } => {
                self.so_far[prompt] = so_far;
                let index = first + choice as usize;
                self.echo(prompt, index, None);
                let choice = &mut self.choices[index];
                choice.text.push_str(&text);
                if self.options.logprobs {
                    choice.tokens.extend(tokens);
                }
                index..index + 1
            }
            StreamEvent::Finish { choice, reason, cause } => {
                let index = first + choice as usize;
                self.echo(prompt, index, None);
                self.choices[index].finish = Some(reason.as_openai());
                self.choices[index].stop_cause = cause;
                index..index + 1
            }
            StreamEvent::Done(counts, bill) => {
                let Options { books, requests, .. } = &self.options;
                let device_ns = bill.as_ref().map_or(0, |bill| bill.used.device_ns);
                if let Some(energy) = books.estimate(&requests[prompt], device_ns) {
                    self.energy_uj = Some(self.energy_uj.unwrap_or(0) + energy.total_uj());
                }
                self.bills.extend(bill);
                self.usage.prompt_tokens += counts.prompt_tokens;
                self.usage.cached_tokens += counts.cached_tokens;
                self.usage.completion_tokens += counts.completion_tokens;
                self.prompts_done += 1;
                0..0
            }
            StreamEvent::Error(error) => {
                self.error = Some(error.to_string());
                0..0
            }
        }
    }

    /// Puts the prompt before the first text of a choice, where that was asked for.
    fn echo(&mut self, prompt: usize, index: usize, scores: Option<&[Option<TokenLogprobs>]>) {
        let Some(echo) = self.options.echoes.as_ref().map(|echoes| &echoes[prompt]) else { return };
        let choice = &mut self.choices[index];
        if std::mem::replace(&mut choice.echoed, true) {
            return;
        }
        choice.text.push_str(&echo.text);
        for (id, score) in echo.ids.iter().zip(scores.unwrap_or(&[])) {
            choice.tokens.push(OutputToken { id: *id, logprobs: score.clone() });
        }
    }

    /// The answer that is not streamed.
    pub fn whole(mut self) -> Value {
        let choices: Vec<Value> = (0..self.choices.len())
            .map(|index| {
                let choice = &mut self.choices[index];
                let (text, tokens) =
                    (std::mem::take(&mut choice.text), std::mem::take(&mut choice.tokens));
                let finish = choice.finish;
                let logprobs =
                    if self.options.logprobs { self.logprobs(index, &tokens) } else { Value::Null };
                let stop_cause = self.choices[index].stop_cause;
                let mut whole = match self.options.shape {
                    Shape::Chat => json!({
                        "index": index, "logprobs": logprobs, "finish_reason": finish,
                        "message": {"role": "assistant", "content": text, "refusal": null},
                    }),
                    Shape::Completion => json!({
                        "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish,
                    }),
                };
                mark(&mut whole, stop_cause);
                whole
            })
            .collect();
        let mut whole = self.envelope(choices.into());
        whole["usage"] = self.usage();
        whole
    }

    /// Tokens, and what they cost once that is durable.
    fn usage(&self) -> Value {
        let counts = self.usage;
        let mut usage = json!({
            "prompt_tokens": counts.prompt_tokens,
            "completion_tokens": counts.completion_tokens,
            "total_tokens": counts.prompt_tokens + counts.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        });
        if self.bills.len() == self.options.prompt_tokens.len() {
            let sum = |amount: fn(&Bill) -> NanoUsd| {
                usd::format(NanoUsd(self.bills.iter().map(|bill| amount(bill).0).sum()))
            };
            let device_ns: u64 = self.bills.iter().map(|bill| bill.used.device_ns).sum();
            usage["cost"] = sum(|bill| bill.cost).into();
            usage["cost_details"] = json!({
                "token": sum(|bill| bill.token_cost),
                "gpu": sum(|bill| bill.device_cost),
                "price_version": self.bills[0].price_version,
                "gpu_ms": device_ns as f64 / 1e6,
            });
            // The windows it ran in are not settled yet; the ledger's row is, a moment later.
            if let Some(uj) = self.energy_uj {
                usage["cost_details"]["joules"] = (uj as f64 / 1e6).into();
                usage["cost_details"]["joules_estimated"] = true.into();
            }
        }
        usage
    }

    fn envelope(&self, choices: Value) -> Value {
        let object = match (self.options.shape, self.options.stream) {
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Chat, false) => "chat.completion",
            (Shape::Completion, _) => "text_completion",
        };
        json!({
            "id": self.id, "object": object, "created": self.options.created_unix_s,
            "model": self.options.model, "choices": choices,
        })
    }

    fn chunk(
        &self,
        index: usize,
        delta: Value,
        text: &str,
        logprobs: Value,
        finish: Option<&str>,
    ) -> String {
        let mut choice = json!({"index": index, "logprobs": logprobs, "finish_reason": finish});
        mark(&mut choice, self.choices[index].stop_cause.filter(|_| finish.is_some()));
        match self.options.shape {
            Shape::Chat => choice["delta"] = delta,
            Shape::Completion => choice["text"] = text.into(),
        }
        let mut chunk = self.envelope(json!([choice]));
        if self.options.continuous_usage {
            let prompt = index / self.options.choices as usize;
            let (prompt_tokens, so_far) = (self.options.prompt_tokens[prompt], self.so_far[prompt]);
            chunk["usage"] = json!({
                "prompt_tokens": prompt_tokens,
                "completion_tokens": so_far.completion_tokens,
                "total_tokens": prompt_tokens + so_far.completion_tokens,
                "cost": usd::format(so_far.cost),
            });
        } else if self.options.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk.to_string()
    }

    fn logprobs(&mut self, index: usize, tokens: &[OutputToken]) -> Value {
        if tokens.is_empty() {
            return Value::Null;
        }
        let tokenizer = &self.options.tokenizer;
        match self.options.shape {
            Shape::Chat => {
                let content = tokens.iter().filter_map(|token| {
                    let scores = token.logprobs.as_ref()?;
                    let mut entry = chat_entry(tokenizer, token.id, scores.logprob);
                    let top =
                        scores.top.iter().map(|(id, logprob)| chat_entry(tokenizer, *id, *logprob));
                    entry["top_logprobs"] = top.collect();
                    Some(entry)
                });
                json!({"content": content.collect::<Vec<_>>(), "refusal": null})
            }
            Shape::Completion => {
                let (mut texts, mut offsets) = (Vec::new(), Vec::new());
                let (mut chosen, mut tops) = (Vec::new(), Vec::new());
                let Choice { characters, lead, .. } = &mut self.choices[index];
                for token in tokens {
                    texts.push(label(tokenizer, token.id, "bytes:"));
                    let bytes = tokenizer.piece(token.id, lead);
                    let continues = bytes.first().is_some_and(|byte| !begins(*byte));
                    offsets.push(characters.saturating_sub(usize::from(continues)));
                    *characters += bytes.iter().filter(|byte| begins(**byte)).count();
                    chosen.push(token.logprobs.as_ref().map(|scores| finite(scores.logprob)));
                    tops.push(token.logprobs.as_ref().map(|scores| {
                        // As others do, the chosen token is among them, whatever its rank.
                        let all = scores.top.iter().copied().chain([(token.id, scores.logprob)]);
                        all.map(|(id, logprob)| {
                            (label(tokenizer, id, "bytes:"), finite(logprob).into())
                        })
                        .collect::<serde_json::Map<String, Value>>()
                    }));
                }
                json!({
                    "tokens": texts, "token_logprobs": chosen, "top_logprobs": tops,
                    "text_offset": offsets,
                })
            }
        }
    }
}

/// Says beside `finish_reason` what OpenAI has no word for.
fn mark(choice: &mut Value, stop_cause: Option<EndCause>) {
    if let Some(cause) = stop_cause {
        choice["candela"] = json!({"stop_cause": cause.name()});
    }
}

fn chat_entry(tokenizer: &Tokenizer, id: TokenId, logprob: f32) -> Value {
    let text = label(tokenizer, id, "");
    let bytes = match tokenizer.token_bytes(id) {
        [] => text.as_bytes(),
        bytes => bytes,
    };
    json!({"token": text, "logprob": finite(logprob), "bytes": bytes})
}

fn finite(logprob: f32) -> f32 {
    logprob.max(LOGPROB_MIN)
}

/// Whether a byte of UTF-8 begins a character.
fn begins(byte: u8) -> bool {
    byte & 0xc0 != 0x80
}

/// A token as text; a part of a character as `prefix` and escaped bytes, as OpenAI writes it.
fn label(tokenizer: &Tokenizer, id: TokenId, prefix: &str) -> String {
    let bytes = tokenizer.token_bytes(id);
    if std::str::from_utf8(bytes).is_ok() {
        return tokenizer.token_text(id);
    }
    bytes.iter().fold(prefix.to_owned(), |text, byte| text + &format!("\\x{byte:02x}"))
}
