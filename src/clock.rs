//! Time is passed in: a system clock for the server, a simulated one for tests.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Reads the time. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System { origin: Instant },
    Simulated(Arc<AtomicU64>),
}

impl Clock {
    pub fn system() -> Self {
        Self(Source::System { origin: Instant::now() })
    }

    /// A clock that stands still until [`Clock::advance`].
    pub fn simulated() -> Self {
        Self(Source::Simulated(Arc::new(AtomicU64::new(0))))
    }

    /// Monotonic nanoseconds since the clock was made.
    pub fn now_ns(&self) -> u64 {
        match &self.0 {
            Source::System { origin } => origin.elapsed().as_nanos() as u64,
            Source::Simulated(now) => now.load(Ordering::Relaxed),
        }
    }

    /// Seconds since 1970, for `created` fields. A simulated clock starts in 1970.
    pub fn unix_s(&self) -> u64 {
        match &self.0 {
            Source::System { .. } => {
                SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
            }
            Source::Simulated(now) => now.load(Ordering::Relaxed) / 1_000_000_000,
        }
    }

    /// Moves a simulated clock; a system clock moves by itself.
    pub fn advance(&self, by: Duration) {
        if let Source::Simulated(now) = &self.0 {
            now.fetch_add(by.as_nanos() as u64, Ordering::Relaxed);
        }
    }
}
