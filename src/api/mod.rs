//! HTTP: OpenAI's API over an engine.

mod admin;
mod answer;
mod error;
mod estimate;
mod generate;
mod gpus;
mod record;
mod request;
mod tokens;
mod utilization;

use std::{sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::{DefaultBodyLimit, Path, State},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures_util::StreamExt;
use serde_json::json;

use crate::{
    admission::{Caller, Door},
    clock::Clock,
    engine::{EngineHandle, books::Books},
    gpu::GpuFeed,
    ledger::{Ledger, Reader, book::Role},
    meter::By,
    telemetry::Metrics,
    text::{ChatTemplate, Tokenizer},
    types::ModelId,
};

pub use error::ApiError;

/// How much of a body that is too large is read before the refusal, and how long.
const DISCARDED_BYTES_MAX: usize = 64 << 20;
const DISCARD_TIME_MAX: Duration = Duration::from_secs(10);
/// What shares of the device's time in the metrics are of.
const METRICS_WINDOW: Duration = Duration::from_secs(60);

/// A model as it is served.
pub struct ServedModel {
    pub id: ModelId,
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub engine: EngineHandle,
    pub context_tokens_max: usize,
    pub created_unix_s: u64,
}

/// What every handler sees.
pub struct AppState {
    pub model: ServedModel,
    pub clock: Clock,
    pub door: Door,
    pub ledger: Ledger,
    /// Who used the device.
    pub books: Books,
    /// The machine's GPUs, and which of them the engine's device is.
    pub gpus: GpuFeed,
    pub gpu_uuid: Option<String>,
    pub reader: Reader,
    pub choices_max: u32,
    pub logprobs_top_max: u32,
    /// Longest output of one choice.
    pub completion_tokens_max: u32,
    pub metrics: Arc<Metrics>,
}

/// All routes.
pub fn router(state: Arc<AppState>, body_bytes_max: usize) -> Router {
    let keyed = Router::new()
        .route("/v1/chat/completions", post(generate::chat_completions))
        .route("/v1/completions", post(generate::completions))
        .route("/tokenize", post(tokens::tokenize))
        .route("/detokenize", post(tokens::detokenize))
        .route("/v1/cost/estimate", post(estimate::estimate))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .merge(admin::routes())
        .route_layer(axum::middleware::from_fn_with_state(state.clone(), check_key));
    let operators = Router::new()
        .route("/admin/v1/gpu/utilization", get(utilization::utilization))
        .route_layer(axum::middleware::from_fn(check_operator))
        .route_layer(axum::middleware::from_fn_with_state(state.clone(), check_key));
    Router::new()
        .merge(keyed)
        .merge(operators)
        .route("/health", get(|| async { "ok" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/openapi.json", get(openapi))
        .route("/version", get(|| async { Json(json!({"version": env!("CARGO_PKG_VERSION")})) }))
        .fallback(|| async { ApiError::not_found("this path does not exist; see /v1/models") })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(DefaultBodyLimit::max(body_bytes_max))
        .layer(axum::middleware::from_fn_with_state(body_bytes_max, check_size))
        .layer(axum::middleware::from_fn_with_state(state.clone(), record::observe))
        .with_state(state)
}

/// Refuses a body that is said to be too large. It is read and thrown away first, within bounds: most
/// clients look for an answer only after they have sent all, and find a closed connection otherwise.
async fn check_size(
    State(body_bytes_max): State<usize>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let length = request.headers().get("content-length").and_then(|value| value.to_str().ok());
    let length: Option<usize> = length.and_then(|length| length.parse().ok());
    if length.is_none_or(|length| length <= body_bytes_max) {
        return next.run(request).await;
    }
    let mut left = DISCARDED_BYTES_MAX;
    let mut body = request.into_body().into_data_stream();
    let discard = async {
        while let Some(Ok(part)) = body.next().await {
            left = left.saturating_sub(part.len());
            if left == 0 {
                return;
            }
        }
    };
    // Out of time is answered like all read.
    let _ = tokio::time::timeout(DISCARD_TIME_MAX, discard).await;
    ApiError::too_large().into_response()
}

/// Finds out who calls; handlers get a [`crate::admission::Caller`].
async fn check_key(
    State(state): State<Arc<AppState>>,
    mut request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let given = request.headers().get("authorization").and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.strip_prefix("Bearer ")).map(str::to_owned);
    match state.door.identify(given.as_deref()).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(denied) => ApiError::from(denied).into_response(),
    }
}

/// What concerns all tenants is for operators.
async fn check_operator(
    Extension(caller): Extension<Caller>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    if caller.role >= Role::Operator {
        return next.run(request).await;
    }
    ApiError::role(Role::Operator).into_response()
}

async fn ready(State(state): State<Arc<AppState>>) -> Response {
    if state.model.engine.is_ready() {
        return "ok".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, "not ready").into_response()
}

/// The description of this API, with this server's version, model and limits.
async fn openapi(State(state): State<Arc<AppState>>) -> Result<Json<serde_json::Value>, ApiError> {
    let mut document: serde_json::Value = serde_json::from_str(include_str!("openapi.json"))
        .map_err(|error| ApiError::internal(error.to_string()))?;
    admin::describe(&mut document);
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    let schemas = &mut document["components"]["schemas"];
    schemas["ModelId"]["enum"] = json!([state.model.id.as_str()]);
    schemas["TokenId"]["maximum"] = (state.model.tokenizer.vocab_size() - 1).into();
    schemas["Sampling"]["properties"]["n"]["maximum"] = state.choices_max.into();
    let top_max = state.logprobs_top_max;
    schemas["CompletionRequest"]["properties"]["logprobs"]["maximum"] = top_max.into();
    let chat = &mut schemas["ChatRequest"]["properties"];
    chat["top_logprobs"]["maximum"] = top_max.into();
    let longest = (state.model.context_tokens_max as u32).min(state.completion_tokens_max);
    chat["max_tokens"]["maximum"] = longest.into();
    chat["max_completion_tokens"]["maximum"] = longest.into();
    schemas["CompletionRequest"]["properties"]["max_tokens"]["maximum"] = longest.into();
    Ok(Json(document))
}

async fn metrics(State(state): State<Arc<AppState>>) -> Response {
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let window_ns = METRICS_WINDOW.as_nanos() as u64;
    let device = state.books.utilization(state.clock.now_ns(), window_ns, By::Tenant);
    let (engine, gpus) = (state.model.engine.snapshot(), state.gpus.snapshot());
    match state.metrics.render(&engine, tasks, &device, &gpus) {
        Ok(text) => {
            ([("content-type", "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
        }
        Err(error) => ApiError::internal(error.to_string()).into_response(),
    }
}

fn describe(model: &ServedModel) -> serde_json::Value {
    json!({
        "id": model.id.as_str(), "object": "model", "created": model.created_unix_s,
        "owned_by": "candela", "max_model_len": model.context_tokens_max,
    })
}

async fn models(State(state): State<Arc<AppState>>) -> Response {
    Json(json!({"object": "list", "data": [describe(&state.model)]})).into_response()
}

async fn model(State(state): State<Arc<AppState>>, Path(id): Path<String>) -> Response {
    if id == state.model.id.as_str() {
        return Json(describe(&state.model)).into_response();
    }
    ApiError::unknown_model(&id).into_response()
}
