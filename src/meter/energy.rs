//! Energy: from readings of a counter to windows, and from a window to its rows.

use super::{Energy, apportion::apportion};

/// A longer silence between readings is a gap: its total is known, its course is not.
const GAP_NS: u64 = 5_000_000_000;
/// A window this busy, one in so many, says what a busy device draws.
const BUSY_SHARE_MIN: u64 = 10;
/// How fast the powers follow, in windows.
const POWER_WINDOWS: i128 = 8;
/// `mW * ns` in a microjoule.
const MW_NS_PER_UJ: u128 = 1_000_000;

/// A running total of what a device drew since some start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnergyReading {
    /// On the clock of the account.
    pub at_ns: u64,
    pub total_uj: u64,
    /// The part of `total_uj` that its source did not measure.
    pub estimated_uj: u64,
}

/// What the device drew between two readings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub from_ns: u64,
    pub to_ns: u64,
    pub uj: u64,
    pub estimated: bool,
}

/// The newest reading and the power that led to it.
#[derive(Clone, Debug, Default)]
pub(super) struct Readings {
    last: Option<EnergyReading>,
    power_mw: u64,
}

impl Readings {
    /// The time up to which energy is known.
    pub fn until_ns(&self) -> Option<u64> {
        self.last.map(|last| last.at_ns)
    }

    /// The span that a reading ends; the first only begins one. A reading that is not newer than
    /// the last says nothing. A total that fell was reset: the span is bridged at the last known
    /// power and counts as estimated.
    pub fn next(&mut self, reading: EnergyReading) -> Option<Span> {
        let Some(last) = self.last else {
            self.last = Some(reading);
            return None;
        };
        if reading.at_ns <= last.at_ns {
            return None;
        }
        self.last = Some(reading);
        let elapsed_ns = reading.at_ns - last.at_ns;
        let span =
            |uj, estimated| Some(Span { from_ns: last.at_ns, to_ns: reading.at_ns, uj, estimated });
        let Some(uj) = reading.total_uj.checked_sub(last.total_uj) else {
            return span(energy_uj(self.power_mw, elapsed_ns), true);
        };
        self.power_mw = power_mw(uj, elapsed_ns);
        span(uj, elapsed_ns > GAP_NS || reading.estimated_uj != last.estimated_uj)
    }
}

/// What the device draws when it does nothing, and when it works; unknown until seen.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Powers {
    pub idle_mw: Option<u64>,
    pub busy_mw: Option<u64>,
    /// Between the last two readings, whatever it did: better than nothing until the others are seen.
    pub last_mw: Option<u64>,
}

impl Powers {
    /// From a settled window. An idle one counts when the one before was idle too.
    pub fn learn(
        &mut self,
        busy_uj: u64,
        busy_ns: u64,
        all_uj: u64,
        wall_ns: u64,
        after_idle: bool,
    ) {
        if busy_ns == 0 && after_idle {
            follow(&mut self.idle_mw, power_mw(all_uj, wall_ns));
        } else if busy_ns > wall_ns / BUSY_SHARE_MIN {
            follow(&mut self.busy_mw, power_mw(busy_uj, busy_ns));
        }
    }

    pub fn is_known(&self) -> bool {
        self.of_work_mw().is_some()
    }

    fn of_work_mw(&self) -> Option<u64> {
        self.busy_mw.or(self.idle_mw).or(self.last_mw)
    }

    /// What a window with these times, idle last, probably drew.
    pub fn estimate_uj(&self, times_ns: &[u64]) -> Option<u64> {
        let (idle_ns, busy_ns) = times_ns.split_last()?;
        let idle_mw = self.idle_mw.or(self.busy_mw)?;
        let busy_mw = self.busy_mw.or(self.idle_mw)?;
        Some(energy_uj(idle_mw, *idle_ns) + energy_uj(busy_mw, busy_ns.iter().sum()))
    }

    /// What `busy_ns` of device time probably drew.
    pub fn estimate_busy(&self, busy_ns: u64) -> Energy {
        Energy::new(energy_uj(self.of_work_mw().unwrap_or(0), busy_ns), true)
    }
}

fn follow(power_mw: &mut Option<u64>, seen_mw: u64) {
    let known = power_mw.unwrap_or(seen_mw);
    let step = (i128::from(seen_mw) - i128::from(known)) / POWER_WINDOWS;
    *power_mw = Some((i128::from(known) + step).clamp(0, u64::MAX.into()) as u64);
}

/// Divides `uj` over the rows of a window, idle last: to idle what an idle device draws in that
/// time, but never more than its share of the time; the rest by device time. All of it to idle
/// where nothing ran. The parts sum to `uj`.
pub(super) fn divide_energy(uj: u64, idle_mw: Option<u64>, times_ns: &[u64]) -> Vec<u64> {
    let Some((idle_ns, busy_ns)) = times_ns.split_last() else { return Vec::new() };
    let wall_ns: u128 = times_ns.iter().map(|ns| u128::from(*ns)).sum();
    let fair_uj = (u128::from(uj) * u128::from(*idle_ns) / wall_ns.max(1)) as u64;
    let idle_uj = if busy_ns.iter().all(|ns| *ns == 0) {
        uj
    } else {
        idle_mw.map_or(fair_uj, |mw| energy_uj(mw, *idle_ns).min(fair_uj))
    };
    let weights: Vec<_> = busy_ns.iter().map(|ns| (*ns, ())).collect();
    let mut parts = apportion(uj - idle_uj, &weights);
    parts.push(idle_uj);
    parts
}

fn energy_uj(power_mw: u64, ns: u64) -> u64 {
    let uj = u128::from(power_mw) * u128::from(ns) / MW_NS_PER_UJ;
    u64::try_from(uj).unwrap_or(u64::MAX)
}

pub(super) fn power_mw(uj: u64, ns: u64) -> u64 {
    let mw = u128::from(uj) * MW_NS_PER_UJ / u128::from(ns.max(1));
    u64::try_from(mw).unwrap_or(u64::MAX)
}

/// A request's device time by window, until the energy of those windows is settled. One entry for
/// each window that the request computed in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EnergyClaim(Vec<(u64, u64)>);

impl EnergyClaim {
    /// Adds device time in a window, as [`super::Account::record_step`] reported it.
    pub fn add(&mut self, window: u64, device_ns: u64) {
        match self.0.iter_mut().rev().find(|(known, _)| *known == window) {
            Some((_, known_ns)) => *known_ns += device_ns,
            None if device_ns > 0 => self.0.push((window, device_ns)),
            None => {}
        }
    }

    /// All that was added.
    pub fn device_ns(&self) -> u64 {
        self.0.iter().map(|(_, ns)| ns).sum()
    }

    pub(super) fn windows(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(at_s: u64, total_uj: u64, estimated_uj: u64) -> EnergyReading {
        EnergyReading { at_ns: at_s * 1_000_000_000, total_uj, estimated_uj }
    }

    /// Feeds readings; what each span drew, and whether it is estimated.
    fn check(readings: &[EnergyReading], expected: &[(u64, bool)]) {
        let mut known = Readings::default();
        let spans: Vec<_> = readings.iter().filter_map(|reading| known.next(*reading)).collect();
        let drawn: Vec<_> = spans.iter().map(|span| (span.uj, span.estimated)).collect();
        assert_eq!(drawn, expected, "{readings:?}");
        assert!(spans.windows(2).all(|pair| pair[0].to_ns == pair[1].from_ns), "{spans:?}");
    }

    #[test]
    fn spans_between_readings() {
        check(&[], &[]);
        check(&[reading(1, 500, 0)], &[]);
        check(&[reading(1, 500, 0), reading(2, 800, 0)], &[(300, false)]);
        // Not newer: ignored, also when its total is absurd.
        check(
            &[reading(2, 5, 0), reading(2, 9, 0), reading(1, 0, 0), reading(3, 6, 0)],
            &[(1, false)],
        );
        // Reset before any power is known, and after 3 J/s.
        check(&[reading(1, 500, 0), reading(2, 100, 0)], &[(0, true)]);
        let reset =
            [reading(1, 0, 0), reading(2, 3_000_000, 0), reading(4, 7, 0), reading(5, 9, 0)];
        check(&reset, &[(3_000_000, false), (6_000_000, true), (2, false)]);
        // A gap keeps its total; a source that estimated says so.
        check(&[reading(1, 0, 0), reading(9, 40, 0)], &[(40, true)]);
        check(
            &[reading(1, 0, 0), reading(2, 40, 30), reading(3, 50, 30)],
            &[(40, true), (10, false)],
        );
    }

    fn check_division(uj: u64, idle_mw: Option<u64>, times_ns: &[u64], expected: &[u64]) {
        let parts = divide_energy(uj, idle_mw, times_ns);
        assert_eq!(parts, expected, "{uj} uJ at {idle_mw:?} over {times_ns:?}");
        assert!(times_ns.is_empty() || parts.iter().sum::<u64>() == uj);
    }

    #[test]
    fn idle_draws_its_power_and_work_the_rest() {
        const S: u64 = 1_000_000_000;
        check_division(
            100_000_000,
            Some(20_000),
            &[S / 4, S / 4, S / 2],
            &[45_000_000, 45_000_000, 10_000_000],
        );
        // An idle power that is too high takes no more than its time.
        check_division(100, Some(u64::MAX), &[S / 4, S / 4, S / 2], &[25, 25, 50]);
        check_division(100, None, &[S / 4, S / 4, S / 2], &[25, 25, 50]);
        check_division(100, Some(1), &[0, 0, S], &[0, 0, 100]);
        check_division(100, Some(u64::MAX), &[S, 0, 0], &[100, 0, 0]);
        check_division(7, None, &[0, 0, 0], &[0, 0, 7]);
        check_division(7, None, &[], &[]);
    }

    #[test]
    fn powers_follow_what_windows_show() {
        let mut powers = Powers::default();
        assert_eq!(powers.estimate_uj(&[5, 5]), None, "nothing known, nothing guessed");
        powers.learn(0, 0, 70_000_000, 1_000_000_000, false);
        assert_eq!(powers.idle_mw, None, "the device may still be coming down");
        powers.learn(0, 0, 70_000_000, 1_000_000_000, true);
        assert_eq!(powers.idle_mw, Some(70_000));
        powers.learn(0, 0, 78_000_000, 1_000_000_000, true);
        assert_eq!(powers.idle_mw, Some(71_000));
        powers.learn(9_000_000, 50_000_000, 0, 1_000_000_000, true);
        assert_eq!(powers.busy_mw, None, "a twentieth of a window says little");
        powers.learn(250_000_000, 500_000_000, 0, 1_000_000_000, true);
        assert_eq!(powers.busy_mw, Some(500_000));
        assert_eq!(powers.estimate_uj(&[500_000_000, 500_000_000]), Some(285_500_000));
        assert_eq!(powers.estimate_busy(2_000_000), Energy::new(1_000_000, true));
    }
}
