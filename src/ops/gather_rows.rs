//! Picks the rows whose logits are wanted.

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result};

use super::{
    Place, View,
    arena::f32_mut,
    gpu::{Args, Launch, THREADS, Work, kernel},
    region::{self, GpuOp1},
};

pub struct GatherRows<'a> {
    pub x: View,
    pub y: View,
    /// On a GPU they are the `sample_rows` of its step.
    pub rows: &'a [u32],
    pub place: &'a Place,
}

impl InplaceOp1 for GatherRows<'_> {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let arena = f32_mut("gather_rows", storage, layout)?;
        for (to, from) in self.rows.iter().enumerate() {
            let from = self.x.offset + *from as usize * self.x.cols;
            arena.copy_within(from..from + self.x.cols, self.y.offset + to * self.y.cols);
        }
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.gpu_fwd(region::address(storage, layout)?)
    }
}

impl GpuOp1 for GatherRows<'_> {
    fn gpu_fwd(&self, arena: u64) -> Result<()> {
        let (place, wanted) = (self.place.gpu()?, self.rows.len());
        if wanted == 0 {
            return Ok(());
        }
        place.gpu.launch(&Launch {
            kernel: kernel!("gather_rows", place.dtype),
            grid: [wanted as u32, 1, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(self.x.address(arena))
                .address(place.step.sample_rows)
                .address(self.y.address(arena))
                .u32(self.x.cols),
            work: Work::elements(2 * wanted * self.x.cols),
        })
    }
}
