//! Rate limits.

use serde_json::Value;

use crate::ledger::{
    Book,
    book::{RateLimit, Role},
};

use super::{
    AdminError, Call, Field, Kind, Route, Verb, Work,
    budgets::check_scope,
    view::{self, PAGE, PAGING},
};

/// Keeps a rate times a minute in nanoseconds far inside 128 bits, and is above any machine.
const RATE_MAX: i64 = 1_000_000_000_000;

const SCOPE: Field =
    Field::needed("scope", Kind::Scope, "whom it binds: global, org:ID, tenant:ID or key:ID");

pub const LIMITS: Route = Route {
    name: "listLimits",
    summary: "Rate limits.",
    verb: Verb::Get,
    path: "/admin/v1/limits",
    least: Role::Operator,
    fields: &[PAGING],
    work: Work::Change(limits),
};

pub const LIMIT_SET: Route = Route {
    name: "setLimit",
    summary: "Set the rate limits of a scope. What is left out stays, what is null is unlimited.",
    verb: Verb::Put,
    path: "/admin/v1/limits",
    least: Role::Admin,
    fields: &[&[
        SCOPE,
        Field::optional("requests_per_minute", Kind::Int(0, RATE_MAX), "requests begun"),
        Field::optional("tokens_per_minute", Kind::Int(0, RATE_MAX), "input and output together"),
        Field::optional("sequences_max", Kind::Int(0, RATE_MAX), "choices running at once"),
    ]],
    work: Work::Change(set),
};

pub const LIMIT_DELETE: Route = Route {
    name: "deleteLimit",
    summary: "Take the rate limits of a scope away.",
    verb: Verb::Delete,
    path: "/admin/v1/limits/{scope}",
    least: Role::Admin,
    fields: &[&[SCOPE]],
    work: Work::Change(delete),
};

fn limits(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let limit = call.given.int("limit").unwrap_or(PAGE);
    let rows = book.rate_limits(call.given.text("after").unwrap_or_default(), limit + 1)?;
    let rows = rows.iter().map(|(scope, rates)| view::limit(scope, rates)).collect();
    Ok(view::list(rows, limit))
}

fn set(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let scope = call.needed("scope")?;
    check_scope(book, scope)?;
    let old = book.rate_limit(scope)?;
    let rate = |name, old| if call.given.has(name) { call.given.int(name) } else { old };
    let new = RateLimit {
        requests_per_minute: rate("requests_per_minute", old.requests_per_minute),
        tokens_per_minute: rate("tokens_per_minute", old.tokens_per_minute),
        sequences_max: rate("sequences_max", old.sequences_max),
    };
    book.set_rate_limit(scope, &new)?;
    let (old, new) = (view::limit(scope, &old), view::limit(scope, &new));
    call.audit(book, "limit.set", &format!("limit:{scope}"), &old, &new)?;
    Ok(new)
}

fn delete(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let scope = call.needed("scope")?;
    let old = view::limit(scope, &book.rate_limit(scope)?);
    if !book.delete_rate_limit(scope)? {
        return Err(AdminError::not_found("scope", "limit", scope));
    }
    call.audit(book, "limit.delete", &format!("limit:{scope}"), &old, &Value::Null)?;
    Ok(old)
}
