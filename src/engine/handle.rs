//! The door into an engine thread: bounded, never blocking, and shut while draining.

use std::sync::{
    Arc, RwLock,
    atomic::{AtomicBool, AtomicUsize, Ordering},
    mpsc::{SyncSender, TrySendError},
};

use tokio::sync::mpsc;

use crate::ledger::Lease;

use super::{
    Event, Submission,
    request::{GenerateRequest, StreamEvent, SubmitError},
    snapshot::EngineSnapshot,
};

/// Told to a client whose request found the queue full.
const RETRY_AFTER_S: u64 = 1;

/// Clones share one engine.
#[derive(Clone)]
pub struct EngineHandle {
    pub(super) inbox: SyncSender<Event>,
    pub(super) shared: Arc<Shared>,
}

/// What both sides see. No lock is held longer than a copy.
pub(super) struct Shared {
    pub snapshot: RwLock<Arc<EngineSnapshot>>,
    /// Requests submitted and not yet in the batch.
    pub waiting: AtomicUsize,
    pub waiting_max: usize,
    /// Longest prompt plus output.
    pub context_tokens_max: usize,
    pub choices_max: usize,
    pub stream_events: usize,
    pub draining: AtomicBool,
    pub alive: AtomicBool,
}

impl EngineHandle {
    /// Queues a request, which charges to `lease`. Dropping the returned stream aborts it within one
    /// step; a refusal drops the lease, which gives back what it holds.
    pub fn submit(
        &self,
        request: GenerateRequest,
        lease: Lease,
    ) -> Result<RequestStream, SubmitError> {
        let shared = &*self.shared;
        if !shared.alive.load(Ordering::Acquire) {
            return Err(SubmitError::Stopped);
        }
        if shared.draining.load(Ordering::Acquire) {
            return Err(SubmitError::Draining);
        }
        let tokens = request.prompt.len() + request.stop.max_tokens as usize;
        if tokens > shared.context_tokens_max || request.prompt.is_empty() {
            return Err(SubmitError::TooLong { tokens, max: shared.context_tokens_max });
        }
        let choices = request.choices as usize;
        if choices > shared.choices_max {
            return Err(SubmitError::TooManyChoices { choices, max: shared.choices_max });
        }
        let waiting = shared.waiting.fetch_add(1, Ordering::AcqRel);
        let refuse = |error| {
            shared.waiting.fetch_sub(1, Ordering::AcqRel);
            Err(error)
        };
        if waiting >= shared.waiting_max {
            return refuse(SubmitError::QueueFull { waiting, retry_after_s: RETRY_AFTER_S });
        }
        let (events, receiver) = mpsc::channel(shared.stream_events.max(8 * choices + 8));
        match self.inbox.try_send(Event::Submit(Box::new(Submission { request, lease, events }))) {
            Ok(()) => Ok(RequestStream { events: receiver }),
            Err(TrySendError::Full(_)) => {
                refuse(SubmitError::QueueFull { waiting, retry_after_s: RETRY_AFTER_S })
            }
            Err(TrySendError::Disconnected(_)) => refuse(SubmitError::Stopped),
        }
    }

    /// The latest snapshot.
    pub fn snapshot(&self) -> Arc<EngineSnapshot> {
        self.shared.snapshot.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Whether the engine thread is alive and takes work.
    pub fn is_ready(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire) && !self.shared.draining.load(Ordering::Acquire)
    }

    /// Whether the engine thread is running; false after a failed step.
    pub fn is_alive(&self) -> bool {
        self.shared.alive.load(Ordering::Acquire)
    }

    /// Turns new requests away; running ones go on.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
    }

    /// Ends every request with an error its client can read.
    pub fn abort_all(&self) {
        self.drain();
        // A dead engine has nothing to abort; a full inbox is emptied by the engine every step.
        let _ = self.inbox.send(Event::AbortAll);
    }

    /// Ends the thread.
    pub fn stop(&self) {
        self.drain();
        let _ = self.inbox.send(Event::Stop);
    }
}

/// The events of one request. Dropping it aborts the request.
pub struct RequestStream {
    pub(super) events: mpsc::Receiver<StreamEvent>,
}

impl RequestStream {
    /// The next event; `None` once `Done` or `Error` has been taken, or if the engine died.
    pub async fn next(&mut self) -> Option<StreamEvent> {
        self.events.recv().await
    }
}
