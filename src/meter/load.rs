//! What a step asks of the device, in the three quantities its time depends on.

use std::ops::{Add, AddAssign};

use crate::types::SeqId;

/// Work that costs device time, without the fixed part of a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Rows of the forward: each passes every weight once.
    pub new_tokens: u64,
    /// KV entries read by decodes, which are bound by memory.
    pub decode_kv_tokens: u64,
    /// Query-key pairs of prefill chunks, which are bound by arithmetic.
    pub prefill_qk_pairs: u64,
}

impl Load {
    /// Rows `first .. first + rows` of a chunk of `chunk` rows. A row at position `p` sees `p + 1`
    /// keys, or `window` where the model's attention slides. A chunk of one row is a decode.
    fn rows(first: u32, rows: u32, chunk: u32, window: Option<u32>) -> Self {
        let keys = keys_seen(first, rows, window);
        let (decode_kv_tokens, prefill_qk_pairs) = if chunk == 1 { (keys, 0) } else { (0, keys) };
        Self { new_tokens: rows.into(), decode_kv_tokens, prefill_qk_pairs }
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl Add for Load {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            new_tokens: self.new_tokens.saturating_add(other.new_tokens),
            decode_kv_tokens: self.decode_kv_tokens.saturating_add(other.decode_kv_tokens),
            prefill_qk_pairs: self.prefill_qk_pairs.saturating_add(other.prefill_qk_pairs),
        }
    }
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// `sum(min(p + 1, window))` over positions `first .. first + rows`, saturating.
fn keys_seen(first: u32, rows: u32, window: Option<u32>) -> u64 {
    let (first, rows) = (u128::from(first), u128::from(rows));
    let window = window.map_or(u128::MAX, u128::from);
    // Rows that still see everything before them: those with `p + 1 <= window`.
    let whole = window.saturating_sub(first).min(rows);
    let triangle = whole * first + whole * (whole + 1) / 2;
    let capped = rows - whole;
    let keys = if capped == 0 { triangle } else { triangle + capped * window };
    u64::try_from(keys).unwrap_or(u64::MAX)
}

/// The rows of one sequence in a step, by who pays for them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeqWork {
    pub seq: SeqId,
    /// Paid for by the sequence's owner.
    pub useful: Load,
    /// Computed before, lost to a preemption: the operator's.
    pub recomputed: Load,
    /// Computed past a finish, stop, cap or disconnect and thrown away: the operator's.
    pub discarded: Load,
}

impl SeqWork {
    /// Rows `first .. first + rows`, all useful. `window` is the model's sliding window.
    pub fn new(seq: SeqId, first: u32, rows: u32, window: Option<u32>) -> Self {
        Self::divided(seq, first, [0, rows, 0], window)
    }

    /// Consecutive rows from `first`: so many recomputed, then useful, then discarded.
    pub fn divided(seq: SeqId, first: u32, rows: [u32; 3], window: Option<u32>) -> Self {
        let [again, useful, lost] = rows;
        let chunk = again.saturating_add(useful).saturating_add(lost);
        let useful_first = first.saturating_add(again);
        let lost_first = useful_first.saturating_add(useful);
        Self {
            seq,
            recomputed: Load::rows(first, again, chunk, window),
            useful: Load::rows(useful_first, useful, chunk, window),
            discarded: Load::rows(lost_first, lost, chunk, window),
        }
    }

    /// The same rows, thrown away: what a sequence computed in a step that ran past its end.
    pub fn into_discarded(self) -> Self {
        let discarded = self.useful + self.discarded;
        Self { useful: Load::default(), discarded, ..self }
    }

    pub fn load(&self) -> Load {
        self.recomputed + self.useful + self.discarded
    }
}

/// One step over a ragged batch. The order of sequences does not matter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepWork {
    pub seqs: Vec<SeqWork>,
    /// Rows that only fill up a batch bucket: they pass the weights and see no key.
    pub padding_tokens: u64,
}

impl StepWork {
    pub fn load(&self) -> Load {
        let padding = Load { new_tokens: self.padding_tokens, ..Load::default() };
        self.seqs.iter().fold(padding, |sum, seq| sum + seq.load())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(first: u32, rows: u32, window: Option<u32>) {
        let limit = window.map_or(u64::MAX, u64::from);
        let slow: u64 =
            (0..rows).map(|row| (u64::from(first) + u64::from(row) + 1).min(limit)).sum();
        assert_eq!(keys_seen(first, rows, window), slow, "{first}+{rows} in {window:?}");
    }

    #[test]
    fn keys_seen_is_the_sum_over_rows() {
        for first in [0, 1, 7, 100] {
            for rows in [0, 1, 2, 9, 50] {
                for window in [None, Some(0), Some(1), Some(8), Some(9), Some(107), Some(1000)] {
                    check(first, rows, window);
                }
            }
        }
    }

    #[test]
    fn absurd_sizes_saturate() {
        assert_eq!(keys_seen(u32::MAX, u32::MAX, Some(1)), u64::from(u32::MAX));
        let all = SeqWork::divided(SeqId(0), u32::MAX, [u32::MAX; 3], None).load();
        assert_eq!(all.prefill_qk_pairs, u64::MAX);
    }

    #[test]
    fn a_divided_chunk_adds_up_to_the_whole() {
        let whole = SeqWork::new(SeqId(1), 5, 12, Some(9));
        let parts = SeqWork::divided(SeqId(1), 5, [4, 7, 1], Some(9));
        assert_eq!(parts.load(), whole.load());
        assert_eq!(parts.discarded.decode_kv_tokens, 0, "one row of a chunk is no decode");
        assert_eq!(parts.into_discarded().useful, Load::default());
        assert_eq!(parts.into_discarded().load(), whole.load());
    }

    #[test]
    fn a_single_row_is_a_decode() {
        let one = SeqWork::new(SeqId(1), 41, 1, None).load();
        let expected = Load { new_tokens: 1, decode_kv_tokens: 42, prefill_qk_pairs: 0 };
        assert_eq!(one, expected);
        assert!(SeqWork::new(SeqId(1), 41, 0, None).load().is_empty());
    }
}
