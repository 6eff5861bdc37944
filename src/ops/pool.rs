//! Threads that share the work of one op. A decode step enters a few hundred parallel regions of
//! some ten microseconds each, so workers spin for the next region a while before they sleep.
//!
//! Threads take units of a region as they come. One that the system has put aside takes none and is
//! not waited for, so a busy machine costs its share and not a time slice a region.

use std::{
    cell::UnsafeCell,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Iterations of the spin before a worker sleeps: some hundreds of microseconds.
const SPINS_MAX: u32 = 20_000;
/// `state` is the number of the region, whether it is open, and how many workers are inside.
const REGION_ONE: u64 = 1 << 32;
const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

type Body = *const (dyn Fn(Range<usize>) + Sync);

#[derive(Clone, Copy)]
struct Job {
    body: Body,
    units: usize,
    grain: usize,
}

struct Shared {
    state: AtomicU64,
    /// First unit that nobody has taken.
    next: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    stop: AtomicBool,
    panicked: AtomicBool,
    sleepers: Mutex<usize>,
    wake: Condvar,
}

// SAFETY: `job` is written only by `each` while the region is closed and nobody is inside, and read
// only from inside.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointer in `job` is only used inside a region, while the closure it points to is
// alive and `Sync`.
unsafe impl Send for Shared {}

/// A fixed set of threads; the caller of [`CpuPool::each`] is one of them.
pub struct CpuPool {
    shared: Arc<Shared>,
    entry: Mutex<()>,
    workers: Vec<JoinHandle<()>>,
}

impl CpuPool {
    /// A pool that computes on `threads` threads in all (at least one).
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            next: AtomicUsize::new(0),
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
                    .spawn(move || work(&shared))
            })
            .collect::<std::io::Result<_>>()?;
        Ok(Self { shared, entry: Mutex::new(()), workers })
    }

    /// How many threads take part in a [`CpuPool::each`].
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body` with ranges of at most `grain` that together are `0 .. units`, each once, on any
    /// of the threads, and returns when all are done. A panic in any of them is raised again here.
    /// Must not be called from inside a body.
    pub fn each(&self, units: usize, grain: usize, body: &(dyn Fn(Range<usize>) + Sync)) {
        let grain = grain.max(1);
        if self.workers.is_empty() || units <= grain {
            if units > 0 {
                body(0..units);
            }
            return;
        }
        let _entry = self.entry.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; the pointer is not used after this call returns,
        // because the region is closed and empty by then.
        let body: Body =
            unsafe { std::mem::transmute(body as *const (dyn Fn(Range<usize>) + Sync)) };
        let job = Job { body, units, grain };
        // SAFETY: the region is closed and empty, and `entry` keeps other callers out.
        unsafe { *shared.job.get() = Some(job) };
        shared.next.store(0, Ordering::Relaxed);
        let region =
            shared.state.load(Ordering::Relaxed).wrapping_add(REGION_ONE) & !(OPEN | INSIDE);
        shared.state.store(region | OPEN, Ordering::SeqCst);
        if *shared.sleepers.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) > 0 {
            shared.wake.notify_all();
        }
        // SAFETY: the closure is alive.
        let own = catch_unwind(AssertUnwindSafe(|| unsafe { take_units(shared, job) }));
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while shared.state.load(Ordering::Acquire) & INSIDE > 0 {
            spins += 1;
            if spins < SPINS_MAX { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panicked = shared.panicked.swap(false, Ordering::Relaxed);
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        assert!(!panicked, "a part of an op panicked");
    }
}

impl Drop for CpuPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.state.fetch_add(REGION_ONE, Ordering::SeqCst);
        drop(self.shared.sleepers.lock());
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its parts, so there is nothing to learn from join.
            let _ = worker.join();
        }
    }
}

/// # Safety
/// The closure of `job` is alive.
unsafe fn take_units(shared: &Shared, job: Job) {
    loop {
        let first = shared.next.fetch_add(job.grain, Ordering::Relaxed);
        if first >= job.units {
            return;
        }
        // SAFETY: as the caller promises.
        unsafe { (*job.body)(first..(first + job.grain).min(job.units)) };
    }
}

fn work(shared: &Shared) {
    let mut seen = 0;
    loop {
        let state = next_region(shared, seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        if state & OPEN == 0 {
            seen = state / REGION_ONE;
            continue;
        }
        let inside = state + 1;
        if shared
            .state
            .compare_exchange(state, inside, Ordering::AcqRel, Ordering::Relaxed)
            .is_err()
        {
            continue;
        }
        seen = state / REGION_ONE;
        // SAFETY: we are inside: `each` wrote the job before it opened the region, and waits for us.
        let outcome = catch_unwind(AssertUnwindSafe(|| unsafe {
            (*shared.job.get()).map(|job| take_units(shared, job))
        }));
        if outcome.is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        shared.state.fetch_sub(1, Ordering::Release);
    }
}

/// Waits until there is another region than `seen`: spinning first, then asleep.
fn next_region(shared: &Shared, seen: u64) -> u64 {
    for _ in 0..SPINS_MAX {
        let state = shared.state.load(Ordering::Acquire);
        if state / REGION_ONE != seen {
            return state;
        }
        std::hint::spin_loop();
    }
    let mut sleepers = shared.sleepers.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    *sleepers += 1;
    loop {
        let state = shared.state.load(Ordering::SeqCst);
        if state / REGION_ONE != seen {
            *sleepers -= 1;
            return state;
        }
        sleepers = shared.wake.wait(sleepers).unwrap_or_else(|poisoned| poisoned.into_inner());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_runs_once_per_region_awake_or_asleep() {
        let pool = CpuPool::new(3).expect("threads");
        for round in 0..1_000 {
            let (units, grain) = (round % 40, round % 7);
            let counts: Vec<AtomicUsize> = (0..units).map(|_| AtomicUsize::new(0)).collect();
            pool.each(units, grain, &|range| {
                assert!(!range.is_empty() && range.len() <= grain.max(1));
                for unit in range {
                    counts[unit].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(counts.into_iter().all(|count| count.into_inner() == 1), "{round}");
            if round % 250 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn all_threads_work_on_a_long_region() {
        let pool = CpuPool::new(3).expect("threads");
        // Each unit waits for the others, so that all three threads must be inside at once.
        let barrier = std::sync::Barrier::new(3);
        pool.each(3, 1, &|_| {
            barrier.wait();
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = CpuPool::new(2).expect("threads");
        for culprit in [0, 1, 50, 99] {
            let run = || pool.each(100, 1, &|range| assert_ne!(range.start, culprit));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        let ran = AtomicUsize::new(0);
        pool.each(100, 1, &|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 100);
    }
}
