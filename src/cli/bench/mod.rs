//! `candela bench`: loads any OpenAI-compatible server and measures what its clients see.
//!
//! A measurement follows the way of a request: the workload says what is sent and when, the client
//! sends it and notes times, the sse module cuts the answer into events, the report computes.

mod args;
mod client;
mod report;
mod run;
mod sse;
mod stats;
mod workload;

use std::{fs, io::Write, process::ExitCode};

use anyhow::Context;

pub use args::BenchArgs;

/// Runs the benchmark; 1 when no request succeeded.
pub fn bench(args: BenchArgs) -> anyhow::Result<ExitCode> {
    let plan = args.check()?;
    // Before the run: an hour's numbers must not be lost to a mistyped directory.
    let json = match &plan.json {
        Some(path) => Some((
            fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?,
            path,
        )),
        None => None,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let report = runtime.block_on(run::run(&plan))?;
    write!(std::io::stdout().lock(), "{}", report.table())?;
    if let Some((mut file, path)) = json {
        serde_json::to_writer_pretty(&mut file, &report)
            .map_err(anyhow::Error::from)
            .and_then(|()| Ok(file.write_all(b"\n")?))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(if report.completed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
