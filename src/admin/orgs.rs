//! Organisations.

use serde_json::Value;

use crate::{
    ledger::{Book, book::Role},
    types::OrgId,
};

use super::{
    AdminError, Call, Field, Kind, Route, Verb, Work,
    view::{self, PAGE, PAGING},
};

pub(super) const NAME: Kind = Kind::Text(128);

pub const ORGS: Route = Route {
    name: "listOrgs",
    summary: "Organisations.",
    verb: Verb::Get,
    path: "/admin/v1/orgs",
    least: Role::Operator,
    fields: &[PAGING],
    work: Work::Change(orgs),
};

pub const ORG_CREATE: Route = Route {
    name: "createOrg",
    summary: "Make an organisation.",
    verb: Verb::Post,
    path: "/admin/v1/orgs",
    least: Role::Admin,
    fields: &[&[
        Field::needed("id", Kind::Id, "its id, for good"),
        Field::optional("name", NAME, "for people"),
    ]],
    work: Work::Change(create),
};

fn orgs(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let limit = call.given.int("limit").unwrap_or(PAGE);
    let rows = book.orgs(call.given.text("after").unwrap_or_default(), limit + 1)?;
    Ok(view::list(rows.iter().map(view::org).collect(), limit))
}

fn create(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let id = OrgId::new(call.needed("id")?);
    if book.org(&id)?.is_some() {
        let message = format!("there is an organisation `{id}` already");
        return Err(AdminError::Conflict { field: "id", message });
    }
    book.add_org(&id, call.given.text("name").unwrap_or_default())?;
    let made = book.org(&id)?.as_ref().map(view::org).unwrap_or_default();
    call.audit(book, "org.create", &format!("org:{id}"), &Value::Null, &made)?;
    Ok(made)
}
