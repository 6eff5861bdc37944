//! Rotary position embedding (Su et al., 2021) on q and k in place, with the optional per-head
//! RMSNorm of Qwen3 before it. Pairs are `(i, i + head_dim / 2)`.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result};

use super::{
    CpuPool, View,
    arena::{Shared, f32_mut, for_rows, versions},
    rms_norm::inverse_rms,
};

pub struct Rope<'a> {
    /// `[rows, (heads + 2 kv_heads) * head_dim]`: q, k, v.
    pub qkv: View,
    pub positions: &'a [u32],
    /// Heads of q and k together.
    pub qk_heads: usize,
    pub heads: usize,
    pub head_dim: usize,
    /// `[positions, head_dim]`: cosines, then sines.
    pub table: &'a [f32],
    /// Weights of q's and k's norm, each `[head_dim]`.
    pub norms: Option<(&'a [f32], &'a [f32])>,
    pub eps: f32,
    pub pool: &'a CpuPool,
}

impl InplaceOp1 for Rope<'_> {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let arena = Shared::new(f32_mut("rope", storage, layout)?);
        let (dim, cols) = (self.head_dim, self.qkv.cols);
        for_rows(self.pool, self.positions.len(), cols, &|row| {
            let angles = &self.table[self.positions[row] as usize * dim..][..dim];
            for head in 0..self.qk_heads {
                // SAFETY: heads and rows are disjoint.
                let x = unsafe { arena.part(self.qkv.offset + row * cols + head * dim, dim) };
                if let Some((q_norm, k_norm)) = self.norms {
                    let weight = if head < self.heads { q_norm } else { k_norm };
                    normalise_in_place(x, weight, self.eps);
                }
                rotate(x, angles);
            }
        });
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
