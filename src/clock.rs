//! Time is passed in: a system clock for the server, a simulated one for tests.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Reads the time. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System { origin: Instant },
    Simulated(Arc<Simulated>),
}

/// A monotonic time, and how far the wall clock is ahead of it.
#[derive(Debug, Default)]
struct Simulated {
    now_ns: AtomicU64,
    wall_offset_ns: AtomicI64,
}

impl Clock {
    pub fn system() -> Self {
        Self(Source::System { origin: Instant::now() })
    }

    /// A clock that stands still until [`Clock::advance`].
    pub fn simulated() -> Self {
        Self(Source::Simulated(Arc::default()))
    }

    /// Monotonic nanoseconds since the clock was made.
    pub fn now_ns(&self) -> u64 {
        match &self.0 {
            Source::System { origin } => origin.elapsed().as_nanos() as u64,
            Source::Simulated(time) => time.now_ns.load(Ordering::Relaxed),
        }
    }

    /// Seconds since 1970, for `created` fields. A simulated clock starts in 1970.
    pub fn unix_s(&self) -> u64 {
        self.unix_ns().max(0) as u64 / 1_000_000_000
    }

    /// Nanoseconds since 1970 by the wall clock, which may be set back.
    pub fn unix_ns(&self) -> i64 {
        match &self.0 {
            Source::System { .. } => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)),
            Source::Simulated(time) => {
                let now_ns = time.now_ns.load(Ordering::Relaxed) as i64;
                now_ns + time.wall_offset_ns.load(Ordering::Relaxed)
            }
        }
    }

    /// Sets a simulated wall clock, forward or back; a system clock stays as it is.
    pub fn set_wall(&self, unix_ns: i64) {
        if let Source::Simulated(time) = &self.0 {
            let now_ns = time.now_ns.load(Ordering::Relaxed) as i64;
            time.wall_offset_ns.store(unix_ns - now_ns, Ordering::Relaxed);
        }
    }

    /// Moves a simulated clock; a system clock moves by itself.
    pub fn advance(&self, by: Duration) {
        if let Source::Simulated(time) = &self.0 {
            time.now_ns.fetch_add(by.as_nanos() as u64, Ordering::Relaxed);
        }
    }
}
