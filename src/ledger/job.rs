//! What the ledger's thread is asked to do, and how it does it.

use std::{
    collections::HashMap,
    sync::{Arc, Weak, mpsc::Sender},
    time::Duration,
};

use tokio::sync::oneshot;

use super::{
    Book,
    book::Subjects,
    db::{DbError, Row},
    lease::{Lease, Meterage, Shared},
    rows::{Bill, EndCause, EnergyRow, Extension, Grant, Opened, Opening, Refusal},
    thread::{LedgerError, LedgerOptions},
};
use crate::types::{KeyId, RequestId};

pub(super) type Closed = Box<dyn FnOnce(Option<Bill>) + Send>;

/// What engines send through: never waits.
#[derive(Clone)]
pub(super) struct Outbox(pub Sender<Job>);

pub(super) type Work = Box<dyn FnMut(&mut Book<'_>) -> Result<(), DbError> + Send>;
pub(super) type Done = Box<dyn FnOnce(Result<(), String>) + Send>;

pub(super) enum Job {
    Open {
        opening: Box<Opening>,
        reply: oneshot::Sender<Result<Lease, LedgerError>>,
    },
    /// Anything in one transaction. It may run more than once until it is committed.
    Run {
        work: Work,
        done: Done,
    },
    Extend {
        asked: Extension,
        shared: Arc<Shared>,
    },
    Close(Box<Closing>),
    /// Ended requests are kept so long before they are rolled up.
    Retain(Duration),
    /// Energy of ended requests.
    Energy(Vec<EnergyRow>),
    /// A request that may have been admitted, and whose client was told that it was not.
    Forget(RequestId),
    Stop,
}

/// A request to be closed.
pub(super) struct Closing {
    pub request: RequestId,
    pub counted: Meterage,
    pub cause: EndCause,
    pub closed: Option<Closed>,
    /// When it was first tried.
    pub since_ns: Option<u64>,
}

impl Outbox {
    /// A thread that is gone answers nothing: the lease runs out and its request ends.
    pub fn send(&self, job: Job) {
        let _ = self.0.send(job);
    }

    pub fn extend(&self, asked: Extension, shared: Arc<Shared>) {
        self.send(Job::Extend { asked, shared });
    }

    pub fn close(
        &self,
        request: RequestId,
        counted: Meterage,
        cause: EndCause,
        closed: Option<Closed>,
    ) {
        self.send(Job::Close(Box::new(Closing {
            request,
            counted,
            cause,
            closed,
            since_ns: None,
        })));
    }
}

/// Says that this server lives. False where the database did not know it any more. `found` is the
/// answer to [`replica_of`](super::book::replica_of).
pub(super) fn present(
    book: &mut Book<'_>,
    options: &LedgerOptions,
    found: &[Row],
) -> Result<bool, DbError> {
    let ttl_ns = options.replica_ttl.as_nanos() as i64;
    let known = book.heartbeat(&options.replica, ttl_ns, found)?;
    if !known {
        book.join(&options.replica, &options.name, ttl_ns)?;
    }
    Ok(known)
}

/// What a job led to, to be told once it is durable.
pub(super) enum Answer {
    None,
    Opened(Box<Result<Opened, Refusal>>),
    Grant(Grant),
    Bill(Option<Bill>),
}

/// What the jobs will ask for, to be read at once. Work of an operator may change it between them,
/// so then each reads for itself.
pub(super) fn subjects(group: &[Job]) -> Subjects {
    let mut found = Subjects::default();
    if group.iter().any(|job| matches!(job, Job::Run { .. })) {
        return found;
    }
    for job in group {
        match job {
            Job::Open { opening, .. } => found.opens(opening),
            Job::Extend { asked, .. } => found.extends(&asked.request),
            Job::Close(closing) => found.ends(&closing.request),
            Job::Forget(request) => found.ends(request),
            _ => {}
        }
    }
    found
}

pub(super) fn perform(
    book: &mut Book<'_>,
    job: &mut Job,
    replica: &str,
) -> Result<Answer, DbError> {
    Ok(match job {
        Job::Open { opening, .. } => Answer::Opened(Box::new(book.open(opening, replica)?)),
        Job::Run { work, .. } => {
            work(book)?;
            Answer::None
        }
        Job::Extend { asked, .. } => Answer::Grant(book.extend(asked)?),
        Job::Close(closing) => {
            let Closing { request, counted, cause, since_ns, .. } = &**closing;
            let bill = book.close(request, &counted.used, *cause, counted.steps)?;
            // An earlier try may have been done although its answer was lost.
            let bill = match bill {
                None if since_ns.is_some() => book.settled(request)?,
                bill => bill,
            };
            Answer::Bill(bill)
        }
        Job::Forget(request) => {
            book.forget(request)?;
            Answer::None
        }
        Job::Energy(rows) => {
            for row in rows {
                book.note_energy(row)?;
            }
            Answer::None
        }
        Job::Stop | Job::Retain(_) => Answer::None,
    })
}

/// Leases of watched requests whose key has ended.
pub(super) fn revoked(
    book: &mut Book<'_>,
    watched: &HashMap<RequestId, (Option<KeyId>, Weak<Shared>)>,
) -> Result<Vec<Arc<Shared>>, DbError> {
    let mut ended: HashMap<&KeyId, bool> = HashMap::new();
    let mut found = Vec::new();
    for (key, shared) in watched.values() {
        let Some(key) = key else { continue };
        let gone = match ended.get(key) {
            Some(gone) => *gone,
            None => {
                let gone = !book.key_is_valid(key)?;
                ended.insert(key, gone);
                gone
            }
        };
        if gone && let Some(shared) = shared.upgrade() {
            found.push(shared);
        }
    }
    Ok(found)
}
