//! `POST /v1/chat/completions` and `POST /v1/completions`.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Json,
    body::Bytes,
    extract::State,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{Stream, stream};
use serde_json::{Value, json};

use crate::{
    engine::{GenerateRequest, RequestStream, RequestUsage, StreamEvent},
    types::RequestId,
};

use super::{ApiError, AppState, request::Body};

const COMPLETION_TOKENS_DEFAULT: usize = 16;
const SSE_KEEP_ALIVE: Duration = Duration::from_secs(15);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    Chat,
    Completion,
}

/// What the answer repeats of the request.
struct Answer {
    shape: Shape,
    id: String,
    created: u64,
    model: String,
    choices: u32,
    stream: bool,
    include_usage: bool,
}

pub async fn chat_completions(state: State<Arc<AppState>>, body: Bytes) -> Response {
    answer(state, body, Shape::Chat).await.unwrap_or_else(IntoResponse::into_response)
}

pub async fn completions(state: State<Arc<AppState>>, body: Bytes) -> Response {
    answer(state, body, Shape::Completion).await.unwrap_or_else(IntoResponse::into_response)
}

async fn answer(
    State(state): State<Arc<AppState>>,
    body: Bytes,
    shape: Shape,
) -> Result<Response, ApiError> {
    // Templates and tokenizers take their time on long prompts: not on the threads that serve.
    let prepare = tokio::task::spawn_blocking({
        let state = state.clone();
        move || prepare(&state, &body, shape)
    });
    let (request, answer) =
        prepare.await.map_err(|_| ApiError::internal("preparing the request failed"))??;
    let events = state.model.engine.submit(request)?;
    if answer.stream {
        let keep_alive = KeepAlive::new().interval(SSE_KEEP_ALIVE);
        return Ok(Sse::new(sse(events, answer)).keep_alive(keep_alive).into_response());
    }
    collect(events, &answer).await
}

fn prepare(
    state: &AppState,
    bytes: &[u8],
    shape: Shape,
) -> Result<(GenerateRequest, Answer), ApiError> {
    let body = Body::parse(bytes)?;
    let model = &state.model;
    match body.text("model")? {
        Some(id) if id == model.id.as_str() => {}
        Some(id) => return Err(ApiError::unknown_model(id)),
        None => return Err(ApiError::invalid(Some("model"), "`model` must name a served model")),
    }
    body.check_supported()?;
    let prompt = match shape {
        Shape::Chat => {
            let messages = body.messages()?;
            let template = model.template.as_ref().ok_or_else(|| {
                ApiError::invalid(None, "this model has no chat template; use /v1/completions")
            })?;
            template.encode(&model.tokenizer, &messages, true)?
        }
        Shape::Completion => completion_prompt(state, &body)?,
    };
    let room = model.context_tokens_max.saturating_sub(prompt.len());
    if room == 0 {
        return Err(ApiError::too_long(prompt.len() + 1, model.context_tokens_max));
    }
    let stop = match shape {
        Shape::Chat => body.stop(&["max_tokens", "max_completion_tokens"], room)?,
        Shape::Completion => body.stop(&["max_tokens"], COMPLETION_TOKENS_DEFAULT.min(room))?,
    };
    let choices = body.integer("n", 1..=u64::from(state.choices_max))?.unwrap_or(1) as u32;
    let include_usage = match body.get("stream_options") {
        Some(options) => options.get("include_usage").and_then(Value::as_bool).unwrap_or(false),
        None => false,
    };
    let prefix = if shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
    let id = format!("{prefix}-{}", uuid::Uuid::new_v4().simple());
    let request = GenerateRequest {
        id: RequestId::new(&id),
        prompt: prompt.into(),
        choices,
        sampling: body.sampling(model.tokenizer.vocab_size())?,
        stop,
        prompt_logprobs: None,
    };
    let answer = Answer {
        shape,
        id,
        created: state.clock.unix_s(),
        model: model.id.as_str().to_owned(),
        choices,
        stream: body.flag("stream")?,
        include_usage,
    };
    Ok((request, answer))
}

fn completion_prompt(state: &AppState, body: &Body) -> Result<Vec<u32>, ApiError> {
    let expected = || ApiError::invalid(Some("prompt"), "`prompt` must be a string or token ids");
    let tokenizer = &state.model.tokenizer;
    let ids = match body.get("prompt").ok_or_else(expected)? {
        Value::String(text) => tokenizer.encode(text, true)?,
        Value::Array(ids) => ids
            .iter()
            .map(|id| {
                let id = id.as_u64().filter(|id| (*id as usize) < tokenizer.vocab_size());
                id.map(|id| id as u32).ok_or_else(expected)
            })
            .collect::<Result<_, _>>()?,
        _ => return Err(expected()),
    };
    if ids.is_empty() {
        return Err(ApiError::invalid(Some("prompt"), "`prompt` must hold at least one token"));
    }
    Ok(ids)
}

fn usage(usage: RequestUsage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

impl Answer {
    fn envelope(&self, choices: Value) -> Value {
        let object = match (self.shape, self.stream) {
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Chat, false) => "chat.completion",
            (Shape::Completion, _) => "text_completion",
        };
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "choices": choices,
        })
    }

    fn chunk(&self, choice: u32, delta: Value, text: &str, finish: Option<&str>) -> Event {
        let choice = match self.shape {
            Shape::Chat => {
                json!({"index": choice, "delta": delta, "logprobs": null, "finish_reason": finish})
            }
            Shape::Completion => {
                json!({"index": choice, "text": text, "logprobs": null, "finish_reason": finish})
            }
        };
        let mut chunk = self.envelope(json!([choice]));
        if self.include_usage {
            chunk["usage"] = Value::Null;
        }
        Event::default().data(chunk.to_string())
    }

    /// The events of a stream for one of the engine's; the last one is `[DONE]`.
    fn events(&self, event: StreamEvent) -> Vec<Event> {
        match event {
            StreamEvent::PromptLogprobs(_) => Vec::new(),
            StreamEvent::Delta { choice, text, .. } => {
                vec![self.chunk(choice, json!({"content": text}), &text, None)]
            }
            StreamEvent::Finish { choice, reason } => {
                vec![self.chunk(choice, json!({}), "", Some(reason.as_openai()))]
            }
            StreamEvent::Done(counts) => {
                let mut events = Vec::new();
                if self.include_usage {
                    let mut chunk = self.envelope(json!([]));
                    chunk["usage"] = usage(counts);
                    events.push(Event::default().data(chunk.to_string()));
                }
                events.push(Event::default().data("[DONE]"));
                events
            }
            StreamEvent::Error(error) => {
                let body = ApiError::unavailable(error.to_string()).body();
                vec![Event::default().data(body.to_string())]
            }
        }
    }
}

fn sse(
    events: RequestStream,
    answer: Answer,
) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    let roles: Vec<Event> = match answer.shape {
        Shape::Chat => (0..answer.choices)
            .map(|choice| {
                answer.chunk(choice, json!({"role": "assistant", "content": ""}), "", None)
            })
            .collect(),
        Shape::Completion => Vec::new(),
    };
    let start = (events, answer, std::collections::VecDeque::from(roles), false);
    stream::unfold(start, |(mut events, answer, mut ready, mut ended)| async move {
        loop {
            if let Some(event) = ready.pop_front() {
                return Some((Ok(event), (events, answer, ready, ended)));
            }
            if ended {
                return None;
            }
            let event = events.next().await?;
            ended = matches!(event, StreamEvent::Done(_) | StreamEvent::Error(_));
            ready.extend(answer.events(event));
        }
    })
}

async fn collect(mut events: RequestStream, answer: &Answer) -> Result<Response, ApiError> {
    let mut choices = vec![(String::new(), ""); answer.choices as usize];
    while let Some(event) = events.next().await {
        match event {
            StreamEvent::PromptLogprobs(_) => {}
            StreamEvent::Delta { choice, text, .. } => choices[choice as usize].0.push_str(&text),
            StreamEvent::Finish { choice, reason } => {
                choices[choice as usize].1 = reason.as_openai()
            }
            StreamEvent::Done(counts) => {
                let choices = choices.iter().enumerate().map(|(index, (text, finish))| match answer.shape {
                    Shape::Chat => json!({"index": index, "logprobs": null, "finish_reason": finish,
                        "message": {"role": "assistant", "content": text, "refusal": null}}),
                    Shape::Completion => {
                        json!({"index": index, "text": text, "logprobs": null, "finish_reason": finish})
                    }
                });
                let mut whole = answer.envelope(choices.collect());
                whole["usage"] = usage(counts);
                return Ok(Json(whole).into_response());
            }
            StreamEvent::Error(error) => return Err(ApiError::unavailable(error.to_string())),
        }
    }
    Err(ApiError::internal("the engine stopped before the answer was complete"))
}
