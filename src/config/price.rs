//! `[[price]]` in `candela.toml`.

use serde::Deserialize;

use crate::{
    price::{Asked, Billing, Rates, usd},
    types::NanoUsd,
};

/// A price of the file, checked. Amounts are decimal strings in USD.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(try_from = "Written")]
pub struct FilePrice {
    pub model: String,
    /// None is everyone without a price of their own.
    pub tenant: Option<String>,
    pub rates: Rates,
    pub billing: Billing,
}

/// As it is written: tokens a million, `gpu_hour` an hour, `gpu` by a name of the catalogue.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    model: String,
    tenant: Option<String>,
    #[serde(default, with = "usd::optional")]
    input: Option<NanoUsd>,
    #[serde(default, with = "usd::optional")]
    cached_input: Option<NanoUsd>,
    #[serde(default, with = "usd::optional")]
    output: Option<NanoUsd>,
    #[serde(default, with = "usd::optional")]
    request: Option<NanoUsd>,
    #[serde(default, with = "usd::optional")]
    gpu_second: Option<NanoUsd>,
    #[serde(default, with = "usd::optional")]
    gpu_hour: Option<NanoUsd>,
    gpu: Option<String>,
    billing: Option<Billing>,
}

impl TryFrom<Written> for FilePrice {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        if written.model.trim().is_empty() {
            return Err("model: is empty".to_owned());
        }
        let asked = Asked {
            input: written.input,
            cached_input: written.cached_input,
            output: written.output,
            request: written.request,
            gpu_second: written.gpu_second,
            gpu_hour: written.gpu_hour,
            gpu: written.gpu,
            billing: written.billing,
        };
        let rates = asked.rates().map_err(|error| format!("{}: {error}", error.field));
        let (rates, billing) = rates?;
        Ok(Self { model: written.model, tenant: written.tenant, rates, billing })
    }
}
