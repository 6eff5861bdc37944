//! Causal attention over the paged cache, grouped queries, optional sliding window, one ragged
//! batch of prefill chunks and decodes.
//!
//! Online softmax (Milakov and Gimelshein, 2018) runs over chunks of the KV cache at absolute
//! positions. Queries that see the same of a chunk are computed together while it is in cache, each
//! with the arithmetic it would have alone, so a row's result does not depend on chunking, batch,
//! threads or instruction set.

mod gpu;

use candle_core::{CpuStorage, CudaStorage, InplaceOp2, Layout, Result, bail};
use half::f16;

use super::{
    CpuPool, Place, StepInputs, View,
    arena::{Shared, exp, f32_mut, lane_max, lane_sum},
    kv_cache::{KV_BLOCK_TOKENS, KvElement, KvShape},
    lanes::{Element, LANES, Lanes, for_isa},
    region::{self, GpuOp2},
    simd::{self, Isa},
};

/// Queries, of rows and heads, that share one pass over K and V; the largest group of query heads.
const QUERIES_MAX: usize = 32;
/// Queries whose sums are in registers at once.
const BLOCK_QUERIES: usize = 4;
/// Blocks after which the softmax is corrected.
const CHUNK_BLOCKS: usize = 4;
const CHUNK_TOKENS: usize = CHUNK_BLOCKS * KV_BLOCK_TOKENS;
const _: () = assert!(KV_BLOCK_TOKENS == LANES);
/// Rows of one sequence that are computed together.
struct RowTile {
    seq: usize,
    rows: std::ops::Range<usize>,
}

/// The tiles of a step, computed once for all layers.
#[derive(Default)]
pub struct AttentionTiles(Vec<RowTile>);

impl AttentionTiles {
    /// `group` query heads share a KV head.
    pub fn new(inputs: &StepInputs, group: usize) -> Self {
        let tile_rows = (QUERIES_MAX / group.max(1)).max(1);
        let mut tiles = Vec::new();
        for seq in 0..inputs.seqs() {
            let end = inputs.cu_seqlens_q[seq + 1] as usize;
            for first in (inputs.cu_seqlens_q[seq] as usize..end).step_by(tile_rows) {
                tiles.push(RowTile { seq, rows: first..(first + tile_rows).min(end) });
            }
        }
        // Threads take them in this order: with the longest last, all but one would wait for it.
        let work = |tile: &RowTile| {
            tile.rows.len() * (inputs.positions[tile.rows.end - 1] as usize + CHUNK_TOKENS)
        };
        tiles.sort_by_key(|tile| std::cmp::Reverse(work(tile)));
        Self(tiles)
    }
}

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
    /// Of the CPU.
    pub tiles: &'a AttentionTiles,
    pub place: &'a Place,
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
        let group = self.heads / self.shape.kv_heads;
        if group > QUERIES_MAX || !self.heads.is_multiple_of(self.shape.kv_heads) {
            bail!("attention takes heads in groups of up to {QUERIES_MAX}");
        }
        let (isa, pool) = (simd::isa(), self.place.pool()?);
        let arena = Shared::new(f32_mut("attention", arena, arena_layout)?);
        match cache {
            CpuStorage::F16(_) => {
                self.run(isa, pool, &arena, f16::slice("attention", cache, cache_layout)?)
            }
            _ => self.run(isa, pool, &arena, f32::slice("attention", cache, cache_layout)?),
        }
        Ok(())
    }

    fn cuda_fwd(
        &self,
        arena: &mut CudaStorage,
        arena_layout: &Layout,
        cache: &CudaStorage,
        cache_layout: &Layout,
    ) -> Result<()> {
        let arena = region::address(arena, arena_layout)?;
        self.gpu_fwd(arena, region::address(cache, cache_layout)?)
    }
}

impl Attention<'_> {
    fn run<E: KvElement>(&self, isa: Isa, pool: &CpuPool, arena: &Shared<f32>, cache: &[E]) {
        let (kv_heads, dim, inputs) = (self.shape.kv_heads, self.shape.head_dim, self.inputs);
        let group = self.heads / kv_heads;
        pool.each(self.tiles.0.len() * kv_heads, 1, &|units| {
            for unit in units {
                let (tile, head) = (&self.tiles.0[unit / kv_heads], unit % kv_heads);
                let column = head * group * dim;
                let table = &inputs.block_tables[tile.seq * inputs.block_table_stride..];
                let kv = Kv { cache, shape: self.shape, layer: self.layer, head, table };
                let queries = Queries {
                    arena,
                    q: View { offset: self.qkv.offset + column, cols: self.qkv.cols },
                    y: View { offset: self.y.offset + column, cols: self.y.cols },
                    group,
                    first_row: tile.rows.start,
                    positions: &inputs.positions[tile.rows.clone()],
                    window: self.window,
                };
                attend(isa, &kv, &queries);
            }
        });
    }
}

/// K and V of one head of one sequence.
struct Kv<'a, E> {
    cache: &'a [E],
    shape: KvShape,
    layer: usize,
    head: usize,
    table: &'a [u32],
}

impl<E> Kv<'_, E> {
    /// K `[head_dim, 16]` and V `[16, head_dim]` of the block that holds positions from
    /// `index * 16`.
    fn block(&self, index: usize) -> (&[E], &[E]) {
        let (block, elements) = (self.table[index] as usize, self.shape.head_elements());
        let k = self.shape.k(self.layer, block, self.head);
        let v = self.shape.v(self.layer, block, self.head);
        (&self.cache[k..k + elements], &self.cache[v..v + elements])
    }
}

/// A group of query heads in consecutive rows of one sequence: query `i` is head `i % group` of row
/// `i / group`. The parts of the arena under `y` belong to this tile and head alone; those under `q`
/// are only read.
struct Queries<'a> {
    arena: &'a Shared<f32>,
    /// Offsets are those of the first head in row 0.
    q: View,
    y: View,
    group: usize,
    first_row: usize,
    positions: &'a [u32],
    window: Option<usize>,
}

impl Queries<'_> {
    /// Positions that a row sees.
    fn seen(&self, row: usize) -> (usize, usize) {
        let to = self.positions[row] as usize + 1;
        (self.window.map_or(0, |window| to.saturating_sub(window)), to)
    }

    /// What a row sees of the chunk from `start`, relative to it; empty if `from >= to`.
    fn seen_of(&self, row: usize, start: usize) -> (usize, usize) {
        let (from, to) = self.seen(row);
        (from.saturating_sub(start), to.saturating_sub(start).min(CHUNK_TOKENS))
    }

    fn offset(&self, view: View, query: usize, dim: usize) -> usize {
        let row = self.first_row + query / self.group;
        view.offset + row * view.cols + query % self.group * dim
    }

    fn q(&self, query: usize, dim: usize) -> &[f32] {
        // SAFETY: only read, as the type says.
        unsafe { self.arena.part(self.offset(self.q, query, dim), dim) }
    }

    /// # Safety
    /// Not while another slice of the same query lives.
    #[allow(clippy::mut_from_ref)]
    unsafe fn y(&self, query: usize, dim: usize) -> &mut [f32] {
        // SAFETY: nobody else has it, as the type and the caller say.
        unsafe { self.arena.part(self.offset(self.y, query, dim), dim) }
    }
}

/// The running softmax of a query: the largest score, and the sum of weights in lanes by position.
#[derive(Clone, Copy)]
struct State {
    top: f32,
    total: [f32; LANES],
}

for_isa! {
    fn attend[E: Element](kv: &Kv<'_, E>, queries: &Queries<'_>) = attend_tile
}

/// # Safety
/// Here and below: the machine has the instructions of `L`.
#[inline(always)]
unsafe fn attend_tile<L: Lanes, E: Element>(kv: &Kv<'_, E>, queries: &Queries<'_>) {
    let (dim, group, rows) = (kv.shape.head_dim, queries.group, queries.positions.len());
    let mut states = [State { top: f32::NEG_INFINITY, total: [0.0; LANES] }; QUERIES_MAX];
    for query in 0..rows * group {
        // SAFETY: the slice lives for this statement.
        unsafe { queries.y(query, dim) }.fill(0.0);
    }
    let (first, last) = (queries.seen(0).0, queries.seen(rows - 1).1);
    for start in (first / CHUNK_TOKENS * CHUNK_TOKENS..last).step_by(CHUNK_TOKENS) {
        let mut row = 0;
        while row < rows {
            let seen = queries.seen_of(row, start);
            let alike = (row + 1..rows).take_while(|next| queries.seen_of(*next, start) == seen);
            let end = row + 1 + alike.count();
            if seen.0 < seen.1 {
                let chunk = Chunk::new(kv, start, seen);
                let mut query = row * group;
                while query < end * group {
                    let count = BLOCK_QUERIES.min(end * group - query);
                    let states = &mut states[query..query + count];
                    // SAFETY: as the caller promises.
                    unsafe {
                        match count {
                            1 => attend_chunk::<L, E, 1>(&chunk, queries, query, states),
                            2 => attend_chunk::<L, E, 2>(&chunk, queries, query, states),
                            3 => attend_chunk::<L, E, 3>(&chunk, queries, query, states),
                            _ => attend_chunk::<L, E, 4>(&chunk, queries, query, states),
                        }
                    }
                    query += count;
                }
            }
            row = end;
        }
    }
    for (query, state) in states[..rows * group].iter().enumerate() {
        let inverse = 1.0 / lane_sum(state.total);
        // SAFETY: the slice lives for this loop.
        for y in unsafe { queries.y(query, dim) } {
            *y *= inverse;
        }
    }
}

/// K and V of 64 positions, of which `from .. to` count.
struct Chunk<'a, E> {
    k: [&'a [E]; CHUNK_BLOCKS],
    v: [&'a [E]; CHUNK_BLOCKS],
    from: usize,
    to: usize,
    dim: usize,
}

impl<'a, E> Chunk<'a, E> {
    /// `seen` is not empty and relative to `start`.
    fn new(kv: &'a Kv<'_, E>, start: usize, seen: (usize, usize)) -> Self {
        let (from, to) = seen;
        let mut chunk = Self {
            k: [&[]; CHUNK_BLOCKS],
            v: [&[]; CHUNK_BLOCKS],
            from,
            to,
            dim: kv.shape.head_dim,
        };
        for block in chunk.blocks() {
            (chunk.k[block], chunk.v[block]) = kv.block(start / KV_BLOCK_TOKENS + block);
        }
        chunk
    }

    fn blocks(&self) -> std::ops::Range<usize> {
        self.from / KV_BLOCK_TOKENS..self.to.div_ceil(KV_BLOCK_TOKENS)
    }
}

/// Scores of `N` queries, then weights, by position in the chunk.
type Scores<const N: usize> = [[f32; CHUNK_TOKENS]; N];

/// Calls `$body` for `$range` in steps of 4, 2 or 1 vectors: as many as have room for `N` sums each.
macro_rules! in_vectors {
    ($range:expr, $at:ident, $count:ident => $body:expr) => {
        let range = $range;
        let mut $at = range.start;
        while $at < range.end {
            let left = range.end - $at;
            if 4 * N <= L::ACCUMULATORS && left >= 4 {
                const $count: usize = 4;
                $body;
                $at += 4;
            } else if 2 * N <= L::ACCUMULATORS && left >= 2 {
                const $count: usize = 2;
                $body;
                $at += 2;
            } else {
                const $count: usize = 1;
                $body;
                $at += 1;
            }
        }
    };
}

/// Takes `N` queries from `first` on over one chunk.
#[inline(always)]
unsafe fn attend_chunk<L: Lanes, E: Element, const N: usize>(
    chunk: &Chunk<'_, E>,
    queries: &Queries<'_>,
    first: usize,
    states: &mut [State],
) {
    let dim = chunk.dim;
    let mut scores: Scores<N> = [[f32::NEG_INFINITY; CHUNK_TOKENS]; N];
    let q: [&[f32]; N] = std::array::from_fn(|query| queries.q(first + query, dim));
    // SAFETY: as the caller promises.
    unsafe {
        in_vectors!(chunk.blocks(), block, COUNT => dots::<L, E, N, COUNT>(chunk, &q, block, &mut scores));
    }
    let mut shrink = [0f32; N];
    let scale = 1.0 / (dim as f32).sqrt();
    for ((scores, state), shrink) in scores.iter_mut().zip(states).zip(&mut shrink) {
        *shrink = weigh(chunk, scores, state, scale);
    }
    // SAFETY: the queries are different ones.
    let mut y: [&mut [f32]; N] =
        std::array::from_fn(|query| unsafe { queries.y(first + query, dim) });
    // SAFETY: as the caller promises.
    unsafe {
        in_vectors!(0..dim / LANES, vector, COUNT => values::<L, E, N, COUNT>(chunk, &scores, &shrink, vector * LANES, &mut y));
    }
    values_tail(chunk, &scores, &shrink, dim / LANES * LANES, &mut y);
}

/// `scores = q K` of `COUNT` blocks from `block` on.
#[inline(always)]
unsafe fn dots<L: Lanes, E: Element, const N: usize, const COUNT: usize>(
    chunk: &Chunk<'_, E>,
    q: &[&[f32]; N],
    block: usize,
    scores: &mut Scores<N>,
) {
    assert!(q.iter().all(|q| q.len() == chunk.dim));
    assert!(chunk.k[block..block + COUNT].iter().all(|k| k.len() == chunk.dim * LANES));
    // SAFETY: lengths are asserted; instructions as the caller promises.
    unsafe {
        let mut sums = [[L::splat(0.0); COUNT]; N];
        for index in 0..chunk.dim {
            let mut k = [L::splat(0.0); COUNT];
            for (k, from) in k.iter_mut().zip(&chunk.k[block..block + COUNT]) {
                *k = E::load::<L>(from.as_ptr().add(index * LANES));
            }
            for (sums, q) in sums.iter_mut().zip(q) {
                let q = L::splat(*q.as_ptr().add(index));
                for (sum, k) in sums.iter_mut().zip(k) {
                    *sum = L::mul_add(k, q, *sum);
                }
            }
        }
        for (sums, scores) in sums.into_iter().zip(scores) {
            let (places, _) = scores[block * LANES..].as_chunks_mut::<LANES>();
            for (sum, place) in sums.into_iter().zip(places) {
                L::store(place.as_mut_ptr(), sum);
            }
        }
    }
}

/// Scores to weights relative to the largest score so far; returns by what earlier sums shrink.
#[inline(always)]
fn weigh<E>(
    chunk: &Chunk<'_, E>,
    scores: &mut [f32; CHUNK_TOKENS],
    state: &mut State,
    scale: f32,
) -> f32 {
    let (blocks, _) = scores.as_chunks_mut::<LANES>();
    let blocks = &mut blocks[chunk.blocks()];
    for score in blocks.as_flattened_mut() {
        *score *= scale;
    }
    let first = chunk.blocks().start * KV_BLOCK_TOKENS;
    let end = first + blocks.len() * KV_BLOCK_TOKENS;
    let flat = blocks.as_flattened_mut();
    flat[..chunk.from - first].fill(f32::NEG_INFINITY);
    flat[chunk.to - first..end - first].fill(f32::NEG_INFINITY);
    let mut tops = [f32::NEG_INFINITY; LANES];
    for block in blocks.iter() {
        for (top, score) in tops.iter_mut().zip(block) {
            *top = if score > top { *score } else { *top };
        }
    }
    let top = lane_max(tops);
    let top = if top > state.top { top } else { state.top };
    let shrink = exp(state.top - top);
    state.top = top;
    let mut total = [0f32; LANES];
    for block in blocks {
        for (score, total) in block.iter_mut().zip(&mut total) {
            *score = exp(*score - top);
            *total += *score;
        }
    }
    for (state, total) in state.total.iter_mut().zip(total) {
        *state = state.mul_add(shrink, total);
    }
    shrink
}

/// `y = y * shrink + weights V` of `COUNT` vectors of columns from `column` on. Positions that do
/// not count may hold anything, NaN included, which a weight of zero does not cancel: they are not
/// read.
#[inline(always)]
unsafe fn values<L: Lanes, E: Element, const N: usize, const COUNT: usize>(
    chunk: &Chunk<'_, E>,
    scores: &Scores<N>,
    shrink: &[f32; N],
    column: usize,
    y: &mut [&mut [f32]; N],
) {
    assert!(column + COUNT * LANES <= chunk.dim && y.iter().all(|y| y.len() == chunk.dim));
    // SAFETY: columns are inside, as asserted, of V and of y; instructions as the caller promises.
    unsafe {
        let mut sums = [[L::splat(0.0); COUNT]; N];
        for ((sums, y), shrink) in sums.iter_mut().zip(y.iter()).zip(shrink) {
            for (index, sum) in sums.iter_mut().enumerate() {
                let y = L::load(y.as_ptr().add(column + index * LANES));
                *sum = L::mul(y, L::splat(*shrink));
            }
        }
        for block in chunk.blocks() {
            let first = block * KV_BLOCK_TOKENS;
            let rows = &chunk.v[block][..KV_BLOCK_TOKENS * chunk.dim];
            for token in chunk.from.max(first)..chunk.to.min(first + KV_BLOCK_TOKENS) {
                let row = rows.as_ptr().add((token - first) * chunk.dim + column);
                let mut v = [L::splat(0.0); COUNT];
                for (index, v) in v.iter_mut().enumerate() {
                    *v = E::load::<L>(row.add(index * LANES));
                }
                for (sums, scores) in sums.iter_mut().zip(scores) {
                    let weight = L::splat(*scores.as_ptr().add(token));
                    for (sum, v) in sums.iter_mut().zip(v) {
                        *sum = L::mul_add(v, weight, *sum);
                    }
                }
            }
        }
        for (sums, y) in sums.into_iter().zip(y.iter_mut()) {
            for (index, sum) in sums.into_iter().enumerate() {
                L::store(y.as_mut_ptr().add(column + index * LANES), sum);
            }
        }
    }
}

/// As `values`, of the columns that fill no vector.
#[inline(always)]
fn values_tail<E: Element, const N: usize>(
    chunk: &Chunk<'_, E>,
    scores: &Scores<N>,
    shrink: &[f32; N],
    column: usize,
    y: &mut [&mut [f32]; N],
) {
    for ((y, shrink), scores) in y.iter_mut().zip(shrink).zip(scores) {
        for (column, y) in y.iter_mut().enumerate().skip(column) {
            *y *= shrink;
            let weights = scores.iter().enumerate().take(chunk.to).skip(chunk.from);
            for (token, weight) in weights {
                let (block, slot) = (token / KV_BLOCK_TOKENS, token % KV_BLOCK_TOKENS);
                let v = chunk.v[block][slot * chunk.dim + column].to_f32();
                *y = v.mul_add(*weight, *y);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    const KV_HEADS: usize = 2;
    const BLOCKS: usize = 24;

    fn cpu(threads: usize) -> Place {
        Place::on_cpu(Arc::new(CpuPool::new(threads).expect("threads")), 0, 0)
    }

    /// One sequence: queries at positions `rows` of a cache that is full before `rows.end`.
    #[derive(Clone, Debug)]
    struct Case {
        dim: usize,
        group: usize,
        window: Option<usize>,
        rows: std::ops::Range<usize>,
        seed: u64,
    }

    impl Case {
        fn shape(&self) -> KvShape {
            KvShape { layers: 2, blocks: BLOCKS, kv_heads: KV_HEADS, head_dim: self.dim }
        }

        fn cols(&self) -> usize {
            (self.group + 2) * KV_HEADS * self.dim
        }

        /// Values around zero, with outliers; K and V are exact in f16.
        fn value(&self, what: u64, head: usize, position: usize, index: usize) -> f32 {
            let mut z = self.seed ^ what << 60 ^ (head << 40 ^ position << 20 ^ index) as u64;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            let value = ((z >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 2.0;
            f16::from_f32(if z.is_multiple_of(97) { value * 5.0 } else { value }).to_f32()
        }

        /// Where nothing was written there is NaN.
        fn cache<E: KvElement>(&self) -> Vec<E> {
            let shape = self.shape();
            let mut cache = vec![E::ZERO; shape.elements()];
            E::narrow(&vec![f32::NAN; shape.elements()], &mut cache);
            for position in 0..self.rows.end {
                let (block, slot) = (block(position), position % KV_BLOCK_TOKENS);
                for head in 0..KV_HEADS {
                    for d in 0..self.dim {
                        let k = shape.k(1, block, head) + d * KV_BLOCK_TOKENS + slot;
                        let v = shape.v(1, block, head) + slot * self.dim + d;
                        E::narrow(&[self.value(1, head, position, d)], &mut cache[k..=k]);
                        E::narrow(&[self.value(2, head, position, d)], &mut cache[v..=v]);
                    }
                }
            }
            cache
        }

        /// `y` of the rows, computed in steps of `step` rows.
        fn run<E: KvElement>(&self, isa: Isa, threads: usize, step: usize) -> Vec<f32> {
            let cache = self.cache::<E>();
            let place = cpu(threads);
            let (cols, heads) = (self.cols(), self.group * KV_HEADS);
            let mut out = Vec::new();
            for first in self.rows.clone().step_by(step) {
                let rows = first..(first + step).min(self.rows.end);
                let mut arena = vec![f32::NAN; rows.len() * (cols + heads * self.dim)];
                for (row, position) in rows.clone().enumerate() {
                    for column in 0..heads * self.dim {
                        let (head, d) = (column / self.dim, column % self.dim);
                        arena[row * cols + column] = self.value(3, head, position, d);
                    }
                }
                let inputs = StepInputs {
                    positions: rows.clone().map(|position| position as u32).collect(),
                    cu_seqlens_q: vec![0, rows.len() as u32],
                    seq_lens: vec![rows.end as u32],
                    block_tables: (0..BLOCKS).map(|i| block(i * KV_BLOCK_TOKENS) as u32).collect(),
                    block_table_stride: BLOCKS,
                    ..StepInputs::default()
                };
                let op = Attention {
                    shape: self.shape(),
                    layer: 1,
                    heads,
                    qkv: View { offset: 0, cols },
                    y: View { offset: rows.len() * cols, cols: heads * self.dim },
                    window: self.window,
                    inputs: &inputs,
                    tiles: &AttentionTiles::new(&inputs, self.group),
                    place: &place,
                };
                let pool = place.pool().expect("the CPU");
                op.run(isa, pool, &Shared::new(&mut arena), &cache);
                out.extend_from_slice(&arena[rows.len() * cols..]);
            }
            out
        }

        /// Softmax in f64, one query after the other, and how far off f32 may be: a weight is off by
        /// as much as its score, which is rounded relative to its size.
        fn reference(&self) -> Vec<(f64, f64)> {
            let mut out = Vec::new();
            for position in self.rows.clone() {
                let from = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
                for head in 0..self.group * KV_HEADS {
                    let value = |what, at, d| f64::from(self.value(what, head / self.group, at, d));
                    let score = |at| {
                        let q = |d| f64::from(self.value(3, head, position, d));
                        let dot: f64 = (0..self.dim).map(|d| q(d) * value(1, at, d)).sum();
                        dot / (self.dim as f64).sqrt()
                    };
                    let scores: Vec<f64> = (from..=position).map(score).collect();
                    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                    let total: f64 = weights.iter().sum();
                    let size = scores.iter().fold(1.0, |size: f64, score| size.max(score.abs()));
                    out.extend((0..self.dim).map(|d| {
                        let v: Vec<f64> = (from..=position).map(|at| value(2, at, d)).collect();
                        let size = size * v.iter().fold(1.0, |size: f64, v| size.max(v.abs()));
                        let y = v.iter().zip(&weights).map(|(v, weight)| v * weight);
                        (y.sum::<f64>() / total, size * 3e-7)
                    }));
                }
            }
            out
        }
    }

    /// Blocks in an order that is not theirs.
    fn block(position: usize) -> usize {
        (position / KV_BLOCK_TOKENS * 7 + 3) % BLOCKS
    }

    fn cases() -> impl Strategy<Value = Case> {
        let dim = prop_oneof![Just(2usize), Just(16), Just(40), Just(64), Just(80)];
        let group = prop_oneof![Just(1usize), Just(2), Just(3), Just(4), Just(7)];
        let window = prop_oneof![Just(None), (1usize..200).prop_map(Some)];
        (dim, group, window, 0usize..300, 1usize..50, any::<u64>()).prop_map(
            |(dim, group, window, first, count, seed)| Case {
                dim,
                group,
                window,
                rows: first..first + count,
                seed,
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn every_isa_tiling_type_and_thread_count_gives_the_same_bits(case in cases()) {
            let bits = |y: Vec<f32>| y.into_iter().map(f32::to_bits).collect::<Vec<_>>();
            let alone = bits(case.run::<f32>(Isa::Portable, 1, 1));
            for isa in simd::available() {
                for step in [1, 5, 64] {
                    prop_assert_eq!(&bits(case.run::<f32>(isa, 2, step)), &alone, "{:?}", isa);
                    prop_assert_eq!(&bits(case.run::<f16>(isa, 2, step)), &alone, "{:?}", isa);
                }
            }
        }

        #[test]
        fn sums_are_near_those_in_f64(case in cases()) {
            let ours = case.run::<f32>(simd::isa(), 1, 64);
            for (index, (ours, (exact, most))) in ours.iter().zip(case.reference()).enumerate() {
                let error = (f64::from(*ours) - exact).abs();
                prop_assert!(error < most, "{index}: {ours} for {exact} within {most}");
            }
        }
    }

    #[test]
    fn the_longest_tiles_come_first_and_every_row_is_in_one() {
        let check = |lens: &[(usize, usize)], group: usize| {
            let mut inputs = StepInputs { cu_seqlens_q: vec![0], ..StepInputs::default() };
            for (first, count) in lens {
                inputs.positions.extend((*first..first + count).map(|position| position as u32));
                inputs.cu_seqlens_q.push(inputs.positions.len() as u32);
                inputs.seq_lens.push((first + count) as u32);
            }
            let tiles = AttentionTiles::new(&inputs, group).0;
            let mut rows: Vec<usize> = tiles.iter().flat_map(|tile| tile.rows.clone()).collect();
            let longest = lens.iter().enumerate().max_by_key(|(_, (first, count))| first * count);
            assert_eq!(tiles.first().map(|tile| tile.seq), longest.map(|(seq, _)| seq), "{lens:?}");
            rows.sort_unstable();
            assert_eq!(rows, (0..inputs.positions.len()).collect::<Vec<_>>(), "{lens:?}");
            assert!(tiles.iter().all(|tile| tile.rows.len() * group <= QUERIES_MAX.max(group)));
        };
        check(&[], 3);
        check(&[(5, 1), (900, 1), (30, 1)], 3);
        check(&[(900, 1), (512, 512), (0, 7)], 4);
        check(&[(10, 40)], 40);
    }
}
