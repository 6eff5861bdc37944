//! The engine thread: plan, run, commit.

pub mod handle;
pub mod request;
pub mod snapshot;

pub use handle::{EngineHandle, RequestStream};
pub use request::{
    GenerateRequest, OutputToken, RequestError, RequestUsage, StopParams, StreamEvent, SubmitError,
};
pub use snapshot::EngineSnapshot;

/// Everything that can reach an engine thread.
pub(crate) enum Event {
    Submit(Box<(GenerateRequest, tokio::sync::mpsc::Sender<StreamEvent>)>),
}
