//! The command line: one file per subcommand.

pub mod assemble;
pub mod bench;
mod doctor;
mod ledger;
pub mod logging;
pub mod machine;
pub mod net;
mod open_ledger;
mod pull;
mod serve;

use std::{io::Write, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::config::{Config, Settings};

/// Self-hosted inference server with cost control built in.
///
/// `candela serve` answers OpenAI's API on http://127.0.0.1:8000. Without a model of your own it
/// fetches a small one first; no account, GPU or configuration file is needed.
#[derive(Debug, Parser)]
#[command(name = "candela", version, after_help = AFTER_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Settings: a flag wins over its CANDELA_* variable, that over candela.toml, that over the default.
A key in candela.toml is the flag's name with underscores: --max-num-seqs 8 is max_num_seqs = 8.
CANDELA_LOG sets what is logged, such as `debug` or `candela=debug,info`.

Examples:
  candela serve
  candela serve --model ./my-model.gguf --port 9000
  CANDELA_API_KEY=... candela serve --host 0.0.0.0
  candela pull qwen2.5-coder-1.5b-instruct
  candela bench --url http://127.0.0.1:8000 --num-prompts 64 --concurrency 8";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over OpenAI's API
    Serve(Box<Settings>),
    /// Fetch and verify a model without serving it
    Pull(pull::PullArgs),
    /// Say what this machine offers, what is wrong with it and what to do
    Doctor(Box<Settings>),
    /// Load any OpenAI-compatible server and measure its latency and throughput
    Bench(Box<bench::BenchArgs>),
    /// Check, back up or restore the ledger
    Ledger(ledger::LedgerArgs),
    /// Print the version
    Version,
}

/// Parses the command line and runs it. 0 is success, 1 a failure, 2 a wrong command line.
pub fn run() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            // Causes on the same line: an operator greps for one line, not for a chain.
            let _ = writeln!(std::io::stderr(), "candela: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Serve(settings) => serve::serve(Config::load(*settings)?),
        Command::Pull(args) => pull::pull(args),
        Command::Doctor(settings) => doctor::doctor(*settings),
        Command::Bench(args) => bench::bench(*args),
        Command::Ledger(args) => ledger::ledger(args),
        Command::Version => {
            writeln!(std::io::stdout(), "candela {}", env!("CARGO_PKG_VERSION"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
