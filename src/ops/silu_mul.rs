//! SwiGLU's gate (Shazeer, 2020): `y = silu(gate) * up`.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result};

use super::{
    CpuPool, View,
    arena::{Shared, exp, f32_mut, for_rows, versions},
};

pub struct SiluMul<'a> {
    /// `[rows, 2 * size]`: gate, then up.
    pub gate_up: View,
    /// `[rows, size]`.
    pub y: View,
    pub rows: usize,
    pub pool: &'a CpuPool,
}

impl InplaceOp1 for SiluMul<'_> {
    fn name(&self) -> &'static str {
        "silu_mul"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let arena = Shared::new(f32_mut("silu_mul", storage, layout)?);
        let size = self.y.cols;
        for_rows(self.pool, self.rows, 4 * size, &|row| {
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
}

versions! { fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) = silu_mul_body }

#[inline(always)]
fn silu_mul_body(gate: &[f32], up: &[f32], y: &mut [f32]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y = gate / (1.0 + exp(-gate)) * up;
    }
}
