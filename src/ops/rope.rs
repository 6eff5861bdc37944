//! Rotary position embedding (Su et al., 2021) on q and k in place, with the optional per-head
//! RMSNorm of Qwen3 before it. Pairs are `(i, i + head_dim / 2)`.

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result};

use super::{
    Place, Vector, View,
    arena::{Shared, f32_mut, for_rows, versions},
    region::{self, GpuOp1},
    rms_norm::inverse_rms,
};

pub struct Rope<'a> {
    /// `[rows, (heads + 2 kv_heads) * head_dim]`: q, k, v.
    pub qkv: View,
    /// A GPU has its own.
    pub positions: &'a [u32],
    /// Heads of q and k together.
    pub qk_heads: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// `[positions, head_dim]`: cosines, then sines.
    pub table: &'a Vector,
    /// Weights of q's and k's norm, each `[head_dim]`.
    pub norms: Option<(&'a Vector, &'a Vector)>,
    pub eps: f32,
    pub place: &'a Place,
}

impl InplaceOp1 for Rope<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let arena = Shared::new(f32_mut("rope", storage, layout)?);
        let (dim, cols) = (self.head_dim, self.qkv.cols);
        let table = self.table.host()?;
        let norms = match self.norms {
            Some((q, k)) => Some((q.host()?, k.host()?)),
            None => None,
        };
        for_rows(self.place.pool()?, self.positions.len(), cols, &|row| {
            let angles = &table[self.positions[row] as usize * dim..][..dim];
            for head in 0..self.qk_heads {
                // SAFETY: heads and rows are disjoint.
                let x = unsafe { arena.part(self.qkv.offset + row * cols + head * dim, dim) };
                if let Some((q_norm, k_norm)) = norms {
                    let weight = if head < self.heads { q_norm } else { k_norm };
                    normalise_in_place(x, weight, self.eps);
                }
                rotate(x, angles);
            }
        });
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.gpu_fwd(region::address(storage, layout)?)
    }
}

impl GpuOp1 for Rope<'_> {
    /// Nothing: the kernel that writes K and V to the cache rotates them and q, in one pass over them.
    fn gpu_fwd(&self, _: u64) -> Result<()> {
        Ok(())
    }
}

versions! { fn rotate(x: &mut [f32], angles: &[f32]) = rotate_body }
versions! {
    fn normalise_in_place(x: &mut [f32], weight: &[f32], eps: f32) = normalise_in_place_body
}

#[inline(always)]
fn rotate_body(x: &mut [f32], angles: &[f32]) {
    let half = x.len() / 2;
    let (first, second) = x.split_at_mut(half);
    let (cos, sin) = angles.split_at(half);
    for index in 0..half {
        let (a, b) = (first[index], second[index]);
        first[index] = a.mul_add(cos[index], -(b * sin[index]));
        second[index] = b.mul_add(cos[index], a * sin[index]);
    }
}

#[inline(always)]
fn normalise_in_place_body(x: &mut [f32], weight: &[f32], eps: f32) {
    let scale = inverse_rms(x, eps);
    for (x, weight) in x.iter_mut().zip(weight) {
        *x = *x * scale * weight;
    }
}
