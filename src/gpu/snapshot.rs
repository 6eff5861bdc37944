//! What the monitor tells everyone else, replaced as a whole after every look.

use super::{EnergyTotal, GpuFault, GpuSample};

/// How the monitor is.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum GpuState {
    /// It has not looked yet.
    #[default]
    Starting,
    /// There is nothing to monitor: the normal state of a machine without GPUs.
    Absent(GpuFault),
    Sampling,
    /// The driver answers nothing; it is asked again.
    Failing(GpuFault),
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuSnapshot {
    pub state: GpuState,
    /// Looks so far, failed ones too.
    pub looks: u64,
    /// Every device ever seen, by UUID.
    pub devices: Vec<DeviceStatus>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct DeviceStatus {
    pub uuid: String,
    pub name: String,
    /// The driver's number when last seen.
    pub index: u32,
    /// The newest good one; its time says how old it is.
    pub sample: Option<GpuSample>,
    /// Set while the device cannot be read.
    pub fault: Option<GpuFault>,
    pub energy: EnergyTotal,
}

impl GpuSnapshot {
    pub fn device(&self, uuid: &str) -> Option<&DeviceStatus> {
        self.devices.iter().find(|device| device.uuid == uuid)
    }
}
