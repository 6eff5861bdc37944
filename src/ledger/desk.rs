//! What the ledger's thread does: takes what has come, does it in one transaction, answers when it is
//! durable.
//!
//! While one commit waits for the disk the next group gathers, so the group grows with the load and
//! nobody waits for a timer.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError},
    },
    time::Duration,
};

use super::{
    Book,
    book::{replica_of, transact, transact_asking},
    db::{Db, DbError, Row},
    job::{Answer, Closing, Job, Outbox, perform, present, revoked, subjects},
    lease::{Lease, Shared},
    rows::{Event, Opened},
    thread::{LedgerError, LedgerOptions},
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
/// How often a server says that it lives and looks for others that do not, at least.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Words a server has until its leases end, so that one that is lost does not end them.
const HEARTBEATS_PER_LIFE: u32 = 4;
/// How long jobs that must happen wait before the next try, once the database has failed.
const RETRY: Duration = Duration::from_millis(200);
/// How long a request that the database does not let be closed waits for its next try, alone, and how
/// many may wait so: an operator may mend the row meanwhile, and the next start gives up the others.
const REFUSED_RETRY: Duration = Duration::from_secs(60);
const REFUSED_MAX: usize = 1024;
/// How often a database that fails is spoken of.
const OUTAGE_SAID: Duration = Duration::from_secs(10);
/// How long a client waits for a bill that cannot be written.
const BILL_WAIT_MAX: Duration = Duration::from_secs(5);

/// What the thread works with.
pub struct Desk {
    db: Box<dyn Db>,
    /// For the leases it hands out.
    outbox: Outbox,
    jobs: Receiver<Job>,
    clock: Clock,
    options: Arc<LedgerOptions>,
    valid_until_ns: Arc<AtomicU64>,
    watched: HashMap<RequestId, (Option<KeyId>, Weak<Shared>)>,
    /// Of the last look at who is revoked.
    revision: i64,
    /// Jobs that must happen and could not yet.
    unsettled: VecDeque<Job>,
    /// Requests that could not be closed for what the database says of them, and when they are due.
    refused: VecDeque<(u64, Box<Closing>)>,
    outage: Option<Outage>,
    /// When it last said that it lives.
    beat_ns: u64,
    /// How long requests are kept, and when the next are due.
    roll_up: Option<(Duration, u64)>,
    on_event: OnEvent,
}

type OnEvent = Box<dyn Fn(&Event) + Send>;

/// A time in which the database fails.
struct Outage {
    since_ns: u64,
    say_ns: u64,
    jobs: usize,
}

impl Desk {
    /// Joins the database: gives up what servers that are gone left open.
    pub(super) fn join(
        db: Box<dyn Db>,
        outbox: Outbox,
        jobs: Receiver<Job>,
        clock: Clock,
        options: LedgerOptions,
        on_event: OnEvent,
    ) -> Result<Self, DbError> {
        let asked_ns = clock.now_ns();
        let mut desk = Self {
            db,
            outbox,
            jobs,
            clock,
            options: Arc::new(options),
            valid_until_ns: Arc::new(AtomicU64::new(0)),
            watched: HashMap::new(),
            revision: -1,
            unsettled: VecDeque::new(),
            refused: VecDeque::new(),
            outage: None,
            beat_ns: asked_ns,
            roll_up: None,
            on_event,
        };
        let options = desk.options.clone();
        let ttl_ns = options.replica_ttl.as_nanos() as i64;
        let (_, events) = transact(&mut *desk.db, |book| {
            let margin_ns = if options.exclusive { i64::MIN / 2 } else { 0 };
            for replica in book.expired_replicas(margin_ns)? {
                book.recover(&replica)?;
            }
            book.join(&options.replica, &options.name, ttl_ns)
        })?;
        desk.extend_validity(asked_ns);
        events.iter().for_each(|event| (desk.on_event)(event));
        Ok(desk)
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

    /// Takes turns until it is asked to stop, and signs off.
    pub(super) fn run(mut self) {
        let mut goes_on = true;
        while goes_on {
            let since = Duration::from_nanos(self.clock.now_ns().saturating_sub(self.beat_ns));
            let due = self.beat_every().saturating_sub(since);
            let wait = if self.unsettled.is_empty() { due } else { due.min(RETRY) };
            let wait = wait.min(self.roll_up_due());
            goes_on = match self.jobs.recv_timeout(wait) {
                Ok(job) => self.take(Some(job)),
                Err(RecvTimeoutError::Timeout) => self.take(None),
                Err(RecvTimeoutError::Disconnected) => false,
            };
        }
        self.leave();
    }

    /// Does what has come, without waiting for more. False once it was asked to stop.
    pub fn turn(&mut self) -> bool {
        self.take(None)
    }

    fn beat_every(&self) -> Duration {
        HEARTBEAT.min(self.life() / HEARTBEATS_PER_LIFE)
    }

    /// One group of jobs, `first` before those that wait.
    fn take(&mut self, first: Option<Job>) -> bool {
        let mut group: Vec<Job> = self.unsettled.drain(..).chain(first).collect();
        while group.len() < GROUP_MAX
            && let Ok(job) = self.jobs.try_recv()
        {
            group.push(job);
        }
        let goes_on = !group.iter().any(|job| matches!(job, Job::Stop));
        self.settle(group);
        let now_ns = self.clock.now_ns();
        while let Some((_, closing)) = self.refused.pop_front_if(|(due_ns, _)| *due_ns <= now_ns) {
            self.settle(vec![Job::Close(closing)]);
        }
        self.roll_up();
        let now_ns = self.clock.now_ns();
        if now_ns.saturating_sub(self.beat_ns) >= self.beat_every().as_nanos() as u64 {
            self.beat_ns = now_ns;
            self.beat();
        }
        goes_on
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
        let subjects = subjects(group);
        let first = [replica_of(&options.replica)].into_iter().chain(subjects.questions());
        let attempt = |book: &mut Book<'_>, found: Vec<Vec<Row>>| {
            let (presence, found) = found.split_at(1);
            // A hold must belong to a server that others know of, or nobody would give it back.
            let known = options.exclusive || present(book, options, &presence[0])?;
            book.read_ahead(&subjects, found)?;
            let answers = group.iter_mut().map(|job| perform(book, job, &options.replica));
            let answers = answers.collect::<Result<Vec<_>, _>>()?;
            let revision = book.revision();
            let revoked = if revision == seen { Vec::new() } else { revoked(book, watched)? };
            Ok((answers, revoked, revision, known))
        };
        let ((answers, revoked, revision, known), events) =
            transact_asking(&mut *self.db, first.collect(), attempt)?;
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
                Job::Close(closing) if error.is_of_one_job() => self.refuse(closing),
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

    /// It is tried again later, and apart: one that fails makes every group with it fail first.
    fn refuse(&mut self, mut closing: Box<Closing>) {
        if let Some(closed) = closing.closed.take() {
            closed(None);
        }
        let request = &closing.request;
        tracing::error!(%request, "a request could not be closed, so what it holds stays held");
        if self.refused.len() < REFUSED_MAX {
            let due_ns = self.clock.now_ns().saturating_add(REFUSED_RETRY.as_nanos() as u64);
            self.refused.push_back((due_ns, closing));
        }
    }

    /// Says that this server lives, gives up those that do not, and hears of revocations.
    fn beat(&mut self) {
        let options = self.options.clone();
        let asked_ns = self.clock.now_ns();
        let (watched, seen) = (&self.watched, self.revision);
        let first = vec![replica_of(&options.replica)];
        let beaten = transact_asking(&mut *self.db, first, |book, found| {
            let known = present(book, &options, &found[0])?;
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
    pub fn leave(mut self) {
        let rest: Vec<Job> = self.unsettled.drain(..).chain(self.jobs.try_iter()).collect();
        self.settle(rest);
        for (_, closing) in std::mem::take(&mut self.refused) {
            self.settle(vec![Job::Close(closing)]);
        }
        let replica = self.options.replica.clone();
        if let Err(error) = transact(&mut *self.db, |book| book.recover(&replica)) {
            tracing::error!(%error, "the ledger was left with open holds; the next start gives them up");
        }
    }
}
