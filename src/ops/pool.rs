//! Threads that share the work of one op. A decode step enters a few hundred parallel regions of
//! some ten microseconds each, so workers spin for the next region a while before they sleep.

use std::{
    cell::UnsafeCell,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Iterations of the spin before a worker sleeps: some tens of microseconds.
const SPINS_MAX: u32 = 20_000;

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    epoch: AtomicU64,
    pending: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    panicked: AtomicBool,
    sleepers: Mutex<usize>,
    wake: Condvar,
}

// SAFETY: `job` is written only by `run` while no worker reads it (pending is zero), and published
// by the release store of `epoch`.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is only ever used between `run`'s start and end, while the
// closure it points to is alive and `Sync`.
unsafe impl Send for Shared {}

/// A fixed set of threads; the caller of [`CpuPool::run`] is one of them.
pub struct CpuPool {
    shared: Arc<Shared>,
    entry: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

impl CpuPool {
    /// A pool that computes on `threads` threads in all (at least one).
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            epoch: AtomicU64::new(0),
            pending: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            sleepers: Mutex::new(0),
            wake: Condvar::new(),
        });
        let workers = (1..threads.max(1))
            .map(|index| {
                let shared = shared.clone();
                std::thread::Builder::new()
                    .name(format!("candela-op-{index}"))
                    .spawn(move || work(&shared, index))
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { shared, entry: Mutex::new(()), workers })
    }

    /// How many threads take part in a [`CpuPool::run`].
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `part(0)` .. `part(threads - 1)`, each on its own thread, and returns when all are done.
    /// A panic in any part is raised again here. Must not be called from inside a part.
    pub fn run(&self, part: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            return part(0);
        }
        let _entry = self.entry.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; the pointer is not used after this call returns,
        // because every worker has counted `pending` down by then.
        let job: Job = unsafe { std::mem::transmute(part as *const (dyn Fn(usize) + Sync)) };
        // SAFETY: no worker reads `job` while `pending` is zero, and `entry` keeps other callers out.
        unsafe { *shared.job.get() = Some(job) };
        shared.pending.store(self.workers.len(), Ordering::Relaxed);
        shared.epoch.fetch_add(1, Ordering::SeqCst);
        if *shared.sleepers.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) > 0 {
            shared.wake.notify_all();
        }
        let own = catch_unwind(AssertUnwindSafe(|| part(0)));
        let mut spins = 0u32;
        while shared.pending.load(Ordering::Acquire) > 0 {
            spins += 1;
            if spins < SPINS_MAX { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        assert!(!shared.panicked.swap(false, Ordering::Relaxed), "a part of an op panicked");
    }
}

impl Drop for CpuPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.epoch.fetch_add(1, Ordering::SeqCst);
        drop(self.shared.sleepers.lock());
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its parts, so there is nothing to learn from join.
            let _ = worker.join();
        }
    }
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    loop {
        seen = next_epoch(shared, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the epoch was read with acquire after `run` wrote `job`; `run` waits for us.
        let part = unsafe { (*shared.job.get()).map(|job| &*job) };
        let outcome = catch_unwind(AssertUnwindSafe(|| part.map(|part| part(index))));
        if outcome.is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.pending.fetch_sub(1, Ordering::Release);
    }
}

/// Waits until the epoch is past `seen`: spinning first, then asleep.
fn next_epoch(shared: &Shared, seen: u64) -> u64 {
    for _ in 0..SPINS_MAX {
        let epoch = shared.epoch.load(Ordering::Acquire);
        if epoch != seen {
            return epoch;
        }
        std::hint::spin_loop();
    }
    let mut sleepers = shared.sleepers.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    *sleepers += 1;
    loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        if epoch != seen {
            *sleepers -= 1;
            return epoch;
        }
        sleepers = shared.wake.wait(sleepers).unwrap_or_else(|poisoned| poisoned.into_inner());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_runs_once_per_region_awake_or_asleep() {
        let pool = CpuPool::new(3).expect("threads");
        let counts: [AtomicUsize; 3] = Default::default();
        for round in 0..1_000 {
            pool.run(&|part| {
                counts[part].fetch_add(1, Ordering::Relaxed);
            });
            if round % 250 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
        assert_eq!(counts.map(|count| count.into_inner()), [1_000; 3]);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = CpuPool::new(2).expect("threads");
        for culprit in [0, 1] {
            let run = || pool.run(&|part| assert_ne!(part, culprit));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        let ran = AtomicUsize::new(0);
        pool.run(&|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 2);
    }
}
