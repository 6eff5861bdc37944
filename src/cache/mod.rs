//! KV blocks as ids: who holds which, and what a full block contains. Pure; no tensors.

mod key;
mod pool;

pub use key::BlockKey;
pub use pool::BlockPool;
