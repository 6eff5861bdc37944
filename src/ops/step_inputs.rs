//! The one metadata layout of a step: prefill chunks and decodes of many sequences in one ragged
//! batch. Plain data, built by `engine::inputs`, read by every op on every device.

use serde::{Deserialize, Serialize};

/// `slot_mapping` of a padding row: it writes nothing to the KV cache.
pub const PAD_SLOT: i64 = -1;

/// `token_ids` of a row whose token is the one last sampled for its sequence and may not have
/// reached the host yet; it is read on the device from `sampled[last_token_slot[row]]`.
pub const TOKEN_FROM_DEVICE: u32 = u32::MAX;

/// A step over `T` token rows of `S` sequences.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepInputs {
    /// `[T]` token id of each row, or [`TOKEN_FROM_DEVICE`].
    pub token_ids: Vec<u32>,
    /// `[T]` the sequence's slot, used where `token_ids` is [`TOKEN_FROM_DEVICE`].
    pub last_token_slot: Vec<u32>,
    /// `[T]` absolute position of each row in its sequence, from 0.
    pub positions: Vec<u32>,
    /// `[T]` where the row's K and V go: `block_id * block_size + offset`, or [`PAD_SLOT`].
    pub slot_mapping: Vec<i64>,
    /// `[S + 1]` first row of each sequence; the last entry is `T`.
    pub cu_seqlens_q: Vec<u32>,
    /// `[S]` tokens in the KV cache of each sequence once this step has run.
    pub seq_lens: Vec<u32>,
    /// `[S, block_table_stride]` physical blocks of each sequence, zero padded.
    pub block_tables: Vec<u32>,
    pub block_table_stride: usize,
    /// `[R]` token rows whose logits are wanted, in the order the logits come out. A row may not
    /// repeat; several samples may be drawn from one row of logits.
    pub sample_rows: Vec<u32>,
    /// `[T]` LoRA adapter of each row; 0 is none.
    pub adapter_ids: Vec<u32>,
    /// Physical blocks copied, all layers, `(from, to)`, before anything else of the step runs.
    pub block_copies: Vec<(u32, u32)>,
}

impl StepInputs {
    /// `T`, the number of token rows.
    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// `S`, the number of sequences.
    pub fn seqs(&self) -> usize {
        self.seq_lens.len()
    }
}
