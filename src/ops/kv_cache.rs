//! The paged KV cache: where K and V of a block lie, the write of new rows, and block copies.
//!
//! One tensor of f32 or f16. Per layer and block: K as `[kv_heads, head_dim, 16]`, so that the 16
//! tokens of a block are the lanes of a register, then V as `[kv_heads, 16, head_dim]`.

use candle_core::{CpuStorage, CudaStorage, DType, InplaceOp1, InplaceOp2, Layout, Result, bail};
use half::{f16, slice::HalfFloatSliceExt};

use super::{
    Place, Rope, StepInputs, View,
    arena::{Shared, f32_ref, for_rows},
    gpu::{Args, Half, Launch, THREADS, Work, kernel},
    lanes::Element,
    region::{self, GpuOp1, GpuOp2},
    step_inputs::PAD_SLOT,
};

/// Tokens of one block.
pub const KV_BLOCK_TOKENS: usize = 16;
/// Values converted at once.
const NARROW_VALUES: usize = 64;

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

    /// Where a layer begins in a cache on a GPU.
    pub fn layer_address(&self, cache: u64, layer: usize) -> u64 {
        cache + (self.k(layer, 0, 0) * Half::BYTES) as u64
    }

    pub fn v(&self, layer: usize, block: usize, head: usize) -> usize {
        self.k(layer, block, self.kv_heads + head)
    }
}

/// Element type of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    F32,
    /// Half the memory; K and V are rounded to 11 bits, and to at most 65504 in size.
    F16,
}

impl From<KvDtype> for DType {
    fn from(dtype: KvDtype) -> Self {
        match dtype {
            KvDtype::F32 => Self::F32,
            KvDtype::F16 => Self::F16,
        }
    }
}

/// An element of the cache.
pub trait KvElement: Element {
    /// The elements of a contiguous tensor.
    fn slice<'a>(op: &str, storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [Self]>;
    fn slice_mut<'a>(
        op: &str,
        storage: &'a mut CpuStorage,
        layout: &Layout,
    ) -> Result<&'a mut [Self]>;
    /// Rounds to nearest, ties to even, and keeps what is finite finite.
    fn narrow(from: &[f32], to: &mut [Self]);
    const ZERO: Self;
}

macro_rules! kv_element {
    ($type:ty, $variant:ident, $zero:expr, |$from:ident, $to:ident| $narrow:expr) => {
        impl KvElement for $type {
            const ZERO: Self = $zero;

            fn slice<'a>(op: &str, storage: &'a CpuStorage, at: &Layout) -> Result<&'a [Self]> {
                match storage {
                    CpuStorage::$variant(data) if whole(at) => Ok(data),
                    _ => bail!("{op} wants a contiguous cache of {}", stringify!($type)),
                }
            }

            fn slice_mut<'a>(
                op: &str,
                storage: &'a mut CpuStorage,
                at: &Layout,
            ) -> Result<&'a mut [Self]> {
                match storage {
                    CpuStorage::$variant(data) if whole(at) => Ok(data),
                    _ => bail!("{op} wants a contiguous cache of {}", stringify!($type)),
                }
            }

            fn narrow($from: &[f32], $to: &mut [Self]) {
                $narrow
            }
        }
    };
}

kv_element!(f32, F32, 0.0, |from, to| to.copy_from_slice(from));
kv_element!(f16, F16, f16::ZERO, |from, to| {
    let (least, most) = (f16::MIN.to_f32_const(), f16::MAX.to_f32_const());
    let mut bounded = [0f32; NARROW_VALUES];
    for (from, to) in from.chunks(NARROW_VALUES).zip(to.chunks_mut(NARROW_VALUES)) {
        let bounded = &mut bounded[..from.len()];
        for (bounded, value) in bounded.iter_mut().zip(from) {
            *bounded = value.clamp(least, most);
        }
        to.convert_from_f32_slice(bounded);
    }
});

fn whole(layout: &Layout) -> bool {
    layout.is_contiguous() && layout.start_offset() == 0
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
    /// What was to be done before; a GPU does both in one kernel.
    pub rope: &'a Rope<'a>,
    pub place: &'a Place,
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
        let arena = f32_ref("kv_write", arena, arena_layout)?;
        match cache {
            CpuStorage::F16(_) => {
                self.write(f16::slice_mut("kv_write", cache, cache_layout)?, arena)
            }
            _ => self.write(f32::slice_mut("kv_write", cache, cache_layout)?, arena),
        }
    }

    fn cuda_fwd(
        &self,
        cache: &mut CudaStorage,
        cache_layout: &Layout,
        arena: &CudaStorage,
        arena_layout: &Layout,
    ) -> Result<()> {
        let cache = region::address(cache, cache_layout)?;
        self.gpu_fwd(cache, region::address(arena, arena_layout)?)
    }
}

impl GpuOp2 for KvWrite<'_> {
    /// Norm of the heads, rotation, and the write.
    fn gpu_fwd(&self, cache: u64, arena: u64) -> Result<()> {
        let (place, rope, shape) = (self.place.gpu()?, self.rope, self.shape);
        let rows = self.inputs.tokens();
        let norms = match rope.norms {
            Some((q, k)) => (q.gpu()?, k.gpu()?),
            None => (0, 0),
        };
        // A thread takes 8 elements and their partners.
        let threads_a_row = self.qkv.cols / 16;
        let kv = 2 * shape.kv_heads * shape.head_dim;
        place.gpu.launch(&Launch {
            kernel: kernel!("rope", place.dtype, shape.head_dim),
            grid: [rows as u32, threads_a_row.div_ceil(THREADS as usize) as u32, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(self.qkv.address(arena))
                .address(shape.layer_address(cache, self.layer))
                .address(rope.table.gpu()?)
                .address(place.step.positions)
                .address(place.step.slot_mapping)
                .address(norms.0)
                .address(norms.1)
                .u32(self.heads)
                .u32(shape.kv_heads)
                .f32(rope.eps),
            // All is read; q goes back to its place, k and v to the cache.
            work: Work::elements(rows * (2 * (self.qkv.cols - kv) + 2 * kv)),
        })
    }
}

impl KvWrite<'_> {
    fn write<E: KvElement>(&self, cache: &mut [E], arena: &[f32]) -> Result<()> {
        let (shape, dim) = (self.shape, self.shape.head_dim);
        let cache = Shared::new(cache);
        for_rows(self.place.pool()?, self.inputs.tokens(), self.qkv.cols, &|row| {
            let slot = self.inputs.slot_mapping[row];
            if slot == PAD_SLOT {
                return;
            }
            let (block, token) = (slot as usize / KV_BLOCK_TOKENS, slot as usize % KV_BLOCK_TOKENS);
            let from = self.qkv.offset + row * self.qkv.cols + self.heads * dim;
            for head in 0..shape.kv_heads {
                let k = &arena[from + head * dim..][..dim];
                let place = shape.k(self.layer, block, head) + token;
                let mut narrow = [E::ZERO; NARROW_VALUES];
                for (part, k) in k.chunks(NARROW_VALUES).enumerate() {
                    E::narrow(k, &mut narrow[..k.len()]);
                    for (index, value) in narrow[..k.len()].iter().enumerate() {
                        let index = part * NARROW_VALUES + index;
                        // SAFETY: no two rows of a step have the same slot.
                        let place = unsafe { cache.part(place + index * KV_BLOCK_TOKENS, 1) };
                        place[0] = *value;
                    }
                }
                let v = &arena[from + (shape.kv_heads + head) * dim..][..dim];
                let place = shape.v(self.layer, block, head) + token * dim;
                // SAFETY: as above.
                E::narrow(v, unsafe { cache.part(place, dim) });
            }
        });
        Ok(())
    }
}

/// Copies whole blocks in all layers, in order.
pub struct BlockCopy<'a> {
    pub shape: KvShape,
    /// On a GPU they are the `block_copies` of its step.
    pub copies: &'a [(u32, u32)],
    pub place: &'a Place,
}

impl InplaceOp1 for BlockCopy<'_> {
    fn name(&self) -> &'static str {
        "block_copy"
    }

    fn cpu_fwd(&self, cache: &mut CpuStorage, layout: &Layout) -> Result<()> {
        match cache {
            CpuStorage::F16(_) => self.copy(f16::slice_mut("block_copy", cache, layout)?),
            _ => self.copy(f32::slice_mut("block_copy", cache, layout)?),
        }
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.gpu_fwd(region::address(storage, layout)?)
    }
}

impl GpuOp1 for BlockCopy<'_> {
    fn gpu_fwd(&self, cache: u64) -> Result<()> {
        let (place, shape, count) = (self.place.gpu()?, self.shape, self.copies.len());
        let bytes = shape.block_elements() * Half::BYTES;
        place.gpu.launch(&Launch {
            kernel: "block_copy",
            grid: [bytes.div_ceil(16 * THREADS as usize) as u32, shape.layers as u32, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(cache)
                .address(place.step.block_copies)
                .u64(shape.blocks as u64)
                .u32(bytes)
                .u32(count),
            work: Work::elements(2 * count * shape.layers * shape.block_elements()),
        })
    }
}

impl BlockCopy<'_> {
    fn copy<E: KvElement>(&self, cache: &mut [E]) {
        for &(from, to) in self.copies {
            for layer in 0..self.shape.layers {
                let from = self.shape.k(layer, from as usize, 0);
                let to = self.shape.k(layer, to as usize, 0);
                cache.copy_within(from..from + self.shape.block_elements(), to);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{lanes, lanes::Lanes};

    #[test]
    fn narrowing_is_to_the_nearest_and_stays_finite() {
        let check = |value: f32, expected: f32| {
            let mut out = [f16::ZERO];
            f16::narrow(&[value], &mut out);
            assert_eq!(out[0].to_f32_const(), expected, "{value}");
        };
        let finite = (0..=u16::MAX).map(f16::from_bits).filter(|half| half.is_finite());
        let mut finite: Vec<f32> = finite.map(f16::to_f32_const).collect();
        finite.sort_by(f32::total_cmp);
        for pair in finite.windows(2) {
            let middle = (pair[0] + pair[1]) / 2.0;
            check(pair[0], pair[0]);
            check(middle.next_down(), if pair[0] == pair[1] { pair[1] } else { pair[0] });
            check(middle.next_up(), pair[1]);
        }
        for (value, expected) in [
            (65504.0, 65504.0),
            (65519.0, 65504.0),
            (65520.0, 65504.0),
            (1e30, 65504.0),
            (f32::INFINITY, 65504.0),
            (f32::NEG_INFINITY, -65504.0),
            (2049.0, 2048.0),
            (2051.0, 2052.0),
            (1e-30, 0.0),
        ] {
            check(value, expected);
        }
        let mut out = [f16::ZERO];
        f16::narrow(&[f32::NAN], &mut out);
        assert!(out[0].is_nan());
    }

    lanes::for_isa! {
        fn widen_all[](from: &[f16], to: &mut [f32]) = widen_body
    }

    #[inline(always)]
    unsafe fn widen_body<L: Lanes>(from: &[f16], to: &mut [f32]) {
        let (from, to) = (from.as_chunks::<16>().0, to.as_chunks_mut::<16>().0);
        for (from, to) in from.iter().zip(to) {
            // SAFETY: 16 elements each.
            unsafe { L::store(to.as_mut_ptr(), f16::load::<L>(from.as_ptr())) };
        }
    }

    #[test]
    fn every_isa_widens_every_finite_f16_exactly() {
        let from: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        for isa in crate::ops::simd::available() {
            let mut to = vec![0f32; from.len()];
            widen_all(isa, &from, &mut to);
            for (from, to) in from.iter().zip(to) {
                let expected = from.to_f32_const();
                assert!(!from.is_finite() || to.to_bits() == expected.to_bits(), "{from:?}: {to}");
            }
        }
    }
}
