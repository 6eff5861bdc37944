//! Rows of the embedding table: `y[rows, hidden]`.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, bail};

use super::{
    CpuPool, PackedWeight, StepInputs, View,
    arena::{Shared, f32_mut, for_rows},
    step_inputs::TOKEN_FROM_DEVICE,
};

pub struct Embed<'a> {
    pub table: &'a PackedWeight,
    pub inputs: &'a StepInputs,
    /// Last sampled token by slot.
    pub sampled: &'a [u32],
    pub y: View,
    pub pool: &'a CpuPool,
}

impl InplaceOp1 for Embed<'_> {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let rows = self.inputs.tokens();
        let mut ids = Vec::with_capacity(rows);
        for (row, &id) in self.inputs.token_ids.iter().enumerate() {
            let slot = self.inputs.last_token_slot[row] as usize;
            let id = if id == TOKEN_FROM_DEVICE { self.sampled[slot] } else { id } as usize;
            if id >= self.table.n() {
                bail!("token id {id} is outside the vocabulary of {}", self.table.n());
            }
            ids.push(id);
        }
        let out = Shared::new(&mut f32_mut("embed", storage, layout)?[self.y.range(rows)]);
        for_rows(self.pool, rows, self.y.cols, &|row| {
            // SAFETY: rows are disjoint.
            let y = unsafe { out.part(row * self.y.cols, self.y.cols) };
            self.table.dequant_row(ids[row], y);
        });
        Ok(())
    }
}
