//! What a tenant or key is allowed, as fields of an operation.

use crate::ledger::Policy;

use super::{Field, Given, Kind};

const CLOSING_TEXT_BYTES_MAX: usize = 256;

/// Fields that are left out stay as they are; those that are null are taken away.
pub const POLICY: &[Field] = &[
    Field::optional("models", Kind::Labels, "models that may be used; none is all"),
    Field::optional("class_max", Kind::Id, "highest QoS class"),
    Field::optional("max_cost_usd", Kind::Usd, "cap of each request"),
    Field::optional(
        "closing_text",
        Kind::Text(CLOSING_TEXT_BYTES_MAX),
        "added, unbilled, to an output that money ended",
    ),
    Field::optional("natural_stop", Kind::Bool, "end at a sentence once the output is long enough"),
    Field::optional(
        "soft_landing_percent",
        Kind::Int(1, 100),
        "within this share of its cap an output ends at the next sentence",
    ),
];

/// `policy` with what was given.
pub fn changed(policy: &Policy, given: &Given) -> Policy {
    let mut policy = policy.clone();
    if given.has("models") {
        policy.models = given.texts("models");
    }
    if given.has("class_max") {
        policy.class_max = given.text("class_max").map(str::to_owned);
    }
    if given.has("max_cost_usd") {
        policy.max_cost_usd = given.usd("max_cost_usd");
    }
    if given.has("closing_text") {
        policy.closing_text = given.text("closing_text").map(str::to_owned);
    }
    if given.has("natural_stop") {
        policy.natural_stop = given.flag("natural_stop");
    }
    if given.has("soft_landing_percent") {
        let percent = given.int("soft_landing_percent");
        policy.soft_landing_percent = percent.and_then(|percent| u8::try_from(percent).ok());
    }
    policy
}
