//! The books of a device over time: who used it, and what it drew.
//!
//! They are kept by a thread of their own, told by the engine after every step and by whoever reads
//! the device's energy: whoever reads the books never holds the engine up.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    clock::Clock,
    meter::{
        Account, AccountLimits, By, Claims, DeviceStep, Energy, EnergyReading, Owner, Report,
        Settled, Tokens,
    },
    types::RequestId,
};

/// How long steps are kept back, so that not every one of them wakes the keeper's thread up: on few
/// cores that would hold up the next step.
const SEND_EVERY: Duration = Duration::from_millis(100);

/// What one step adds to the books.
#[derive(Debug, Default)]
pub struct StepRecord {
    pub step: DeviceStep,
    /// In the order of the step's `owned_ns`.
    pub requests: Vec<RequestId>,
    pub tokens: Vec<(Owner, Tokens)>,
    /// KV blocks held since the step before.
    pub blocks: Vec<(Owner, u64)>,
    pub blocks_from_ns: u64,
    /// Requests that computed for the last time.
    pub ended: Vec<RequestId>,
}

/// What a look at the device's sensors adds to them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLook {
    /// `None` where the device tells neither energy nor power.
    pub energy: Option<EnergyReading>,
    /// Use by other processes: from, to, and millionths of the time.
    pub foreign: Option<(u64, u64, u32)>,
}

enum Entry {
    Steps(Vec<StepRecord>),
    Look(DeviceLook),
    Settle(SettledSink),
    /// The engine has ended: what is not settled by now is told as an estimate.
    End,
}

type SettledSink = Box<dyn Fn(Vec<Settled>) + Send>;

/// The books of a device; clones share them.
#[derive(Clone)]
pub struct Books {
    kept: Arc<Mutex<Kept>>,
    entries: Sender<Entry>,
}

struct Kept {
    account: Account,
    claims: Claims,
}

/// The engine's pen.
pub struct BooksWriter {
    entries: Sender<Entry>,
    /// When the oldest step in flight, or not yet sent, was launched; `u64::MAX` while there is none.
    busy_since_ns: Arc<AtomicU64>,
    unsent: Vec<StepRecord>,
}

impl Books {
    /// Adds a look. Never waits.
    pub fn look(&self, look: DeviceLook) {
        // Books that are gone are of a server that ends.
        let _ = self.entries.send(Entry::Look(look));
    }

    /// Who is told the energy of ended requests once it is settled.
    pub fn on_settled(&self, sink: impl Fn(Vec<Settled>) + Send + 'static) {
        let _ = self.entries.send(Entry::Settle(Box::new(sink)));
    }

    /// Who used the device in the last whole windows that make up `window_ns`.
    pub fn utilization(&self, now_ns: u64, window_ns: u64, by: By) -> Report {
        self.lock().account.utilization(now_ns, window_ns, by)
    }

    /// Device time told after its window had been forgotten.
    pub fn late_ns(&self) -> u64 {
        self.lock().account.late_ns()
    }

    /// What a request with `device_ns` of device time drew so far. `None` where nobody reads it.
    pub fn estimate(&self, request: &RequestId, device_ns: u64) -> Option<Energy> {
        let kept = self.lock();
        kept.claims.estimate(&kept.account, request, device_ns)
    }

    /// Not for the engine's thread.
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl BooksWriter {
    /// Says that a step is about to be launched, if none is in flight.
    pub fn begin(&self, now_ns: u64) {
        self.busy_since_ns.fetch_min(now_ns, Ordering::AcqRel);
    }

    /// Adds a step; `busy_since_ns` is the launch of the oldest step still in flight, if any.
    pub fn add(&mut self, record: StepRecord, busy_since_ns: Option<u64>) {
        let end_ns = record.step.end_ns;
        self.unsent.push(record);
        let since_ns = self.unsent.first().map_or(end_ns, |first| first.step.end_ns);
        if end_ns.saturating_sub(since_ns) >= SEND_EVERY.as_nanos() as u64 {
            self.flush(busy_since_ns);
        }
    }

    /// Sends what was kept back, as no step may follow for long.
    pub fn flush(&mut self, busy_since_ns: Option<u64>) {
        if !self.unsent.is_empty() {
            let _ = self.entries.send(Entry::Steps(std::mem::take(&mut self.unsent)));
        }
        // After the records: who sees this finds them in the queue.
        self.busy_since_ns.store(busy_since_ns.unwrap_or(u64::MAX), Ordering::Release);
    }
}

impl Drop for BooksWriter {
    fn drop(&mut self) {
        self.flush(None);
        let _ = self.entries.send(Entry::End);
    }
}

/// Starts the thread that keeps the books. It ends when the engine does.
pub fn keep_books(clock: Clock) -> std::io::Result<(Books, BooksWriter, JoinHandle<()>)> {
    let account = Account::new(clock.now_ns(), AccountLimits::default());
    let kept = Arc::new(Mutex::new(Kept { account, claims: Claims::default() }));
    let (entries, arriving) = channel();
    let busy_since_ns = Arc::new(AtomicU64::new(u64::MAX));
    let books = Books { kept, entries: entries.clone() };
    let unsent = Vec::new();
    let writer = BooksWriter { entries, busy_since_ns: busy_since_ns.clone(), unsent };
    let keeper = Keeper { books: books.kept.clone(), clock, busy_since_ns, sink: None };
    let thread = std::thread::Builder::new().name("candela-meter".into());
    let thread = thread.spawn(move || keeper.run(&arriving))?;
    Ok((books, writer, thread))
}

struct Keeper {
    books: Arc<Mutex<Kept>>,
    clock: Clock,
    busy_since_ns: Arc<AtomicU64>,
    sink: Option<SettledSink>,
}

impl Keeper {
    fn run(mut self, arriving: &Receiver<Entry>) {
        while let Ok(first) = arriving.recv() {
            // Steps that end before `until_ns` are in the queue by now: no window up to there changes.
            let now_ns = self.clock.now_ns();
            let until_ns = self.busy_since_ns.load(Ordering::Acquire).min(now_ns);
            let entries: Vec<Entry> = std::iter::once(first).chain(arriving.try_iter()).collect();
            let (mut looked, mut ended) = (false, false);
            let books = self.books.clone();
            let mut kept = books.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            for entry in entries {
                match entry {
                    Entry::Steps(records) => records.iter().for_each(|one| kept.add_step(one)),
                    Entry::Look(look) => {
                        kept.add_look(look);
                        looked = true;
                    }
                    Entry::Settle(sink) => self.sink = Some(sink),
                    Entry::End => ended = true,
                }
            }
            // Only a look brings energy to settle.
            if looked {
                kept.account.settle(until_ns);
            }
            let settled = if looked || ended {
                let Kept { account, claims } = &mut *kept;
                claims.take_settled(account, ended)
            } else {
                Vec::new()
            };
            drop(kept);
            if let Some(sink) = self.sink.as_ref().filter(|_| !settled.is_empty()) {
                sink(settled);
            }
            if ended {
                return;
            }
        }
    }
}

impl Kept {
    fn add_step(&mut self, record: &StepRecord) {
        let end_ns = record.step.end_ns;
        let pieces = self.account.record_step(&record.step);
        // Where nobody reads energy there is none to claim.
        if self.account.is_read() {
            for piece in pieces {
                for (request, ns) in record.requests.iter().zip(&piece.owned_ns) {
                    self.claims.add(request, piece.window, *ns);
                }
            }
        }
        for (owner, tokens) in &record.tokens {
            self.account.record_tokens(end_ns, owner, *tokens);
        }
        for (owner, blocks) in &record.blocks {
            self.account.record_blocks(record.blocks_from_ns, end_ns, owner, *blocks);
        }
        for request in &record.ended {
            self.claims.end(request.clone());
        }
    }

    fn add_look(&mut self, look: DeviceLook) {
        if let Some((from_ns, to_ns, share_ppm)) = look.foreign {
            self.account.record_foreign(from_ns, to_ns, share_ppm);
        }
        if let Some(reading) = look.energy {
            self.account.record_energy(reading);
        }
    }
}
