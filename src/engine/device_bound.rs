//! The most device time that work may be charged, where device time is what is billed.
//!
//! Plain numbers of the step model as it is now, so that admission can ask without the engine.

use crate::{
    meter::{SeqWork, StepBound, StepWork},
    types::SeqId,
};

/// Times the bound of input and first tokens, in percent, for what is held at admission: until the
/// request runs the device may slow down, and its prompt may be cut into more chunks.
const HOLD_PERCENT: u64 = 125;

/// Bounds on one request of one model on one device. Each is the sum of bounds of single steps,
/// which [`crate::meter::BOUND_SHARE`] of steps stay under; a sequence alone in its step takes at
/// least what it takes among others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceBound {
    pub step: StepBound,
    /// The model's sliding window.
    pub window: Option<u32>,
    /// Longest chunk of a prompt, and of one whose tokens are scored.
    pub chunk_tokens: usize,
    pub scored_chunk_tokens: usize,
}

impl DeviceBound {
    /// What is to be held at admission: the whole input and one token of each choice.
    pub fn opening_ns(&self, input_tokens: usize, choices: u32, scored: bool) -> u64 {
        let tokens_ns = u64::from(choices).saturating_mul(self.token_ns(input_tokens));
        let least_ns = self.input_ns(0, input_tokens, scored).saturating_add(tokens_ns);
        least_ns.saturating_mul(HOLD_PERCENT) / 100
    }

    /// With the longest output.
    pub fn worst_ns(
        &self,
        input_tokens: usize,
        output_tokens: u32,
        choices: u32,
        scored: bool,
    ) -> u64 {
        let longest_ns = self.token_ns(input_tokens + output_tokens as usize);
        let tokens = u64::from(output_tokens).saturating_mul(choices.into());
        let input_ns = self.input_ns(0, input_tokens, scored);
        let worst_ns = input_ns.saturating_add(tokens.saturating_mul(longest_ns));
        worst_ns.saturating_mul(HOLD_PERCENT) / 100
    }

    /// Prompt tokens `first .. end`, in the longest chunks.
    pub fn input_ns(&self, first: usize, end: usize, scored: bool) -> u64 {
        let chunk = if scored { self.scored_chunk_tokens } else { self.chunk_tokens }.max(1);
        let chunks = (first..end).step_by(chunk).map(|first| {
            let rows = chunk.min(end - first);
            self.seq_ns(SeqWork::new(SeqId(0), first as u32, rows as u32, self.window))
        });
        chunks.fold(0, u64::saturating_add)
    }

    /// One more token of a sequence with `context` tokens.
    pub fn token_ns(&self, context: usize) -> u64 {
        self.seq_ns(SeqWork::new(SeqId(0), context as u32, 1, self.window))
    }

    /// One sequence's rows of a step.
    pub fn seq_ns(&self, alone: SeqWork) -> u64 {
        self.step.step_ns(&StepWork { seqs: vec![alone], padding_tokens: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meter::{Coefficients, StepModel};

    #[test]
    fn bounds_add_up_by_chunk_and_token() {
        // 1000 a step, 10 a token, 1 a key: and eight times that, as no step is known.
        let model = StepModel::new(Coefficients::new([1000.0, 10.0, 1.0, 1.0]).expect("sane"));
        let bound = DeviceBound {
            step: model.bound(),
            window: None,
            chunk_tokens: 8,
            scored_chunk_tokens: 4,
        };
        assert_eq!(bound.token_ns(9), 8 * (1000 + 10 + 10));
        let chunk = |rows: u64, keys: u64| 8 * (1000 + 10 * rows + keys);
        assert_eq!(bound.input_ns(0, 8, false), chunk(8, 36));
        assert_eq!(bound.input_ns(0, 12, false), chunk(8, 36) + chunk(4, 42));
        assert_eq!(bound.input_ns(8, 12, false), chunk(4, 42));
        assert_eq!(bound.input_ns(0, 8, true), chunk(4, 10) + chunk(4, 26));
        assert_eq!(bound.input_ns(12, 12, false), 0);
        let least = bound.input_ns(0, 12, false) + 2 * bound.token_ns(12);
        assert_eq!(bound.opening_ns(12, 2, false), least * 5 / 4);
        let worst = bound.input_ns(0, 12, false) + 6 * bound.token_ns(15);
        assert_eq!(bound.worst_ns(12, 3, 2, false), worst * 5 / 4);
        assert!(bound.worst_ns(12, 1, 1, false) >= bound.opening_ns(12, 1, false));
    }
}
