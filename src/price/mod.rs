//! Money: decimal USD to integer nano-USD, and usage to money, exactly.

mod asked;
mod gpus;
mod rates;
pub mod usd;

pub use asked::{Asked, AskedError};
pub use gpus::{GPU_NAMES, GPU_RATES_AS_OF, GPUS, Gpu};
pub use rates::{Billing, Rates, Tally, Terms};

use crate::types::NanoUsd;

/// Token prices of a model as its manifest has them, in nano-USD per million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prices {
    pub input: NanoUsd,
    pub cached_input: NanoUsd,
    pub output: NanoUsd,
}
