//! Residual add and RMSNorm (Zhang and Sennrich, 2019): `h += x`, then `y = h / rms(h) * weight`.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result};

use super::{
    CpuPool, View,
    arena::{Shared, f32_mut, for_rows, versions},
};

/// `cols` of the views is the size normalised over.
pub struct RmsNorm<'a> {
    /// Added to `h` first.
    pub residual: Option<View>,
    pub h: View,
    pub y: View,
    pub rows: usize,
    pub weight: &'a [f32],
    pub eps: f32,
    pub pool: &'a CpuPool,
}

impl InplaceOp1 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let arena = Shared::new(f32_mut("rms_norm", storage, layout)?);
        let cols = self.h.cols;
        for_rows(self.pool, self.rows, cols, &|row| {
            // SAFETY: the views do not overlap and rows are disjoint.
            unsafe {
                let h = arena.part(self.h.offset + row * cols, cols);
                if let Some(residual) = self.residual {
                    add(h, arena.part(residual.offset + row * cols, cols));
                }
                let y = arena.part(self.y.offset + row * cols, cols);
                normalise(h, self.weight, self.eps, y);
            }
        });
        Ok(())
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
