//! Why there is nothing to read.

use thiserror::Error;

#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum GpuFault {
    #[error("NVML is not here: {0}")]
    NoLibrary(String),
    #[error("the NVIDIA driver is not loaded")]
    NoDriver,
    #[error("the driver knows no GPU")]
    NoDevice,
    #[error("the NVML library lacks what is needed: {0}")]
    NoSymbol(String),
    #[error("the driver lets only other users read the GPU")]
    NoPermission,
    #[error(
        "the NVML library and the loaded driver are of different versions: reboot, or reload the driver"
    )]
    VersionMismatch,
    #[error("the GPU is lost: it fell off the bus, or needs a reset")]
    Lost,
    /// Neither NVML nor the GPU is known to be at fault.
    #[error("{0}")]
    Other(String),
}

impl GpuFault {
    /// Whether this is a machine without NVIDIA GPUs, rather than one with a problem.
    pub fn is_absence(&self) -> bool {
        matches!(self, Self::NoLibrary(_) | Self::NoDriver | Self::NoDevice)
    }
}
