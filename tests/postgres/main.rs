//! The ledger on PostgreSQL: what it means is what it means on SQLite, and several servers share it.

mod certificates;
#[path = "../common/mod.rs"]
mod common;
mod connection;
mod crash;
mod impostors;
mod replicas;
mod semantics;
mod servers;
mod tls;
