//! One window of an account: every nanosecond and microjoule of it has a row.

use std::{cmp::Reverse, collections::BTreeMap};

use super::{
    Energy, Overhead, Owner, Usage,
    apportion::apportion,
    energy::{Powers, divide_energy},
};

/// How often a window may fill up with owners before it is cut down to the largest again.
const OPEN_OWNERS_FACTOR: usize = 4;

/// What a row of a window is about.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Slot<'a> {
    Owner(&'a Owner),
    /// Owners beyond the bound, together.
    Other,
    Overhead(Overhead),
    /// Other processes on the device.
    Foreign,
    Idle,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Window {
    owners: BTreeMap<Owner, Usage>,
    other: Usage,
    overhead: [Usage; Overhead::ALL.len()],
    /// As claimed by samples, which may be more than there is room for.
    foreign: Usage,
    /// Its time is the remainder and not kept.
    idle: Usage,
    /// What the device drew in the part of the window that readings cover.
    pub drawn_uj: u64,
    pub drawn_estimated: bool,
    settled: Option<Settled>,
}

/// What was divided when the window's energy was settled.
#[derive(Clone, Copy, Debug)]
struct Settled {
    busy_uj: u64,
    busy_ns: u64,
    estimated: bool,
}

impl Window {
    /// The row of an owner. At most four times `owners_max` are kept while the window is written.
    pub fn owner(&mut self, owner: &Owner, owners_max: usize) -> &mut Usage {
        let full = self.owners.len() >= OPEN_OWNERS_FACTOR * owners_max;
        if full && !self.owners.contains_key(owner) {
            self.keep_largest(owners_max);
        }
        self.owners.entry(owner.clone()).or_default()
    }

    pub fn overhead(&mut self, kind: Overhead) -> &mut Usage {
        &mut self.overhead[kind as usize]
    }

    pub fn foreign(&mut self) -> &mut Usage {
        &mut self.foreign
    }

    /// Merges all but the largest owners into one row; nothing is lost.
    pub fn keep_largest(&mut self, owners_max: usize) {
        if self.owners.len() <= owners_max {
            return;
        }
        let mut rows: Vec<_> = std::mem::take(&mut self.owners).into_iter().collect();
        // Stable, so that equal owners are kept in the order of their names.
        rows.sort_by_key(|(_, usage)| Reverse((usage.device_ns, usage.kv_block_ns)));
        rows.drain(owners_max..).for_each(|(_, usage)| self.other += usage);
        self.owners = rows.into_iter().collect();
    }

    pub fn is_settled(&self) -> bool {
        self.settled.is_some()
    }

    /// Every row, with times that sum to `wall_ns`. Foreign time gets what is left by ours, idle
    /// the rest. Steps of two models on one device may overlap; if that makes more than there is,
    /// all are scaled down.
    fn rows(&self, wall_ns: u64) -> Vec<(Slot<'_>, Usage)> {
        let owners = self.owners.iter().map(|(owner, usage)| (Slot::Owner(owner), *usage));
        let mut rows: Vec<_> = owners.collect();
        rows.push((Slot::Other, self.other));
        let overhead = Overhead::ALL.into_iter().zip(&self.overhead);
        rows.extend(overhead.map(|(kind, usage)| (Slot::Overhead(kind), *usage)));
        let busy_ns: u64 = rows.iter().map(|(_, usage)| usage.device_ns).sum();
        if busy_ns > wall_ns {
            let weights: Vec<_> = rows.iter().map(|(_, usage)| (usage.device_ns, ())).collect();
            let scaled = apportion(wall_ns, &weights);
            rows.iter_mut().zip(scaled).for_each(|((_, usage), ns)| usage.device_ns = ns);
        }
        let left_ns = wall_ns.saturating_sub(busy_ns);
        let foreign_ns = self.foreign.device_ns.min(left_ns);
        rows.push((Slot::Foreign, Usage { device_ns: foreign_ns, ..self.foreign }));
        rows.push((Slot::Idle, Usage { device_ns: left_ns - foreign_ns, ..self.idle }));
        rows
    }

    /// Every row with its energy: as settled, or else estimated at the powers known so far.
    pub fn report(&self, wall_ns: u64, powers: &Powers) -> Vec<(Slot<'_>, Usage)> {
        let mut rows = self.rows(wall_ns);
        if self.settled.is_none() {
            let times_ns = times(&rows);
            if let Some(uj) = powers.estimate_uj(&times_ns) {
                let parts = divide_energy(uj, powers.idle_mw, &times_ns);
                let estimates = parts.into_iter().map(|uj| Energy::new(uj, true));
                rows.iter_mut().zip(estimates).for_each(|((_, row), energy)| row.energy = energy);
            }
        }
        rows
    }

    /// Divides what the device drew over the rows, for good, and learns the device's powers.
    /// `after_idle`: the window before had no work either, so that clocks have come down.
    pub fn settle(&mut self, wall_ns: u64, powers: &mut Powers, after_idle: bool) {
        let times_ns = times(&self.rows(wall_ns));
        let parts = divide_energy(self.drawn_uj, powers.idle_mw, &times_ns);
        let estimated = self.drawn_estimated;
        let owners = self.owners.values_mut();
        let named = owners.chain([&mut self.other]).chain(&mut self.overhead);
        let all = named.chain([&mut self.foreign, &mut self.idle]);
        all.zip(&parts).for_each(|(usage, uj)| usage.energy += Energy::new(*uj, estimated));
        let (idle_uj, idle_ns) = (parts[parts.len() - 1], times_ns[times_ns.len() - 1]);
        let (busy_uj, busy_ns) = (self.drawn_uj - idle_uj, wall_ns - idle_ns);
        // Where steps overlap more was told than there is, and claims are on what was told.
        let told_ns = self.told_ns().max(busy_ns);
        self.settled = Some(Settled { busy_uj, busy_ns: told_ns, estimated });
        if !estimated {
            powers.learn(busy_uj, busy_ns, self.drawn_uj, wall_ns, after_idle);
        }
    }

    /// Whether nothing of ours or of others ran.
    pub fn is_idle(&self) -> bool {
        self.told_ns() == 0 && self.foreign.device_ns == 0
    }

    /// Device time of ours, as steps told it.
    fn told_ns(&self) -> u64 {
        let ours = self.owners.values().chain([&self.other]).chain(&self.overhead);
        ours.map(|usage| usage.device_ns).sum()
    }

    /// The part of the settled energy that falls to `device_ns` of this window's busy time, rounded
    /// down so that claims never sum to more than there is.
    pub fn claim(&self, device_ns: u64) -> Option<Energy> {
        let Settled { busy_uj, busy_ns, estimated } = self.settled?;
        let share = u128::from(busy_uj) * u128::from(device_ns) / u128::from(busy_ns.max(1));
        Some(Energy::new(share.min(busy_uj.into()) as u64, estimated))
    }
}

fn times(rows: &[(Slot<'_>, Usage)]) -> Vec<u64> {
    rows.iter().map(|(_, usage)| usage.device_ns).collect()
}
