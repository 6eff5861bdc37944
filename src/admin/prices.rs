//! The price book. A price that was set is never changed: the next version follows it.

use serde_json::{Value, json};

use crate::{
    ledger::{
        Book,
        book::{PriceSpec, Role},
        db::DbError,
    },
    price::{Asked, Billing, GPU_NAMES, GPU_RATES_AS_OF, GPUS as CATALOGUE, usd},
    types::{ModelId, NanoUsd, TenantId},
};

use super::{
    AdminError, Call, Field, Kind, Route, Verb, Work,
    call::audit,
    tenants,
    view::{self, PAGE, PAGING},
};

/// Who sets prices of the configuration, in the audit log.
const FILE: &str = "file";

pub const PRICES: Route = Route {
    name: "listPrices",
    summary: "Prices in force and still to come, or every version there was.",
    verb: Verb::Get,
    path: "/admin/v1/prices",
    least: Role::Operator,
    fields: &[
        &[
            Field::optional("model", Kind::Label, "of this model only"),
            Field::optional("history", Kind::Bool, "every version, newest first"),
            Field::optional("before", Kind::Int(1, i64::MAX), "with history: versions below this"),
        ],
        PAGING,
    ],
    work: Work::Change(prices),
};

pub const PRICE_SET: Route = Route {
    name: "setPrice",
    summary: "Set a price. Requests that run keep theirs, and history is never priced anew.",
    verb: Verb::Post,
    path: "/admin/v1/prices",
    least: Role::Admin,
    fields: &[&[
        Field::needed("model", Kind::Label, "the model, by the name it is served under"),
        Field::optional("tenant", Kind::Id, "for this tenant only"),
        Field::optional("input_usd", Kind::Usd, "a million input tokens"),
        Field::optional(
            "cached_input_usd",
            Kind::Usd,
            "a million input tokens that were cached; like others unless given, never more",
        ),
        Field::optional("output_usd", Kind::Usd, "a million output tokens"),
        Field::optional("request_usd", Kind::Usd, "each request"),
        Field::optional("gpu_second_usd", Kind::Usd, "a second of device time"),
        Field::optional("gpu_hour_usd", Kind::Usd, "an hour of device time"),
        Field::optional("gpu", Kind::OneOf(&GPU_NAMES), "device time like this GPU's example rate"),
        Field::optional(
            "billing",
            Kind::OneOf(&["tokens", "device"]),
            "which of the two a tenant is charged; tokens unless given",
        ),
        Field::optional("from", Kind::Time, "when it begins; now unless given"),
        Field::optional("until", Kind::Time, "when it ends; never unless given"),
    ]],
    work: Work::Change(set),
};

pub const GPUS: Route = Route {
    name: "listGpus",
    summary: "Example hourly rates of common GPUs. They are no offer: set your own.",
    verb: Verb::Get,
    path: "/admin/v1/gpus",
    least: Role::Operator,
    fields: &[],
    work: Work::Change(gpus),
};

fn prices(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let limit = call.given.int("limit").unwrap_or(PAGE);
    let model = call.given.text("model").unwrap_or_default();
    let now_ns = book.now_ns();
    if call.given.flag("history") == Some(true) {
        let before = call.given.int("before").unwrap_or(i64::MAX);
        let rows = book.price_history(model, before, limit + 1)?;
        return Ok(view::list(rows.iter().map(view::price).collect(), limit));
    }
    let after = call.given.text("after").unwrap_or_default();
    let rows = book.prices_in_force(model, after, limit)?;
    // A page is of models, each with all its prices.
    let mut models: Vec<_> = rows.iter().map(|row| row.model.as_str()).collect();
    models.dedup();
    let has_more = models.len() as i64 == limit;
    let rows = rows.iter().map(|row| {
        let mut shown = view::price(row);
        let scheduled = row.from_ns > now_ns;
        shown["state"] = if scheduled { "scheduled" } else { "in_force" }.into();
        shown
    });
    let rows = rows.collect();
    let mut answer = view::list(rows, i64::MAX);
    answer["has_more"] = has_more.into();
    Ok(answer)
}

fn set(book: &mut Book<'_>, call: &Call) -> Result<Value, AdminError> {
    let given = &call.given;
    let tenant = given.text("tenant").map(TenantId::new);
    if let Some(tenant) = &tenant {
        tenants::found(book, "tenant", tenant)?;
    }
    let asked = Asked {
        input: given.usd("input_usd"),
        cached_input: given.usd("cached_input_usd"),
        output: given.usd("output_usd"),
        request: given.usd("request_usd"),
        gpu_second: given.usd("gpu_second_usd"),
        gpu_hour: given.usd("gpu_hour_usd"),
        gpu: given.text("gpu").map(str::to_owned),
        billing: given.text("billing").map(|name| match name {
            "device" => Billing::Device,
            _ => Billing::Tokens,
        }),
    };
    let (rates, billing) = asked.rates().map_err(|error| {
        let field = match error.field {
            "gpu" => "gpu".to_owned(),
            amount => format!("{amount}_usd"),
        };
        AdminError::field(&field, error.message)
    })?;
    let now_ns = book.now_ns();
    let (from_ns, until_ns) = (call.future_ns("from", now_ns)?, call.future_ns("until", now_ns)?);
    if until_ns.is_some_and(|until_ns| until_ns <= from_ns.unwrap_or(now_ns)) {
        return Err(AdminError::field("until", "`until` must come after `from`"));
    }
    let model = ModelId::new(call.needed("model")?);
    let spec = PriceSpec { model, tenant, rates, billing, from_ns, until_ns, origin: "api" };
    Ok(put(book, &call.authority.actor(), &spec)?)
}

fn put(book: &mut Book<'_>, actor: &str, spec: &PriceSpec) -> Result<Value, DbError> {
    let old = book.price_last_set(&spec.model, spec.tenant.as_ref())?;
    book.set_price(spec)?;
    let new = book.price_last_set(&spec.model, spec.tenant.as_ref())?;
    let old = old.as_ref().map(view::price).unwrap_or_default();
    let new = new.as_ref().map(view::price).unwrap_or_default();
    audit(book, actor, "price.set", &format!("price:{}", spec.model), &old, &new)?;
    Ok(new)
}

/// Sets a price of the configuration file unless it is the last one that was set. Whether it was set.
pub fn set_from_file(book: &mut Book<'_>, spec: &PriceSpec) -> Result<bool, DbError> {
    let last = book.price_last_set(&spec.model, spec.tenant.as_ref())?;
    let same = last.is_some_and(|last| {
        let for_good = last.from_ns <= book.now_ns() && last.until_ns.is_none();
        for_good && last.rates == spec.rates && last.billing == spec.billing
    });
    if !same {
        put(book, FILE, spec)?;
    }
    Ok(!same)
}

fn gpus(_: &mut Book<'_>, _: &Call) -> Result<Value, AdminError> {
    let rows = CATALOGUE.iter().map(|gpu| {
        json!({
            "object": "gpu", "name": gpu.name, "as_of": GPU_RATES_AS_OF,
            "gpu_hour_usd": usd::format(NanoUsd(gpu.hour_nano_usd)),
        })
    });
    Ok(view::list(rows.collect(), i64::MAX))
}
