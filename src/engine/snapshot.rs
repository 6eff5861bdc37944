//! What the engine tells everyone else, replaced as a whole after every step.

use super::device_bound::DeviceBound;
use crate::types::FinishReason;

/// Gauges now and counters since start. Reading one never waits for the engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EngineSnapshot {
    /// Requests in the queue, not yet admitted to the batch.
    pub waiting_requests: usize,
    /// Sequences in the batch.
    pub running_seqs: usize,
    pub kv_blocks_total: usize,
    pub kv_blocks_used: usize,
    /// Sequences that hold state of any kind: waiting, running or finishing.
    pub live_seqs: usize,
    pub steps: u64,
    pub prompt_tokens: u64,
    pub generation_tokens: u64,
    /// Sequences whose blocks were taken away and recomputed.
    pub preemptions: u64,
    /// Tokens computed again after a preemption.
    pub recomputed_tokens: u64,
    /// Sampled past a finish, stop or disconnect and thrown away.
    pub discarded_tokens: u64,
    pub finished_eos: u64,
    pub finished_stop: u64,
    pub finished_length: u64,
    pub finished_abort: u64,
    pub finished_error: u64,
    /// Time the device spent in steps.
    pub device_busy_ns: u64,
    /// Device time of requests billed by it that was not held, and so is not charged.
    pub device_written_off_ns: u64,
    /// What a request may be charged at most; `None` before the first step.
    pub device_bound: Option<DeviceBound>,
}

impl EngineSnapshot {
    /// The counter of choices that ended for `reason`.
    pub(super) fn finished(&mut self, reason: FinishReason) -> &mut u64 {
        match reason {
            FinishReason::Eos => &mut self.finished_eos,
            FinishReason::StopString => &mut self.finished_stop,
            FinishReason::Length => &mut self.finished_length,
            FinishReason::Abort => &mut self.finished_abort,
            FinishReason::Error => &mut self.finished_error,
        }
    }
}
