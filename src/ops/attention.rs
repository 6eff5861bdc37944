//! Causal attention over the paged cache, grouped queries, optional sliding window, one ragged
//! batch of prefill chunks and decodes.
//!
//! Online softmax (Milakov and Gimelshein, 2018) runs over KV blocks at absolute positions, so a
//! row's result does not depend on chunking, batch or threads.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result, bail};

use super::{
    CpuPool, StepInputs, View,
    arena::{Shared, exp, f32_mut, f32_ref, versions},
    kv_cache::{KV_BLOCK_TOKENS, KvShape},
};

/// Largest head size and group of query heads per KV head that the kernel keeps on its stack.
pub const HEAD_DIM_MAX: usize = 256;
pub const GROUP_MAX: usize = 16;

/// First tensor: the arena; second: the cache.
pub struct Attention<'a> {
    pub shape: KvShape,
    pub layer: usize,
    pub heads: usize,
    /// `[rows, (heads + 2 kv_heads) * head_dim]`.
    pub qkv: View,
    /// `[rows, heads * head_dim]`.
    pub y: View,
    pub window: Option<usize>,
    pub inputs: &'a StepInputs,
    pub pool: &'a CpuPool,
}

impl InplaceOp2 for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        arena: &mut CpuStorage,
        arena_layout: &Layout,
        cache: &CpuStorage,
        cache_layout: &Layout,
    ) -> Result<()> {
        let arena = Shared::new(f32_mut("attention", arena, arena_layout)?);
        let cache = f32_ref("attention", cache, cache_layout)?;
        let (dim, group) = (self.shape.head_dim, self.heads / self.shape.kv_heads);
        if dim > HEAD_DIM_MAX
            || group > GROUP_MAX
            || !self.heads.is_multiple_of(self.shape.kv_heads)
        {
            bail!("attention takes heads of up to {HEAD_DIM_MAX} in groups of up to {GROUP_MAX}");
        }
        let inputs = self.inputs;
        let mut seq_of_row = vec![0; inputs.tokens()];
        for seq in 0..inputs.seqs() {
            let rows = inputs.cu_seqlens_q[seq] as usize..inputs.cu_seqlens_q[seq + 1] as usize;
            seq_of_row[rows].fill(seq);
        }
        let units = inputs.tokens() * self.shape.kv_heads;
        let next = std::sync::atomic::AtomicUsize::new(0);
        let body = |_part: usize| {
            loop {
                let unit = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if unit >= units {
                    return;
                }
                let (row, head) = (unit / self.shape.kv_heads, unit % self.shape.kv_heads);
                let table = &inputs.block_tables[seq_of_row[row] * inputs.block_table_stride..];
                // SAFETY: q is only read; the heads of `y` are disjoint between units.
                let (q, y) = unsafe {
                    let q = self.qkv.offset + row * self.qkv.cols + head * group * dim;
                    let y = self.y.offset + row * self.y.cols + head * group * dim;
                    (arena.part(q, group * dim), arena.part(y, group * dim))
                };
                let position = inputs.positions[row] as usize;
                let from = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
                let kv = Kv { cache, shape: self.shape, layer: self.layer, head, table };
                attend(&kv, q, y, from, position + 1);
            }
        };
        if units > 1 {
            self.pool.run(&body)
        } else {
            body(0)
        }
        Ok(())
    }
}

/// K and V of one head of one sequence.
struct Kv<'a> {
    cache: &'a [f32],
    shape: KvShape,
    layer: usize,
    head: usize,
    table: &'a [u32],
}

versions! {
    fn attend(kv: &Kv<'_>, q: &[f32], y: &mut [f32], from: usize, to: usize) = attend_body
}

/// Attention of a group of query heads over positions `from .. to`.
#[inline(always)]
fn attend_body(kv: &Kv<'_>, q: &[f32], y: &mut [f32], from: usize, to: usize) {
    let dim = kv.shape.head_dim;
    let scale = 1.0 / (dim as f32).sqrt();
    let group = q.len() / dim;
    let mut top = [f32::NEG_INFINITY; GROUP_MAX];
    let mut total = [0f32; GROUP_MAX];
    y.fill(0.0);
    for index in from / KV_BLOCK_TOKENS..to.div_ceil(KV_BLOCK_TOKENS) {
        let block = kv.table[index] as usize;
        let k = &kv.cache[kv.shape.k(kv.layer, block, kv.head)..][..kv.shape.head_elements()];
        let v = &kv.cache[kv.shape.v(kv.layer, block, kv.head)..][..kv.shape.head_elements()];
        let first = index * KV_BLOCK_TOKENS;
        for head in 0..group {
            let q = &q[head * dim..(head + 1) * dim];
            let mut scores = [0f32; KV_BLOCK_TOKENS];
            for (q, k) in q.iter().zip(k.chunks_exact(KV_BLOCK_TOKENS)) {
                for (score, k) in scores.iter_mut().zip(k) {
                    *score = k.mul_add(*q, *score);
                }
            }
            let mut best = top[head];
            for (token, score) in scores.iter_mut().enumerate() {
                let seen = first + token >= from && first + token < to;
                *score = if seen { *score * scale } else { f32::NEG_INFINITY };
                best = if *score > best { *score } else { best };
            }
            let shrink = exp(top[head] - best);
            top[head] = best;
            let mut sum = 0f32;
            for score in &mut scores {
                *score = exp(*score - best);
            }
            for score in scores {
                sum += score;
            }
            total[head] = total[head].mul_add(shrink, sum);
            // Slots outside the range may hold anything, NaN included, which a weight of zero
            // does not cancel: they are left out.
            let seen = from.saturating_sub(first)..(to - first).min(KV_BLOCK_TOKENS);
            let (scores, v) = (&scores[seen.clone()], &v[seen.start * dim..seen.end * dim]);
            accumulate(&mut y[head * dim..(head + 1) * dim], scores, v, shrink, dim);
        }
    }
    for head in 0..group {
        let inverse = 1.0 / total[head];
        for y in &mut y[head * dim..(head + 1) * dim] {
            *y *= inverse;
        }
    }
}

/// `y = y * shrink + scores V`, 64 columns at a time so that they stay in registers.
#[inline(always)]
fn accumulate(y: &mut [f32], scores: &[f32], v: &[f32], shrink: f32, dim: usize) {
    for (part, y) in y.chunks_mut(64).enumerate() {
        let columns = part * 64;
        if y.len() == 64 {
            let mut sums = [0f32; 64];
            for (sum, y) in sums.iter_mut().zip(&*y) {
                *sum = y * shrink;
            }
            for (score, v) in scores.iter().zip(v.chunks_exact(dim)) {
                for (sum, v) in sums.iter_mut().zip(&v[columns..columns + 64]) {
                    *sum = v.mul_add(*score, *sum);
                }
            }
            y.copy_from_slice(&sums);
        } else {
            for (index, y) in y.iter_mut().enumerate() {
                let mut sum = *y * shrink;
                for (score, v) in scores.iter().zip(v.chunks_exact(dim)) {
                    sum = v[columns + index].mul_add(*score, sum);
                }
                *y = sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// K is zero, so a row is the mean of the V it may see; all else is NaN.
    fn check(dim: usize, from: usize, to: usize) {
        let shape = KvShape { layers: 1, blocks: 3, kv_heads: 1, head_dim: dim };
        let mut cache = vec![f32::NAN; shape.elements()];
        for token in from..to {
            let (block, slot) = (token / KV_BLOCK_TOKENS, token % KV_BLOCK_TOKENS);
            for d in 0..dim {
                cache[shape.k(0, block, 0) + d * KV_BLOCK_TOKENS + slot] = 0.0;
                cache[shape.v(0, block, 0) + slot * dim + d] = token as f32;
            }
        }
        let kv = Kv { cache: &cache, shape, layer: 0, head: 0, table: &[0, 1, 2] };
        let (q, mut y) = (vec![1.0; 2 * dim], vec![f32::NAN; 2 * dim]);
        attend(&kv, &q, &mut y, from, to);
        let mean = (from + to - 1) as f32 / 2.0;
        assert!(y.iter().all(|y| (y - mean).abs() < 1e-3), "{dim} {from}..{to}: {y:?}");
    }

    #[test]
    fn slots_outside_the_range_do_not_count_whatever_they_hold() {
        for dim in [2, 64, 80, 128] {
            for (from, to) in [(0, 1), (0, 15), (0, 16), (0, 17), (5, 9), (15, 17), (18, 40)] {
                check(dim, from, to);
            }
        }
    }
}
