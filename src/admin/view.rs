//! Rows of the ledger as answers show them.

use serde_json::{Value, json};

use crate::{
    ledger::{
        Policy,
        book::{BudgetState, KeyRow, OrgRow, PriceRow, RateLimit, TenantRow},
    },
    price::{Billing, usd},
    types::NanoUsd,
};

use super::{Field, Kind, call::NS_PER_S};

pub const PAGE_MAX: i64 = 1000;
pub const PAGE: i64 = 100;

/// How much of a list to show, in ids that are text.
pub const PAGING: &[Field] = &[
    Field::optional("after", Kind::Text(256), "show what follows this entry"),
    Field::optional("limit", Kind::Int(1, PAGE_MAX), "entries of one answer; 100 unless given"),
];

/// As [`PAGING`], in ids that are numbers.
pub const FEED: &[Field] = &[
    Field::optional(
        "after",
        Kind::Int(0, i64::MAX),
        "show what follows this entry; without it the last ones are shown",
    ),
    Field::optional("limit", Kind::Int(1, PAGE_MAX), "entries of one answer; 100 unless given"),
];

/// One answer of a list; `rows` may hold one more than `limit`, which says that there are more.
pub fn list(mut rows: Vec<Value>, limit: i64) -> Value {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let has_more = rows.len() > limit;
    rows.truncate(limit);
    json!({"object": "list", "data": rows, "has_more": has_more})
}

/// Whole seconds since 1970.
pub fn seconds(at_ns: i64) -> i64 {
    at_ns.div_euclid(NS_PER_S)
}

pub fn amount(nano: i64) -> String {
    usd::format(NanoUsd(nano.into()))
}

pub fn org(row: &OrgRow) -> Value {
    json!({
        "object": "org", "id": row.id.as_str(), "name": row.name,
        "created_at": seconds(row.created_ns),
    })
}

pub fn tenant(row: &TenantRow) -> Value {
    json!({
        "object": "tenant", "id": row.id.as_str(), "org": row.org.as_str(), "name": row.name,
        "policy": policy(&row.policy), "created_at": seconds(row.created_ns),
    })
}

pub fn key(row: &KeyRow, now_ns: i64) -> Value {
    let ended = |at_ns: Option<i64>| at_ns.is_some_and(|at_ns| at_ns <= now_ns);
    let state = match (ended(row.revoked_ns), ended(row.expires_ns)) {
        (true, _) => "revoked",
        (_, true) => "expired",
        _ => "active",
    };
    json!({
        "object": "key", "id": row.id.as_str(), "tenant": row.tenant.as_str(), "name": row.name,
        "role": row.role.name(), "state": state, "policy": policy(&row.policy),
        "created_at": seconds(row.created_ns), "expires_at": row.expires_ns.map(seconds),
        "revoked_at": row.revoked_ns.map(seconds),
    })
}

fn policy(policy: &Policy) -> Value {
    json!({
        "models": policy.models, "class_max": policy.class_max,
        "max_cost_usd": policy.max_cost_usd.map(usd::format), "closing_text": policy.closing_text,
        "natural_stop": policy.natural_stop, "soft_landing_percent": policy.soft_landing_percent,
    })
}

pub fn budget(state: &BudgetState) -> Value {
    let budget = &state.budget;
    let left = NanoUsd(budget.limit.0 - state.spent.0 - state.held.0);
    json!({
        "object": "budget", "scope": budget.scope, "span": budget.span.name(),
        "zone": budget.zone.name(), "limit_usd": usd::format(budget.limit),
        "spent_usd": usd::format(state.spent), "held_usd": usd::format(state.held),
        "left_usd": usd::format(left), "soft_percent": budget.soft_percent,
        "starts_at": state.start_s, "resets_at": state.resets_s,
    })
}

pub fn limit(scope: &str, limit: &RateLimit) -> Value {
    json!({
        "object": "limit", "scope": scope, "requests_per_minute": limit.requests_per_minute,
        "tokens_per_minute": limit.tokens_per_minute, "sequences_max": limit.sequences_max,
    })
}

pub fn billing(billing: Billing) -> &'static str {
    match billing {
        Billing::Tokens => "tokens",
        Billing::Device => "device",
    }
}

pub fn price(row: &PriceRow) -> Value {
    let rates = &row.rates;
    json!({
        "object": "price", "version": row.version, "model": row.model.as_str(),
        "tenant": row.tenant.as_ref().map(|tenant| tenant.as_str()),
        "input_usd": usd::format(rates.input), "cached_input_usd": usd::format(rates.cached_input),
        "output_usd": usd::format(rates.output), "request_usd": usd::format(rates.request),
        "gpu_second_usd": usd::format(rates.device_second), "billing": billing(row.billing),
        "from": seconds(row.from_ns), "until": row.until_ns.map(seconds),
        "origin": row.origin, "created_at": seconds(row.created_ns),
    })
}
