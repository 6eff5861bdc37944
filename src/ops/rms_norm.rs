//! Residual add and RMSNorm (Zhang and Sennrich, 2019): `h += x`, then `y = h / rms(h) * weight`.

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, bail};

use super::{
    Place, Vector, View,
    arena::{Shared, f32_mut, for_rows, versions},
    gpu::{Args, Launch, PACK, Work, kernel},
    region::{self, GpuOp1},
};

/// Packs of a row that a thread of the GPU's kernel keeps, and threads of its block.
const GPU_PACKS: usize = 2;
const GPU_THREADS_MAX: usize = 1024;

/// `cols` of the views is the size normalised over.
pub struct RmsNorm<'a> {
    /// Added to `h` first.
    pub residual: Option<View>,
    pub h: View,
    pub y: View,
    pub rows: usize,
    pub weight: &'a Vector,
    pub eps: f32,
    pub place: &'a Place,
}

impl InplaceOp1 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let arena = Shared::new(f32_mut("rms_norm", storage, layout)?);
        let (cols, weight) = (self.h.cols, self.weight.host()?);
        for_rows(self.place.pool()?, self.rows, cols, &|row| {
            // SAFETY: the views do not overlap and rows are disjoint.
            unsafe {
                let h = arena.part(self.h.offset + row * cols, cols);
                if let Some(residual) = self.residual {
                    add(h, arena.part(residual.offset + row * cols, cols));
                }
                let y = arena.part(self.y.offset + row * cols, cols);
                normalise(h, weight, self.eps, y);
            }
        });
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.gpu_fwd(region::address(storage, layout)?)
    }
}

impl GpuOp1 for RmsNorm<'_> {
    fn gpu_fwd(&self, arena: u64) -> Result<()> {
        let (place, cols) = (self.place.gpu()?, self.h.cols);
        let threads = cols.div_ceil(PACK * GPU_PACKS).next_multiple_of(32);
        if threads > GPU_THREADS_MAX {
            bail!("rms_norm: a row of {cols} is too long for the GPU's kernel");
        }
        let residual = self.residual.map_or(0, |residual| residual.address(arena));
        let passes = if self.residual.is_some() { 4 } else { 2 };
        place.gpu.launch(&Launch {
            kernel: kernel!("rms_norm", place.dtype),
            grid: [self.rows as u32, 1, 1],
            threads: threads as u32,
            shared_bytes: 0,
            args: Args::default()
                .address(self.h.address(arena))
                .address(residual)
                .address(self.weight.gpu()?)
                .address(self.y.address(arena))
                .u32(cols)
                .f32(self.eps),
            work: Work::elements(passes * self.rows * cols + cols),
        })
    }
}

versions! { fn add(h: &mut [f32], x: &[f32]) = add_body }
versions! {
    /// `y = x / rms(x) * weight`.
    pub fn normalise(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) = normalise_body
}

#[inline(always)]
fn add_body(h: &mut [f32], x: &[f32]) {
    for (h, x) in h.iter_mut().zip(x) {
        *h += x;
    }
}

/// Sum of squares in 16 lanes and a tail, added in a fixed order.
#[inline(always)]
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    let mut lanes = [0f32; 16];
    let chunks = x.chunks_exact(16);
    let mut total: f32 = chunks.remainder().iter().map(|x| x * x).sum();
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = x.mul_add(*x, *lane);
        }
    }
    for lane in lanes {
        total += lane;
    }
    1.0 / (total / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn normalise_body(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    let scale = inverse_rms(x, eps);
    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
        *y = x * scale * weight;
    }
}
