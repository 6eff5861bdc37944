//! Picks the rows whose logits are wanted.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result};

use super::{View, arena::f32_mut};

pub struct GatherRows<'a> {
    pub x: View,
    pub y: View,
    pub rows: &'a [u32],
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
}
