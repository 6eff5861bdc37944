//! What is counted, and for whom.

use std::{ops::AddAssign, sync::Arc};

use crate::types::{ModelId, NanoUsd};

/// Who used a device: names as reports print them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Owner {
    pub tenant: Arc<str>,
    /// The key's public id, unique over tenants; never the key.
    pub key: Arc<str>,
    pub model: ModelId,
}

/// Device time that no tenant pays for, by cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overhead {
    /// Work done again after a preemption.
    Recompute,
    /// Tokens computed past the end of their sequence.
    Discarded,
    /// Calibration and warm-up steps.
    WarmUp,
    /// Rows that fill up a batch, and steps without a row.
    Padding,
}

impl Overhead {
    pub const ALL: [Self; 4] = [Self::Recompute, Self::Discarded, Self::WarmUp, Self::Padding];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Recompute => "recompute",
            Self::Discarded => "discarded",
            Self::WarmUp => "warm_up",
            Self::Padding => "padding",
        }
    }
}

/// Microjoules, by how they are known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Energy {
    /// From a counter, or from power sampled without a gap.
    pub measured_uj: u64,
    /// Across gaps and resets, and for time that no sample covers yet.
    pub estimated_uj: u64,
}

impl Energy {
    pub fn new(uj: u64, estimated: bool) -> Self {
        if estimated {
            Self { measured_uj: 0, estimated_uj: uj }
        } else {
            Self { measured_uj: uj, estimated_uj: 0 }
        }
    }

    pub fn total_uj(self) -> u64 {
        self.measured_uj + self.estimated_uj
    }
}

impl AddAssign for Energy {
    fn add_assign(&mut self, other: Self) {
        self.measured_uj += other.measured_uj;
        self.estimated_uj += other.estimated_uj;
    }
}

/// Tokens delivered or read, in disjoint buckets, and what they cost their owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tokens {
    pub input: u64,
    pub cached_input: u64,
    pub output: u64,
    pub cost: NanoUsd,
}

impl AddAssign for Tokens {
    fn add_assign(&mut self, other: Self) {
        self.input += other.input;
        self.cached_input += other.cached_input;
        self.output += other.output;
        self.cost.0 += other.cost.0;
    }
}

/// One row of an account.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub device_ns: u64,
    /// KV blocks held, times how long: divide by 1e9 for block-seconds.
    pub kv_block_ns: u128,
    pub tokens: Tokens,
    pub energy: Energy,
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.device_ns += other.device_ns;
        self.kv_block_ns += other.kv_block_ns;
        self.tokens += other.tokens;
        self.energy += other.energy;
    }
}
