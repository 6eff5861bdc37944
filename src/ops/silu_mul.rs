//! SwiGLU's gate (Shazeer, 2020): `y = silu(gate) * up`.

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result};

use super::{
    Place, View,
    arena::{Shared, exp, f32_mut, for_rows, versions},
    gpu::{Args, Launch, PACK, THREADS, Work, kernel},
    region::{self, GpuOp1},
};

pub struct SiluMul<'a> {
    /// `[rows, 2 * size]`: gate, then up.
    pub gate_up: View,
    /// `[rows, size]`.
    pub y: View,
    pub rows: usize,
    pub place: &'a Place,
}

impl InplaceOp1 for SiluMul<'_> {
    fn name(&self) -> &'static str {
        "silu_mul"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let arena = Shared::new(f32_mut("silu_mul", storage, layout)?);
        let size = self.y.cols;
        for_rows(self.place.pool()?, self.rows, 4 * size, &|row| {
            // SAFETY: the views do not overlap and rows are disjoint.
            let (gate_up, y) = unsafe {
                (
                    arena.part(self.gate_up.offset + row * 2 * size, 2 * size),
                    arena.part(self.y.offset + row * size, size),
                )
            };
            let (gate, up) = gate_up.split_at(size);
            silu_mul(gate, up, y);
        });
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.gpu_fwd(region::address(storage, layout)?)
    }
}

impl GpuOp1 for SiluMul<'_> {
    fn gpu_fwd(&self, arena: u64) -> Result<()> {
        let (place, size) = (self.place.gpu()?, self.y.cols);
        place.gpu.launch(&Launch {
            kernel: kernel!("silu_mul", place.dtype),
            grid: [size.div_ceil(PACK * THREADS as usize) as u32, self.rows as u32, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(self.gate_up.address(arena))
                .address(self.y.address(arena))
                .u32(size),
            work: Work::elements(3 * self.rows * size),
        })
    }
}

versions! { fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) = silu_mul_body }

#[inline(always)]
fn silu_mul_body(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y = gate / (1.0 + exp(-gate)) * up;
    }
}
