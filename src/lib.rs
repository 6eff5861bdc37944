//! Candela: a self-hosted inference server for Llama-class models that knows what every token costs.
//!
//! The map of the crate, in reading order: what a request meets on its way in comes first, the
//! machinery under it after.

/// Ids and units, shared by everything.
pub mod types;
/// The only place that reads the time.
pub mod clock;
/// Flags, environment and file as one validated configuration; every limit and default.
pub mod config;
/// One file per subcommand.
pub mod cli;
/// HTTP: OpenAI's API, health, metrics, errors.
pub mod api;
/// Tokenizer, chat template, incremental detokenizer, stop strings.
pub mod text;
/// What operators do, for REST and the command line.
pub mod admin;
/// Metrics for Prometheus.
pub mod telemetry;
/// Who may enter.
pub mod admission;
/// Model ids and paths to files on disk.
pub mod registry;
/// Money: decimal USD to integer nano-USD, usage to money.
pub mod price;
/// Accounts, budgets, holds and posts: every nano-USD, durable and provable.
pub mod ledger;
/// The engine thread: plan, run, commit.
pub mod engine;
/// Device time and energy: who used what, and nothing lost; pure.
pub mod meter;
/// What NVIDIA's driver says about the GPUs.
pub mod gpu;
/// Queues and policy; pure.
pub mod scheduler;
/// KV block allocator and block keys; pure.
pub mod cache;
/// Model files to weights, and the one forward.
pub mod model;
/// One file per op of the forward.
pub mod ops;
/// Logits to tokens.
pub mod sampling;
