//! What goes into the ledger and what comes out: plain data, no SQL, no HTTP.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Span;
use crate::{
    price::{Tally, Terms, usd},
    types::{KeyId, ModelId, NanoUsd, OrgId, RequestId, TenantId},
};

/// Everyone a request is charged to, and whose limits it meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    pub org: OrgId,
    pub tenant: TenantId,
    /// None for the loopback quick start.
    pub key: Option<KeyId>,
}

impl Chain {
    /// From the narrowest scope to the widest.
    pub fn scopes(&self) -> Vec<String> {
        let key = self.key.as_ref().map(|key| format!("key:{key}"));
        let rest =
            [format!("tenant:{}", self.tenant), format!("org:{}", self.org), GLOBAL.to_owned()];
        key.into_iter().chain(rest).collect()
    }
}

/// The operator's own scope: all spend of all organisations.
pub const GLOBAL: &str = "global";

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Payer {
    Key(KeyId),
    /// Without a key, where the server allows that.
    Tenant(TenantId),
}

/// What a tenant or a key is allowed and gets unless a request says otherwise. A key's own settings
/// come before its tenant's; of two caps the lower one holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Policy {
    /// Models that may be used; none means all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    /// Highest QoS class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_max: Option<String>,
    /// Cap of each request, in decimal USD.
    #[serde(skip_serializing_if = "Option::is_none", with = "usd::optional")]
    pub max_cost_usd: Option<NanoUsd>,
    /// Added, unbilled, to an output that its cap or budget ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub closing_text: Option<String>,
    /// Ends outputs at the end of a sentence once they are long enough.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub natural_stop: Option<bool>,
    /// Within this share of its cap an output ends at the next end of a sentence, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft_landing_percent: Option<u8>,
}

impl Policy {
    /// This policy over that of the wider scope.
    pub fn over(self, wider: Self) -> Self {
        let lower = |a: Option<NanoUsd>, b: Option<NanoUsd>| a.into_iter().chain(b).min();
        Self {
            models: self.models.or(wider.models),
            class_max: self.class_max.or(wider.class_max),
            max_cost_usd: lower(self.max_cost_usd, wider.max_cost_usd),
            closing_text: self.closing_text.or(wider.closing_text),
            natural_stop: self.natural_stop.or(wider.natural_stop),
            soft_landing_percent: self.soft_landing_percent.or(wider.soft_landing_percent),
        }
    }
}

/// A request that asks to be admitted.
#[derive(Clone, Debug)]
pub struct Opening {
    /// Never used before.
    pub request: RequestId,
    pub payer: Payer,
    pub model: ModelId,
    pub user_label: String,
    /// JSON object of strings, bounded by the API.
    pub metadata: String,
    pub input_tokens: u64,
    pub choices: u32,
    /// Device time that the input and the first tokens may take at most, where that is billed.
    pub device_bound_ns: u64,
    pub cap: Option<NanoUsd>,
    /// Requests that one call was divided into: each gets its part of every cap.
    pub parts: u32,
    /// Idempotency key, and the hash of what it stands for.
    pub idempotency: Option<(String, [u8; 32])>,
}

/// An admitted request.
#[derive(Clone, Debug, PartialEq)]
pub struct Opened {
    pub chain: Chain,
    pub terms: Terms,
    pub input_tokens: u64,
    /// Held so far: the charge may reach this.
    pub granted: NanoUsd,
    /// The lowest of the request's, the key's and the tenant's.
    pub cap: Option<NanoUsd>,
    pub policy: Policy,
}

/// What a running request has used, and how much more it asks to have held.
#[derive(Clone, Debug)]
pub struct Extension {
    pub request: RequestId,
    pub used: Tally,
    /// The hold it wants in all, and the least that is of any use.
    pub wanted: NanoUsd,
    pub least: NanoUsd,
}

/// What an extension led to.
#[derive(Clone, Debug, PartialEq)]
pub struct Grant {
    /// Held in all so far.
    pub granted: NanoUsd,
    pub denied: Option<Denial>,
}

/// Why a running request gets no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denial {
    /// A budget is used up. Others may still give back what they hold of it.
    BudgetForNow,
    /// A budget is used up, and nothing is held of it by others.
    BudgetForGood,
    /// The key was revoked or has expired.
    Revoked,
    /// The ledger gave this request up, as after a silence of the server.
    Lost,
}

/// Why a request ended, as far as money is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EndCause {
    Finished,
    CostCap,
    Budget,
    Revoked,
    NaturalStop,
    SoftLanding,
    /// The ledger could not be reached for longer than the lease lasted.
    LedgerLost,
    /// The client went away, or the server shut down.
    Aborted,
    /// The step failed.
    Failed,
    /// The server died; found when its holds were given back.
    Crashed,
}

impl EndCause {
    pub fn name(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::CostCap => "cost_cap",
            Self::Budget => "budget",
            Self::Revoked => "revoked",
            Self::NaturalStop => "natural_stop",
            Self::SoftLanding => "soft_landing",
            Self::LedgerLost => "ledger_lost",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
            Self::Crashed => "crashed",
        }
    }
}

/// What a device drew for an ended request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnergyRow {
    pub request: RequestId,
    pub total_uj: u64,
    /// The part of it that was not measured.
    pub estimated_uj: u64,
}

/// What a request cost in the end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bill {
    /// What the tenant was charged.
    pub cost: NanoUsd,
    pub token_cost: NanoUsd,
    pub device_cost: NanoUsd,
    pub price_version: i64,
    pub used: Tally,
}

/// Why a request was not admitted. The message says what to do.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    #[error("this API key is not known, was revoked or has expired")]
    Key,
    #[error("this API key may not use the model `{0}`")]
    ModelForbidden(ModelId),
    #[error("the model `{0}` has no price: the operator sets one with `candela price set`")]
    UnknownPrice(ModelId),
    #[error(
        "the input and one token cost {} USD, more than the cap of {} USD: raise max_cost_usd or shorten the input",
        usd::format(*.needed), usd::format(*.cap)
    )]
    CapTooLow { cap: NanoUsd, needed: NanoUsd },
    #[error(
        "the {} budget of {scope} is used up: {} of {} USD spent or held, {} USD needed",
        .span.name(), usd::format(*.used), usd::format(*.limit), usd::format(*.needed)
    )]
    Budget {
        scope: String,
        span: Span,
        limit: NanoUsd,
        used: NanoUsd,
        needed: NanoUsd,
        /// Seconds since 1970 when the next window starts.
        resets_s: Option<i64>,
    },
    #[error("{scope} may start {limit} requests a minute")]
    RequestsPerMinute { scope: String, limit: i64, retry_after_ns: i64 },
    #[error("{scope} may use {limit} tokens a minute")]
    TokensPerMinute { scope: String, limit: i64, retry_after_ns: i64 },
    #[error("the input is {tokens} tokens, {scope} may use {limit} a minute: shorten it")]
    InputOverRate { scope: String, limit: i64, tokens: u64 },
    #[error("{scope} may run {limit} sequences at once")]
    Sequences { scope: String, limit: i64 },
    #[error("this Idempotency-Key was used with another body: send a new key")]
    IdempotencyMismatch,
    #[error("the request {0} with this Idempotency-Key is still running")]
    IdempotencyRunning(RequestId),
    #[error(
        "the request {0} with this Idempotency-Key is done and charged: send a new key to run it again"
    )]
    IdempotencyDone(RequestId),
}

/// Something an operator wants to hear of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub at_ns: i64,
    pub kind: EventKind,
    pub scope: String,
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A soft threshold of a budget was passed, once a window.
    BudgetSoft,
    /// A budget turned something away, once a window.
    BudgetHard,
    /// Requests of a dead server were given up.
    Recovered,
}

impl EventKind {
    pub fn name(self) -> &'static str {
        match self {
            Self::BudgetSoft => "budget_soft",
            Self::BudgetHard => "budget_hard",
            Self::Recovered => "recovered",
        }
    }
}
