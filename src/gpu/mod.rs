//! What the driver says about the GPUs: use, memory, power, energy, clocks, and whose it is.
//!
//! Read through NVML, NVIDIA's management library (`libnvidia-ml.so.1`, part of the driver; NVML API
//! reference, docs.nvidia.com/deploy/nvml-api), which is loaded at run time: the same binary serves
//! where there is none. No driver and no GPU are normal and said once. Anything else that fails is a
//! [`GpuFault`]; nothing here panics on what a driver does.
//!
//! A [`GpuMonitor`] samples on its own thread and publishes the newest [`GpuSnapshot`]. Devices are
//! known by UUID: the order in which NVML counts them is not CUDA's, and may change.
//!
//! Units: bytes, mW, MHz, percent of time as NVML averages it. Energy is a running total in
//! microjoules since the monitor began, `sum(counter_i - counter_(i-1))`; where a device has no
//! counter, `sum((power_i + power_(i-1)) / 2 * elapsed)`. Power across a reset or a gap counts as
//! estimated.

mod energy;
mod fault;
mod monitor;
mod nvml;
mod sample;
mod snapshot;

pub use energy::EnergyTotal;
pub use fault::GpuFault;
pub use monitor::{DEFAULT_INTERVAL, GpuFeed, GpuMonitor};
pub use nvml::NvmlSource;
pub use sample::{GpuReading, GpuSample, GpuSource, ProcessUse, throttle_names};
pub use snapshot::{DeviceStatus, GpuSnapshot, GpuState};
