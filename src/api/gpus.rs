//! The machine's GPUs, as an operator sees them.

use serde_json::{Value, json};

use crate::gpu::{DeviceStatus, GpuSnapshot, GpuState, throttle_names};

/// Every GPU ever seen; `own` is the one whose time and energy are attributed.
pub fn describe(seen: &GpuSnapshot, own: Option<&str>, own_pid: u32) -> Value {
    seen.devices.iter().map(|device| device_of(device, own, own_pid)).collect()
}

/// Why there is nothing to see, where there is a reason.
pub fn reason(seen: &GpuSnapshot) -> Option<String> {
    match &seen.state {
        GpuState::Absent(fault) | GpuState::Failing(fault) => Some(fault.to_string()),
        GpuState::Starting | GpuState::Sampling => None,
    }
}

/// What the device cannot tell is null.
fn device_of(device: &DeviceStatus, own: Option<&str>, own_pid: u32) -> Value {
    let sample = device.sample.clone().unwrap_or_default();
    let throttled: Option<Vec<_>> = sample.throttle.map(|bits| throttle_names(bits).collect());
    let ppm = |ppm: u32| f64::from(ppm) / 1e6;
    json!({
        "uuid": device.uuid,
        "name": device.name,
        "index": device.index,
        "attributed": own == Some(device.uuid.as_str()),
        "fault": device.fault.as_ref().map(ToString::to_string),
        "gpu_percent": sample.gpu_percent,
        "memory_percent": sample.memory_percent,
        "memory_used_bytes": sample.memory_used_bytes,
        "memory_total_bytes": sample.memory_total_bytes,
        "power_watts": sample.power_mw.map(|mw| mw as f64 / 1e3),
        "sm_clock_mhz": sample.sm_clock_mhz,
        "memory_clock_mhz": sample.memory_clock_mhz,
        "throttle_reasons": throttled,
        "processes": sample.processes.as_ref().map(Vec::len),
        "foreign_share": sample.foreign_ppm(own_pid).map(ppm),
        "joules": device.energy.total_uj as f64 / 1e6,
        "joules_estimated": device.energy.estimated_uj as f64 / 1e6,
        "counter_resets": device.energy.resets,
    })
}
