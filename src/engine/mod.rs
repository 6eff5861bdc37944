//! The engine thread: plan, run, commit.
//!
//! One OS thread owns the scheduler and the device. A step is three verbs: the scheduler plans,
//! the device runs, and the results are committed. With pipeline depth 2 the next step is launched
//! before the last one is committed.

pub mod books;
mod calibrate;
pub mod device;
pub mod device_bound;
mod ending;
pub mod handle;
pub mod inputs;
mod live;
pub mod metering;
pub mod output;
pub mod request;
mod run;
pub mod snapshot;
mod step;

pub use handle::{EngineHandle, RequestStream};
pub use live::ENOUGH_TOKENS;
pub use request::{
    GenerateRequest, OutputToken, RequestError, RequestUsage, SoFar, StopParams, StreamEvent,
    SubmitError,
};
pub use run::{EngineOptions, EngineThread, EngineWithoutThread, start};
pub use snapshot::EngineSnapshot;

use crate::ledger::Lease;

/// Everything that can reach an engine thread.
pub(crate) enum Event {
    Submit(Box<Submission>),
    /// End every request with [`RequestError::ShuttingDown`].
    AbortAll,
    /// Leave the loop; whatever is live ends as with `AbortAll`.
    Stop,
}

/// A request on its way in, and where its events go.
pub(crate) struct Submission {
    pub request: GenerateRequest,
    pub lease: Lease,
    pub events: tokio::sync::mpsc::Sender<StreamEvent>,
}
