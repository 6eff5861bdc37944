//! A running total of what one device drew.

use super::GpuSample;

/// Power integrated over a longer silence is an estimate.
const GAP_NS: u64 = 5_000_000_000;
/// A device that would have drawn more than this was reset, or its counter is broken.
const POWER_MW_MAX: u64 = 20_000_000;
/// `mW * ns` in a microjoule.
const MW_NS_PER_UJ: u128 = 1_000_000;

/// Since the monitor began; never falls, whatever the device's counter does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EnergyTotal {
    /// When the newest sample in it was taken.
    pub at_ns: u64,
    pub total_uj: u64,
    /// The part that is not measured: power across a reset or a gap.
    pub estimated_uj: u64,
    /// How often the counter fell or jumped.
    pub resets: u32,
}

/// What is needed to go on from the last sample.
#[derive(Clone, Debug, Default)]
pub(super) struct EnergyTally {
    pub total: EnergyTotal,
    last: Option<GpuSample>,
    /// Of the last span, for one that tells nothing.
    power_mw: u64,
}

impl EnergyTally {
    /// Adds what was drawn since the last sample. The first only begins.
    pub fn add(&mut self, sample: &GpuSample) {
        // The processes of a sample are not needed here, and are its only list.
        let kept = GpuSample { processes: None, ..*sample };
        let Some(last) = self.last.replace(kept) else {
            self.total.at_ns = sample.at_ns;
            return;
        };
        let Some(elapsed_ns) = sample.at_ns.checked_sub(last.at_ns).filter(|ns| *ns > 0) else {
            self.last = Some(last);
            return;
        };
        let counted = self.counted_uj(&last, sample, elapsed_ns);
        let integrated = mean_power_mw(&last, sample).map(|mw| energy_uj(mw, elapsed_ns));
        let has_counter = last.energy_mj.or(sample.energy_mj).is_some();
        let (uj, estimated) = match (counted, integrated) {
            (Some(uj), _) => (uj, false),
            (None, Some(uj)) => (uj, has_counter || elapsed_ns > GAP_NS),
            (None, None) => (energy_uj(self.power_mw, elapsed_ns), true),
        };
        self.power_mw = (u128::from(uj) * MW_NS_PER_UJ / u128::from(elapsed_ns)) as u64;
        self.total.at_ns = sample.at_ns;
        self.total.total_uj = self.total.total_uj.saturating_add(uj);
        if estimated {
            self.total.estimated_uj = self.total.estimated_uj.saturating_add(uj);
        }
    }

    /// By the counter, unless it fell or jumped.
    fn counted_uj(&mut self, last: &GpuSample, now: &GpuSample, elapsed_ns: u64) -> Option<u64> {
        let (before_mj, after_mj) = (last.energy_mj?, now.energy_mj?);
        let uj = after_mj.checked_sub(before_mj).and_then(|mj| mj.checked_mul(1000));
        // The counter is refreshed in steps of its own, so a short span may show two of them.
        let most_uj = energy_uj(POWER_MW_MAX, elapsed_ns.max(1_000_000_000));
        let plausible = uj.filter(|uj| *uj <= most_uj);
        self.total.resets += u32::from(plausible.is_none());
        plausible
    }
}

/// The mean of both ends (trapezoidal rule), or the end that is known.
fn mean_power_mw(last: &GpuSample, now: &GpuSample) -> Option<u64> {
    match (last.power_mw, now.power_mw) {
        (Some(before), Some(after)) => Some(before.midpoint(after)),
        (before, after) => before.or(after),
    }
}

fn energy_uj(power_mw: u64, ns: u64) -> u64 {
    let uj = u128::from(power_mw) * u128::from(ns) / MW_NS_PER_UJ;
    u64::try_from(uj).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: u64, power_mw: Option<u64>, energy_mj: Option<u64>) -> GpuSample {
        GpuSample { at_ns: ms * 1_000_000, power_mw, energy_mj, ..GpuSample::default() }
    }

    fn check(samples: &[GpuSample], total_uj: u64, estimated_uj: u64, resets: u32) {
        let mut tally = EnergyTally::default();
        let mut before = 0;
        for sample in samples {
            tally.add(sample);
            assert!(tally.total.total_uj >= before, "a total never falls");
            before = tally.total.total_uj;
        }
        let EnergyTotal { total_uj: total, estimated_uj: estimated, resets: seen, .. } =
            tally.total;
        assert_eq!((total, estimated, seen), (total_uj, estimated_uj, resets), "{samples:#?}");
    }

    #[test]
    fn a_counter_is_believed() {
        check(&[], 0, 0, 0);
        check(&[at(0, None, Some(900))], 0, 0, 0);
        check(&[at(0, Some(9), Some(900)), at(500, Some(9), Some(950))], 50_000, 0, 0);
        // A gap keeps its total.
        check(&[at(0, None, Some(1)), at(60_000, None, Some(3))], 2_000, 0, 0);
    }

    #[test]
    fn without_a_counter_power_is_integrated() {
        let samples = [at(0, Some(100_000), None), at(500, Some(300_000), None)];
        check(&samples, 100_000_000, 0, 0);
        let holes = [at(0, Some(100_000), None), at(500, None, None), at(1000, None, None)];
        check(&holes, 100_000_000, 50_000_000, 0);
        check(
            &[at(0, Some(1_000), None), at(10_000, Some(1_000), None)],
            10_000_000,
            10_000_000,
            0,
        );
        check(&[at(0, None, None), at(500, None, None)], 0, 0, 0);
    }

    #[test]
    fn a_reset_is_bridged_by_power() {
        let reset = [
            at(0, Some(100_000), Some(900)),
            at(500, Some(100_000), Some(950)),
            at(1000, Some(300_000), Some(7)),
            at(1500, Some(300_000), Some(9)),
        ];
        check(&reset, 50_000 + 100_000_000 + 2_000, 100_000_000, 1);
        // Without power, at that of the span before: 0.1 W for a second.
        let blind = [at(0, None, Some(900)), at(500, None, Some(950)), at(1500, None, Some(7))];
        check(&blind, 50_000 + 100_000, 100_000, 1);
        let jump = [at(0, Some(1_000), Some(0)), at(1000, Some(1_000), Some(u64::MAX))];
        check(&jump, 1_000_000, 1_000_000, 1);
        // The counter goes away and comes back.
        let away = [at(0, Some(2), Some(0)), at(1000, Some(2), None), at(2000, Some(2), Some(5))];
        check(&away, 4_000, 4_000, 0);
    }

    #[test]
    fn time_that_does_not_pass_draws_nothing() {
        let still =
            [at(500, Some(1_000), Some(1)), at(500, Some(1_000), Some(9)), at(400, None, Some(99))];
        check(&still, 0, 0, 0);
        let on = [still.as_slice(), &[at(1500, None, Some(2))]].concat();
        check(&on, 1_000, 0, 0);
    }
}
