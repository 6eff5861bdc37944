//! One line in the log and one set of measurements for every HTTP request, also for one whose client
//! went away: written when the last part of the answer is dropped.

use std::{
    panic::AssertUnwindSafe,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    task::{Context, Poll},
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::{HeaderName, HeaderValue, StatusCode},
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::FutureExt;

use crate::{clock::Clock, engine::StreamEvent, price::usd, telemetry::Metrics, types::NanoUsd};

use super::{ApiError, AppState};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id of a client that is logged beside ours.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Asked for every few seconds by machines; logged at debug level.
const PROBES: [&str; 3] = ["/health", "/ready", "/metrics"];

/// What becomes known of a request.
pub struct Record {
    id: String,
    client_id: Option<String>,
    method: String,
    path: String,
    clock: Clock,
    started_ns: u64,
    metrics: Arc<Metrics>,
    facts: Mutex<Facts>,
}

#[derive(Default)]
struct Facts {
    status: Option<StatusCode>,
    model: String,
    first_ns: Option<u64>,
    /// When each choice last brought something.
    last_ns: Vec<u64>,
    prompt_tokens: u32,
    completion_tokens: u32,
    cost_nano_usd: i128,
    tenant: String,
    finish: Vec<&'static str>,
    begun: bool,
    complete: bool,
    error: Option<String>,
}

impl Record {
    fn new(state: &AppState, request: &Request) -> Self {
        let given = request.headers().get(&REQUEST_ID).and_then(|id| id.to_str().ok());
        let given = given.filter(|id| !id.is_empty() && id.len() <= REQUEST_ID_BYTES_MAX);
        Self {
            // Never the client's own: the ledger knows requests by this, and two clients may agree.
            id: format!("req-{}", uuid::Uuid::now_v7().simple()),
            client_id: given.map(str::to_owned),
            method: request.method().to_string(),
            path: request.uri().path().to_owned(),
            clock: state.clock.clone(),
            started_ns: state.clock.now_ns(),
            metrics: state.metrics.clone(),
            facts: Mutex::default(),
        }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// A generation of `choices` choices begins.
    pub fn begin(&self, model: &str, choices: usize) {
        let mut facts = self.facts();
        facts.begun = true;
        facts.model = model.to_owned();
        facts.last_ns = vec![0; choices];
    }

    /// Who pays became known.
    pub fn tenant(&self, tenant: &str) {
        self.facts().tenant = tenant.to_owned();
    }

    /// An event of the prompt whose first choice has the index `first`.
    pub fn event(&self, first: usize, event: &StreamEvent) {
        let now_ns = self.clock.now_ns();
        let mut facts = self.facts();
        match event {
            StreamEvent::Delta { choice, .. } => {
                if facts.first_ns.is_none() {
                    facts.first_ns = Some(now_ns);
                    self.metrics.first_token(now_ns - self.started_ns);
                }
                let last = std::mem::replace(&mut facts.last_ns[first + *choice as usize], now_ns);
                if last > 0 {
                    self.metrics.inter_token(now_ns - last);
                }
            }
            StreamEvent::Finish { reason, .. } => facts.finish.push(reason.as_openai()),
            StreamEvent::Done(usage, bill) => {
                facts.cost_nano_usd += bill.as_ref().map_or(0, |bill| bill.cost.0);
                facts.prompt_tokens += usage.prompt_tokens;
                facts.completion_tokens += usage.completion_tokens;
            }
            StreamEvent::PromptLogprobs(_) | StreamEvent::Error(_) => {}
        }
    }

    /// The generation has ended.
    pub fn complete(&self, error: Option<&str>) {
        let mut facts = self.facts();
        facts.complete = true;
        facts.error = error.map(str::to_owned);
        if error.is_none() {
            self.metrics.end_to_end(self.clock.now_ns() - self.started_ns);
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let now_ns = self.clock.now_ns();
        let facts = self.facts();
        let ms = |ns: u64| ns as f64 / 1e6;
        let outcome = match facts.status {
            None => "aborted",
            Some(status) if status.is_success() && facts.begun && !facts.complete => "aborted",
            Some(_) if facts.error.is_some() => "error",
            Some(status) if status.is_success() => "ok",
            Some(_) => "refused",
        };
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    request_id = self.id,
                    client_request_id = self.client_id,
                    method = self.method,
                    path = self.path,
                    outcome,
                    status = facts.status.map(|status| status.as_u16()),
                    model = facts.model,
                    prompt_tokens = facts.prompt_tokens,
                    completion_tokens = facts.completion_tokens,
                    tenant = facts.tenant,
                    cost_usd = usd::format(NanoUsd(facts.cost_nano_usd)),
                    finish = facts.finish.join(","),
                    ttft_ms = facts.first_ns.map(|first_ns| ms(first_ns - self.started_ns)),
                    duration_ms = ms(now_ns - self.started_ns),
                    error = facts.error,
                    "request",
                )
            };
        }
        if PROBES.contains(&self.path.as_str()) { line!(debug) } else { line!(info) }
    }
}

/// Around every route: the request id, the record, and an answer even after a panic.
pub async fn observe(
    State(state): State<Arc<AppState>>,
    mut request: Request,
    next: Next,
) -> Response {
    let record = Arc::new(Record::new(&state, &request));
    request.extensions_mut().insert(record.clone());
    let answer = AssertUnwindSafe(next.run(request)).catch_unwind().await;
    let mut response = answer.unwrap_or_else(|_| {
        ApiError::internal("a bug in the server; its log has the details").into_response()
    });
    record.facts().status = Some(response.status());
    if let Ok(id) = HeaderValue::from_str(&record.id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response.map(|body| Body::new(Recorded { body, _record: record }))
}

/// A body that holds its record until it has been sent or given up.
struct Recorded {
    body: Body,
    _record: Arc<Record>,
}

impl HttpBody for Recorded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
