//! The paged KV cache: where K and V of a block lie, the write of new rows, and block copies.
//!
//! One f32 tensor. Per layer and block: K as `[kv_heads, head_dim, 16]`, so that the 16 tokens of a
//! block are the lanes of a register, then V as `[kv_heads, 16, head_dim]`.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result};

use super::{
    StepInputs, View,
    arena::{f32_mut, f32_ref},
    step_inputs::PAD_SLOT,
};

/// Tokens of one block.
pub const KV_BLOCK_TOKENS: usize = 16;

/// Shape of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    pub layers: usize,
    pub blocks: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl KvShape {
    /// Elements of K, and of V, of one head in one block.
    pub fn head_elements(&self) -> usize {
        self.head_dim * KV_BLOCK_TOKENS
    }

    /// Elements of one block in one layer.
    pub fn block_elements(&self) -> usize {
        2 * self.kv_heads * self.head_elements()
    }

    pub fn elements(&self) -> usize {
        self.layers * self.blocks * self.block_elements()
    }

    pub fn k(&self, layer: usize, block: usize, head: usize) -> usize {
        (layer * self.blocks + block) * self.block_elements() + head * self.head_elements()
    }

    pub fn v(&self, layer: usize, block: usize, head: usize) -> usize {
        self.k(layer, block, self.kv_heads + head)
    }
}

/// Writes k and v of the step's rows; padding rows write nothing. First tensor: the cache; second:
/// the arena.
pub struct KvWrite<'a> {
    pub shape: KvShape,
    pub layer: usize,
    /// `[rows, (heads + 2 kv_heads) * head_dim]`.
    pub qkv: View,
    pub heads: usize,
    pub inputs: &'a StepInputs,
}

impl InplaceOp2 for KvWrite<'_> {
    fn name(&self) -> &'static str {
        "kv_write"
    }

    fn cpu_fwd(
        &self,
        cache: &mut CpuStorage,
        cache_layout: &Layout,
        arena: &CpuStorage,
        arena_layout: &Layout,
    ) -> Result<()> {
        let cache = f32_mut("kv_write", cache, cache_layout)?;
        let arena = f32_ref("kv_write", arena, arena_layout)?;
        let (shape, dim) = (self.shape, self.shape.head_dim);
        for (row, &slot) in self.inputs.slot_mapping.iter().enumerate() {
            if slot == PAD_SLOT {
                continue;
            }
            let (block, token) = (slot as usize / KV_BLOCK_TOKENS, slot as usize % KV_BLOCK_TOKENS);
            let from = self.qkv.offset + row * self.qkv.cols + self.heads * dim;
            for head in 0..shape.kv_heads {
                let k = &arena[from + head * dim..][..dim];
                let place = &mut cache[shape.k(self.layer, block, head)..][..shape.head_elements()];
                for (index, value) in k.iter().enumerate() {
                    place[index * KV_BLOCK_TOKENS + token] = *value;
                }
                let v = &arena[from + (shape.kv_heads + head) * dim..][..dim];
                cache[shape.v(self.layer, block, head) + token * dim..][..dim].copy_from_slice(v);
            }
        }
        Ok(())
    }
}

/// Copies whole blocks in all layers, in order.
pub struct BlockCopy<'a> {
    pub shape: KvShape,
    pub copies: &'a [(u32, u32)],
}

impl InplaceOp1 for BlockCopy<'_> {
    fn name(&self) -> &'static str {
        "block_copy"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let cache = f32_mut("block_copy", cache, layout)?;
        for &(from, to) in self.copies {
            for layer in 0..self.shape.layers {
                let from = self.shape.k(layer, from as usize, 0);
                let to = self.shape.k(layer, to as usize, 0);
                cache.copy_within(from..from + self.shape.block_elements(), to);
            }
        }
        Ok(())
    }
}
