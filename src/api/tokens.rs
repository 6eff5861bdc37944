//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes.

use std::sync::Arc;

use axum::{
    Json,
    body::Bytes,
    extract::{State, rejection::BytesRejection},
};
use serde_json::{Value, json};

use super::{ApiError, AppState, request::Body};

/// Text or messages to token ids.
pub async fn tokenize(
    State(state): State<Arc<AppState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    on_bytes(state, body?, |state, body| {
        let model = &state.model;
        let tokens = match (body.text("prompt")?, body.get("messages")) {
            (Some(text), None) => {
                let add_special = body.flag_or("add_special_tokens", true)?;
                model.tokenizer.encode(text, add_special)?
            }
            (None, Some(_)) => {
                body.chat_prompt_with(model, body.flag_or("add_generation_prompt", true)?)?
            }
            _ => {
                return Err(ApiError::invalid(
                    Some("prompt"),
                    "give `prompt`, a string, or `messages`, and not both",
                ));
            }
        };
        let texts = body
            .flag("return_token_strs")?
            .then(|| tokens.iter().map(|id| model.tokenizer.token_text(*id)).collect::<Vec<_>>());
        Ok(json!({
            "count": tokens.len(), "max_model_len": model.context_tokens_max, "tokens": tokens,
            "token_strs": texts,
        }))
    })
    .await
}

/// Token ids to text.
pub async fn detokenize(
    State(state): State<Arc<AppState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Json<Value>, ApiError> {
    on_bytes(state, body?, |state, body| {
        let tokenizer = &state.model.tokenizer;
        let ids = body.get("tokens").and_then(|ids| super::request::token_ids(ids, tokenizer));
        let ids = ids.ok_or_else(|| {
            ApiError::invalid(Some("tokens"), "`tokens` must be a list of ids of the vocabulary")
        })?;
        Ok(json!({"prompt": tokenizer.decode(&ids)}))
    })
    .await
}

/// Long texts take their time: not on the threads that serve.
async fn on_bytes(
    state: Arc<AppState>,
    bytes: Bytes,
    work: impl FnOnce(&AppState, &Body) -> Result<Value, ApiError> + Send + 'static,
) -> Result<Json<Value>, ApiError> {
    let task = tokio::task::spawn_blocking(move || {
        let body = Body::parse(&bytes)?;
        match body.text("model")? {
            Some(id) if id != state.model.id.as_str() => Err(ApiError::unknown_model(id)),
            _ => work(&state, &body),
        }
    });
    Ok(Json(task.await.map_err(|_| ApiError::internal("tokenizing failed"))??))
}
