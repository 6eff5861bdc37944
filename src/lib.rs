//! Candela: a self-hosted inference server for Llama-class models that knows what every token costs.
//!
//! The map of the crate, in reading order: what a request meets on its way in comes first, the
//! machinery under it after. `tests/tidy.rs` checks who may use whom.

/// Who may enter.
pub mod admission;
/// HTTP: OpenAI's API, health, metrics, errors.
pub mod api;
/// KV block allocator and block keys; pure.
pub mod cache;
/// One file per subcommand.
pub mod cli;
/// The only place that reads the time.
pub mod clock;
/// The engine thread: plan, run, commit.
pub mod engine;
/// Model files to weights, and the one forward.
pub mod model;
/// One file per op of the forward.
pub mod ops;
/// Money: decimal USD to integer nano-USD.
pub mod price;
/// Model ids and paths to files on disk.
pub mod registry;
/// Logits to tokens.
pub mod sampling;
/// Queues and policy; pure.
pub mod scheduler;
/// Tokenizer, chat template, incremental detokenizer, stop strings.
pub mod text;
/// Ids and units, shared by everything.
pub mod types;
