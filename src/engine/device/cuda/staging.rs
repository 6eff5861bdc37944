//! Pinned memory that copies run through, so that they run beside the host.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::Result;
use cudarc::driver::{
    CudaContext, CudaEvent, CudaStream, PinnedHostSlice,
    result::{memcpy_dtoh_async, memcpy_htod_async},
};

use super::failed;

pub type Pinned = PinnedHostSlice<u8>;

/// Copies to the GPU that may be under way at once.
const UPLOADS: usize = 8;
/// Least size of a buffer: most copies are small.
const PINNED_BYTES_MIN: usize = 64 << 10;

/// Buffers that take turns.
pub struct Uploads {
    slots: Vec<Slot>,
    next: usize,
}

struct Slot {
    memory: Pinned,
    /// Its last copy has been read.
    read: CudaEvent,
}

impl Uploads {
    pub fn new(context: &Arc<CudaContext>) -> Result<Self> {
        let slot = || {
            let memory = pinned(context, PINNED_BYTES_MIN)?;
            Ok(Slot { memory, read: context.new_event(None).map_err(failed)? })
        };
        let slots = (0..UPLOADS).map(|_| slot()).collect::<Result<_>>()?;
        Ok(Self { slots, next: 0 })
    }

    pub fn send(
        &mut self,
        context: &Arc<CudaContext>,
        stream: &CudaStream,
        to: u64,
        bytes: &[u8],
    ) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let slot = &mut self.slots[self.next];
        self.next = (self.next + 1) % UPLOADS;
        slot.read.synchronize().map_err(failed)?;
        if slot.memory.len() < bytes.len() {
            slot.memory = pinned(context, bytes.len().next_power_of_two())?;
        }
        let staged = &mut slot.memory.as_mut_slice().map_err(failed)?[..bytes.len()];
        staged.copy_from_slice(bytes);
        context.bind_to_thread().map_err(failed)?;
        // SAFETY: the slot is not written again before `read` says so, and the caller has memory of that
        // size at `to`.
        unsafe { memcpy_htod_async(to, staged, stream.cu_stream()) }.map_err(failed)?;
        slot.read.record(stream).map_err(failed)
    }
}

/// Buffers for results, which come back once they were read.
#[derive(Default)]
pub struct Downloads(Mutex<Vec<Pinned>>);

impl Downloads {
    /// Begins to copy to a buffer, whose owner waits until it has arrived.
    pub fn start(
        &self,
        context: &Arc<CudaContext>,
        stream: &CudaStream,
        from: u64,
        bytes: usize,
    ) -> Result<Pinned> {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = free.iter().position(|memory| memory.len() >= bytes);
        let mut memory = match fits {
            Some(at) => free.swap_remove(at),
            None => pinned(context, bytes.next_power_of_two().max(PINNED_BYTES_MIN))?,
        };
        drop(free);
        if bytes > 0 {
            let to = &mut memory.as_mut_slice().map_err(failed)?[..bytes];
            context.bind_to_thread().map_err(failed)?;
            // SAFETY: the buffer belongs to the step until it has arrived, and the caller has as many
            // bytes at `from`.
            unsafe { memcpy_dtoh_async(to, from, stream.cu_stream()) }.map_err(failed)?;
        }
        Ok(memory)
    }

    pub fn give_back(&self, memory: Pinned) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
    }
}

/// Memory that both sides read well.
fn pinned(context: &Arc<CudaContext>, bytes: usize) -> Result<Pinned> {
    // SAFETY: every byte is written before it is read.
    unsafe { context.alloc_pinned_with_flags(bytes, 0) }.map_err(failed)
}
