//! Tenants: who pays.

use serde_json::Value;

use crate::{
    ledger::{
        Book, Policy,
        book::{Role, TenantRow},
    },
    types::{OrgId, TenantId},
};

use super::{
    AdminError, Call, Field, Kind, Route, Verb, Work,
    orgs::NAME,
    policy::{self, POLICY},
    view::{self, PAGE, PAGING},
};

/// The organisation of whoever runs this server; the one that tenants belong to unless said otherwise.
const OWN_ORG: &str = "local";
const OWN_ORG_NAME: &str = "this server";

pub const TENANTS: Route = Route {
    name: "listTenants",
    summary: "Tenants, of one organisation or of all.",
    verb: Verb::Get,
    path: "/admin/v1/tenants",
    least: Role::Operator,
    fields: &[&[Field::optional("org", Kind::Id, "of this organisation only")], PAGING],
    work: Work::Change(tenants),
};

pub const TENANT_CREATE: Route = Route {
    name: "createTenant",
    summary: "Make a tenant.",
    verb: Verb::Post,
    path: "/admin/v1/tenants",
    least: Role::Admin,
    fields: &[
        &[
            Field::needed("id", Kind::Id, "its id, for good"),
            Field::optional("org", Kind::Id, "its organisation; `local` unless given"),
            Field::optional("name", NAME, "for people"),
        ],
        POLICY,
    ],
    work: Work::Change(create),
};

pub const TENANT_GET: Route = Route {
    name: "getTenant",
    summary: "One tenant.",
    verb: Verb::Get,
    path: "/admin/v1/tenants/{id}",
    least: Role::Operator,
    fields: &[&[Field::needed("id", Kind::Id, "of the tenant")]],
    work: Work::Change(get),
};

pub const TENANT_CHANGE: Route = Route {
    name: "changeTenant",
    summary: "Change a tenant's name or policy. What is left out stays, what is null is taken away.",
    verb: Verb::Patch,
    path: "/admin/v1/tenants/{id}",
    least: Role::Admin,
    fields: &[
        &[
            Field::needed("id", Kind::Id, "of the tenant"),
            Field::optional("name", NAME, "for people"),
        ],
        POLICY,
    ],
    work: Work::Change(change),
};

fn tenants(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let limit = call.given.int("limit").unwrap_or(PAGE);
    let (org, after) = (call.given.text("org"), call.given.text("after"));
    let rows = book.tenants(org.unwrap_or_default(), after.unwrap_or_default(), limit + 1)?;
    Ok(view::list(rows.iter().map(view::tenant).collect(), limit))
}

pub(super) fn found(
    book: &mut Book<'_>,
    field: &'static str,
    id: &TenantId,
) -> Result<TenantRow, AdminError> {
    book.tenant(id)?.ok_or_else(|| AdminError::not_found(field, "tenant", id.as_str()))
}

fn create(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let id = TenantId::new(call.needed("id")?);
    let org = OrgId::new(call.given.text("org").unwrap_or(OWN_ORG));
    if book.tenant(&id)?.is_some() {
        let message = format!("there is a tenant `{id}` already");
        return Err(AdminError::Conflict { field: "id", message });
    }
    if book.org(&org)?.is_none() {
        // Before the first start of a server not even its own is there.
        if org.as_str() != OWN_ORG {
            return Err(AdminError::not_found("org", "organisation", org.as_str()));
        }
        book.add_org(&org, OWN_ORG_NAME)?;
    }
    let policy = policy::changed(&Policy::default(), &call.given);
    book.add_tenant(&id, &org, call.given.text("name").unwrap_or_default(), &policy)?;
    let made = view::tenant(&found(book, "id", &id)?);
    call.audit(book, "tenant.create", &format!("tenant:{id}"), &Value::Null, &made)?;
    Ok(made)
}

fn get(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    Ok(view::tenant(&found(book, "id", &TenantId::new(call.needed("id")?))?))
}

fn change(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let id = TenantId::new(call.needed("id")?);
    let old = found(book, "id", &id)?;
    let name = match call.given.has("name") {
        true => call.given.text("name").unwrap_or_default(),
        false => &old.name,
    };
    book.change_tenant(&id, name, &policy::changed(&old.policy, &call.given))?;
    let new = view::tenant(&found(book, "id", &id)?);
    call.audit(book, "tenant.change", &format!("tenant:{id}"), &view::tenant(&old), &new)?;
    Ok(new)
}
