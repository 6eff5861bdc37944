//! The ledger, proven: random histories, known failures of others, many streams at once, the real
//! server, and crashes at every write.

mod budget_traps;
mod charge_traps;
#[path = "../common/mod.rs"]
mod common;
mod crash;
mod crash_ledger;
mod crash_server;
mod files;
mod histories;
mod load;
mod server;
mod server_traps;
mod streams;
mod world;
