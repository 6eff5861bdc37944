//! What runs a step. A device is launched with plain data and answers in the order of launches.

use crate::{
    ops::StepInputs,
    sampling::{SamplingParams, TokenLogprobs},
    types::{SlotId, TokenId},
};

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod gpu;
pub mod gpus;

pub use cpu::CpuDevice;
pub use gpu::{GpuDevice, GpuSpec};

/// Everything a device needs for one step, in the order it happens.
#[derive(Clone, Debug, Default)]
pub struct DeviceStep {
    /// Seats that get a new occupant before anything is drawn.
    pub begins: Vec<SlotBegin>,
    pub inputs: StepInputs,
    /// Tokens to draw.
    pub samples: Vec<SampleSpec>,
    /// Prompt tokens whose log-probability is wanted.
    pub scores: Vec<ScoreSpec>,
}

/// A sequence takes a seat.
#[derive(Clone, Debug)]
pub struct SlotBegin {
    pub slot: SlotId,
    pub params: SamplingParams,
    pub choice: u32,
    pub prompt: Vec<TokenId>,
    /// Drawn before, when the sequence returns from a preemption.
    pub output: Vec<TokenId>,
}

/// Draw a token for `slot` from row `logits_row` of the step's logits.
#[derive(Clone, Debug)]
pub struct SampleSpec {
    pub logits_row: u32,
    pub slot: SlotId,
    pub position: u32,
    /// Tokens that may not be drawn.
    pub banned: Vec<TokenId>,
}

/// The log-probability of `token` under row `logits_row`.
#[derive(Clone, Copy, Debug)]
pub struct ScoreSpec {
    pub logits_row: u32,
    pub token: TokenId,
    pub top: u32,
}

/// What a step produced, in the order it was asked for.
#[derive(Clone, Debug, Default)]
pub struct DeviceOutcome {
    pub sampled: Vec<(TokenId, Option<TokenLogprobs>)>,
    pub scores: Vec<TokenLogprobs>,
    /// Time the device spent in the step.
    pub device_ns: u64,
}

/// The step failed; nothing of it counts.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// A device with its model. `collect` returns the outcome of the oldest launch not yet collected.
pub trait Device {
    fn launch(&mut self, step: DeviceStep) -> Result<(), DeviceError>;
    fn collect(&mut self) -> Result<DeviceOutcome, DeviceError>;
    /// What NVML and CUDA call this device, where it is a GPU; ordinals differ between the two.
    fn gpu_uuid(&self) -> Option<String> {
        None
    }
}
