//! Who used a device over the last while: rows that make all of the time.

use std::{cmp::Reverse, collections::BTreeMap, sync::Arc};

use super::{
    Account, Overhead, Owner, Usage,
    window::{Slot, Window},
};

/// What rows are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    Tenant,
    Key,
    Model,
}

impl By {
    fn name(self, owner: &Owner) -> Arc<str> {
        match self {
            Self::Tenant => owner.tenant.clone(),
            Self::Key => owner.key.clone(),
            Self::Model => owner.model.0.clone(),
        }
    }
}

/// Every nanosecond of `from_ns .. to_ns`, once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub from_ns: u64,
    pub to_ns: u64,
    /// The largest first.
    pub rows: Vec<(Arc<str>, Usage)>,
    /// All that have no row of their own.
    pub other: Usage,
    /// In the order of [`Overhead::ALL`].
    pub overhead: [Usage; Overhead::ALL.len()],
    pub foreign: Usage,
    pub idle: Usage,
}

impl Report {
    /// Sum of all rows: its `device_ns` is the wall time.
    pub fn total(&self) -> Usage {
        let named = self.rows.iter().map(|(_, usage)| usage).chain([&self.other]);
        let mut total = Usage::default();
        named
            .chain(&self.overhead)
            .chain([&self.foreign, &self.idle])
            .for_each(|row| total += *row);
        total
    }
}

impl Account {
    /// The last whole windows that make up `window_ns`, before `until_ns` (see
    /// [`Account::settle`]), or as many as are remembered. At most
    /// `windows_max * 4 * owners_max` rows are added up.
    pub fn utilization(&self, until_ns: u64, window_ns: u64, by: By) -> Report {
        let end = self.index(until_ns);
        let count = window_ns.div_ceil(self.limits.window_ns).min(self.limits.windows_max as u64);
        let begin = end.saturating_sub(count).max(self.first.min(end));
        let edge_ns = |index: u64| self.start_ns + index * self.limits.window_ns;
        let mut report =
            Report { from_ns: edge_ns(begin), to_ns: edge_ns(end), ..Report::default() };
        let mut groups: BTreeMap<Arc<str>, Usage> = BTreeMap::new();
        let nothing = Window::default();
        for index in begin..end {
            let window = self.window(index).unwrap_or(&nothing);
            for (slot, usage) in window.report(self.limits.window_ns, &self.powers) {
                match slot {
                    Slot::Owner(owner) => *groups.entry(by.name(owner)).or_default() += usage,
                    Slot::Other => report.other += usage,
                    Slot::Overhead(kind) => report.overhead[kind as usize] += usage,
                    Slot::Foreign => report.foreign += usage,
                    Slot::Idle => report.idle += usage,
                }
            }
        }
        report.rows = groups.into_iter().collect();
        report.rows.sort_by_key(|(_, usage)| Reverse((usage.device_ns, usage.kv_block_ns)));
        let small = self.limits.owners_max.min(report.rows.len());
        report.rows.drain(small..).for_each(|(_, usage)| report.other += usage);
        report
    }
}
