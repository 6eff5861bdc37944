//! Rows of the embedding table: `y[rows, hidden]`.

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, bail};

use super::{
    Matrix, Place, StepInputs, View,
    arena::{Shared, f32_mut, for_rows},
    gpu::{Args, Launch, THREADS, Work, kernel},
    region::{self, GpuOp1},
    step_inputs::TOKEN_FROM_DEVICE,
};

pub struct Embed<'a> {
    pub table: &'a Matrix,
    pub inputs: &'a StepInputs,
    /// Last sampled token by slot; a GPU has its own.
    pub sampled: &'a [u32],
    pub y: View,
    pub place: &'a Place,
}

impl InplaceOp1 for Embed<'_> {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (rows, table) = (self.inputs.tokens(), self.table.host()?);
        let mut ids = Vec::with_capacity(rows);
        for (row, &id) in self.inputs.token_ids.iter().enumerate() {
            let slot = self.inputs.last_token_slot[row] as usize;
            let id = if id == TOKEN_FROM_DEVICE { self.sampled[slot] } else { id } as usize;
            if id >= table.n() {
                bail!("token id {id} is outside the vocabulary of {}", table.n());
            }
            ids.push(id);
        }
        let out = Shared::new(&mut f32_mut("embed", storage, layout)?[self.y.range(rows)]);
        for_rows(self.place.pool()?, rows, self.y.cols, &|row| {
            // SAFETY: rows are disjoint.
            let y = unsafe { out.part(row * self.y.cols, self.y.cols) };
            table.dequant_row(ids[row], y);
        });
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.gpu_fwd(region::address(storage, layout)?)
    }
}

impl GpuOp1 for Embed<'_> {
    fn gpu_fwd(&self, arena: u64) -> Result<()> {
        let (rows, place, table) = (self.inputs.tokens(), self.place.gpu()?, self.table.gpu()?);
        place.gpu.launch(&Launch {
            kernel: kernel!("embed", place.dtype),
            grid: [rows as u32, 1, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(table.memory.address)
                .address(place.step.token_ids)
                .address(place.step.last_token_slot)
                .address(place.step.sampled)
                .address(self.y.address(arena))
                .u32(table.n)
                .u32(self.y.cols),
            work: Work::elements(2 * rows * self.y.cols),
        })
    }
}
