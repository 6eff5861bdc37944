//! Values that look random in a GPU's memory, for weights that nobody has.

use candle_core::Result;

use super::gpu::{Args, Gpu, Half, Launch, PACK, THREADS, Work, kernel};

/// Blocks that write at the memory's speed.
const BLOCKS_MAX: usize = 4096;

/// `count` elements, a multiple of 8, evenly within `size` of 0; the same seed gives the same.
pub struct Fill {
    pub to: u64,
    pub count: usize,
    pub dtype: Half,
    pub seed: u32,
    pub size: f32,
}

impl Fill {
    pub fn run(&self, gpu: &dyn Gpu) -> Result<()> {
        let blocks = self.count.div_ceil(PACK * THREADS as usize).min(BLOCKS_MAX);
        gpu.launch(&Launch {
            kernel: kernel!("fill", self.dtype),
            grid: [blocks as u32, 1, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(self.to)
                .u64(self.count as u64)
                .u32(self.seed as usize)
                .f32(self.size),
            work: Work::elements(self.count),
        })
    }
}
