//! SIGHUP: the prices of the configuration file are read again.

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    config::{Config, FilePrice, Settings},
    ledger::{Book, Ledger, book::PriceSpec, db::DbError},
    types::{ModelId, TenantId},
};

/// Sets the prices that are not the last ones set already. How many that were.
pub fn set_prices(book: &mut Book<'_>, prices: &[FilePrice]) -> Result<usize, DbError> {
    let mut set = 0;
    for price in prices {
        let tenant = price.tenant.as_ref().map(TenantId::new);
        if let Some(tenant) = &tenant
            && book.tenant(tenant)?.is_none()
        {
            tracing::warn!(%tenant, model = price.model, "a price is for a tenant that is not there");
        }
        let spec = PriceSpec {
            model: ModelId::new(&price.model),
            tenant,
            rates: price.rates,
            billing: price.billing,
            from_ns: None,
            until_ns: None,
            origin: "file",
        };
        set += usize::from(crate::admin::set_from_file(book, &spec)?);
    }
    Ok(set)
}

/// From now on SIGHUP is heard, and no longer ends the process.
pub fn hangups() -> anyhow::Result<Signal> {
    signal(SignalKind::hangup()).context("cannot listen for SIGHUP")
}

/// Reads the file again at each signal. One with a mistake changes nothing.
pub async fn reload(mut hangups: Signal, settings: Settings, ledger: Ledger) {
    while hangups.recv().await.is_some() {
        let prices = match Config::load(settings.clone()) {
            Ok(config) => config.prices,
            Err(error) => {
                tracing::error!(%error, "the prices stay as they are");
                continue;
            }
        };
        match ledger.run(move |book| set_prices(book, &prices)).await {
            Ok(set) => tracing::info!(set, "prices read again"),
            Err(error) => tracing::error!(%error, "the prices stay as they are"),
        }
    }
}
