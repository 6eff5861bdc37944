//! Gauges of the machine's GPUs. Their number is bounded by the monitor, and so are the labels.

use prometheus::{CounterVec, GaugeVec, Opts, Registry};

use crate::gpu::{GpuSnapshot, throttle_names};

const LABELS: [&str; 2] = ["uuid", "gpu"];

/// Adds what every GPU told last; nothing where there is none. A quantity that a device does not
/// tell has no series.
pub fn add(to: &Registry, seen: &GpuSnapshot) -> prometheus::Result<()> {
    if seen.devices.is_empty() {
        return Ok(());
    }
    let gauge = |name: &str, help: &str| {
        let gauge = GaugeVec::new(Opts::new(name, help), &LABELS)?;
        to.register(Box::new(gauge.clone()))?;
        prometheus::Result::Ok(gauge)
    };
    let up = gauge("candela:gpu_up", "1 where the GPU can be read, 0 while it cannot.")?;
    let busy = gauge("candela:gpu_busy_ratio", "Share of time in which a kernel ran.")?;
    let memory_busy =
        gauge("candela:gpu_memory_busy_ratio", "Share of time in which memory was accessed.")?;
    let power = gauge("candela:gpu_power_watts", "Power drawn.")?;
    let used = gauge("candela:gpu_memory_used_bytes", "Memory in use, by any process.")?;
    let total = gauge("candela:gpu_memory_bytes", "Memory there is.")?;
    let sm_clock = gauge("candela:gpu_sm_clock_hertz", "Clock of the multiprocessors.")?;
    let memory_clock = gauge("candela:gpu_memory_clock_hertz", "Clock of the memory.")?;
    let energy = CounterVec::new(
        Opts::new("candela:gpu_energy_joules_total", "Energy drawn since the server began."),
        &LABELS,
    )?;
    to.register(Box::new(energy.clone()))?;
    let throttled = GaugeVec::new(
        Opts::new("candela:gpu_throttled", "1 for each reason why clocks are held down."),
        &["uuid", "gpu", "reason"],
    )?;
    to.register(Box::new(throttled.clone()))?;
    for device in &seen.devices {
        let labels = [device.uuid.as_str(), device.name.as_str()];
        up.with_label_values(&labels).set(f64::from(u8::from(device.fault.is_none())));
        energy.with_label_values(&labels).inc_by(device.energy.total_uj as f64 / 1e6);
        // An old sample says nothing about now.
        let Some(sample) = device.sample.as_ref().filter(|_| device.fault.is_none()) else {
            continue;
        };
        let set = |gauge: &GaugeVec, value: Option<f64>| {
            if let Some(value) = value {
                gauge.with_label_values(&labels).set(value);
            }
        };
        set(&busy, sample.gpu_percent.map(|percent| f64::from(percent) / 100.0));
        set(&memory_busy, sample.memory_percent.map(|percent| f64::from(percent) / 100.0));
        set(&power, sample.power_mw.map(|mw| mw as f64 / 1e3));
        set(&used, sample.memory_used_bytes.map(|bytes| bytes as f64));
        set(&total, sample.memory_total_bytes.map(|bytes| bytes as f64));
        set(&sm_clock, sample.sm_clock_mhz.map(|mhz| f64::from(mhz) * 1e6));
        set(&memory_clock, sample.memory_clock_mhz.map(|mhz| f64::from(mhz) * 1e6));
        for reason in throttle_names(sample.throttle.unwrap_or(0)) {
            throttled.with_label_values(&[labels[0], labels[1], reason]).set(1.0);
        }
    }
    Ok(())
}
