//! The ledger, proven: random histories, known failures of others, many streams at once, the real
//! server, and crashes at every write.

mod files;
mod histories;
mod streams;
mod traps;
mod world;
