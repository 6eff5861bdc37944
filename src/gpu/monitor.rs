//! The thread that samples GPUs.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, PoisonError, RwLock,
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread::{Builder, JoinHandle},
    time::Duration,
};

use tracing::{info, warn};

use super::{
    DeviceStatus, GpuFault, GpuReading, GpuSnapshot, GpuSource, GpuState, energy::EnergyTally,
};

/// NVML refreshes power and energy every 20 to 100 ms, and use every second at most.
pub const DEFAULT_INTERVAL: Duration = Duration::from_millis(500);

/// A driver that is there but cannot be opened is tried again after this many intervals.
const OPEN_INTERVALS: u32 = 60;
/// How long the end waits for a driver that does not answer.
const STOP_WAIT: Duration = Duration::from_secs(2);
/// Devices that come and go under new names are not remembered beyond this.
const DEVICES_MAX: usize = 64;

/// What a monitor saw last; clones share it.
#[derive(Clone, Debug, Default)]
pub struct GpuFeed(Arc<RwLock<Arc<GpuSnapshot>>>);

impl GpuFeed {
    /// The newest look at the GPUs. Never waits for a driver.
    pub fn snapshot(&self) -> Arc<GpuSnapshot> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn publish(&self, snapshot: GpuSnapshot) -> Arc<GpuSnapshot> {
        let snapshot = Arc::new(snapshot);
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = snapshot.clone();
        snapshot
    }
}

/// A running sampler. Dropping it stops the thread.
pub struct GpuMonitor {
    feed: GpuFeed,
    stop: Option<Sender<()>>,
    done: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl GpuMonitor {
    /// Opens a source and samples it every `interval`, on a thread of its own, as a driver may take
    /// seconds to answer. Where there is no GPU it says so once and the thread ends. `now_ns` reads
    /// the server's monotonic clock; `heard` hears of every look. Fails if the system has no thread
    /// left.
    pub fn start<S: GpuSource + 'static>(
        open: impl FnMut() -> Result<S, GpuFault> + Send + 'static,
        interval: Duration,
        now_ns: impl Fn() -> u64 + Send + 'static,
        heard: impl FnMut(&GpuSnapshot) + Send + 'static,
    ) -> io::Result<Self> {
        let feed = GpuFeed::default();
        let (stop, stopped) = channel();
        let (finished, done) = channel();
        let publisher = feed.clone();
        let thread = Builder::new().name("gpu".to_owned()).spawn(move || {
            // Dropped when the thread ends, in whatever way.
            let _finished = finished;
            run(open, interval, now_ns, &publisher, heard, &stopped);
        })?;
        Ok(Self { feed, stop: Some(stop), done, thread: Some(thread) })
    }

    pub fn feed(&self) -> GpuFeed {
        self.feed.clone()
    }

    /// The newest look at the GPUs. Never waits for a driver.
    pub fn snapshot(&self) -> Arc<GpuSnapshot> {
        self.feed.snapshot()
    }
}

impl Drop for GpuMonitor {
    fn drop(&mut self) {
        // The thread wakes up from its wait when the sender is gone.
        self.stop = None;
        let waited = self.done.recv_timeout(STOP_WAIT);
        let Some(thread) = self.thread.take() else { return };
        if waited == Err(RecvTimeoutError::Timeout) {
            warn!("the GPU driver does not answer; its thread is left behind");
        } else if thread.join().is_err() {
            warn!("the GPU thread panicked");
        }
    }
}

fn run<S: GpuSource>(
    open: impl FnMut() -> Result<S, GpuFault>,
    interval: Duration,
    now_ns: impl Fn() -> u64,
    feed: &GpuFeed,
    mut heard: impl FnMut(&GpuSnapshot),
    stopped: &Receiver<()>,
) {
    let unopened = |state| drop(feed.publish(GpuSnapshot { state, ..GpuSnapshot::default() }));
    let Some(mut source) = open_source(open, interval * OPEN_INTERVALS, unopened, stopped) else {
        return;
    };
    let mut watch = Watch::default();
    loop {
        let begin_ns = now_ns();
        let looked = source.sample(&now_ns);
        heard(&feed.publish(watch.note(looked)));
        let took = Duration::from_nanos(now_ns().saturating_sub(begin_ns));
        if is_stopped(stopped, interval.saturating_sub(took)) {
            return;
        }
    }
}

/// Waits, and says whether the monitor was stopped meanwhile.
fn is_stopped(stopped: &Receiver<()>, wait: Duration) -> bool {
    stopped.recv_timeout(wait) != Err(RecvTimeoutError::Timeout)
}

/// `None` where there is no GPU, or the monitor is stopped before the driver can be opened.
fn open_source<S>(
    mut open: impl FnMut() -> Result<S, GpuFault>,
    wait: Duration,
    publish: impl Fn(GpuState),
    stopped: &Receiver<()>,
) -> Option<S> {
    let mut said = false;
    loop {
        match open() {
            Ok(source) => return Some(source),
            Err(fault) if fault.is_absence() => {
                info!(reason = %fault, "no NVIDIA GPU is monitored");
                publish(GpuState::Absent(fault));
                return None;
            }
            Err(fault) => {
                if !std::mem::replace(&mut said, true) {
                    warn!(reason = %fault, "GPUs cannot be monitored");
                }
                publish(GpuState::Failing(fault));
            }
        }
        if is_stopped(stopped, wait) {
            return None;
        }
    }
}

/// What is carried from look to look.
#[derive(Default)]
struct Watch {
    looks: u64,
    failing: Option<GpuFault>,
    devices: BTreeMap<String, (DeviceStatus, EnergyTally)>,
}

impl Watch {
    /// Takes in a look. A fault is said when it begins, and its end when it ends.
    fn note(&mut self, looked: Result<Vec<GpuReading>, GpuFault>) -> GpuSnapshot {
        self.looks += 1;
        let state = match looked {
            Ok(readings) => {
                if self.failing.take().is_some() {
                    info!("the GPU driver answers again");
                }
                readings.into_iter().for_each(|reading| self.note_device(reading));
                GpuState::Sampling
            }
            Err(fault) => {
                if self.failing.is_none() {
                    warn!(reason = %fault, "the GPU driver does not answer");
                }
                for (device, _) in self.devices.values_mut() {
                    device.fault.get_or_insert_with(|| fault.clone());
                }
                self.failing = Some(fault.clone());
                GpuState::Failing(fault)
            }
        };
        let devices = self.devices.values().map(|(device, _)| device.clone()).collect();
        GpuSnapshot { state, looks: self.looks, devices }
    }

    fn note_device(&mut self, reading: GpuReading) {
        let GpuReading { uuid, name, index, result } = reading;
        if !self.devices.contains_key(&uuid) {
            if self.devices.len() >= DEVICES_MAX {
                return;
            }
            info!(%uuid, %name, index, "a GPU is monitored");
        }
        let (device, tally) = self.devices.entry(uuid.clone()).or_insert_with(|| {
            let energy = Default::default();
            let device = DeviceStatus { uuid, name, index, sample: None, fault: None, energy };
            (device, EnergyTally::default())
        });
        device.index = index;
        match result {
            Ok(sample) => {
                if device.fault.take().is_some() {
                    info!(uuid = %device.uuid, "the GPU is back");
                }
                tally.add(&sample);
                device.energy = tally.total;
                device.sample = Some(sample);
            }
            Err(fault) => {
                if device.fault.is_none() {
                    warn!(uuid = %device.uuid, reason = %fault, "a GPU cannot be read");
                }
                device.fault = Some(fault);
            }
        }
    }
}
