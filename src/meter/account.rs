//! A device's time and energy over the last minutes.

use std::collections::VecDeque;

use super::{
    Energy, EnergyClaim, EnergyReading, Overhead, Owner, Tokens,
    apportion::apportion,
    energy::{Powers, Readings, power_mw},
    window::Window,
};

/// How finely and how long an account remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccountLimits {
    pub window_ns: u64,
    /// Windows in the ring: what is older is forgotten.
    pub windows_max: usize,
    /// Owners with a row of their own, in a window and in a report; the others share one.
    pub owners_max: usize,
}

impl Default for AccountLimits {
    /// Ten minutes of seconds.
    fn default() -> Self {
        Self { window_ns: 1_000_000_000, windows_max: 600, owners_max: 64 }
    }
}

/// A step that ran, as it is booked: its device time is the sum of its shares and ends at `end_ns`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceStep {
    pub end_ns: u64,
    /// Useful time; an owner may appear more than once.
    pub owned_ns: Vec<(Owner, u64)>,
    pub overhead_ns: [u64; Overhead::ALL.len()],
}

/// The part of a step that fell into one window.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StepPiece {
    pub window: u64,
    /// In the order of [`DeviceStep::owned_ns`].
    pub owned_ns: Vec<u64>,
}

/// The account of one device. Nothing is in it but what it is told, so it needs no clock; times are
/// those of the server's monotonic clock. It may be told in any order.
#[derive(Clone, Debug)]
pub struct Account {
    pub(super) limits: AccountLimits,
    pub(super) start_ns: u64,
    /// Windows `first ..`, counted from `start_ns`; later ones are idle so far.
    pub(super) first: u64,
    pub(super) ring: VecDeque<Window>,
    readings: Readings,
    /// The first window that readings cover from its beginning.
    energy_first: u64,
    /// The next window to settle.
    unsettled: u64,
    pub(super) powers: Powers,
    late_ns: u64,
}

impl Account {
    /// An account of time from `start_ns` on. Limits of nought count as one.
    pub fn new(start_ns: u64, limits: AccountLimits) -> Self {
        let AccountLimits { window_ns, windows_max, owners_max } = limits;
        let limits = AccountLimits {
            window_ns: window_ns.max(1),
            windows_max: windows_max.max(1),
            owners_max: owners_max.max(1),
        };
        Self {
            limits,
            start_ns,
            first: 0,
            ring: VecDeque::new(),
            readings: Readings::default(),
            energy_first: 0,
            unsettled: 0,
            powers: Powers::default(),
            late_ns: 0,
        }
    }

    /// Books a step. At the edge of a window it is cut so that every share and every window keeps
    /// its sum to the nanosecond. Returns the pieces whose energy is still to be settled.
    pub fn record_step(&mut self, step: &DeviceStep) -> Vec<StepPiece> {
        let owned = step.owned_ns.iter().map(|(_, ns)| *ns);
        let mut left: Vec<(u64, ())> = owned.chain(step.overhead_ns).map(|ns| (ns, ())).collect();
        let device_ns: u64 = left.iter().map(|(ns, ())| *ns).sum();
        let mut pieces = Vec::new();
        for (index, piece_ns) in self.cut(step.end_ns.saturating_sub(device_ns), step.end_ns) {
            let shares_ns = apportion(piece_ns, &left);
            left.iter_mut().zip(&shares_ns).for_each(|((ns, ()), share_ns)| *ns -= share_ns);
            let owners_max = self.limits.owners_max;
            let Some(window) = self.window_mut(index) else {
                self.late_ns += piece_ns;
                continue;
            };
            let (owned_ns, overhead_ns) = shares_ns.split_at(step.owned_ns.len());
            for ((owner, _), ns) in step.owned_ns.iter().zip(owned_ns).filter(|(_, ns)| **ns > 0) {
                window.owner(owner, owners_max).device_ns += ns;
            }
            for (kind, ns) in Overhead::ALL.into_iter().zip(overhead_ns) {
                window.overhead(kind).device_ns += ns;
            }
            if !window.is_settled() {
                pieces.push(StepPiece { window: index, owned_ns: owned_ns.to_vec() });
            }
        }
        pieces
    }

    /// Books tokens at the moment they were delivered, or read.
    pub fn record_tokens(&mut self, at_ns: u64, owner: &Owner, tokens: Tokens) {
        let (index, owners_max) = (self.index(at_ns), self.limits.owners_max);
        if let Some(window) = self.window_mut(index) {
            window.owner(owner, owners_max).tokens += tokens;
        }
    }

    /// Books `blocks` KV blocks, held from one moment to another.
    pub fn record_blocks(&mut self, from_ns: u64, to_ns: u64, owner: &Owner, blocks: u64) {
        let owners_max = self.limits.owners_max;
        for (index, ns) in self.cut(from_ns, to_ns) {
            if let Some(window) = self.window_mut(index) {
                let block_ns = u128::from(blocks) * u128::from(ns);
                window.owner(owner, owners_max).kv_block_ns += block_ns;
            }
        }
    }

    /// Books what other processes used of the device between two samples, in millionths. It takes
    /// from idle time alone, however much it claims.
    pub fn record_foreign(&mut self, from_ns: u64, to_ns: u64, share_ppm: u32) {
        for (index, ns) in self.cut(from_ns, to_ns) {
            let claimed = u128::from(ns) * u128::from(share_ppm.min(1_000_000)) / 1_000_000;
            if let Some(window) = self.window_mut(index) {
                window.foreign().device_ns += claimed as u64;
            }
        }
    }

    /// Notes a reading of the device's energy: spread evenly over the windows since the last one.
    pub fn record_energy(&mut self, reading: EnergyReading) {
        let first_reading = self.readings.until_ns().is_none();
        let span = self.readings.next(reading);
        if first_reading {
            let since_ns = reading.at_ns.saturating_sub(self.start_ns);
            self.energy_first = since_ns.div_ceil(self.limits.window_ns);
        }
        let Some(span) = span else { return };
        self.powers.last_mw = Some(power_mw(span.uj, span.to_ns - span.from_ns));
        let cut = self.cut(span.from_ns, span.to_ns);
        let weights: Vec<(u64, ())> = cut.iter().map(|(_, ns)| (*ns, ())).collect();
        for ((index, _), uj) in cut.iter().zip(apportion(span.uj, &weights)) {
            if let Some(window) = self.window_mut(*index) {
                window.drawn_uj += uj;
                window.drawn_estimated |= span.estimated;
            }
        }
    }

    /// Tells what the idle device draws, where it was measured at start-up; later it is learned
    /// from idle windows.
    pub fn set_idle_power_mw(&mut self, power_mw: u64) {
        self.powers.idle_mw = Some(power_mw);
    }

    /// Divides the energy of each window that readings cover and whose steps are all told: those
    /// that end by `until_ns`, the start of the step in flight, or now if there is none. Time told
    /// later is counted, without energy.
    pub fn settle(&mut self, until_ns: u64) {
        let Some(read_ns) = self.readings.until_ns() else { return };
        let end = self.index(until_ns.min(read_ns));
        let oldest = end.saturating_sub(self.limits.windows_max as u64);
        self.unsettled = self.unsettled.max(self.energy_first).max(self.first).max(oldest);
        while self.unsettled < end {
            let index = self.unsettled;
            let before = index.checked_sub(1).and_then(|before| self.window(before));
            let after_idle = before.is_some_and(Window::is_idle);
            let (wall_ns, mut powers) = (self.limits.window_ns, self.powers);
            if let Some(window) = self.window_mut(index) {
                window.settle(wall_ns, &mut powers, after_idle);
            }
            self.powers = powers;
            self.unsettled = index + 1;
        }
    }

    /// A request's energy, and whether it is final. What is not settled is estimated at the power
    /// the busy device drew lately; what readings never covered, and what was forgotten before they
    /// did, stays an estimate. Claims on a window never sum to more than it drew.
    pub fn energy_of(&self, claim: &EnergyClaim) -> (Energy, bool) {
        let (mut energy, mut is_final) = (Energy::default(), true);
        for (index, ns) in claim.windows() {
            let known = self.window(index).and_then(|window| window.claim(ns));
            is_final &= known.is_some() || index < self.unsettled || index < self.first;
            energy += known.unwrap_or_else(|| self.powers.estimate_busy(ns));
        }
        (energy, is_final)
    }

    /// What `device_ns` of work probably drew. `None` while no power is known.
    pub fn estimate(&self, device_ns: u64) -> Option<Energy> {
        self.powers.is_known().then(|| self.powers.estimate_busy(device_ns))
    }

    /// Whether anybody reads this device's energy.
    pub fn is_read(&self) -> bool {
        self.readings.until_ns().is_some()
    }

    /// Device time told after its window had been forgotten.
    pub fn late_ns(&self) -> u64 {
        self.late_ns
    }

    /// The window of a moment. Time before the start belongs to the first.
    pub(super) fn index(&self, at_ns: u64) -> u64 {
        at_ns.saturating_sub(self.start_ns) / self.limits.window_ns
    }

    pub(super) fn window(&self, index: u64) -> Option<&Window> {
        self.ring.get(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    /// `None` if it is forgotten. The ring moves on to a window that is new.
    fn window_mut(&mut self, index: u64) -> Option<&mut Window> {
        let windows_max = self.limits.windows_max as u64;
        if index >= self.first + 2 * windows_max {
            self.ring.clear();
            self.first = index + 1 - windows_max;
        }
        while index >= self.first + self.ring.len() as u64 {
            // Two windows are written at once: the newest, and the one that a step began in.
            if let Some(before) = self.ring.len().checked_sub(2) {
                self.ring[before].keep_largest(self.limits.owners_max);
            }
            self.ring.push_back(Window::default());
            if self.ring.len() as u64 > windows_max {
                self.ring.pop_front();
                self.first += 1;
            }
        }
        self.ring.get_mut(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    /// Cuts an interval at the edges of windows: `(window, nanoseconds)`, oldest first. The ring
    /// moves on to its end; what is older than the ring then is one piece.
    fn cut(&mut self, from_ns: u64, to_ns: u64) -> Vec<(u64, u64)> {
        let mut pieces = Vec::new();
        if from_ns >= to_ns {
            return pieces;
        }
        let last = self.index(to_ns - 1);
        self.window_mut(last);
        let forgotten = self.first.saturating_sub(1).min(last);
        let mut at_ns = from_ns;
        while at_ns < to_ns {
            let index = self.index(at_ns).max(forgotten);
            let edge = (index + 1).saturating_mul(self.limits.window_ns);
            let edge_ns = self.start_ns.saturating_add(edge).min(to_ns).max(at_ns + 1);
            pieces.push((index, edge_ns - at_ns));
            at_ns = edge_ns;
        }
        pieces
    }
}
