//! `candela serve`.

use std::{net::SocketAddr, process::ExitCode};

use anyhow::{Context, bail};

use super::{logging, machine, net};
use crate::config::{ByteSize, Config};

/// Serves until told to stop.
///
/// # Errors
/// When the port is taken, the model cannot be fetched or loaded, or a part fails to start.
pub fn serve(config: Config) -> anyhow::Result<ExitCode> {
    logging::init(config.log_format)?;
    if let Some(file) = &config.file {
        tracing::info!(file = %file.display(), "configuration read");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    runtime.block_on(run(config))
}

async fn run(config: Config) -> anyhow::Result<ExitCode> {
    // First, so that a taken port is known before a model is fetched and loaded.
    let listener = net::bind(SocketAddr::new(config.host, config.port))?;
    let address = listener.local_addr()?;
    let kv_bytes = machine::kv_cache_memory_bytes(config.kv_cache_memory_bytes)?;
    tracing::info!(%address, kv_cache = %ByteSize(kv_bytes), "bound");
    bail!("the server's parts are not assembled in this build")
}
