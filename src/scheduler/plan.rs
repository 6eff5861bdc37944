//! A plan is plain data: print one and read it.

use crate::types::{BlockId, SeqId, SlotId};

/// What bounds a step.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Token rows of one step, over all sequences.
    pub step_tokens_max: usize,
    /// Sequences in the batch at once.
    pub running_seqs_max: usize,
    /// Rows of one step whose logits are computed.
    pub logits_rows_max: usize,
    /// Tokens in one KV block.
    pub block_tokens: usize,
}

/// One forward pass over a ragged batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    /// Sequences that entered the batch for this step.
    pub admitted: Vec<Admission>,
    /// Sequences that computed nothing yet but share a prefilled prompt, and their seats.
    pub forked: Vec<Admission>,
    /// Sequences that lost their blocks and wait again.
    pub preempted: Vec<SeqId>,
    /// Blocks to copy before the forward.
    pub copies: Vec<(BlockId, BlockId)>,
    pub seqs: Vec<PlannedSeq>,
}

/// A sequence and the seat it takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Admission {
    pub seq: SeqId,
    pub slot: SlotId,
}

/// The part of one sequence in a step: rows `first .. first + new_tokens`.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedSeq {
    pub seq: SeqId,
    pub first: usize,
    pub new_tokens: usize,
    /// Of these, how many were computed before, from the first on, and lost to a preemption.
    pub recomputed: usize,
    /// Who draws a token from the last row: nobody while a prompt is unfinished, the sequence
    /// itself, or every choice of a request that has just been prefilled.
    pub samples: Vec<SampleTarget>,
    /// Logits of every row are wanted, for the log-probabilities of the prompt.
    pub score: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SampleTarget {
    pub seq: SeqId,
    pub slot: SlotId,
    /// Absolute position of the drawn token.
    pub position: usize,
}

impl StepPlan {
    pub fn is_empty(&self) -> bool {
        self.seqs.is_empty()
    }

    pub fn tokens(&self) -> usize {
        self.seqs.iter().map(|planned| planned.new_tokens).sum()
    }
}
