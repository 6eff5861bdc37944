//! The ledger, proven: random histories, known failures of others, many streams at once, the real
//! server, and crashes at every write.

#[path = "../common/mod.rs"]
mod common;
mod files;
mod histories;
mod server;
mod streams;
mod tiny;
mod traps;
mod world;
