//! What goes into an engine and what comes out: plain data, no HTTP.

use std::sync::Arc;

use crate::{
    ledger::{Bill, EndCause},
    sampling::{SamplingParams, TokenLogprobs},
    types::{FinishReason, NanoUsd, RequestId, TokenId},
};

/// One validated request: a prompt and `choices` continuations of it.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    pub id: RequestId,
    /// At least one token.
    pub prompt: Arc<[TokenId]>,
    /// OpenAI's `n`, at least 1. The prompt is prefilled once.
    pub choices: u32,
    pub sampling: SamplingParams,
    pub stop: StopParams,
    /// `Some(k)`: log-probabilities of every prompt token with `k` alternatives, as `echo` asks.
    pub prompt_logprobs: Option<u32>,
}

/// When a sequence ends.
#[derive(Clone, Debug, Default)]
pub struct StopParams {
    /// At most this many output tokens; 0 only together with `prompt_logprobs` or `echo`.
    pub max_tokens: u32,
    /// No end token and no stop string counts before this many output tokens.
    pub min_tokens: u32,
    /// Keep going at the model's end tokens.
    pub ignore_eos: bool,
    /// Strings that end the output; not part of it.
    pub strings: Vec<String>,
    /// End at the first end of a sentence from this many output tokens on; `None` leaves it to the
    /// tenant's policy, 0 is off.
    pub enough_tokens: Option<u32>,
}

/// What an engine sends for a request, in order. Events of different choices interleave; every
/// choice gets exactly one `Finish`, then one `Done` (or `Error`) closes the request.
#[derive(Clone, Debug)]
pub enum StreamEvent {
    /// Once, before the first delta: entry 0 is `None` (nothing precedes the first token).
    PromptLogprobs(Vec<Option<TokenLogprobs>>),
    /// New text of one choice; never half a character. May be empty when only tokens arrived.
    Delta { choice: u32, text: String, tokens: Vec<OutputToken>, so_far: SoFar },
    Finish {
        choice: u32,
        reason: FinishReason,
        /// Present where money or a rule of its tenant ended it.
        cause: Option<EndCause>,
    },
    /// What was used and, once it is durable, what was charged; `None` where the ledger had given the
    /// request up.
    Done(RequestUsage, Option<Bill>),
    /// The request ended early; text already sent stays valid.
    Error(RequestError),
}

/// What a request has used and owes when a piece of its output leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SoFar {
    /// Over all choices.
    pub completion_tokens: u32,
    pub cost: NanoUsd,
}

/// One output token as its text is delivered.
#[derive(Clone, Debug)]
pub struct OutputToken {
    pub id: TokenId,
    /// Present when the request asked for logprobs.
    pub logprobs: Option<TokenLogprobs>,
}

/// Token counts of a request, final.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RequestUsage {
    pub prompt_tokens: u32,
    /// Prompt tokens found in the prefix cache; part of `prompt_tokens`.
    pub cached_tokens: u32,
    /// Over all choices, up to and including the token that ended each.
    pub completion_tokens: u32,
}

/// Why a running request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the reader took longer than {0} s to take the next piece")]
    ReaderStalled(u64),
    #[error("the step failed: {0}")]
    StepFailed(String),
}

/// Why a request did not enter the engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("{waiting} requests are waiting already")]
    QueueFull { waiting: usize, retry_after_s: u64 },
    #[error("{tokens} tokens are more than the {max} that fit")]
    TooLong { tokens: usize, max: usize },
    #[error("{choices} choices are more than the {max} that run at once")]
    TooManyChoices { choices: usize, max: usize },
    #[error("the server is shutting down")]
    Draining,
    #[error("the engine has stopped")]
    Stopped,
}
