//! Attention on a GPU: decodes in splits over their KV, chunks of prompts on tensor cores.

use candle_core::Result;

use super::Attention;
use crate::ops::{
    gpu::{Args, Half, Launch, Work, kernel},
    place::GpuPlace,
    region::GpuOp2,
};

/// Of the kernels: threads of a block, heads of a group that decode takes, and queries of a tile of
/// prefill with the rows of KV beside them in shared memory.
const THREADS: u32 = 128;
const DECODE_GROUP_MAX: usize = 8;
const PREFILL_QUERIES: usize = 128;
const PREFILL_KV_ROWS: usize = 192;

impl GpuOp2 for Attention<'_> {
    fn gpu_fwd(&self, arena: u64, cache: u64) -> Result<()> {
        let (place, group) = (self.place.gpu()?, self.heads / self.shape.kv_heads);
        // Decodes come first, and their long sequences are divided; the chunks behind them are not.
        let single = |bounds: &[u32]| bounds[1] - bounds[0] == 1;
        let decodes = self.inputs.cu_seqlens_q.windows(2).take_while(|bounds| single(bounds));
        let decodes = if group <= DECODE_GROUP_MAX { decodes.count() } else { 0 };
        if decodes > 0 {
            self.decode(place, arena, cache, decodes)?;
        }
        if decodes < self.inputs.seqs() {
            self.prefill(place, arena, cache, decodes)?;
        }
        Ok(())
    }
}

impl Attention<'_> {
    /// The first `rows` sequences, of one query each, in splits over their KV.
    fn decode(&self, place: &GpuPlace, arena: u64, cache: u64, rows: usize) -> Result<()> {
        let (shape, dim) = (self.shape, self.shape.head_dim);
        let splits = &place.splits;
        let (count, window) = (splits.count(rows * shape.kv_heads), self.window.unwrap_or(0));
        let scale = 1.0 / (dim as f32).sqrt();
        place.gpu.launch(&Launch {
            kernel: kernel!("attention_decode", place.dtype, dim),
            grid: [shape.kv_heads as u32, rows as u32, count as u32],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(self.qkv.address(arena))
                .address(shape.layer_address(cache, self.layer))
                .address(place.step.seq_lens)
                .address(place.step.block_tables)
                .address(self.y.address(arena))
                .address(splits.partial())
                .address(splits.stats())
                .u32(self.qkv.cols)
                .u32(place.step.stride)
                .u32(shape.kv_heads)
                .u32(self.heads / shape.kv_heads)
                .u32(splits.chunk_blocks())
                .u32(window)
                .f32(scale),
            work: self.work(0..rows),
        })?;
        if count == 1 {
            return Ok(());
        }
        place.gpu.launch(&Launch {
            kernel: kernel!("attention_combine", place.dtype, dim),
            grid: [self.heads as u32, rows as u32, 1],
            threads: THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(splits.partial())
                .address(splits.stats())
                .address(place.step.seq_lens)
                .address(self.y.address(arena))
                .u32(count)
                .u32(splits.chunk_blocks())
                .u32(window)
                .f32(scale),
            // Of the algorithm, not of attention: nothing of it is in the floor.
            work: Work::default(),
        })
    }

    /// Chunks of any length: the sequences from `first` on.
    fn prefill(&self, place: &GpuPlace, arena: u64, cache: u64, first: usize) -> Result<()> {
        let (shape, dim) = (self.shape, self.shape.head_dim);
        let (group, seqs) = (self.heads / shape.kv_heads, self.inputs.seqs() - first);
        let rows = self.inputs.tokens() - self.inputs.cu_seqlens_q[first] as usize;
        let tiles = rows * group / PREFILL_QUERIES + seqs;
        let (step, word) = (&place.step, first as u64 * 4);
        place.gpu.launch(&Launch {
            kernel: kernel!("attention_prefill", place.dtype, dim),
            grid: [shape.kv_heads as u32, tiles as u32, 1],
            threads: THREADS,
            shared_bytes: ((PREFILL_QUERIES + PREFILL_KV_ROWS) * dim * Half::BYTES) as u32,
            args: Args::default()
                .address(self.qkv.address(arena))
                .address(shape.layer_address(cache, self.layer))
                .address(step.cu_seqlens_q + word)
                .address(step.seq_lens + word)
                .address(step.block_tables + word * step.stride as u64)
                .address(self.y.address(arena))
                .u32(seqs)
                .u32(self.qkv.cols)
                .u32(place.step.stride)
                .u32(shape.kv_heads)
                .u32(group)
                .u32(self.window.unwrap_or(0))
                .f32(1.0 / (dim as f32).sqrt()),
            work: self.work(first..self.inputs.seqs()),
        })
    }

    /// Of each sequence, the KV that its rows see is read once, q read and y written; two products.
    fn work(&self, seqs: std::ops::Range<usize>) -> Work {
        let (inputs, shape) = (self.inputs, self.shape);
        let (mut tokens, mut pairs) = (0, 0);
        for seq in seqs.clone() {
            let len = inputs.seq_lens[seq] as usize;
            // A row of padding sees nothing.
            let rows = (inputs.cu_seqlens_q[seq + 1] - inputs.cu_seqlens_q[seq]) as usize;
            let rows = rows.min(len);
            let window = self.window.unwrap_or(len);
            tokens += len.min(window + rows.saturating_sub(1));
            pairs += seen(len, window) - seen(len - rows, window);
        }
        let bounds = &inputs.cu_seqlens_q;
        let rows = (bounds[seqs.end] - bounds[seqs.start]) as usize;
        let rows = 2 * rows * self.heads * shape.head_dim;
        let kv = tokens * 2 * shape.kv_heads * shape.head_dim;
        let flops = 4 * pairs as u64 * (self.heads * shape.head_dim) as u64;
        Work { flops, ..Work::elements(rows + kv) }
    }
}

/// Tokens that the first `rows` rows of a sequence see together, each up to `window` of them.
fn seen(rows: usize, window: usize) -> usize {
    let growing = rows.min(window);
    growing * (growing + 1) / 2 + (rows - growing) * window
}

#[cfg(test)]
mod tests {
    use super::seen;

    #[test]
    fn what_rows_see_is_the_sum_over_them() {
        for rows in 0..40 {
            for window in [1, 7, 39, 40, 100] {
                let one_by_one: usize = (1..=rows).map(|row: usize| row.min(window)).sum();
                assert_eq!(seen(rows, window), one_by_one, "{rows} rows, a window of {window}");
            }
        }
    }
}
