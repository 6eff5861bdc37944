//! The way to the ledger's thread: what it is asked, and the answer once that is durable.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc::channel,
    },
    thread::JoinHandle,
    time::Duration,
};

use thiserror::Error;
use tokio::sync::oneshot;

use super::{
    Book,
    db::{Db, DbError},
    desk::Desk,
    job::{Job, Outbox},
    lease::{Lease, LeaseLimits},
    rows::{EnergyRow, Event, Opening, Refusal},
};
use crate::clock::Clock;

/// Rows of energy in one job, so that admission never waits for many.
const ENERGY_ROWS_MAX: usize = 64;
/// Requests that may wait for admission.
const OPENINGS_MAX: usize = 4096;

/// How a ledger is run.
#[derive(Clone, Debug)]
pub struct LedgerOptions {
    /// This process, never used before.
    pub replica: String,
    /// For people: host and address.
    pub name: String,
    /// Nobody else uses the database: whatever other servers left open is given up at once.
    pub exclusive: bool,
    /// How long leases outlive the last word of a server that shares the database.
    pub replica_ttl: Duration,
    /// Bound on the error between this machine's clock and the database's over that time.
    pub clock_error_max: Duration,
    pub lease: LeaseLimits,
}

/// Why the ledger did not do what it was asked.
#[derive(Debug, Error)]
pub enum LedgerError {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("the ledger is not available, so nothing can be charged: {0}")]
    Unavailable(String),
    #[error("{0} requests wait for admission already")]
    Busy(usize),
}

impl LedgerError {
    fn ended() -> Self {
        Self::Unavailable("its thread has ended".into())
    }
}

/// The way to a ledger's thread. Clones share it.
#[derive(Clone)]
pub struct Ledger {
    outbox: Outbox,
    openings: Arc<AtomicUsize>,
}

/// A thread and its handle.
pub struct LedgerThread {
    pub ledger: Ledger,
    pub thread: JoinHandle<()>,
}

impl Ledger {
    /// Joins the database and starts the thread. `on_event` hears what operators want to hear of.
    pub fn start(
        db: Box<dyn Db>,
        clock: Clock,
        options: LedgerOptions,
        on_event: impl Fn(&Event) + Send + 'static,
    ) -> Result<LedgerThread, DbError> {
        let (ledger, desk) = Self::without_thread(db, clock, options, on_event)?;
        let thread = std::thread::Builder::new().name("candela-ledger".into());
        let thread = thread.spawn(move || desk.run());
        let thread = thread.map_err(|error| DbError::Unavailable(error.to_string()))?;
        Ok(LedgerThread { ledger, thread })
    }

    /// As `start`, and what the thread would do is left to the caller: simulations take turns.
    pub fn without_thread(
        mut db: Box<dyn Db>,
        clock: Clock,
        options: LedgerOptions,
        on_event: impl Fn(&Event) + Send + 'static,
    ) -> Result<(Self, Desk), DbError> {
        super::schema::migrate(&mut *db)?;
        let (sender, jobs) = channel();
        let outbox = Outbox(sender);
        let desk = Desk::join(db, outbox.clone(), jobs, clock, options, Box::new(on_event))?;
        Ok((Self { outbox, openings: Arc::default() }, desk))
    }

    /// Admits a request: its lease once the hold is durable.
    pub async fn open(&self, opening: Opening) -> Result<Lease, LedgerError> {
        let before = self.openings.fetch_add(1, Ordering::AcqRel);
        let guard = Counted(self.openings.clone());
        if before >= OPENINGS_MAX {
            return Err(LedgerError::Busy(before));
        }
        let (reply, answer) = oneshot::channel();
        self.outbox.send(Job::Open { opening: Box::new(opening), reply });
        let opened = answer.await;
        drop(guard);
        opened.map_err(|_| LedgerError::ended())?
    }

    /// Runs `work` in a transaction, perhaps more than once; the answer comes when it is durable.
    pub async fn run<T: Send + 'static>(
        &self,
        mut work: impl FnMut(&mut Book<'_>) -> Result<T, DbError> + Send + 'static,
    ) -> Result<T, LedgerError> {
        let (reply, answer) = oneshot::channel();
        let value = Arc::new(std::sync::Mutex::new(None));
        let slot = value.clone();
        let work = Box::new(move |book: &mut Book<'_>| {
            let found = work(book)?;
            *slot.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(found);
            Ok(())
        });
        let done = Box::new(move |outcome: Result<(), String>| {
            let found = value.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).take();
            let answered = outcome.and_then(|()| found.ok_or_else(|| "no answer".to_owned()));
            // The one who asked may have left.
            let _ = reply.send(answered);
        });
        self.outbox.send(Job::Run { work, done });
        match answer.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(LedgerError::Unavailable(error)),
            Err(_) => Err(LedgerError::ended()),
        }
    }

    /// Rolls ended requests up into daily sums once they are as old as this; see [`Book::roll_up`].
    pub fn retain(&self, retention: Duration) {
        self.outbox.send(Job::Retain(retention));
    }

    /// Notes the energy of ended requests, as soon as the database takes it. Never waits.
    pub fn note_energy(&self, rows: Vec<EnergyRow>) {
        for some in rows.chunks(ENERGY_ROWS_MAX) {
            self.outbox.send(Job::Energy(some.to_vec()));
        }
    }

    /// Ends the thread once everything sent before is done.
    pub fn stop(&self) {
        self.outbox.send(Job::Stop);
    }
}

/// Counts one down when dropped.
struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
