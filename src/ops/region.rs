//! Memory that ops work on in place.

use candle_core::{CudaStorage, InplaceOp1, InplaceOp2, Layout, Result, Storage, Tensor, bail};

use super::gpu::Buffer;

/// A tensor of candle's, or memory of an emulated GPU.
pub enum Region {
    Tensor(Tensor),
    Emulated(Buffer),
}

/// What an op does on a GPU to memory at an address; `cuda_fwd` finds that of a tensor.
pub trait GpuOp1: InplaceOp1 {
    fn gpu_fwd(&self, memory: u64) -> Result<()>;
}

/// As [`GpuOp1`], with a second memory.
pub trait GpuOp2: InplaceOp2 {
    fn gpu_fwd(&self, memory: u64, other: u64) -> Result<()>;
}

impl Region {
    /// Where it begins in a GPU's memory.
    pub fn address(&self) -> Result<u64> {
        match self {
            Self::Tensor(tensor) => {
                let (storage, layout) = tensor.storage_and_layout();
                match &*storage {
                    Storage::Cuda(storage) => address(storage, layout),
                    _ => bail!("a tensor is not on a GPU"),
                }
            }
            Self::Emulated(memory) => Ok(memory.address),
        }
    }

    pub fn apply(&self, op: &impl GpuOp1) -> Result<()> {
        match self {
            Self::Tensor(tensor) => tensor.inplace_op1(op),
            Self::Emulated(memory) => op.gpu_fwd(memory.address),
        }
    }

    pub fn apply_with(&self, other: &Region, op: &impl GpuOp2) -> Result<()> {
        match (self, other) {
            (Self::Tensor(tensor), Self::Tensor(other)) => tensor.inplace_op2(other, op),
            (Self::Emulated(memory), Self::Emulated(other)) => {
                op.gpu_fwd(memory.address, other.address)
            }
            _ => {
                bail!("{} has one memory on a GPU that is emulated, and one that is not", op.name())
            }
        }
    }
}

/// Where the elements of a contiguous tensor on a GPU begin.
#[cfg(feature = "cuda")]
pub fn address(storage: &CudaStorage, layout: &Layout) -> Result<u64> {
    use candle_core::{backend::BackendStorage, cuda_backend::CudaStorageSlice as Slice};
    use cudarc::driver::DevicePtr;

    if !layout.is_contiguous() || layout.start_offset() != 0 {
        bail!("a GPU op wants a contiguous tensor");
    }
    let stream = storage.device().cuda_stream();
    // Nothing is waited for: all there is runs on this one stream.
    match &storage.slice {
        Slice::BF16(slice) => Ok(slice.device_ptr(&stream).0),
        Slice::F16(slice) => Ok(slice.device_ptr(&stream).0),
        _ => bail!("a GPU op wants a tensor of bf16 or f16"),
    }
}

#[cfg(not(feature = "cuda"))]
pub fn address(_: &CudaStorage, _: &Layout) -> Result<u64> {
    bail!("this program was built without CUDA")
}
