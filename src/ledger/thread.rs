//! The ledger's thread: takes what has come, does it in one transaction, answers when it is durable.
//!
//! While one commit waits for the disk the next group gathers, so the group grows with the load and
//! nobody waits for a timer.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use thiserror::Error;
use tokio::sync::oneshot;

use super::{
    Book,
    book::transact,
    db::{Db, DbError},
    job::{Answer, Closing, Job, Outbox, perform, present, revoked},
    lease::{Lease, LeaseLimits, Shared},
    rows::{EnergyRow, Event, Opened, Opening, Refusal},
};
use crate::{
    clock::Clock,
    types::{KeyId, RequestId},
};

/// Jobs of one transaction.
const GROUP_MAX: usize = 256;
/// Requests rolled up in one transaction, between jobs: admission waits for no more than that.
const ROLL_UP_MAX: i64 = 64;
/// How long the thread is free for others between two of them, and looks for more once all are done.
const ROLL_UP_PAUSE: Duration = Duration::from_millis(20);
const ROLL_UP_EVERY: Duration = Duration::from_secs(600);
/// Rows of energy in one job, so that admission never waits for many.
const ENERGY_ROWS_MAX: usize = 64;
/// Requests that may wait for admission.
const OPENINGS_MAX: usize = 4096;
/// How often a server says that it lives and looks for others that do not, at least.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Words a server has until its leases end, so that one that is lost does not end them.
const HEARTBEATS_PER_LIFE: u32 = 4;
/// How long jobs that must happen wait before the next try, once the database has failed.
const RETRY: Duration = Duration::from_millis(200);
/// How often a database that fails is spoken of.
const OUTAGE_SAID: Duration = Duration::from_secs(10);
/// How long a client waits for a bill that cannot be written.
const BILL_WAIT_MAX: Duration = Duration::from_secs(5);

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
        mut db: Box<dyn Db>,
        clock: Clock,
        options: LedgerOptions,
        on_event: impl Fn(&Event) + Send + 'static,
    ) -> Result<LedgerThread, DbError> {
        super::schema::migrate(&mut *db)?;
        let (sender, jobs) = channel();
        let mut desk = Desk {
            db,
            outbox: Outbox(sender.clone()),
            clock,
            options: Arc::new(options),
            valid_until_ns: Arc::new(AtomicU64::new(0)),
            watched: HashMap::new(),
            revision: -1,
            unsettled: VecDeque::new(),
            outage: None,
            roll_up: None,
            on_event: Box::new(on_event),
        };
        desk.join()?;
        let thread = std::thread::Builder::new().name("candela-ledger".into());
        let thread = thread.spawn(move || desk.run(&jobs));
        let thread = thread.map_err(|error| DbError::Unavailable(error.to_string()))?;
        let ledger = Self { outbox: Outbox(sender), openings: Arc::default() };
        Ok(LedgerThread { ledger, thread })
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

/// What the thread works with.
struct Desk {
    db: Box<dyn Db>,
    /// For the leases it hands out.
    outbox: Outbox,
    clock: Clock,
    options: Arc<LedgerOptions>,
    valid_until_ns: Arc<AtomicU64>,
    watched: HashMap<RequestId, (Option<KeyId>, Weak<Shared>)>,
    /// Of the last look at who is revoked.
    revision: i64,
    /// Jobs that must happen and could not yet.
    unsettled: VecDeque<Job>,
    outage: Option<Outage>,
    /// How long requests are kept, and when the next are due.
    roll_up: Option<(Duration, u64)>,
    on_event: Box<dyn Fn(&Event) + Send>,
}

/// A time in which the database fails.
struct Outage {
    since_ns: u64,
    say_ns: u64,
    jobs: usize,
}

impl Desk {
    fn join(&mut self) -> Result<(), DbError> {
        let options = self.options.clone();
        let ttl_ns = options.replica_ttl.as_nanos() as i64;
        let asked_ns = self.clock.now_ns();
        let (_, events) = transact(&mut *self.db, |book| {
            let margin_ns = if options.exclusive { i64::MIN / 2 } else { 0 };
            for replica in book.expired_replicas(margin_ns)? {
                book.recover(&replica)?;
            }
            book.join(&options.replica, &options.name, ttl_ns)
        })?;
        self.extend_validity(asked_ns);
        events.iter().for_each(|event| (self.on_event)(event));
        Ok(())
    }

    /// How long leases may be used after the last word to the database.
    fn life(&self) -> Duration {
        self.options.replica_ttl.saturating_sub(self.options.clock_error_max)
    }

    /// Leases may be used until the database's clock could give this server up.
    fn extend_validity(&self, asked_ns: u64) {
        let span = self.life();
        let until_ns = match self.options.exclusive {
            true => u64::MAX,
            false => asked_ns.saturating_add(span.as_nanos() as u64),
        };
        self.valid_until_ns.store(until_ns, Ordering::Release);
    }

    fn run(&mut self, jobs: &Receiver<Job>) {
        let beat_every = HEARTBEAT.min(self.life() / HEARTBEATS_PER_LIFE);
        let mut beat_ns = self.clock.now_ns();
        let mut stopping = false;
        while !stopping {
            let since = Duration::from_nanos(self.clock.now_ns().saturating_sub(beat_ns));
            let due = beat_every.saturating_sub(since);
            let wait = if self.unsettled.is_empty() { due } else { due.min(RETRY) };
            let wait = wait.min(self.roll_up_due());
            let mut group: Vec<Job> = self.unsettled.drain(..).collect();
            match jobs.recv_timeout(wait) {
                Ok(job) => group.push(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => stopping = true,
            }
            while group.len() < GROUP_MAX
                && let Ok(job) = jobs.try_recv()
            {
                group.push(job);
            }
            stopping |= group.iter().any(|job| matches!(job, Job::Stop));
            self.settle(group);
            self.roll_up();
            let now_ns = self.clock.now_ns();
            if now_ns.saturating_sub(beat_ns) >= beat_every.as_nanos() as u64 {
                beat_ns = now_ns;
                self.beat();
            }
        }
        self.leave(jobs);
    }

    /// How long until requests are to be rolled up.
    fn roll_up_due(&self) -> Duration {
        let now_ns = self.clock.now_ns();
        let due = |(_, at_ns): (_, u64)| Duration::from_nanos(at_ns.saturating_sub(now_ns));
        self.roll_up.map_or(Duration::MAX, due)
    }

    /// Rolls some requests up, if it is time.
    fn roll_up(&mut self) {
        let Some((retention, _)) = self.roll_up else { return };
        if !self.roll_up_due().is_zero() {
            return;
        }
        let retention_ns = i64::try_from(retention.as_nanos()).unwrap_or(i64::MAX);
        let rolled = transact(&mut *self.db, |book| book.roll_up(retention_ns, ROLL_UP_MAX));
        let pause = match rolled {
            Ok((rolled, _)) if rolled >= ROLL_UP_MAX as u64 => ROLL_UP_PAUSE,
            Ok(_) => ROLL_UP_EVERY,
            Err(error) => {
                self.down(&error, 0);
                ROLL_UP_EVERY
            }
        };
        let at_ns = self.clock.now_ns().saturating_add(pause.as_nanos() as u64);
        self.roll_up = Some((retention, at_ns));
    }

    /// Everything at once; one by one where that fails for a reason of one of them.
    fn settle(&mut self, group: Vec<Job>) {
        let mut group = group;
        group.retain(|job| match job {
            Job::Retain(retention) => {
                self.roll_up = Some((*retention, self.clock.now_ns()));
                false
            }
            job => !matches!(job, Job::Stop),
        });
        if group.is_empty() {
            return;
        }
        match self.attempt(&mut group) {
            Ok(answers) => self.answer(group, answers),
            Err(error) if group.len() > 1 && error.is_of_one_job() => {
                for job in group {
                    let mut alone = vec![job];
                    match self.attempt(&mut alone) {
                        Ok(answers) => self.answer(alone, answers),
                        Err(error) => self.failed(alone, &error),
                    }
                }
            }
            Err(error) => self.failed(group, &error),
        }
    }

    fn attempt(&mut self, group: &mut [Job]) -> Result<Vec<Answer>, DbError> {
        let (watched, seen, options) = (&self.watched, self.revision, &self.options);
        let asked_ns = self.clock.now_ns();
        let ((answers, revoked, revision, known), events) = transact(&mut *self.db, |book| {
            // A hold must belong to a server that others know of, or nobody would give it back.
            let known = options.exclusive || present(book, options)?;
            let answers = group.iter_mut().map(|job| perform(book, job, &options.replica));
            let answers = answers.collect::<Result<Vec<_>, _>>()?;
            let revision = book.revision();
            let revoked = if revision == seen { Vec::new() } else { revoked(book, watched)? };
            Ok((answers, revoked, revision, known))
        })?;
        self.heard(asked_ns, known);
        self.revision = revision;
        revoked.iter().for_each(|shared| shared.revoke());
        events.iter().for_each(|event| (self.on_event)(event));
        for job in group.iter() {
            if let Job::Close(closing) = job {
                self.watched.remove(&closing.request);
            }
        }
        Ok(answers)
    }

    /// Tells what is durable now.
    fn answer(&mut self, group: Vec<Job>, answers: Vec<Answer>) {
        for (job, answer) in group.into_iter().zip(answers) {
            match (job, answer) {
                (Job::Run { done, .. }, _) => done(Ok(())),
                (Job::Open { opening, reply }, Answer::Opened(opened)) => {
                    let lease = (*opened).map(|opened| self.lease(opening.request, opened));
                    // Where the client has left meanwhile, dropping the lease closes the request.
                    let _ = reply.send(lease.map_err(LedgerError::Refused));
                }
                (Job::Extend { asked, shared }, Answer::Grant(grant)) => {
                    shared.answer(grant.granted, grant.denied, asked.used.output);
                }
                (Job::Close(closing), Answer::Bill(bill)) => {
                    if let Some(closed) = closing.closed {
                        closed(bill);
                    }
                }
                _ => {}
            }
        }
    }

    fn lease(&mut self, request: RequestId, opened: Opened) -> Lease {
        let shared = Arc::new(Shared::new(opened.granted, self.valid_until_ns.clone()));
        let watch = (opened.chain.key.clone(), Arc::downgrade(&shared));
        self.watched.insert(request.clone(), watch);
        let (outbox, clock) = (self.outbox.clone(), self.clock.clone());
        Lease::new(request, opened, shared, outbox, clock, self.options.lease)
    }

    /// Nothing of `group` happened.
    fn failed(&mut self, group: Vec<Job>, error: &DbError) {
        if error.is_of_one_job() {
            tracing::error!(%error, jobs = group.len(), "the ledger did not take a job");
        } else {
            self.down(error, group.len());
        }
        for job in group {
            match job {
                Job::Run { done, .. } => done(Err(error.to_string())),
                Job::Open { opening, reply } => {
                    if matches!(error, DbError::Uncertain(_)) {
                        self.unsettled.push_back(Job::Forget(opening.request.clone()));
                    }
                    let _ = reply.send(Err(LedgerError::Unavailable(error.to_string())));
                }
                Job::Extend { shared, .. } => shared.unanswered(),
                Job::Close(closing) => self.keep(closing),
                // Rows that the database does not take are not tried for ever.
                Job::Energy(_) if error.is_of_one_job() => {}
                Job::Forget(_) | Job::Energy(_) => self.unsettled.push_back(job),
                Job::Stop | Job::Retain(_) => {}
            }
        }
    }

    /// It is tried until it is done; its client is told without a bill when that takes too long.
    fn keep(&mut self, mut closing: Box<Closing>) {
        let now_ns = self.clock.now_ns();
        let since_ns = *closing.since_ns.get_or_insert(now_ns);
        if now_ns.saturating_sub(since_ns) >= BILL_WAIT_MAX.as_nanos() as u64
            && let Some(closed) = closing.closed.take()
        {
            closed(None);
        }
        self.unsettled.push_back(Job::Close(closing));
    }

    /// Says that this server lives, gives up those that do not, and hears of revocations.
    fn beat(&mut self) {
        let options = self.options.clone();
        let asked_ns = self.clock.now_ns();
        let (watched, seen) = (&self.watched, self.revision);
        let beaten = transact(&mut *self.db, |book| {
            let known = present(book, &options)?;
            for replica in book.expired_replicas(0)? {
                if replica != options.replica {
                    book.recover(&replica)?;
                }
            }
            let revision = book.revision();
            let revoked = if revision == seen { Vec::new() } else { revoked(book, watched)? };
            Ok((revoked, revision, known))
        });
        match beaten {
            Ok(((revoked, revision, known), events)) => {
                self.heard(asked_ns, known);
                self.revision = revision;
                revoked.iter().for_each(|shared| shared.revoke());
                events.iter().for_each(|event| (self.on_event)(event));
            }
            Err(error) => self.down(&error, 0),
        }
        self.watched.retain(|_, (_, shared)| shared.strong_count() > 0);
    }

    /// The database answered a word of `asked_ns`. Where it did not know this server any more, the
    /// leases of before are not valid again: their holds were given back.
    fn heard(&mut self, asked_ns: u64, known: bool) {
        if let Some(outage) = self.outage.take() {
            let seconds = self.clock.now_ns().saturating_sub(outage.since_ns) / 1_000_000_000;
            tracing::info!(seconds, jobs = outage.jobs, "the ledger is written again");
        }
        if !known {
            tracing::error!("the ledger had given this server up: its running requests end");
            let leases = self.watched.values().filter_map(|(_, shared)| shared.upgrade());
            leases.for_each(|shared| shared.lose());
        }
        self.extend_validity(asked_ns);
    }

    /// Says that the database fails, at first and then now and then.
    fn down(&mut self, error: &DbError, jobs: usize) {
        let now_ns = self.clock.now_ns();
        let begun = || Outage { since_ns: now_ns, say_ns: now_ns, jobs: 0 };
        let outage = self.outage.get_or_insert_with(begun);
        outage.jobs += jobs;
        if now_ns >= outage.say_ns {
            outage.say_ns = now_ns.saturating_add(OUTAGE_SAID.as_nanos() as u64);
            tracing::error!(%error, jobs = outage.jobs, "the ledger could not be written");
        }
    }

    /// Closes what is still to be closed and signs off.
    fn leave(&mut self, jobs: &Receiver<Job>) {
        let rest: Vec<Job> = self.unsettled.drain(..).chain(jobs.try_iter()).collect();
        self.settle(rest);
        let replica = self.options.replica.clone();
        if let Err(error) = transact(&mut *self.db, |book| book.recover(&replica)) {
            tracing::error!(%error, "the ledger was left with open holds; the next start gives them up");
        }
    }
}
