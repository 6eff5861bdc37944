//! One look at the GPUs, as plain data.

use super::GpuFault;

/// Something that can be asked about GPUs.
pub trait GpuSource: Send {
    /// Every device that is there, and those that were there and are not. `now_ns` reads the
    /// server's monotonic clock. Fails where no device can be asked at all.
    fn sample(&mut self, now_ns: &dyn Fn() -> u64) -> Result<Vec<GpuReading>, GpuFault>;
}

/// What one device answered.
#[derive(Clone, Debug, PartialEq)]
pub struct GpuReading {
    pub uuid: String,
    pub name: String,
    /// The driver's number, at the time: for people, never for matching.
    pub index: u32,
    pub result: Result<GpuSample, GpuFault>,
}

/// `None` is what the device, the driver or the library cannot tell.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuSample {
    /// When power and energy were read.
    pub at_ns: u64,
    /// Share of time in which a kernel ran; says nothing about how full the device was.
    pub gpu_percent: Option<u32>,
    /// Share of time in which memory was read or written.
    pub memory_percent: Option<u32>,
    pub memory_used_bytes: Option<u64>,
    pub memory_total_bytes: Option<u64>,
    pub power_mw: Option<u64>,
    /// Since the driver was loaded.
    pub energy_mj: Option<u64>,
    pub sm_clock_mhz: Option<u32>,
    pub memory_clock_mhz: Option<u32>,
    /// Bits: see [`throttle_names`].
    pub throttle: Option<u64>,
    pub processes: Option<Vec<ProcessUse>>,
}

/// A process on a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessUse {
    /// In the process namespace of the driver.
    pub pid: u32,
    pub memory_bytes: Option<u64>,
    /// Share of time on the multiprocessors since the last look. `None` at the first look, and
    /// where the device does not tell.
    pub sm_percent: Option<u32>,
}

impl GpuSample {
    /// What other processes used, in millionths of the device's time. `None` if it is not known: no
    /// use by process, or our own process is not among them. That is so in a container, where the
    /// driver tells process ids of the host; ours cannot be told from others' then.
    pub fn foreign_ppm(&self, own_pid: u32) -> Option<u32> {
        let processes = self.processes.as_ref()?;
        if !processes.iter().any(|process| process.pid == own_pid) {
            return None;
        }
        let others = processes.iter().filter(|process| process.pid != own_pid);
        let percent: Option<Vec<u32>> = others.map(|process| process.sm_percent).collect();
        let percent: u64 = percent?.into_iter().map(u64::from).sum();
        Some(percent.min(100) as u32 * 10_000)
    }
}

/// Why clocks are below their maximum, after `nvmlClocksEventReasons` of the NVML reference.
const THROTTLE: [(u64, &str); 9] = [
    (0x1, "idle"),
    (0x2, "applications_clocks_setting"),
    (0x4, "sw_power_cap"),
    (0x8, "hw_slowdown"),
    (0x10, "sync_boost"),
    (0x20, "sw_thermal_slowdown"),
    (0x40, "hw_thermal_slowdown"),
    (0x80, "hw_power_brake_slowdown"),
    (0x100, "display_clock_setting"),
];

/// The reasons among `bits` that have a name.
pub fn throttle_names(bits: u64) -> impl Iterator<Item = &'static str> {
    THROTTLE.into_iter().filter(move |(bit, _)| bits & bit != 0).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, sm_percent: Option<u32>) -> ProcessUse {
        ProcessUse { pid, memory_bytes: None, sm_percent }
    }

    fn check(processes: Option<Vec<ProcessUse>>, expected_ppm: Option<u32>) {
        let sample = GpuSample { processes, ..GpuSample::default() };
        assert_eq!(sample.foreign_ppm(7), expected_ppm, "{sample:?}");
    }

    #[test]
    fn foreign_use_is_what_others_do() {
        check(None, None);
        check(Some(vec![]), None);
        check(Some(vec![process(8, Some(50))]), None);
        check(Some(vec![process(7, None)]), Some(0));
        check(Some(vec![process(7, Some(90)), process(8, Some(5))]), Some(50_000));
        check(Some(vec![process(7, None), process(8, None)]), None);
        let crowd = vec![process(7, Some(9)), process(8, Some(60)), process(9, Some(u32::MAX))];
        check(Some(crowd), Some(1_000_000));
    }

    #[test]
    fn reasons_have_names() {
        let check = |bits, expected: &[&str]| {
            assert_eq!(throttle_names(bits).collect::<Vec<_>>(), expected, "{bits:#x}");
        };
        check(0, &[]);
        check(0x24, &["sw_power_cap", "sw_thermal_slowdown"]);
        check(1 << 40, &[]);
    }
}
