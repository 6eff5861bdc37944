//! The sensors of the machine's GPUs, and the books of the one that the engine computes on.

use anyhow::{Context, Result};

use crate::{
    clock::Clock,
    engine::books::{Books, DeviceLook},
    gpu::{DEFAULT_INTERVAL, DeviceStatus, GpuMonitor, GpuSnapshot, NvmlSource},
    ledger::{EnergyRow, Ledger},
    meter::{EnergyReading, Settled},
};

/// Samples every GPU until the monitor is dropped. Looks at `uuid`, if that is what the engine's
/// device says it is, are booked; the others are only shown.
pub fn watch(clock: Clock, books: Books, uuid: Option<String>) -> Result<GpuMonitor> {
    let mut watched = uuid.map(|uuid| Watched { uuid, last_ns: None, tells_energy: false });
    let own_pid = std::process::id();
    let heard = move |seen: &GpuSnapshot| {
        let look = watched.as_mut().and_then(|watched| watched.look(seen, own_pid));
        look.into_iter().for_each(|look| books.look(look));
    };
    let monitor = GpuMonitor::start(
        || NvmlSource::open(None),
        DEFAULT_INTERVAL,
        move || clock.now_ns(),
        heard,
    );
    monitor.context("cannot start the thread that samples GPUs")
}

/// Writes the energy of ended requests into the ledger.
pub fn note_energy(books: &Books, ledger: Ledger) {
    let row = |Settled { request, energy }| EnergyRow {
        request,
        total_uj: energy.total_uj(),
        estimated_uj: energy.estimated_uj,
    };
    books.on_settled(move |settled| {
        ledger.note_energy(settled.into_iter().map(row).collect());
    });
}

/// The GPU whose looks are booked.
struct Watched {
    uuid: String,
    /// Of the last good look.
    last_ns: Option<u64>,
    /// Whether it has ever told energy or power.
    tells_energy: bool,
}

impl Watched {
    /// What a new, good look at it adds to the books.
    fn look(&mut self, seen: &GpuSnapshot, own_pid: u32) -> Option<DeviceLook> {
        let DeviceStatus { sample, fault: None, energy, .. } = seen.device(&self.uuid)? else {
            return None;
        };
        let sample = sample.as_ref()?;
        let last_ns = self.last_ns.replace(sample.at_ns);
        if last_ns.is_some_and(|last_ns| last_ns >= sample.at_ns) {
            return None;
        }
        self.tells_energy |= sample.energy_mj.or(sample.power_mw).is_some();
        let reading = EnergyReading {
            at_ns: energy.at_ns,
            total_uj: energy.total_uj,
            estimated_uj: energy.estimated_uj,
        };
        let foreign =
            last_ns.and_then(|last_ns| Some((last_ns, sample.at_ns, sample.foreign_ppm(own_pid)?)));
        Some(DeviceLook { energy: self.tells_energy.then_some(reading), foreign })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::{EnergyTotal, GpuFault, GpuSample, ProcessUse};

    const OWN: u32 = 7;

    fn seen(uuid: &str, sample: GpuSample, fault: Option<GpuFault>) -> GpuSnapshot {
        let energy = EnergyTotal { at_ns: sample.at_ns, total_uj: 5, ..EnergyTotal::default() };
        let (name, sample) = (String::new(), Some(sample));
        let device = DeviceStatus { uuid: uuid.into(), name, index: 0, sample, fault, energy };
        GpuSnapshot { devices: vec![device], ..GpuSnapshot::default() }
    }

    fn sample(at_ns: u64, power_mw: Option<u64>) -> GpuSample {
        let process = |pid, percent| ProcessUse { pid, memory_bytes: None, sm_percent: percent };
        let processes = Some(vec![process(OWN, Some(50)), process(8, Some(20))]);
        GpuSample { at_ns, power_mw, processes, ..GpuSample::default() }
    }

    #[test]
    fn only_new_and_good_looks_at_the_device_are_booked() {
        let mut watched = Watched { uuid: "A".into(), last_ns: None, tells_energy: false };
        let mut look = |snapshot: &GpuSnapshot| watched.look(snapshot, OWN);
        let reading = |at_ns| EnergyReading { at_ns, total_uj: 5, estimated_uj: 0 };
        assert_eq!(look(&GpuSnapshot::default()), None);
        assert_eq!(look(&seen("B", sample(1, Some(9)), None)), None, "another GPU");
        let silent = DeviceLook { energy: None, foreign: None };
        assert_eq!(look(&seen("A", sample(2, None), None)), Some(silent), "no power is known");
        let foreign = Some((2, 5, 200_000));
        let energy = Some(reading(5));
        let good = seen("A", sample(5, Some(9)), None);
        assert_eq!(look(&good), Some(DeviceLook { energy, foreign }));
        assert_eq!(look(&good), None, "seen already");
        let lost = seen("A", sample(6, Some(9)), Some(GpuFault::Lost));
        assert_eq!(look(&lost), None);
        // A sample without power goes on from the total that its monitor keeps.
        let back = look(&seen("A", sample(8, None), None)).expect("a look");
        assert_eq!((back.energy, back.foreign), (Some(reading(8)), Some((5, 8, 200_000))));
    }
}
