//! Ids and units. A number that means something has a type here; units are last in names.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// Declares ids that are names: cheap to clone, compared as text.
macro_rules! names {
    ($($(#[$doc:meta])* $name:ident,)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub Arc<str>);

        impl $name {
            pub fn new(name: impl AsRef<str>) -> Self {
                Self(Arc::from(name.as_ref()))
            }

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )*};
}

names! {
    /// The name a model is served under; engine handles are keyed by it.
    ModelId,
    /// One HTTP request; appears in `x-request-id`, in the log and in answers.
    RequestId,
    /// An organisation: what tenants belong to.
    OrgId,
    /// Who pays.
    TenantId,
    /// A credential of a tenant; not the secret itself.
    KeyId,
}

/// One sequence inside an engine: a choice of a request. Never reused within a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub u64);

/// A physical KV block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub u32);

/// A seat in the running batch: indexes what the device keeps per sequence (last sampled token,
/// penalty counts). A running sequence holds one slot from admission until it leaves the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// Which device a model replica computes on, as the operator names it: `cpu`, `cuda:0`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub Arc<str>);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Money, in billionths of a US dollar. No float ever touches money.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
pub struct NanoUsd(pub i128);

/// A token id of a model's vocabulary.
pub type TokenId = u32;

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model's end token or a stop token id.
    Eos,
    /// A stop string appeared.
    StopString,
    /// `max_tokens`, or the context was full.
    Length,
    /// The client went away, stalled, or the server drained.
    Abort,
    /// The step failed.
    Error,
}

impl FinishReason {
    /// The label OpenAI uses.
    pub fn as_openai(self) -> &'static str {
        match self {
            Self::Eos | Self::StopString => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
            Self::Error => "error",
        }
    }
}
