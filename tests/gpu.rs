//! The real NVML wrapper and sampling thread against a library that we build (`fake_nvml.c`), whose
//! GPUs are lost, reset, swapped and shared as a script says.

#[path = "common/nvml.rs"]
mod nvml;

use std::{
    io::Write,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use candela::gpu::{
    GpuFault, GpuMonitor, GpuReading, GpuSample, GpuSnapshot, GpuSource, GpuState, NvmlSource,
    ProcessUse,
};

use nvml::Fake;

const A: &str = "GPU-a0000000-0000-0000-0000-000000000001";
const B: &str = "GPU-b0000000-0000-0000-0000-000000000002";

impl Fake {
    fn open(&self) -> Result<NvmlSource, GpuFault> {
        NvmlSource::open(Some(&self.library()))
    }

    /// One look, through a source that stays open.
    fn look(&self, source: &mut NvmlSource) -> Result<Vec<GpuReading>, GpuFault> {
        source.sample(&|| 42)
    }

    fn monitor(&self, interval: Duration, now_ns: &Arc<AtomicU64>) -> GpuMonitor {
        listen();
        let (library, now_ns) = (self.library(), now_ns.clone());
        let open = move || NvmlSource::open(Some(&library));
        let now_ns = move || now_ns.load(Ordering::SeqCst);
        GpuMonitor::start(open, interval, now_ns, |_| {}).expect("a thread")
    }
}

fn reading<'a>(readings: &'a [GpuReading], uuid: &str) -> &'a GpuReading {
    readings.iter().find(|reading| reading.uuid == uuid).expect("the device is told of")
}

fn sample(readings: &[GpuReading], uuid: &str) -> GpuSample {
    reading(readings, uuid).result.clone().expect("a good sample")
}

/// A GPU that knows everything.
fn whole(uuid: &str, energy_mj: u64) -> String {
    format!(
        "device {uuid} gpu=37 mem_busy=12 mem_total=85899345920 mem_used=1073741824 power=250000 \
         energy={energy_mj} sm_clock=1755 mem_clock=2619 throttle=4\n"
    )
}

#[test]
fn a_whole_gpu_tells_everything() {
    let fake = Fake::new(&whole(A, 7_000));
    let mut source = fake.open().expect("opened");
    let readings = fake.look(&mut source).expect("readings");
    assert_eq!((readings[0].name.as_str(), readings[0].index), (format!("Fake {A}").as_str(), 0));
    let expected = GpuSample {
        at_ns: 42,
        gpu_percent: Some(37),
        memory_percent: Some(12),
        memory_used_bytes: Some(1 << 30),
        memory_total_bytes: Some(80 << 30),
        power_mw: Some(250_000),
        energy_mj: Some(7_000),
        sm_clock_mhz: Some(1755),
        memory_clock_mhz: Some(2619),
        throttle: Some(4),
        processes: Some(Vec::new()),
    };
    assert_eq!(sample(&readings, A), expected);
    drop(source);
    assert_eq!(fake.calls(), ["init", "shutdown"]);
}

#[test]
fn what_a_gpu_does_not_know_is_none() {
    let fake = Fake::new(&format!("device {A}\n"));
    let mut source = fake.open().expect("opened");
    let sample = sample(&fake.look(&mut source).expect("readings"), A);
    let processes = Some(Vec::new());
    assert_eq!(sample, GpuSample { at_ns: 42, processes, ..GpuSample::default() });
}

#[test]
fn a_library_that_lacks_a_quantity_has_the_others() {
    let check = |function: &str, is_gone: fn(&GpuSample) -> bool| {
        let fake = Fake::without(&[function], &whole(A, 1));
        let mut source = fake.open().expect("opened");
        let sample = sample(&fake.look(&mut source).expect("readings"), A);
        assert!(is_gone(&sample), "{function}: {sample:?}");
        assert_eq!(sample.gpu_percent, Some(37), "{function}");
    };
    check("nvmlDeviceGetTotalEnergyConsumption", |sample| sample.energy_mj.is_none());
    check("nvmlDeviceGetPowerUsage", |sample| sample.power_mw.is_none());
    check("nvmlDeviceGetProcessUtilization", |sample| sample.foreign_ppm(1).is_none());
}

#[test]
fn what_cannot_be_opened_says_why() {
    let check = |fake: &Fake, is_expected: fn(&GpuFault) -> bool| {
        let fault = fake.open().err().expect("a fault");
        assert!(is_expected(&fault), "{fault:?}");
    };
    let init = |code: u32| Fake::new(&format!("init {code}\n{}", whole(A, 1)));
    check(&init(9), |fault| *fault == GpuFault::NoDriver);
    check(&init(4), |fault| *fault == GpuFault::NoPermission);
    check(&init(18), |fault| *fault == GpuFault::VersionMismatch);
    check(&init(12), |fault| matches!(fault, GpuFault::NoLibrary(_)));
    check(&init(999), |fault| matches!(fault, GpuFault::Other(_)));
    check(&init(12345), |fault| matches!(fault, GpuFault::Other(_)));
    check(&Fake::new(""), |fault| *fault == GpuFault::NoDevice);
    check(&Fake::new("count 999\n"), |fault| matches!(fault, GpuFault::Other(_)));
    for function in ["nvmlInit_v2", "nvmlDeviceGetCount_v2"] {
        let fake = Fake::without(&[function], &whole(A, 1));
        check(&fake, |fault| matches!(fault, GpuFault::NoSymbol(_)));
    }
    let broken = Fake::new(&whole(A, 1));
    std::fs::write(broken.library(), "no library").expect("written");
    check(&broken, |fault| matches!(fault, GpuFault::NoLibrary(_)));
    std::fs::remove_file(broken.library()).expect("removed");
    check(&broken, |fault| matches!(fault, GpuFault::NoLibrary(_)));
}

#[test]
fn a_library_that_cannot_tell_devices_apart_is_a_fault() {
    for function in ["nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetUUID"] {
        let fake = Fake::without(&[function], &whole(A, 1));
        let mut source = fake.open().expect("opened");
        let fault = fake.look(&mut source).expect_err("a fault");
        assert!(matches!(fault, GpuFault::NoSymbol(_)), "{function}: {fault:?}");
    }
}

#[test]
fn a_library_without_a_shutdown_is_left_open() {
    let fake = Fake::without(&["nvmlShutdown"], &whole(A, 1));
    let mut source = fake.open().expect("opened");
    fake.look(&mut source).expect("readings");
    drop(source);
    assert_eq!(fake.calls(), ["init"]);
}

#[test]
fn a_lost_device_leaves_the_others_and_comes_back() {
    let fake = Fake::new(&(whole(A, 1) + &whole(B, 2)));
    let mut source = fake.open().expect("opened");
    assert_eq!(fake.look(&mut source).expect("readings").len(), 2);
    let lost = |code: u32| whole(A, 1).replace('\n', &format!(" lost={code}\n"));
    for gone in [lost(15), lost(16), String::new()] {
        fake.script(&(gone + &whole(B, 3)));
        let readings = fake.look(&mut source).expect("readings");
        assert_eq!(reading(&readings, A).result, Err(GpuFault::Lost));
        assert_eq!(sample(&readings, B).energy_mj, Some(3));
    }
    fake.script(&(whole(A, 4) + &whole(B, 5)));
    let readings = fake.look(&mut source).expect("readings");
    assert_eq!(sample(&readings, A).energy_mj, Some(4));
    // Lost from the start: there is no device to tell of, but a fault.
    let mut source = fake.open().expect("opened");
    fake.script(&lost(15));
    assert_eq!(fake.look(&mut source), Err(GpuFault::Lost));
}

#[test]
fn a_lasting_fault_opens_the_library_anew() {
    let fake = Fake::new(&whole(A, 1));
    let mut source = fake.open().expect("opened");
    fake.look(&mut source).expect("readings");
    fake.script("init 9\ncount 999\n");
    let faults: Vec<_> = (0..40).map(|_| fake.look(&mut source)).collect();
    assert!(faults.iter().all(Result::is_err), "{faults:?}");
    assert_eq!(faults[39], Err(GpuFault::NoDriver), "what the library says when opened anew");
    // After 8, 16 and 32 looks; only the first had a session to end.
    assert_eq!(fake.calls(), ["init", "shutdown", "init", "init", "init"]);
    fake.script(&whole(A, 2));
    let back = (0..40).find_map(|_| fake.look(&mut source).ok()).expect("it is back");
    assert_eq!(sample(&back, A).energy_mj, Some(2));
}

#[test]
fn devices_are_known_by_uuid_in_any_order() {
    let fake = Fake::new(&(whole(A, 100) + &whole(B, 200)));
    let mut source = fake.open().expect("opened");
    fake.look(&mut source).expect("readings");
    fake.script(&(whole(B, 201) + &whole(A, 101)));
    let readings = fake.look(&mut source).expect("readings");
    for (uuid, index, energy_mj) in [(A, 1, 101), (B, 0, 201)] {
        let reading = reading(&readings, uuid);
        assert_eq!((reading.index, &reading.name), (index, &format!("Fake {uuid}")));
        assert_eq!(sample(&readings, uuid).energy_mj, Some(energy_mj));
    }
}

#[test]
fn other_processes_are_told_from_ours() {
    let ours = format!("process {A} pid=7 mem=1000 sm=40 ts=90\n");
    let fake = Fake::new(&(whole(A, 1) + &ours));
    let mut source = fake.open().expect("opened");
    let check = |source: &mut NvmlSource, lines: &str, expected: Option<u32>| {
        fake.script(&(whole(A, 1) + lines));
        let sample = sample(&fake.look(source).expect("readings"), A);
        assert_eq!(sample.foreign_ppm(7), expected, "{lines} {sample:?}");
        sample.processes.expect("processes are told")
    };
    let other = |sm: u32, ts: u32| format!("process {A} pid=8 mem=2000 sm={sm} ts={ts}\n");
    check(&mut source, &(ours.clone() + &other(30, 95)), None);
    // The old samples say nothing new, and no sample is no use.
    check(&mut source, &(ours.clone() + &other(30, 95)), Some(0));
    check(&mut source, &(ours.clone() + &other(30, 120)), Some(300_000));
    // Two samples of one process: their mean. More than all is not believed.
    let twice = ours.clone() + &other(10, 130) + &other(30, 140);
    check(&mut source, &twice, Some(200_000));
    check(&mut source, &(ours.clone() + &other(250, 150)), Some(0));
    // A process that has ended since, or only draws: not in the list, but it used the device.
    let ended = ours.clone() + &format!("process {A} pid=9 sm=20 ts=170\n");
    let processes = check(&mut source, &ended, Some(200_000));
    let gone = ProcessUse { pid: 9, memory_bytes: None, sm_percent: Some(20) };
    let own = ProcessUse { pid: 7, memory_bytes: Some(1000), sm_percent: Some(0) };
    assert_eq!(processes, [own, gone]);
    // Ours is not there: in a container its number is another.
    check(&mut source, &other(30, 200), None);
}

/// What the library logged so far in this process.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn listen() -> &'static Log {
    static LOG: OnceLock<Log> = OnceLock::new();
    LOG.get_or_init(|| {
        let log = Log::default();
        let writer = log.clone();
        tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).init();
        log
    })
}

/// How many lines have both texts.
fn said(text: &str, about: &str) -> usize {
    let log = listen().0.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let log = String::from_utf8(log).expect("text");
    log.lines().filter(|line| line.contains(text) && line.contains(about)).count()
}

const SOON: Duration = Duration::from_millis(5);
const DEADLINE: Duration = Duration::from_secs(20);

/// Waits for a look that began after this call.
fn next_look(monitor: &GpuMonitor) -> Arc<GpuSnapshot> {
    let looks = monitor.snapshot().looks;
    until(monitor, |snapshot| snapshot.looks >= looks + 2)
}

fn until(monitor: &GpuMonitor, is_so: impl Fn(&GpuSnapshot) -> bool) -> Arc<GpuSnapshot> {
    let begin = Instant::now();
    loop {
        let snapshot = monitor.snapshot();
        if is_so(&snapshot) {
            return snapshot;
        }
        assert!(begin.elapsed() < DEADLINE, "{snapshot:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn clock() -> Arc<AtomicU64> {
    Arc::default()
}

#[test]
fn no_gpu_is_normal_and_said_once() {
    listen();
    let dir = tempfile::tempdir().expect("a directory");
    let library = dir.path().join("libnone.so");
    let path = library.clone();
    let open = move || NvmlSource::open(Some(&path));
    let monitor = GpuMonitor::start(open, SOON, || 0, |_| {}).expect("a thread");
    let snapshot = until(&monitor, |snapshot| snapshot.state != GpuState::Starting);
    assert!(matches!(snapshot.state, GpuState::Absent(GpuFault::NoLibrary(_))), "{snapshot:?}");
    std::thread::sleep(20 * SOON);
    assert_eq!(monitor.snapshot(), snapshot, "nobody looks any more");
    drop(monitor);
    let about = library.to_str().expect("text");
    assert_eq!(said("INFO", about), 1);
    assert_eq!(said("WARN", about), 0);
}

#[test]
fn a_driver_that_cannot_be_opened_is_tried_again() {
    let fake = Fake::new("init 999\n");
    let monitor = fake.monitor(Duration::from_millis(1), &clock());
    until(&monitor, |snapshot| matches!(snapshot.state, GpuState::Failing(_)));
    fake.script(&whole(A, 1));
    until(&monitor, |snapshot| snapshot.state == GpuState::Sampling);
}

#[test]
fn a_fault_is_said_once_and_so_is_its_end() {
    let (c, d) = ("GPU-c", "GPU-d");
    let both = whole(c, 1) + &whole(d, 2);
    let fake = Fake::new(&both);
    let monitor = fake.monitor(SOON, &clock());
    let fine = |snapshot: &GpuSnapshot| {
        let good = snapshot.devices.iter().filter(|device| device.fault.is_none());
        snapshot.state == GpuState::Sampling && good.count() == 2
    };
    until(&monitor, fine);
    fake.script(&(whole(c, 1).replace('\n', " lost=15\n") + &whole(d, 3)));
    let snapshot = next_look(&monitor);
    let lost = snapshot.device(c).expect("still known");
    assert_eq!(lost.fault, Some(GpuFault::Lost));
    assert_eq!(
        lost.sample.as_ref().and_then(|sample| sample.energy_mj),
        Some(1),
        "the last good one"
    );
    assert_eq!(snapshot.device(d).expect("known").fault, None);
    next_look(&monitor);
    assert_eq!((said("cannot be read", c), said("is back", c)), (1, 0));
    fake.script(&both);
    until(&monitor, fine);
    next_look(&monitor);
    assert_eq!((said("cannot be read", c), said("is back", c)), (1, 1));
    assert_eq!(said("cannot be read", d), 0);
    // The driver as a whole.
    fake.script("count 999\n");
    let snapshot = until(&monitor, |snapshot| matches!(snapshot.state, GpuState::Failing(_)));
    assert!(snapshot.devices.iter().all(|device| device.fault.is_some()), "{snapshot:?}");
    fake.script(&both);
    until(&monitor, fine);
    assert_eq!(said("is monitored", c), 1);
}

/// Moves the clock and the GPU together, one look at each.
fn draw(lines: &[(u64, &str)]) -> Arc<GpuSnapshot> {
    let (clock, fake) = (clock(), Fake::new(&format!("device {A} {}\n", lines[0].1)));
    clock.store(lines[0].0 * 1_000_000, Ordering::SeqCst);
    let monitor = fake.monitor(SOON, &clock);
    until(&monitor, |snapshot| snapshot.looks > 0);
    let mut newest = monitor.snapshot();
    for (at_ms, quantities) in &lines[1..] {
        // At a time that has passed a look adds nothing, so the change is seen as a whole.
        fake.script(&format!("device {A} {quantities}\n"));
        clock.store(at_ms * 1_000_000, Ordering::SeqCst);
        newest = next_look(&monitor);
    }
    newest
}

#[test]
fn energy_by_counter_by_power_and_over_a_reset() {
    let check = |lines: &[(u64, &str)], total_uj: u64, estimated_uj: u64, resets: u32| {
        let snapshot = draw(lines);
        let energy = snapshot.device(A).expect("known").energy;
        assert_eq!((energy.total_uj, energy.estimated_uj), (total_uj, estimated_uj), "{lines:?}");
        assert_eq!((energy.resets, energy.at_ns), (resets, lines[lines.len() - 1].0 * 1_000_000));
    };
    check(&[(0, "power=100000 energy=500"), (500, "power=100000 energy=550")], 50_000, 0, 0);
    check(&[(0, "power=100000"), (500, "power=100000"), (1000, "power=300000")], 150_000_000, 0, 0);
    let reset = [
        (0, "power=100000 energy=500000"),
        (500, "power=100000 energy=550000"),
        (1000, "power=300000 energy=10"),
        (1500, "power=300000 energy=20"),
    ];
    check(&reset, 50_000_000 + 100_000_000 + 10_000, 100_000_000, 1);
    check(&[(0, ""), (500, "")], 0, 0, 0);
}

#[test]
fn it_stops_at_once_and_shuts_the_library_down() {
    let fake = Fake::new(&whole(A, 1));
    let monitor = fake.monitor(Duration::from_secs(3600), &clock());
    until(&monitor, |snapshot| snapshot.looks == 1);
    let begin = Instant::now();
    drop(monitor);
    assert!(begin.elapsed() < Duration::from_secs(1), "{:?}", begin.elapsed());
    assert_eq!(fake.calls(), ["init", "shutdown"]);
}

#[test]
fn a_driver_that_hangs_holds_up_nobody() {
    let fake = Fake::new(&format!("sleep_ms 6000\n{}", whole(A, 1)));
    let monitor = fake.monitor(SOON, &clock());
    let begin = Instant::now();
    for _ in 0..1000 {
        assert_eq!(monitor.snapshot().state, GpuState::Starting);
    }
    drop(monitor);
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
}
