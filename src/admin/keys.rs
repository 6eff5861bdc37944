//! API keys. A secret is shown once, by the operation that makes it; the ledger has its hash.

use serde_json::Value;

use crate::{
    ledger::{
        Book, Policy,
        book::{KeyRow, KeySpec, Role, key_hash},
    },
    types::{KeyId, TenantId},
};

use super::{
    AdminError, Call, Field, Kind, Route, Verb, Work,
    call::NS_PER_S,
    orgs::NAME,
    policy::{self, POLICY},
    tenants,
    view::{self, PAGE, PAGING},
};

/// How long the old key still works after a rotation, unless said otherwise.
const OVERLAP_S: i64 = 24 * 60 * 60;
const OVERLAP_S_MAX: i64 = 90 * 24 * 60 * 60;

const ID: Field = Field::needed("id", Kind::Id, "of the key, which is not its secret");
const EXPIRES: Field =
    Field::optional("expires_at", Kind::Time, "when it ends; never unless given");

pub const KEYS: Route = Route {
    name: "listKeys",
    summary: "Keys, of one tenant or of all, without their secrets.",
    verb: Verb::Get,
    path: "/admin/v1/keys",
    least: Role::Operator,
    fields: &[&[Field::optional("tenant", Kind::Id, "of this tenant only")], PAGING],
    work: Work::Change(keys),
};

pub const KEY_CREATE: Route = Route {
    name: "createKey",
    summary: "Make a key. The answer alone has its `secret`.",
    verb: Verb::Post,
    path: "/admin/v1/keys",
    least: Role::Admin,
    fields: &[
        &[
            Field::needed("tenant", Kind::Id, "who pays for its use"),
            Field::optional("id", Kind::Id, "its id, for good; made up unless given"),
            Field::optional("name", NAME, "for people"),
            Field::optional(
                "role",
                Kind::OneOf(&["tenant", "operator", "admin"]),
                "tenant uses models, operator sees everything, admin changes everything",
            ),
            EXPIRES,
        ],
        POLICY,
    ],
    work: Work::Change(create),
};

pub const KEY_GET: Route = Route {
    name: "getKey",
    summary: "One key, without its secret.",
    verb: Verb::Get,
    path: "/admin/v1/keys/{id}",
    least: Role::Operator,
    fields: &[&[ID]],
    work: Work::Change(get),
};

pub const KEY_CHANGE: Route = Route {
    name: "changeKey",
    summary: "Change a key's name, end or policy. What is left out stays, what is null is taken away.",
    verb: Verb::Patch,
    path: "/admin/v1/keys/{id}",
    least: Role::Admin,
    fields: &[&[ID, Field::optional("name", NAME, "for people"), EXPIRES], POLICY],
    work: Work::Change(change),
};

pub const KEY_REVOKE: Route = Route {
    name: "revokeKey",
    summary: "End a key now. What runs on it ends at its next lease.",
    verb: Verb::Post,
    path: "/admin/v1/keys/{id}/revoke",
    least: Role::Admin,
    fields: &[&[ID]],
    work: Work::Change(revoke),
};

pub const KEY_ROTATE: Route = Route {
    name: "rotateKey",
    summary: "Make a key like this one, which ends after an overlap. The answer alone has the `secret`.",
    verb: Verb::Post,
    path: "/admin/v1/keys/{id}/rotate",
    least: Role::Admin,
    fields: &[&[
        ID,
        Field::optional("new_id", Kind::Id, "id of the new key; made up unless given"),
        Field::optional(
            "overlap_s",
            Kind::Int(0, OVERLAP_S_MAX),
            "how long the old key still works; a day unless given",
        ),
    ]],
    work: Work::Change(rotate),
};

fn keys(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let limit = call.given.int("limit").unwrap_or(PAGE);
    let (tenant, after) = (call.given.text("tenant"), call.given.text("after"));
    let rows = book.keys(tenant.unwrap_or_default(), after.unwrap_or_default(), limit + 1)?;
    let now_ns = book.now_ns();
    Ok(view::list(rows.iter().map(|row| view::key(row, now_ns)).collect(), limit))
}

fn found(book: &mut Book<'_>, id: &KeyId) -> Result<KeyRow, AdminError> {
    book.key(id)?.ok_or_else(|| AdminError::not_found("id", "key", id.as_str()))
}

fn shown(book: &mut Book<'_>, id: &KeyId) -> Result<Value, AdminError> {
    Ok(view::key(&found(book, id)?, book.now_ns()))
}

/// The id that was asked for, if it is free, or a fresh one.
fn new_id(book: &mut Book<'_>, call: &Call, field: &'static str) -> Result<KeyId, AdminError> {
    let id = KeyId::new(call.given.text(field).unwrap_or(&call.fresh.id));
    if book.key(&id)?.is_some() {
        let message = format!("there is a key `{id}` already");
        return Err(AdminError::Conflict { field, message });
    }
    Ok(id)
}

fn create(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let tenant = tenants::found(book, "tenant", &TenantId::new(call.needed("tenant")?))?.id;
    let id = new_id(book, call, "id")?;
    let expires_ns = call.future_ns("expires_at", book.now_ns())?;
    book.add_key(&KeySpec {
        id: id.clone(),
        tenant,
        hash: key_hash(&call.fresh.secret),
        name: call.given.text("name").unwrap_or_default().to_owned(),
        role: call.given.text("role").and_then(Role::parse).unwrap_or(Role::Tenant),
        policy: policy::changed(&Policy::default(), &call.given),
        expires_ns,
    })?;
    let mut made = shown(book, &id)?;
    call.audit(book, "key.create", &format!("key:{id}"), &Value::Null, &made)?;
    made["secret"] = call.fresh.secret.as_str().into();
    Ok(made)
}

fn get(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    shown(book, &KeyId::new(call.needed("id")?))
}

fn change(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let id = KeyId::new(call.needed("id")?);
    let (row, old) = (found(book, &id)?, shown(book, &id)?);
    let name = match call.given.has("name") {
        true => call.given.text("name").unwrap_or_default(),
        false => &row.name,
    };
    let expires_ns = match call.given.has("expires_at") {
        true => call.future_ns("expires_at", book.now_ns())?,
        false => row.expires_ns,
    };
    book.change_key(&id, name, &policy::changed(&row.policy, &call.given), expires_ns)?;
    let new = shown(book, &id)?;
    call.audit(book, "key.change", &format!("key:{id}"), &old, &new)?;
    Ok(new)
}

fn revoke(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let id = KeyId::new(call.needed("id")?);
    let old = shown(book, &id)?;
    book.revoke_key(&id, book.now_ns())?;
    let new = shown(book, &id)?;
    call.audit(book, "key.revoke", &format!("key:{id}"), &old, &new)?;
    Ok(new)
}

fn rotate(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let id = KeyId::new(call.needed("id")?);
    let (row, old) = (found(book, &id)?, shown(book, &id)?);
    if !book.key_is_valid(&id)? {
        let message = format!("the key `{id}` has ended: make a new one");
        return Err(AdminError::Conflict { field: "id", message });
    }
    let next = new_id(book, call, "new_id")?;
    let overlap_ns = call.given.int("overlap_s").unwrap_or(OVERLAP_S).saturating_mul(NS_PER_S);
    book.add_key(&KeySpec {
        id: next.clone(),
        tenant: row.tenant,
        hash: key_hash(&call.fresh.secret),
        name: row.name,
        role: row.role,
        policy: row.policy,
        expires_ns: row.expires_ns,
    })?;
    book.revoke_key(&id, book.now_ns().saturating_add(overlap_ns))?;
    let mut made = shown(book, &next)?;
    call.audit(book, "key.rotate", &format!("key:{id}"), &old, &made)?;
    made["secret"] = call.fresh.secret.as_str().into();
    made["replaces"] = shown(book, &id)?;
    Ok(made)
}
