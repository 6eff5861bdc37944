//! What happened: events of budgets and servers, and the audit log of changes.

use serde_json::{Value, json};

use crate::ledger::{Book, book::Role};

use super::{
    AdminError, Call, Route, Verb, Work,
    view::{self, FEED, PAGE, seconds},
};

pub const EVENTS: Route = Route {
    name: "listEvents",
    summary: "Thresholds that were passed, budgets that turned something away, servers that died.",
    verb: Verb::Get,
    path: "/admin/v1/events",
    least: Role::Operator,
    fields: &[FEED],
    work: Work::Change(events),
};

pub const AUDIT: Route = Route {
    name: "listAudit",
    summary: "Who changed what, with the values before and after.",
    verb: Verb::Get,
    path: "/admin/v1/audit",
    least: Role::Operator,
    fields: &[FEED],
    work: Work::Change(audit),
};

/// Where a page starts: after what was named, else so that it ends with the last entry.
fn start(call: &Call, last: i64) -> (i64, i64) {
    let limit = call.given.int("limit").unwrap_or(PAGE);
    (call.given.int("after").unwrap_or_else(|| (last - limit).max(0)), limit)
}

fn events(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let (after, limit) = start(call, book.feed_ends().0);
    let rows = book.events(after, limit + 1)?;
    let rows = rows.iter().map(|row| {
        json!({
            "object": "event", "id": row.id, "at": seconds(row.at_ns), "kind": row.kind,
            "scope": row.scope, "detail": row.detail,
        })
    });
    Ok(view::list(rows.collect(), limit))
}

fn audit(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let (after, limit) = start(call, book.feed_ends().1);
    let rows = book.audits(after, limit + 1)?;
    let value = |text: &str| serde_json::from_str::<Value>(text).unwrap_or_default();
    let rows = rows.iter().map(|row| {
        json!({
            "object": "audit", "id": row.id, "at": seconds(row.at_ns), "actor": row.actor,
            "action": row.action, "target": row.target, "before": value(&row.old),
            "after": value(&row.new),
        })
    });
    Ok(view::list(rows.collect(), limit))
}
