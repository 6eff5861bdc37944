//! The command line: one file per subcommand.

mod admin;
pub mod assemble;
pub mod bench;
mod doctor;
mod gpus;
mod ledger;
pub mod logging;
pub mod machine;
pub mod net;
mod on_gpu;
mod open_ledger;
mod pull;
mod reload;
mod serve;
mod top;

use std::{io::Write, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::config::Settings;

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
  candela tenant create acme
  candela key create --tenant acme
  candela budget set --tenant acme --month 100
  candela usage
  candela top --by key
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
    /// Organisations: what tenants belong to
    #[command(subcommand)]
    Org(admin::OrgCommand),
    /// Tenants: who pays
    #[command(subcommand)]
    Tenant(admin::TenantCommand),
    /// API keys: create, list, change, rotate, revoke
    #[command(subcommand)]
    Key(admin::KeyCommand),
    /// Budgets: how much may be spent in an hour, day, week, month or in all
    #[command(subcommand)]
    Budget(admin::BudgetCommand),
    /// Rate limits: requests and tokens a minute, sequences at once
    #[command(subcommand)]
    Limit(admin::LimitCommand),
    /// Prices of models, their history, and example rates of GPUs
    #[command(subcommand)]
    Price(admin::PriceCommand),
    /// Give a tenant money, or book what it paid in advance
    Credit(admin::CreditArgs),
    /// Give back what a request was charged, or a part of it
    Refund(admin::RefundArgs),
    /// What was used and what it cost, or the raw rows
    Usage(admin::UsageArgs),
    /// Who uses the device now: shares of its time, tokens, energy and cost, until stopped
    Top(top::TopArgs),
    /// What a request used and cost, at which price, and why it ended
    Explain(admin::ExplainArgs),
    /// Who changed what
    Audit(admin::AuditArgs),
    /// Thresholds that were passed, budgets that turned something away, servers that died
    Events(admin::EventsArgs),
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
        Command::Serve(settings) => serve::serve(*settings),
        Command::Pull(args) => pull::pull(args),
        Command::Doctor(settings) => doctor::doctor(*settings),
        Command::Bench(args) => bench::bench(*args),
        Command::Ledger(args) => ledger::ledger(args),
        Command::Org(command) => admin::org(command),
        Command::Tenant(command) => admin::tenant(command),
        Command::Key(command) => admin::key(command),
        Command::Budget(command) => admin::budget(command),
        Command::Limit(command) => admin::limit(command),
        Command::Price(command) => admin::price(command),
        Command::Credit(args) => admin::credit(args),
        Command::Refund(args) => admin::refund(args),
        Command::Usage(args) => admin::usage(args),
        Command::Top(args) => top::top(args),
        Command::Explain(args) => admin::explain(args),
        Command::Audit(args) => admin::audit(args),
        Command::Events(args) => admin::events(args),
        Command::Version => {
            writeln!(std::io::stdout(), "candela {}", env!("CARGO_PKG_VERSION"))?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
