//! How far the last steps were from their prediction, for a bound with a stated coverage.

use std::collections::VecDeque;

/// The share of steps that the bound holds for. The rest costs the operator the excess.
pub const BOUND_SHARE: f64 = 0.99;
/// Steps remembered: a change of the device's speed is in the bound after a hundredth of them.
const STEPS_MAX: usize = 1024;
/// Times the largest ratio seen, while too few steps are known to state a share.
const FEW_STEPS_FACTOR: f64 = 2.0;
/// Times the prediction, while no step is known.
const NO_STEPS_FACTOR: f64 = 8.0;

/// `measured / predicted` of the last steps of one kind.
#[derive(Clone, Debug, Default)]
pub(super) struct Residuals {
    arrived: VecDeque<f64>,
    sorted: Vec<f64>,
}

impl Residuals {
    /// Notes a step whose prediction was made before it was measured.
    pub fn push(&mut self, ratio: f64) {
        if self.arrived.len() == STEPS_MAX
            && let Some(oldest) = self.arrived.pop_front()
        {
            let at = self.sorted.partition_point(|other| other.total_cmp(&oldest).is_lt());
            self.sorted.remove(at);
        }
        let at = self.sorted.partition_point(|other| other.total_cmp(&ratio).is_lt());
        self.sorted.insert(at, ratio);
        self.arrived.push_back(ratio);
    }

    /// Whether [`Residuals::bound`] holds for the stated share of steps.
    pub fn is_stated(&self) -> bool {
        rank(self.sorted.len()) <= self.sorted.len()
    }

    /// The ratio that the next step stays under. Split conformal prediction (Vovk et al. 2005; Lei
    /// et al. 2018): among `n` exchangeable steps the next exceeds the one of rank
    /// `ceil((n + 1) * share)` with a probability of at most `1 - share`.
    pub fn bound(&self) -> f64 {
        match (self.sorted.get(rank(self.sorted.len()) - 1), self.sorted.last()) {
            (Some(ratio), _) => *ratio,
            (None, Some(largest)) => FEW_STEPS_FACTOR * largest.max(1.0),
            (None, None) => NO_STEPS_FACTOR,
        }
    }
}

fn rank(steps: usize) -> usize {
    ((steps + 1) as f64 * BOUND_SHARE).ceil() as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(ratios: impl Iterator<Item = f64>, bound: f64, stated: bool) {
        let mut residuals = Residuals::default();
        ratios.for_each(|ratio| residuals.push(ratio));
        assert_eq!((residuals.bound(), residuals.is_stated()), (bound, stated));
        assert_eq!(residuals.sorted.len(), residuals.arrived.len());
        assert!(residuals.sorted.is_sorted() && residuals.sorted.len() <= STEPS_MAX);
    }

    #[test]
    fn the_bound_is_an_order_statistic() {
        check([].into_iter(), NO_STEPS_FACTOR, false);
        check([0.5].into_iter(), FEW_STEPS_FACTOR, false);
        check([0.5, 3.0].into_iter(), 3.0 * FEW_STEPS_FACTOR, false);
        check((1..=98).map(f64::from), 98.0 * FEW_STEPS_FACTOR, false);
        check((1..=99).map(f64::from), 99.0, true);
        check((1..=999).rev().map(f64::from), 990.0, true);
        // The first steps are forgotten.
        check((0..STEPS_MAX).map(|_| 9.0).chain((0..STEPS_MAX).map(|_| 1.0)), 1.0, true);
    }
}
