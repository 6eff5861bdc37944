//! Accounts, budgets, holds and posts: every nano-USD, durable and provable.
//!
//! A request is opened with a hold for its input and first tokens, extended lease by lease while it
//! runs, and closed with a post of what it used; the rest of its hold is void. All of it happens in
//! transactions of one [`Book`], batched by one thread ([`Ledger`]); the engine sees a [`Lease`].

pub mod book;
pub mod db;
mod desk;
mod job;
pub mod lease;
mod reader;
pub mod rows;
pub mod schema;
pub mod thread;
pub mod window;

pub use book::{Book, transact};
pub use desk::Desk;
pub use lease::{Demand, Lease, LeaseEnd, Meterage};
pub use reader::Reader;
pub use rows::{
    Bill, Chain, Denial, EndCause, EnergyRow, Event, Extension, Grant, Opened, Opening, Payer,
    Policy, Refusal,
};
pub use thread::{Ledger, LedgerError, LedgerOptions};
pub use window::{Span, Zone};
