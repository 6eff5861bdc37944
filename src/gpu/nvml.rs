//! NVIDIA's management library as a source.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use nvml_wrapper::{
    Device, Nvml, enum_wrappers::device::Clock, enums::device::UsedGpuMemory, error::NvmlError,
};

use super::{GpuFault, GpuReading, GpuSample, GpuSource, ProcessUse};

/// More than any machine has.
const DEVICES_MAX: u32 = 64;
/// Looks with a fault in a row before the library is opened anew, as a GPU that was reset is often
/// seen only by a new session. Then after twice as many, and so on up to the longest wait.
const REOPEN_LOOKS_MIN: u32 = 8;
const REOPEN_LOOKS_MAX: u32 = 512;

/// A session with the driver. The library is loaded, never linked.
pub struct NvmlSource {
    library: Option<PathBuf>,
    /// Or why it could not be opened anew.
    session: Result<Session, GpuFault>,
    known: BTreeMap<String, Known>,
    faulty_looks: u32,
}

/// What is remembered of a device between looks.
struct Known {
    name: String,
    index: u32,
    /// The driver's time of the newest use by a process, in microseconds; `None` before the first
    /// look, whose samples would reach back to before our start.
    used_until_us: Option<u64>,
}

impl NvmlSource {
    /// Loads `libnvidia-ml.so.1` by the system's search path, or the library given, and finds the
    /// devices.
    pub fn open(library: Option<&Path>) -> Result<Self, GpuFault> {
        let session = Ok(Session::open(library)?);
        let library = library.map(Path::to_owned);
        let source = Self { library, session, known: BTreeMap::new(), faulty_looks: 0 };
        match source.nvml()?.device_count() {
            Ok(0) => Err(GpuFault::NoDevice),
            Ok(_) => Ok(source),
            Err(error) => Err(fault(error)),
        }
    }

    fn nvml(&self) -> Result<&Nvml, GpuFault> {
        let closed = || GpuFault::Other("the NVML session is closed".to_owned());
        let session = self.session.as_ref().map_err(Clone::clone)?;
        session.0.as_ref().ok_or_else(closed)
    }

    /// Opens the library anew if that is due.
    fn recover(&mut self) {
        let looks = self.faulty_looks;
        let due = looks.is_power_of_two() || looks.is_multiple_of(REOPEN_LOOKS_MAX);
        if looks >= REOPEN_LOOKS_MIN && due {
            // The old session ends first, as the library counts its users.
            self.session = Err(GpuFault::Other("NVML is being opened anew".to_owned()));
            self.session = Session::open(self.library.as_deref());
        }
    }

    fn look(&mut self, now_ns: &dyn Fn() -> u64) -> Result<Vec<GpuReading>, GpuFault> {
        let mut known = std::mem::take(&mut self.known);
        let seen = self.nvml().and_then(|nvml| read_all(nvml, &mut known, now_ns));
        self.known = known;
        let mut readings = seen?;
        for (uuid, device) in &self.known {
            if !readings.iter().any(|reading| reading.uuid == *uuid) {
                let (uuid, name) = (uuid.clone(), device.name.clone());
                let result = Err(GpuFault::Lost);
                readings.push(GpuReading { uuid, name, index: device.index, result });
            }
        }
        Ok(readings)
    }
}

impl GpuSource for NvmlSource {
    fn sample(&mut self, now_ns: &dyn Fn() -> u64) -> Result<Vec<GpuReading>, GpuFault> {
        self.recover();
        let readings = self.look(now_ns);
        let good = readings.as_ref().is_ok_and(|all| all.iter().all(|one| one.result.is_ok()));
        self.faulty_looks = if good { 0 } else { self.faulty_looks.saturating_add(1) };
        readings
    }
}

/// Every device that has a handle. One without, which may be lost, does not hide the others; a
/// fault is all there is to tell where no device was ever seen.
fn read_all(
    nvml: &Nvml,
    known: &mut BTreeMap<String, Known>,
    now_ns: &dyn Fn() -> u64,
) -> Result<Vec<GpuReading>, GpuFault> {
    let count = nvml.device_count().map_err(fault)?.min(DEVICES_MAX);
    let (mut readings, mut failed) = (Vec::new(), None);
    for index in 0..count {
        let found = nvml.device_by_index(index).and_then(|device| Ok((device.uuid()?, device)));
        let (uuid, device) = match found {
            Ok(found) => found,
            Err(error) => {
                failed = Some(fault(error));
                continue;
            }
        };
        let device_known = known.entry(uuid.clone()).or_insert_with(|| {
            let name = device.name().unwrap_or_else(|_| "unknown GPU".to_owned());
            Known { name, index, used_until_us: None }
        });
        device_known.index = index;
        let result = read(&device, &mut device_known.used_until_us, now_ns);
        readings.push(GpuReading { uuid, name: device_known.name.clone(), index, result });
    }
    match failed {
        Some(fault) if known.is_empty() => Err(fault),
        _ => Ok(readings),
    }
}

/// All that a device tells. What it does not know is `None`; that it is lost is a fault.
fn read(
    device: &Device,
    used_until_us: &mut Option<u64>,
    now_ns: &dyn Fn() -> u64,
) -> Result<GpuSample, GpuFault> {
    // First, as energy is what the time is for: half way through a call that may take its time.
    let begin_ns = now_ns();
    let energy_mj = told(device.total_energy_consumption())?;
    let at_ns = begin_ns + now_ns().saturating_sub(begin_ns) / 2;
    let power_mw = told(device.power_usage())?.map(u64::from);
    let utilization = told(device.utilization_rates())?;
    let memory = told(device.memory_info())?;
    Ok(GpuSample {
        at_ns,
        gpu_percent: utilization.as_ref().map(|rates| rates.gpu),
        memory_percent: utilization.as_ref().map(|rates| rates.memory),
        memory_used_bytes: memory.as_ref().map(|memory| memory.used),
        memory_total_bytes: memory.as_ref().map(|memory| memory.total),
        power_mw,
        energy_mj,
        sm_clock_mhz: told(device.clock_info(Clock::SM))?,
        memory_clock_mhz: told(device.clock_info(Clock::Memory))?,
        throttle: told(device.current_throttle_reasons())?.map(|reasons| reasons.bits()),
        processes: processes(device, used_until_us)?,
    })
}

/// Processes with a context on the device, and what those that ran used since the last look.
fn processes(
    device: &Device,
    used_until_us: &mut Option<u64>,
) -> Result<Option<Vec<ProcessUse>>, GpuFault> {
    let Some(running) = told(device.running_compute_processes())? else { return Ok(None) };
    let used = match device.process_utilization_stats(*used_until_us) {
        // Nobody used it.
        Err(NvmlError::NotFound) => Some(Vec::new()),
        other => told(other)?,
    };
    let since_us = *used_until_us;
    // Drivers repeat old samples and have told more than 100 %.
    let fresh =
        |at_us: u64, percent: u32| since_us.is_some_and(|since| at_us > since) && percent <= 100;
    let mut percents: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for sample in used.iter().flatten() {
        if fresh(sample.timestamp, sample.sm_util) {
            percents.entry(sample.pid).or_default().push(sample.sm_util);
        }
    }
    if let Some(used) = &used {
        let newest = used.iter().map(|sample| sample.timestamp).max().unwrap_or(0);
        *used_until_us = Some(newest.max(since_us.unwrap_or(0)));
    }
    let known = used.is_some() && since_us.is_some();
    let mut processes: BTreeMap<u32, ProcessUse> = BTreeMap::new();
    for process in running {
        let memory_bytes = match process.used_gpu_memory {
            UsedGpuMemory::Used(bytes) => Some(bytes),
            UsedGpuMemory::Unavailable => None,
        };
        let pid = process.pid;
        processes.insert(pid, ProcessUse { pid, memory_bytes, sm_percent: known.then_some(0) });
    }
    for (pid, percents) in percents {
        let mean = percents.iter().sum::<u32>() / percents.len() as u32;
        let absent = ProcessUse { pid, memory_bytes: None, sm_percent: None };
        processes.entry(pid).or_insert(absent).sm_percent = Some(mean);
    }
    Ok(Some(processes.into_values().collect()))
}

/// `None` where the device or the library does not know.
fn told<T>(answer: Result<T, NvmlError>) -> Result<Option<T>, GpuFault> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(error @ (NvmlError::GpuLost | NvmlError::ResetRequired | NvmlError::Uninitialized)) => {
            Err(fault(error))
        }
        Err(_) => Ok(None),
    }
}

fn fault(error: NvmlError) -> GpuFault {
    match error {
        NvmlError::LibloadingError(error) => GpuFault::NoLibrary(error.to_string()),
        NvmlError::LibraryNotFound => GpuFault::NoLibrary(error.to_string()),
        NvmlError::DriverNotLoaded => GpuFault::NoDriver,
        NvmlError::FailedToLoadSymbol(what) => GpuFault::NoSymbol(what),
        NvmlError::FunctionNotFound => GpuFault::NoSymbol(error.to_string()),
        NvmlError::NoPermission => GpuFault::NoPermission,
        NvmlError::LibRmVersionMismatch => GpuFault::VersionMismatch,
        NvmlError::GpuLost | NvmlError::ResetRequired => GpuFault::Lost,
        other => GpuFault::Other(format!("NVML: {other}")),
    }
}

/// An open library.
struct Session(Option<Nvml>);

impl Session {
    fn open(library: Option<&Path>) -> Result<Self, GpuFault> {
        let nvml = match library {
            Some(path) => Nvml::builder().lib_path(path.as_os_str()).init(),
            None => Nvml::init(),
        };
        nvml.map(|nvml| Self(Some(nvml))).map_err(fault)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The wrapper calls shutdown when it is dropped, and panics if the library has none. Such a
        // library stays open.
        if let Some(nvml) = self.0.take()
            && nvml.lib().nvmlShutdown.is_err()
        {
            std::mem::forget(nvml);
        }
    }
}
