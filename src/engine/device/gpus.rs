//! The GPUs that this build and this machine have.

use std::sync::Arc;

use crate::ops::gpu::Gpu;

/// What a GPU is called, and how much memory it has.
#[derive(Clone, Debug)]
pub struct GpuFacts {
    pub name: String,
    /// As NVML has it: `GPU-` and groups of hexadecimal digits.
    pub uuid: String,
    pub capability: (i32, i32),
    pub free_bytes: u64,
    pub total_bytes: u64,
}

/// A GPU whose kernels are loaded.
pub struct OpenGpu {
    pub gpu: Arc<dyn Gpu>,
    pub facts: GpuFacts,
}

#[cfg(feature = "cuda")]
mod found {
    use std::sync::Arc;

    use super::{GpuFacts, OpenGpu};
    use crate::engine::device::cuda::{self, Cuda};

    /// How many there are, or what to do so that there are.
    pub fn count() -> Result<usize, String> {
        cuda::count()
    }

    /// Opens one by its number.
    pub fn open(ordinal: usize) -> Result<OpenGpu, String> {
        let gpu = Cuda::open(ordinal).map_err(|error| error.to_string())?;
        let facts: GpuFacts = gpu.facts().map_err(|error| error.to_string())?;
        Ok(OpenGpu { gpu: Arc::new(gpu), facts })
    }
}

#[cfg(not(feature = "cuda"))]
mod found {
    use super::OpenGpu;

    const WITHOUT: &str = "this program was built without CUDA: build it with \
        `cargo build --release --features cuda`, or say --device cpu";

    /// None, as no build without CUDA has any.
    pub fn count() -> Result<usize, String> {
        Err(WITHOUT.into())
    }

    pub fn open(_: usize) -> Result<OpenGpu, String> {
        Err(WITHOUT.into())
    }
}

pub use found::{count, open};

/// Whether this build can use a GPU at all.
pub const BUILT: bool = cfg!(feature = "cuda");
