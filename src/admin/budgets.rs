//! Budgets: how much may be spent in a window.

use serde_json::Value;

use crate::ledger::{
    Book, Span, Zone,
    book::{Budget, BudgetState, Role},
};
use crate::types::{KeyId, OrgId, TenantId};

use super::{
    AdminError, Call, Field, Kind, Route, Verb, Work,
    view::{self, PAGE, PAGING},
};

/// Percentages of a limit that raise an event unless others are given.
const SOFT_PERCENT: [u8; 3] = [50, 80, 95];

const SCOPE: Field =
    Field::needed("scope", Kind::Scope, "whom it binds: global, org:ID, tenant:ID or key:ID");
const SPAN: Field = Field::needed("span", Kind::Span, "how long its windows last");

pub const BUDGETS: Route = Route {
    name: "listBudgets",
    summary: "Budgets with what is spent, held and left in the present window. Pages are of scopes.",
    verb: Verb::Get,
    path: "/admin/v1/budgets",
    least: Role::Operator,
    fields: &[&[Field::optional("scope", Kind::Scope, "of this scope only")], PAGING],
    work: Work::Change(budgets),
};

pub const BUDGET_SET: Route = Route {
    name: "setBudget",
    summary: "Make, raise or lower a budget. What is spent stays spent: a limit below it stops further spend.",
    verb: Verb::Put,
    path: "/admin/v1/budgets",
    least: Role::Admin,
    fields: &[&[
        SCOPE,
        SPAN,
        Field::needed("limit_usd", Kind::Usd, "what may be spent in a window"),
        Field::optional("zone", Kind::Zone, "whose days, weeks and months; UTC unless given"),
        Field::optional(
            "soft_percent",
            Kind::Percents,
            "shares that raise an event once a window; 50, 80 and 95 unless given",
        ),
    ]],
    work: Work::Change(set),
};

pub const BUDGET_DELETE: Route = Route {
    name: "deleteBudget",
    summary: "Take a budget away.",
    verb: Verb::Delete,
    path: "/admin/v1/budgets/{scope}/{span}",
    least: Role::Admin,
    fields: &[&[SCOPE, SPAN]],
    work: Work::Change(delete),
};

fn budgets(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let limit = call.given.int("limit").unwrap_or(PAGE);
    let mut scopes = match call.given.text("scope") {
        Some(scope) => vec![scope.to_owned()],
        None => book.budget_scopes(call.given.text("after").unwrap_or_default(), limit + 1)?,
    };
    let has_more = scopes.len() as i64 > limit;
    scopes.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let mut rows = Vec::new();
    for scope in &scopes {
        rows.extend(book.budget_states(scope)?.iter().map(view::budget));
    }
    let mut answer = view::list(rows, i64::MAX);
    answer["has_more"] = has_more.into();
    Ok(answer)
}

fn state(book: &mut Book<'_>, scope: &str, span: Span) -> Result<Option<BudgetState>, AdminError> {
    Ok(book.budget_states(scope)?.into_iter().find(|state| state.budget.span == span))
}

/// Refuses a scope of nobody, which would otherwise be a typing error that binds no one.
pub(super) fn check_scope(book: &mut Book<'_>, scope: &str) -> Result<(), AdminError> {
    let there = match scope.split_once(':') {
        Some(("org", id)) => book.org(&OrgId::new(id))?.is_some(),
        Some(("tenant", id)) => book.tenant(&TenantId::new(id))?.is_some(),
        Some(("key", id)) => book.key(&KeyId::new(id))?.is_some(),
        _ => true,
    };
    if there { Ok(()) } else { Err(AdminError::not_found("scope", "scope", scope)) }
}

fn span(call: &Call) -> Result<Span, AdminError> {
    let wrong = || AdminError::field("span", "`span` is missing");
    Span::parse(call.needed("span")?).ok_or_else(wrong)
}

fn set(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let (scope, span) = (call.needed("scope")?, span(call)?);
    check_scope(book, scope)?;
    let old = state(book, scope, span)?;
    let limit = call.given.usd("limit_usd");
    let limit = limit.ok_or_else(|| AdminError::field("limit_usd", "`limit_usd` is missing"))?;
    // What is left out stays as it was.
    let zone = call.given.text("zone").and_then(Zone::parse);
    let soft = call.given.percents("soft_percent").map(|mut soft| {
        soft.sort_unstable();
        soft.dedup();
        soft
    });
    let before = old.as_ref().map(|old| old.budget.clone());
    let budget = Budget {
        scope: scope.to_owned(),
        span,
        zone: zone
            .or_else(|| before.as_ref().map(|old| old.zone.clone()))
            .unwrap_or_else(Zone::utc),
        limit,
        soft_percent: soft
            .or_else(|| before.map(|old| old.soft_percent))
            .unwrap_or_else(|| SOFT_PERCENT.to_vec()),
    };
    book.set_budget(&budget)?;
    let old = old.as_ref().map(view::budget).unwrap_or_default();
    let new = state(book, scope, span)?.as_ref().map(view::budget).unwrap_or_default();
    call.audit(book, "budget.set", &format!("budget:{scope}:{}", span.name()), &old, &new)?;
    Ok(new)
}

fn delete(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let (scope, span) = (call.needed("scope")?, span(call)?);
    let target = format!("budget:{scope}:{}", span.name());
    let Some(old) = state(book, scope, span)? else {
        return Err(AdminError::not_found("span", "budget", &target));
    };
    book.delete_budget(scope, span)?;
    let old = view::budget(&old);
    call.audit(book, "budget.delete", &target, &old, &Value::Null)?;
    Ok(old)
}
