//! One step's device time, divided over the sequences in it.

use crate::types::SeqId;

use super::{Coefficients, Load, Overhead, SeqWork, StepWork, apportion::apportion};

/// The largest weight of a step, as an integer: a billionth is resolved, and times the nanoseconds
/// of a step of seconds it fits 64 bits.
const WEIGHT_MAX: f64 = (1u64 << 30) as f64;

/// What one sequence used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeqShare {
    pub seq: SeqId,
    /// The owner's.
    pub useful_ns: u64,
    /// The operator's: see [`super::SeqWork`].
    pub recomputed_ns: u64,
    pub discarded_ns: u64,
}

/// A step's whole time: sequences, in the order of the step, and padding.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    pub seqs: Vec<SeqShare>,
    pub padding_ns: u64,
}

impl Split {
    /// The `device_ns` that was split.
    pub fn total_ns(&self) -> u64 {
        let useful_ns: u64 = self.seqs.iter().map(|share| share.useful_ns).sum();
        useful_ns + self.overhead_ns().iter().sum::<u64>()
    }

    /// The operator's part, in the order of [`Overhead::ALL`].
    pub fn overhead_ns(&self) -> [u64; Overhead::ALL.len()] {
        let recomputed_ns = self.seqs.iter().map(|share| share.recomputed_ns).sum();
        let discarded_ns = self.seqs.iter().map(|share| share.discarded_ns).sum();
        [recomputed_ns, discarded_ns, 0, self.padding_ns]
    }
}

/// Divides `device_ns` in proportion to `w = fixed / n + a * new + b * kv + c * qk`. A sequence's
/// part of `fixed` follows its rows; padding has none. The shares sum to `device_ns` exactly and
/// do not depend on the order of the sequences (largest remainder; ties to padding, then to the
/// smallest id). Time of a step without a row is padding.
pub fn split(coefficients: &Coefficients, step: &StepWork, device_ns: u64) -> Split {
    let padding = Load { new_tokens: step.padding_tokens, ..Load::default() };
    let mut parts = vec![Part { weight: coefficients.load_ns(&padding), load: padding, of: None }];
    let working = step.seqs.iter().filter(|work| !work.load().is_empty()).count();
    let fixed_ns = coefficients.fixed_ns() / working.max(1) as f64;
    for (index, work) in step.seqs.iter().enumerate() {
        let rows = work.load().new_tokens.max(1) as f64;
        let kinds = [work.useful, work.recomputed, work.discarded];
        for (kind, load) in kinds.into_iter().enumerate().filter(|(_, load)| !load.is_empty()) {
            let weight = fixed_ns * load.new_tokens as f64 / rows + coefficients.load_ns(&load);
            parts.push(Part { weight, load, of: Some((work.seq, kind, index)) });
        }
    }
    let mut times_ns = vec![[0; 3]; step.seqs.len()];
    let mut padding_ns = 0;
    for (part, ns) in parts.iter().zip(apportion(device_ns, &whole_weights(&parts))) {
        match part.of {
            Some((_, kind, index)) => times_ns[index][kind] = ns,
            None => padding_ns = ns,
        }
    }
    let share = |(work, [useful_ns, recomputed_ns, discarded_ns]): (&SeqWork, [u64; 3])| SeqShare {
        seq: work.seq,
        useful_ns,
        recomputed_ns,
        discarded_ns,
    };
    let split = Split { seqs: step.seqs.iter().zip(times_ns).map(share).collect(), padding_ns };
    assert_eq!(split.total_ns(), device_ns, "a split loses and makes nothing");
    split
}

/// What gets a share of its own.
struct Part {
    weight: f64,
    load: Load,
    of: PartOf,
}

/// The sequence, the kind of its work, and its place in the step; `None` is padding.
type PartOf = Option<(SeqId, usize, usize)>;

/// Weights as integers, the largest at [`WEIGHT_MAX`]; rows where the coefficients say nothing.
/// Each depends on the others through the largest alone, hence not on their order. With them what
/// decides a tie, padding first.
fn whole_weights(parts: &[Part]) -> Vec<(u64, PartOf)> {
    let largest = parts.iter().map(|part| part.weight).fold(0.0, f64::max);
    let no_rows = parts.iter().all(|part| part.load.new_tokens == 0);
    let whole = |part: &Part| {
        let weight = if no_rows {
            u64::from(part.of.is_none())
        } else if largest > 0.0 {
            (part.weight / largest * WEIGHT_MAX).round() as u64
        } else {
            part.load.new_tokens
        };
        (weight, part.of)
    };
    parts.iter().map(whole).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn coefficients(terms_ns: [f64; 4]) -> Coefficients {
        Coefficients::new(terms_ns).expect("sane coefficients")
    }

    fn decode(seq: u64, position: u32) -> SeqWork {
        SeqWork::new(SeqId(seq), position, 1, None)
    }

    fn check(terms_ns: [f64; 4], step: &StepWork, device_ns: u64, useful: &[u64], padding: u64) {
        let split = split(&coefficients(terms_ns), step, device_ns);
        let got: Vec<u64> = split.seqs.iter().map(|share| share.useful_ns).collect();
        assert_eq!((got.as_slice(), split.padding_ns), (useful, padding), "{step:?}");
    }

    #[test]
    fn shares_follow_the_formula() {
        let two = StepWork { seqs: vec![decode(1, 9), decode(2, 29)], padding_tokens: 0 };
        check([100.0, 0.0, 0.0, 0.0], &two, 101, &[51, 50], 0);
        check([0.0, 5.0, 0.0, 0.0], &two, 100, &[50, 50], 0);
        check([0.0, 0.0, 2.0, 0.0], &two, 100, &[25, 75], 0);
        check([40.0, 10.0, 1.0, 0.0], &two, 1000, &[400, 600], 0);
        let chunk = SeqWork::new(SeqId(3), 0, 4, None);
        let mixed = StepWork { seqs: vec![decode(1, 9), chunk], padding_tokens: 0 };
        check([0.0, 0.0, 1.0, 1.0], &mixed, 200, &[100, 100], 0);
    }

    #[test]
    fn padding_takes_its_rows_and_what_nobody_did() {
        let padded = StepWork { seqs: vec![decode(1, 0)], padding_tokens: 3 };
        check([0.0, 10.0, 0.0, 0.0], &padded, 100, &[25], 75);
        check([1e9, 0.0, 0.0, 0.0], &padded, 100, &[100], 0);
        check([0.0; 4], &padded, 100, &[25], 75);
        check([1.0; 4], &StepWork::default(), 7, &[], 7);
        let idle = SeqWork::new(SeqId(1), 5, 0, None);
        check([1.0; 4], &StepWork { seqs: vec![idle], padding_tokens: 0 }, 7, &[0], 7);
        let beside = StepWork { seqs: vec![idle, decode(2, 0)], padding_tokens: 0 };
        check([8.0, 1.0, 0.0, 0.0], &beside, 9, &[0, 9], 0);
    }

    #[test]
    fn work_done_twice_or_for_nothing_is_not_the_owners() {
        let again = SeqWork::divided(SeqId(1), 0, [6, 2, 0], None);
        let step = StepWork { seqs: vec![again, decode(2, 3).into_discarded()], padding_tokens: 0 };
        let split = split(&coefficients([80.0, 10.0, 0.0, 0.0]), &step, 1700);
        // Weights: 40 + 80 for the chunk, three quarters of it recomputed, and 40 + 10.
        let [chunk, lost] = split.seqs.as_slice() else { panic!("two shares: {split:?}") };
        assert_eq!((chunk.useful_ns, chunk.recomputed_ns, chunk.discarded_ns), (300, 900, 0));
        assert_eq!((lost.useful_ns, lost.recomputed_ns, lost.discarded_ns), (0, 0, 500));
    }

    fn any_step() -> impl Strategy<Value = StepWork> {
        let rows = || prop_oneof![Just(0u32), Just(1), 0u32..5000];
        let seq = (0u32..100_000, rows(), rows(), rows(), prop::option::of(1u32..4096));
        (prop::collection::vec(seq, 0..40), 0u64..64).prop_map(|(seqs, padding_tokens)| {
            let work = |(id, (first, again, useful, lost, window))| {
                SeqWork::divided(SeqId(id), first, [again, useful, lost], window)
            };
            StepWork { seqs: (0u64..).zip(seqs).map(work).collect(), padding_tokens }
        })
    }

    proptest! {
        #[test]
        fn every_nanosecond_goes_to_work_in_any_order(
            step in any_step(),
            device_ns: u64,
            terms_ns in prop::array::uniform4(prop_oneof![Just(0.0), 0.0f64..1e6, 0.0f64..1e12]),
            turn: prop::sample::Index,
        ) {
            let coefficients = coefficients(terms_ns);
            let straight = split(&coefficients, &step, device_ns);
            prop_assert_eq!(straight.total_ns(), device_ns);
            for (share, work) in straight.seqs.iter().zip(&step.seqs) {
                prop_assert!(share.useful_ns == 0 || !work.useful.is_empty());
                prop_assert!(share.recomputed_ns == 0 || !work.recomputed.is_empty());
                prop_assert!(share.discarded_ns == 0 || !work.discarded.is_empty());
            }
            if !step.seqs.is_empty() {
                let turn = turn.index(step.seqs.len());
                let mut turned = step.clone();
                turned.seqs.rotate_left(turn);
                let mut again = split(&coefficients, &turned, device_ns);
                again.seqs.rotate_right(turn);
                prop_assert_eq!(straight, again);
            }
        }
    }
}
