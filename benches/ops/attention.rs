//! Attention alone: rates of decode and prefill against the limits of the machine, one JSON line each.
//! FLOPs are those of scores and values; bytes are K and V, read once a row tile.

#[path = "limits.rs"]
mod limits;

use std::sync::Arc;

use candela::ops::{
    Attention, AttentionTiles, CpuPool, KV_BLOCK_TOKENS, KvDtype, KvShape, Place, StepInputs, View,
};
use candle_core::{DType, Device, Tensor};

const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const COLS: usize = (HEADS + 2 * KV_HEADS) * HEAD_DIM;

/// `rows` positions up to `context` of each of `seqs` sequences.
fn check(
    place: &Place,
    limits: &limits::Limits,
    dtype: KvDtype,
    seqs: usize,
    rows: usize,
    context: usize,
) {
    let seq_blocks = context.div_ceil(KV_BLOCK_TOKENS);
    let shape =
        KvShape { layers: 1, blocks: seqs * seq_blocks, kv_heads: KV_HEADS, head_dim: HEAD_DIM };
    let normal = |elements: usize, dtype: DType| {
        let values = Tensor::randn(0f32, 1f32, elements, &Device::Cpu).expect("values");
        values.to_dtype(dtype).expect("converts")
    };
    let cache = normal(shape.elements(), dtype.into());
    let tokens = seqs * rows;
    let arena = normal(tokens * (COLS + HEADS * HEAD_DIM), DType::F32);
    let inputs = StepInputs {
        positions: (0..tokens).map(|row| (context - rows + row % rows) as u32).collect(),
        cu_seqlens_q: (0..=seqs).map(|seq| (seq * rows) as u32).collect(),
        seq_lens: vec![context as u32; seqs],
        block_tables: (0..(seqs * seq_blocks) as u32).collect(),
        block_table_stride: seq_blocks,
        ..StepInputs::default()
    };
    let op = Attention {
        shape,
        layer: 0,
        heads: HEADS,
        qkv: View { offset: 0, cols: COLS },
        y: View { offset: tokens * COLS, cols: HEADS * HEAD_DIM },
        window: None,
        inputs: &inputs,
        tiles: &AttentionTiles::new(&inputs, HEADS / KV_HEADS),
        place,
    };
    let seconds = limits::best_seconds(|| arena.inplace_op2(&cache, &op).expect("runs"));
    let pairs: usize = inputs.positions.iter().map(|position| *position as usize + 1).sum();
    let flops = (pairs * HEADS * HEAD_DIM * 4) as f64;
    let bytes = (cache.elem_count() * DType::from(dtype).size_in_bytes()) as f64;
    let name = format!("attention {dtype:?} {seqs} x {rows} rows at {context}");
    limits::print(&name, limits, seconds, flops, bytes);
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Arc::new(CpuPool::new(threads).expect("threads"));
    let limits = limits::measure(&pool);
    let place = Place::on_cpu(pool, 0, 0);
    for dtype in [KvDtype::F32, KvDtype::F16] {
        for (seqs, rows, context) in
            [(1, 1, 64), (1, 1, 1024), (8, 1, 1024), (32, 1, 1024), (1, 512, 512), (1, 512, 2048)]
        {
            check(&place, &limits, dtype, seqs, rows, context);
        }
    }
}
