//! Rows of requests as the ledger has them, and what became of one.

use serde_json::{Value, json};

use crate::ledger::{
    book::Role,
    db::{Db, DbError, Row},
};

use super::{
    AdminError, Call, Field, Kind, Route, Verb, Work,
    call::NS_PER_S,
    view::{self, PAGE, PAGE_MAX, amount, seconds},
};

pub const REQUESTS: Route = Route {
    name: "listRequests",
    summary: "Ended requests, oldest first: the raw rows of usage.",
    verb: Verb::Get,
    path: "/admin/v1/requests",
    least: Role::Operator,
    fields: &[&[
        Field::optional("tenant", Kind::Id, "of this tenant only"),
        Field::optional("start_time", Kind::Time, "ended then or later"),
        Field::optional("end_time", Kind::Time, "ended before then"),
        Field::optional("after", Kind::Text(320), "show what follows this `cursor`"),
        Field::optional("limit", Kind::Int(1, PAGE_MAX), "entries of one answer; 100 unless given"),
    ]],
    work: Work::Read(requests),
};

pub const EXPLAIN: Route = Route {
    name: "explainRequest",
    summary: "What a request used and cost, at which price, and why it ended.",
    verb: Verb::Get,
    path: "/admin/v1/requests/{id}",
    least: Role::Operator,
    fields: &[&[Field::needed("id", Kind::Label, "of the request")]],
    work: Work::Read(explain),
};

fn requests(db: &mut dyn Db, call: &Call) -> Result<Value, AdminError> {
    let given = &call.given;
    let limit = given.int("limit").unwrap_or(PAGE);
    let time_ns = |name| given.int(name).map(|at_s| at_s.saturating_mul(NS_PER_S));
    let first_ns = time_ns("start_time").unwrap_or(0);
    let (from_ns, after) = match given.text("after") {
        None => (first_ns, ""),
        Some(cursor) => {
            let wrong = || AdminError::field("after", "`after` must be a `cursor` of an answer");
            let (at, id) = cursor.split_once(':').ok_or_else(wrong)?;
            (at.parse::<i64>().map_err(|_| wrong())?.max(first_ns), id)
        }
    };
    let rows = db.query(
        "SELECT id, org_id, tenant_id, key_id, model, user_label, metadata, state, choices,
        opened_ns, closed_ns, uncached_input, cached_input, output, device_ns,
        billable_device_ns, energy_uj, posted, token_cost, device_cost, price_version, leases,
        steps, end_cause, unrecorded_max, granted, energy_estimated_uj
        FROM request WHERE closed_ns >= $1 AND (closed_ns > $1 OR id > $2) AND closed_ns < $3
        AND ($4 = '' OR tenant_id = $4) ORDER BY closed_ns, id LIMIT $5",
        &[
            from_ns.into(),
            after.into(),
            time_ns("end_time").unwrap_or(i64::MAX).into(),
            given.text("tenant").unwrap_or_default().into(),
            (limit + 1).into(),
        ],
    )?;
    let rows = rows.iter().map(view_row).collect::<Result<_, _>>()?;
    Ok(view::list(rows, limit))
}

/// A row of `request`, in the order of the columns above.
fn view_row(row: &Row) -> Result<Value, DbError> {
    let text = |index| row.text(index);
    let label = |index| row.text(index).map(|text| (!text.is_empty()).then_some(text));
    let usd = |index| row.int(index).map(amount);
    let closed_ns = row.int_or_null(10)?;
    Ok(json!({
        "object": "request", "id": text(0)?, "org": text(1)?, "tenant": text(2)?,
        "key": label(3)?, "model": text(4)?, "user": label(5)?,
        "metadata": serde_json::from_str::<Value>(text(6)?).unwrap_or_default(),
        "state": text(7)?, "choices": row.int(8)?,
        "opened_at": seconds(row.int(9)?), "closed_at": closed_ns.map(seconds),
        "duration_ms": closed_ns.map(|closed_ns| Ok::<_, DbError>((closed_ns - row.int(9)?) / 1_000_000)).transpose()?,
        "input_tokens": row.int(11)? + row.int(12)?, "cached_input_tokens": row.int(12)?,
        "output_tokens": row.int(13)?, "gpu_ns": row.int(14)?, "billable_gpu_ns": row.int(15)?,
        "energy_uj": row.int_or_null(16)?,
        "energy_estimated_uj": row.int_or_null(26)?, "cost_usd": usd(17)?, "token_cost_usd": usd(18)?,
        "gpu_cost_usd": usd(19)?, "price_version": row.int(20)?, "leases": row.int(21)?,
        "steps": row.int(22)?, "end_cause": label(23)?, "unrecorded_max_usd": usd(24)?,
        "held_in_all_usd": usd(25)?,
        "cursor": format!("{}:{}", closed_ns.unwrap_or(0), text(0)?),
    }))
}

fn explain(db: &mut dyn Db, call: &Call) -> Result<Value, AdminError> {
    let id = call.needed("id")?;
    let rows = db.query(
        "SELECT request.id, org_id, request.tenant_id, key_id, request.model, user_label, metadata,
        state, choices, opened_ns, closed_ns, uncached_input, request.cached_input,
        request.output, device_ns, billable_device_ns, energy_uj, posted, token_cost,
        device_cost, price_version, leases, steps, end_cause, unrecorded_max, granted,
        energy_estimated_uj,
        price.input, price.cached_input, price.output, price.request, price.device_second,
        price.billing, price.origin
        FROM request JOIN price ON price.version = request.price_version WHERE request.id = $1",
        &[id.into()],
    )?;
    let Some(row) = rows.first() else {
        return Err(AdminError::not_found("id", "request", id));
    };
    let mut shown = view_row(row)?;
    let usd = |index| row.int(index).map(amount);
    shown["price"] = json!({
        "version": row.int(20)?, "input_usd": usd(27)?, "cached_input_usd": usd(28)?,
        "output_usd": usd(29)?, "request_usd": usd(30)?, "gpu_second_usd": usd(31)?,
        "billing": row.text(32)?, "origin": row.text(33)?,
    });
    let moved = db.query(
        "SELECT at_ns, window_ns, kind, amount, debit, credit, memo FROM transfer
        WHERE request_id = $1 ORDER BY id",
        &[id.into()],
    )?;
    let moved = moved.iter().map(|row| {
        Ok(json!({
            "at": seconds(row.int(0)?), "window_of": seconds(row.int(1)?), "kind": row.text(2)?,
            "amount_usd": amount(row.int(3)?), "debit": row.text(4)?, "credit": row.text(5)?,
            "memo": row.text(6)?,
        }))
    });
    shown["transfers"] = moved.collect::<Result<Vec<_>, DbError>>()?.into();
    let open = db.query(
        "SELECT number, granted_ns, amount, posted FROM lease WHERE request_id = $1 ORDER BY number",
        &[id.into()],
    )?;
    let open = open.iter().map(|row| {
        Ok(json!({
            "number": row.int(0)?, "granted_at": seconds(row.int(1)?),
            "amount_usd": amount(row.int(2)?), "posted_usd": amount(row.int(3)?),
        }))
    });
    shown["open_leases"] = open.collect::<Result<Vec<_>, DbError>>()?.into();
    Ok(shown)
}
