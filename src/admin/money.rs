//! Credits and refunds.

use serde_json::{Value, json};

use crate::{
    ledger::{Book, book::Role},
    price::usd,
    types::{NanoUsd, RequestId, TenantId},
};

use super::{AdminError, Call, Field, Kind, Route, Verb, Work, tenants};

const MEMO: Field = Field::optional("memo", Kind::Text(256), "why, for the ledger");
/// A million USD. More at once is a mistake, and would endanger the sums.
const CREDIT_MAX: NanoUsd = NanoUsd(1_000_000_000_000_000);

pub const CREDIT: Route = Route {
    name: "createCredit",
    summary: "Give a tenant money, or book what it paid in advance: its budgets and its organisation's have that much more left.",
    verb: Verb::Post,
    path: "/admin/v1/credits",
    least: Role::Admin,
    fields: &[&[
        Field::needed("tenant", Kind::Id, "who gets it"),
        Field::needed("amount_usd", Kind::Usd, "how much; at most a million"),
        MEMO,
    ]],
    work: Work::Change(credit),
};

pub const REFUND: Route = Route {
    name: "createRefund",
    summary: "Give back what an ended request was charged, or a part of it; never more than is left of the charge.",
    verb: Verb::Post,
    path: "/admin/v1/refunds",
    least: Role::Admin,
    fields: &[&[
        Field::needed("request", Kind::Label, "id of the request"),
        Field::optional("amount_usd", Kind::Usd, "how much; all that is left unless given"),
        MEMO,
    ]],
    work: Work::Change(refund),
};

fn positive(amount: Option<NanoUsd>) -> Result<NanoUsd, AdminError> {
    let range = NanoUsd(1)..=CREDIT_MAX;
    amount.filter(|amount| range.contains(amount)).ok_or_else(|| {
        let most = usd::format(CREDIT_MAX);
        AdminError::field("amount_usd", format!("`amount_usd` must be above 0 and at most {most}"))
    })
}

fn credit(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let tenant = tenants::found(book, "tenant", &TenantId::new(call.needed("tenant")?))?.id;
    let amount = positive(call.given.usd("amount_usd"))?;
    let memo = call.given.text("memo").unwrap_or_default();
    book.credit(&tenant, amount, memo)?;
    let made = json!({
        "object": "credit", "tenant": tenant.as_str(), "amount_usd": usd::format(amount),
        "memo": memo,
    });
    call.audit(book, "credit.create", &format!("tenant:{tenant}"), &Value::Null, &made)?;
    Ok(made)
}

fn refund(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let request = RequestId::new(call.needed("request")?);
    let amount = match call.given.usd("amount_usd") {
        None => CREDIT_MAX,
        given => positive(given)?,
    };
    let memo = call.given.text("memo").unwrap_or_default();
    let Some(amount) = book.refund(&request, amount, memo)? else {
        return Err(AdminError::not_found("request", "ended request", request.as_str()));
    };
    let made = json!({
        "object": "refund", "request": request.as_str(), "amount_usd": usd::format(amount),
        "memo": memo,
    });
    call.audit(book, "refund.create", &format!("request:{request}"), &Value::Null, &made)?;
    Ok(made)
}
