//! What one decode step of a large model asks of the GPU, and how its bytes compare with the floor.

use std::sync::Arc;

use candela::{
    model::{Llama, ModelConfig, RuntimeLimits, load_dummy},
    ops::{
        GpuPlace, KV_BLOCK_TOKENS, KvDtype, Splits, StepInputs, WeightPlace,
        gpu::{Half, StepBuffers, StepLimits},
    },
};

use crate::gpu::{Asked, NotedGpu};

/// The shapes of Llama-3.1-8B, as its `config.json` says them.
const LLAMA_8B: &str = include_str!("../../benches/gpu/llama-3.1-8b.json");

/// The plan of a step in which `seqs` sequences of `context` tokens get one more each.
fn plan(seqs: usize, context: usize) -> (ModelConfig, u64, Vec<Asked>) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("config.json");
    std::fs::write(&path, LLAMA_8B).expect("written");
    let gpu = Arc::new(NotedGpu::default());
    let (config, weights) =
        load_dummy(&path, WeightPlace::Gpu(&*gpu, Half::Bf16)).expect("a config");
    let weight_bytes = gpu.allocated();
    let blocks = context.div_ceil(KV_BLOCK_TOKENS);
    let limits = RuntimeLimits {
        step_tokens_max: seqs,
        logits_rows_max: seqs,
        kv_blocks: seqs * blocks,
        kv_dtype: KvDtype::F16,
        context_tokens_max: context,
    };
    let step = StepLimits {
        tokens: seqs,
        seqs,
        logits_rows: seqs,
        blocks_per_seq: blocks,
        block_copies: 1,
        slots: seqs,
    };
    let step = StepBuffers::new(&*gpu, step).expect("fits");
    let ModelConfig { heads, kv_heads, head_dim, .. } = config;
    let splits = Splits::new(&*gpu, seqs, kv_heads, heads, head_dim).expect("fits");
    let place = GpuPlace { gpu: gpu.clone(), dtype: Half::Bf16, step, splits };
    let model = Llama::on_gpu(config.clone(), weights, limits, place).expect("fits");
    gpu.asked.lock().expect("no panic").clear();
    let inputs = StepInputs {
        token_ids: vec![0; seqs],
        last_token_slot: vec![0; seqs],
        positions: vec![context as u32 - 1; seqs],
        slot_mapping: (0..seqs).map(|seq| (seq * blocks * KV_BLOCK_TOKENS) as i64).collect(),
        cu_seqlens_q: (0..=seqs as u32).collect(),
        seq_lens: vec![context as u32; seqs],
        block_tables: (0..(seqs * blocks) as u32).collect(),
        block_table_stride: blocks,
        sample_rows: (0..seqs as u32).collect(),
        adapter_ids: vec![0; seqs],
        block_copies: Vec::new(),
    };
    model.forward(&inputs, &[]).expect("plans");
    let asked = std::mem::take(&mut *gpu.asked.lock().expect("no panic"));
    (config, weight_bytes, asked)
}

/// `most`: of the floor. What is above it is activations between kernels.
fn check(seqs: usize, context: usize, most: f64, print: bool) {
    let (config, weight_bytes, asked) = plan(seqs, context);
    let (mut bytes, mut flops) = (0, 0);
    for asked in &asked {
        let (line, work) = match asked {
            Asked::Kernel(launch) => {
                let [x, y, z] = launch.grid;
                let line = format!("{} ({x}, {y}, {z}) x {}", launch.kernel, launch.threads);
                (line, launch.work)
            }
            Asked::Matmul(op) => (format!("matmul {} x {} x {}", op.m, op.n, op.k), op.work()),
        };
        bytes += work.bytes;
        flops += work.flops;
        if print {
            println!("{line:<60} {:>12} bytes {:>14} flops", work.bytes, work.flops);
        }
    }
    // The embedding is looked up, not read; every other weight is read once, and so is all KV.
    let embed = (config.vocab_size * config.hidden_size * Half::BYTES) as u64;
    let kv = (seqs * context * config.layers * 2 * config.kv_heads * config.head_dim) as u64;
    let floor = weight_bytes - embed + kv * Half::BYTES as u64;
    let ratio = bytes as f64 / floor as f64;
    println!("{seqs} x {context}: {bytes} bytes, {ratio:.4} of the floor, {flops} flops");
    assert!((1.0..=most).contains(&ratio), "{seqs} x {context}: {ratio}");
    // Two operations a weight, and four a query head's element and token.
    let products = (weight_bytes - embed) / Half::BYTES as u64 * 2 * seqs as u64;
    let attention = 4 * (seqs * context * config.layers * config.heads * config.head_dim) as u64;
    let expected = (products + attention) as f64;
    assert!((flops as f64 / expected - 1.0).abs() < 0.001, "{flops} of {expected} flops");
    let launches = config.layers * (4 + 2 + 3 + 1) + 4;
    assert!(asked.len() <= launches, "{} launches, not {launches}", asked.len());
}

#[test]
fn a_decode_step_of_8b_reads_little_more_than_its_weights_and_kv() {
    // The activations of 256 rows are 3 GB, of which a GPU's second-level cache keeps most.
    for (seqs, context, most) in [
        (1, 128, 1.002),
        (1, 8192, 1.002),
        (8, 1024, 1.01),
        (64, 1024, 1.05),
        (128, 1024, 1.05),
        (256, 1024, 1.06),
    ] {
        check(seqs, context, most, seqs == 1 && context == 8192);
    }
}
