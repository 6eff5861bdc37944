//! Where log lines go.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// What is logged when `CANDELA_LOG` says nothing.
const FILTER: &str = "info";

/// Sends log lines to standard error, so that standard output stays free for answers.
///
/// # Errors
/// When `CANDELA_LOG` cannot be read as a filter, or logging is set up already.
pub fn init(format: LogFormat) -> anyhow::Result<()> {
    let directives = std::env::var("CANDELA_LOG").unwrap_or_else(|_| FILTER.to_string());
    let filter = EnvFilter::try_new(&directives)
        .map_err(|error| anyhow::anyhow!("CANDELA_LOG `{directives}`: {error}"))?;
    // Colours are noise in a file or a collector.
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    let done = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    done.map_err(|error| anyhow::anyhow!("cannot set up logging: {error}"))
}
