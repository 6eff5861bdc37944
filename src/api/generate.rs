//! `POST /v1/chat/completions` and `POST /v1/completions`.

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{State, rejection::BytesRejection},
    http::HeaderMap,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use futures_util::{Stream, StreamExt, stream};

use crate::{
    admission::Caller,
    engine::{GenerateRequest, RequestStream, StreamEvent},
    ledger::{LedgerError, Opening},
    price::usd,
    types::{NanoUsd, RequestId},
};

use super::{
    ApiError, AppState,
    answer::{Answer, Echo, Shape},
    record::Record,
    request::Body,
};

const COMPLETION_TOKENS_DEFAULT: usize = 16;
/// Prompts of one request.
const PROMPTS_MAX: usize = 64;
const SSE_KEEP_ALIVE: Duration = Duration::from_secs(15);
/// Proxies of the nginx kind hold a stream back unless told not to.
const NO_PROXY_BUFFER: (&str, &str) = ("x-accel-buffering", "no");

const CAP_HEADER: &str = "x-candela-max-cost-usd";
const IDEMPOTENCY_HEADER: &str = "idempotency-key";
const IDEMPOTENCY_BYTES_MAX: usize = 255;

type Input = Result<Bytes, BytesRejection>;

pub async fn chat_completions(
    state: State<Arc<AppState>>,
    record: Extension<Arc<Record>>,
    caller: Extension<Caller>,
    headers: HeaderMap,
    body: Input,
) -> Result<Response, ApiError> {
    answer(state, record, caller, &headers, body?, Shape::Chat).await
}

pub async fn completions(
    state: State<Arc<AppState>>,
    record: Extension<Arc<Record>>,
    caller: Extension<Caller>,
    headers: HeaderMap,
    body: Input,
) -> Result<Response, ApiError> {
    answer(state, record, caller, &headers, body?, Shape::Completion).await
}

async fn answer(
    State(state): State<Arc<AppState>>,
    Extension(record): Extension<Arc<Record>>,
    Extension(caller): Extension<Caller>,
    headers: &HeaderMap,
    body: Bytes,
    shape: Shape,
) -> Result<Response, ApiError> {
    record.tenant(caller.tenant.as_str());
    let money = Money::of_headers(headers, &body)?;
    // Templates and tokenizers take their time on long prompts: not on the threads that serve.
    let prepare = tokio::task::spawn_blocking({
        let (state, record) = (state.clone(), record.clone());
        move || prepare(&state, &record, caller, money, &body, shape)
    });
    let Prepared { requests, answer } =
        prepare.await.map_err(|_| ApiError::internal("preparing the request failed"))??;
    record.begin(answer.model(), requests.len() * answer.choices() as usize);
    // A refusal drops the leases and streams of the prompts before it, which costs nothing.
    let opened = requests.into_iter().map(async |(request, opening)| {
        let lease = state.ledger.open(opening).await?;
        Ok::<_, LedgerError>((request, lease))
    });
    let opened = futures_util::future::try_join_all(opened).await?;
    let streams: Vec<RequestStream> = opened
        .into_iter()
        .map(|(request, lease)| state.model.engine.submit(request, lease))
        .collect::<Result<_, _>>()?;
    let events = merge(streams);
    if answer.is_streamed() {
        let keep_alive = KeepAlive::new().interval(SSE_KEEP_ALIVE);
        let events = Sse::new(sse(events, answer, record)).keep_alive(keep_alive);
        return Ok(([NO_PROXY_BUFFER], events).into_response());
    }
    collect(events, answer, &record).await
}

/// What the headers say about money.
pub(super) struct Money {
    cap: Option<NanoUsd>,
    /// The key, and the hash of the body it stands for.
    idempotency: Option<(String, [u8; 32])>,
}

impl Money {
    pub(super) fn of_headers(headers: &HeaderMap, body: &[u8]) -> Result<Self, ApiError> {
        let text = |name: &'static str| {
            let value = headers.get(name).map(|value| value.to_str());
            value
                .transpose()
                .map_err(|_| ApiError::invalid(None, format!("`{name}` must be ASCII")))
        };
        let cap = text(CAP_HEADER)?.map(usd::parse).transpose();
        let cap = cap.map_err(|error| ApiError::invalid(Some(CAP_HEADER), error.to_string()))?;
        let idempotency = match text(IDEMPOTENCY_HEADER)? {
            None => None,
            Some(key) if (1..=IDEMPOTENCY_BYTES_MAX).contains(&key.len()) => {
                Some((key.to_owned(), *blake3::hash(body).as_bytes()))
            }
            Some(_) => {
                let message = format!(
                    "`{IDEMPOTENCY_HEADER}` must have 1 to {IDEMPOTENCY_BYTES_MAX} characters"
                );
                return Err(ApiError::invalid(Some(IDEMPOTENCY_HEADER), message));
            }
        };
        Ok(Self { cap, idempotency })
    }
}

/// A call that was read and checked: one request a prompt.
pub(super) struct Prepared {
    pub requests: Vec<(GenerateRequest, Opening)>,
    answer: Answer,
}

pub(super) fn prepare(
    state: &AppState,
    record: &Record,
    caller: Caller,
    money: Money,
    bytes: &[u8],
    shape: Shape,
) -> Result<Prepared, ApiError> {
    let body = Body::parse(bytes)?;
    let model = &state.model;
    match body.text("model")? {
        Some(id) if id == model.id.as_str() => {}
        Some(id) => return Err(ApiError::unknown_model(id)),
        None => return Err(ApiError::invalid(Some("model"), "`model` must name a served model")),
    }
    body.check_supported(shape)?;
    let cap = body.amount("max_cost_usd")?.into_iter().chain(money.cap).min();
    let (user_label, metadata) = body.labels()?;
    let stream = body.flag("stream")?;
    let (include_usage, continuous_usage) = body.usage_options(stream)?;
    let choices = body.integer("n", 1..=u64::from(state.choices_max))?.unwrap_or(1) as u32;
    let logprobs = body.logprobs(shape, state.logprobs_top_max)?;
    let mut sampling = body.sampling(model.tokenizer.vocab_size())?;
    sampling.logprobs = logprobs;
    let echo = shape == Shape::Completion && body.flag("echo")?;
    let prompts = match shape {
        Shape::Chat => vec![(body.chat_prompt(model)?, None)],
        Shape::Completion => {
            let prompts = body.prompts(&model.tokenizer)?;
            if prompts.len() > PROMPTS_MAX {
                let message = format!("`prompt` must hold at most {PROMPTS_MAX} prompts");
                return Err(ApiError::invalid(Some("prompt"), message));
            }
            prompts
        }
    };
    let longest = prompts.iter().map(|(ids, _)| ids.len()).max().unwrap_or(0);
    let room = model.context_tokens_max.saturating_sub(longest);
    let stop = match shape {
        Shape::Chat => body.stop(
            &["max_tokens", "max_completion_tokens"],
            1..=state.completion_tokens_max,
            room.max(1),
        )?,
        Shape::Completion => body.stop(
            &["max_tokens"],
            u32::from(!echo)..=state.completion_tokens_max,
            COMPLETION_TOKENS_DEFAULT.min(room.max(1)),
        )?,
    };
    if longest + stop.max_tokens as usize > model.context_tokens_max {
        let tokens = longest + stop.max_tokens as usize;
        return Err(ApiError::too_long(tokens, model.context_tokens_max).at(shape.prompt_field()));
    }
    let parts = prompts.len() as u32;
    let bound = model.engine.snapshot().device_bound;
    let mut idempotency = money.idempotency;
    let requests = prompts.iter().enumerate().map(|(index, (ids, _))| {
        let id = match parts {
            1 => RequestId::new(record.id()),
            _ => RequestId::new(format!("{}/{index}", record.id())),
        };
        let opening = Opening {
            request: id.clone(),
            payer: caller.payer.clone(),
            model: model.id.clone(),
            user_label: user_label.clone(),
            metadata: metadata.clone(),
            input_tokens: ids.len() as u64,
            choices,
            device_bound_ns: bound.map_or(0, |bound| {
                bound.opening_ns(ids.len(), choices, logprobs.is_some() && echo)
            }),
            cap,
            parts,
            // The first prompt stands for the call.
            idempotency: idempotency.take(),
        };
        let request = GenerateRequest {
            id,
            prompt: ids.clone().into(),
            choices,
            sampling: sampling.clone(),
            stop: stop.clone(),
            prompt_logprobs: logprobs.filter(|_| echo),
        };
        (request, opening)
    });
    let requests: Vec<_> = requests.collect();
    let lead = |(ids, _): &(Vec<u32>, _)| model.tokenizer.lead_after(if echo { &[] } else { ids });
    let leads = prompts.iter().map(lead).collect();
    let echoes = echo.then(|| {
        let texts = prompts.into_iter().map(|(ids, text)| Echo {
            text: text.unwrap_or_else(|| model.tokenizer.decode(&ids)),
            ids,
        });
        texts.collect()
    });
    let answer = Answer::new(super::answer::Options {
        shape,
        created_unix_s: state.clock.unix_s(),
        model: model.id.as_str().to_owned(),
        tokenizer: model.tokenizer.clone(),
        prompt_tokens: requests.iter().map(|(request, _)| request.prompt.len() as u32).collect(),
        choices,
        stream,
        include_usage,
        continuous_usage,
        logprobs: logprobs.is_some(),
        echoes,
        leads,
        requests: requests.iter().map(|(request, _)| request.id.clone()).collect(),
        books: state.books.clone(),
    });
    Ok(Prepared { requests, answer })
}

/// The events of all prompts as they come, each with the index of its prompt.
fn merge(streams: Vec<RequestStream>) -> impl Stream<Item = (usize, StreamEvent)> + Send + Unpin {
    stream::select_all(streams.into_iter().enumerate().map(|(prompt, events)| {
        Box::pin(stream::unfold(events, move |mut events| async move {
            events.next().await.map(|event| ((prompt, event), events))
        }))
    }))
}

fn engine_died() -> ApiError {
    ApiError::internal("the engine stopped before the answer was complete")
}

fn sse(
    events: impl Stream<Item = (usize, StreamEvent)> + Send + Unpin,
    answer: Answer,
    record: Arc<Record>,
) -> impl Stream<Item = Result<Event, Infallible>> + Send {
    let ready = VecDeque::from(answer.opening());
    stream::unfold(
        (events, answer, record, ready),
        |(mut events, mut answer, record, mut ready)| async move {
            loop {
                if let Some(data) = ready.pop_front() {
                    let event = Event::default().data(data);
                    return Some((Ok(event), (events, answer, record, ready)));
                }
                if answer.is_complete() {
                    return None;
                }
                match events.next().await {
                    Some((prompt, event)) => {
                        record.event(prompt * answer.choices() as usize, &event);
                        ready.extend(answer.chunks(prompt, event));
                        if answer.is_complete() {
                            record.complete(answer.error());
                        }
                    }
                    None => ready.extend(answer.fail(&engine_died())),
                }
            }
        },
    )
}

async fn collect(
    mut events: impl Stream<Item = (usize, StreamEvent)> + Unpin,
    mut answer: Answer,
    record: &Record,
) -> Result<Response, ApiError> {
    while let Some((prompt, event)) = events.next().await {
        record.event(prompt * answer.choices() as usize, &event);
        if let StreamEvent::Error(error) = event {
            record.complete(Some(&error.to_string()));
            return Err(ApiError::unavailable(error.to_string()));
        }
        answer.take(prompt, event);
        if answer.is_complete() {
            record.complete(None);
            return Ok(Json(answer.whole()).into_response());
        }
    }
    Err(engine_died())
}
