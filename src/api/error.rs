//! Every error as OpenAI shapes it. The only place that knows both domain errors and HTTP.

use axum::{
    Json,
    extract::rejection::BytesRejection,
    http::{HeaderValue, StatusCode},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{
    admin::AdminError,
    admission::Denied,
    engine::SubmitError,
    ledger::{LedgerError, Refusal, book::Role},
    text::TextError,
};

/// An answer that is not a success.
#[derive(Debug)]
pub struct ApiError {
    pub status: StatusCode,
    pub kind: &'static str,
    pub code: Option<&'static str>,
    pub param: Option<String>,
    pub message: String,
    pub retry_after_s: Option<u64>,
    /// What SDKs are told by `x-should-retry`, where the status alone would mislead them.
    pub should_retry: Option<bool>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            code: None,
            param: None,
            message: message.into(),
            retry_after_s: None,
            should_retry: None,
        }
    }

    /// A request that has to be changed, and which field of it.
    pub fn invalid(param: Option<&str>, message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message);
        Self { param: param.map(str::to_owned), ..error }
    }

    pub fn too_long(tokens: usize, max: usize) -> Self {
        let message = format!(
            "the prompt and max_tokens together are {tokens} tokens; this model takes {max}. Shorten the messages or lower max_tokens."
        );
        Self { code: Some("context_length_exceeded"), ..Self::invalid(Some("messages"), message) }
    }

    /// The same error, blamed on another field.
    pub fn at(self, param: &str) -> Self {
        Self { param: Some(param.to_owned()), ..self }
    }

    pub fn too_large() -> Self {
        let message = "the body is larger than this server takes; the operator sets body_bytes_max";
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "invalid_request_error", message)
    }

    pub fn not_found(message: &str) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    pub fn unknown_model(id: &str) -> Self {
        let message = format!("the model `{id}` is not served here; GET /v1/models lists what is");
        let error = Self::not_found(&message);
        Self { code: Some("model_not_found"), param: Some("model".into()), ..error }
    }

    pub fn method_not_allowed() -> Self {
        let message = "this path exists, but not for this method";
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    pub fn invalid_key() -> Self {
        let message = "no valid API key: send the header `Authorization: Bearer KEY`";
        let error = Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message);
        Self { code: Some("invalid_api_key"), ..error }
    }

    /// A key that is valid, but not for this.
    pub fn role(least: Role) -> Self {
        let message = format!("this needs a key of role {} or above", least.name());
        let error = Self::new(StatusCode::FORBIDDEN, "invalid_request_error", message);
        Self { code: Some("insufficient_permissions"), ..error }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    pub fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", message);
        Self { retry_after_s: Some(1), ..error }
    }

    /// The body of the answer, also sent inside a stream.
    pub fn body(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        match error {
            SubmitError::TooLong { tokens, max } => Self::too_long(tokens, max),
            SubmitError::TooManyChoices { .. } => Self::invalid(Some("n"), error.to_string()),
            SubmitError::QueueFull { retry_after_s, .. } => Self {
                status: StatusCode::TOO_MANY_REQUESTS,
                kind: "rate_limit_error",
                code: Some("queue_full"),
                retry_after_s: Some(retry_after_s),
                ..Self::internal(format!("{error}; try again later"))
            },
            SubmitError::Draining | SubmitError::Stopped => Self::unavailable(error.to_string()),
        }
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        match denied {
            Denied::Key => Self::invalid_key(),
            Denied::Ledger(error) => error.into(),
        }
    }
}

impl From<AdminError> for ApiError {
    fn from(error: AdminError) -> Self {
        let message = error.to_string();
        match error {
            AdminError::Field { field, .. } => Self::invalid(Some(&field), message),
            AdminError::NotFound { field, .. } => Self::not_found(&message).at(field),
            AdminError::Conflict { field, .. } => {
                Self::new(StatusCode::CONFLICT, "invalid_request_error", message).at(field)
            }
            AdminError::Ended => Self::invalid_key(),
            AdminError::Db(_) => LedgerError::Unavailable(message).into(),
        }
    }
}

impl From<LedgerError> for ApiError {
    fn from(error: LedgerError) -> Self {
        match error {
            LedgerError::Refused(refusal) => refusal.into(),
            LedgerError::Unavailable(_) | LedgerError::Busy(_) => {
                Self { code: Some("ledger_unavailable"), ..Self::unavailable(error.to_string()) }
            }
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let error = |status, kind, code| Self {
            code: Some(code),
            ..Self::new(status, kind, message.clone())
        };
        let bad = StatusCode::BAD_REQUEST;
        let many = StatusCode::TOO_MANY_REQUESTS;
        let later = |error: Self, after_ns: i64| Self {
            retry_after_s: Some((after_ns.max(0) as u64).div_ceil(1_000_000_000).max(1)),
            ..error
        };
        let never = |error: Self| Self { should_retry: Some(false), ..error };
        match refusal {
            Refusal::Key => Self::invalid_key(),
            Refusal::ModelForbidden(_) => {
                let error = error(StatusCode::FORBIDDEN, "permission_error", "model_not_allowed");
                error.at("model")
            }
            Refusal::UnknownPrice(_) => {
                error(StatusCode::SERVICE_UNAVAILABLE, "server_error", "unknown_price")
            }
            Refusal::CapTooLow { .. } => {
                error(bad, "invalid_request_error", "max_cost_too_low").at("max_cost_usd")
            }
            Refusal::Budget { .. } => {
                never(error(many, "insufficient_quota", "insufficient_quota"))
            }
            Refusal::RequestsPerMinute { retry_after_ns, .. }
            | Refusal::TokensPerMinute { retry_after_ns, .. } => {
                later(error(many, "rate_limit_error", "rate_limit_exceeded"), retry_after_ns)
            }
            Refusal::InputOverRate { .. } => {
                never(error(many, "rate_limit_error", "request_too_large"))
            }
            Refusal::Sequences { .. } => {
                later(error(many, "rate_limit_error", "too_many_sequences"), 0)
            }
            Refusal::IdempotencyMismatch => error(
                StatusCode::UNPROCESSABLE_ENTITY,
                "invalid_request_error",
                "idempotency_key_reused",
            ),
            Refusal::IdempotencyRunning(_) => never(error(
                StatusCode::CONFLICT,
                "invalid_request_error",
                "idempotency_key_in_progress",
            )),
            Refusal::IdempotencyDone(_) => {
                never(error(StatusCode::CONFLICT, "invalid_request_error", "idempotency_key_done"))
            }
        }
    }
}

impl From<BytesRejection> for ApiError {
    fn from(error: BytesRejection) -> Self {
        match error.status() {
            StatusCode::PAYLOAD_TOO_LARGE => Self::too_large(),
            status => Self::new(status, "invalid_request_error", error.body_text()),
        }
    }
}

impl From<TextError> for ApiError {
    fn from(error: TextError) -> Self {
        match error {
            TextError::Template(_) => Self::invalid(Some("messages"), error.to_string()),
            _ => Self::internal(error.to_string()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert("retry-after", HeaderValue::from(seconds));
        }
        if let Some(retry) = self.should_retry {
            let value = HeaderValue::from_static(if retry { "true" } else { "false" });
            response.headers_mut().insert("x-should-retry", value);
        }
        response
    }
}
