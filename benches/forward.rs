//! Tokens per second of the forward alone: prefill of one prompt, and decode of 1, 4, 8 and 32
//! sequences, one JSON line each. `CANDELA_BENCH_MODEL` names a GGUF file.
//!
//! `benches/compare.py` runs it interleaved with llama.cpp.

use std::{path::PathBuf, sync::Arc, time::Instant};

use candela::{
    model::{Llama, RuntimeLimits, WeightFiles, load},
    ops::{CpuPool, KV_BLOCK_TOKENS, StepInputs},
};

const PROMPT_TOKENS: usize = 512;
/// Context at which decoding starts.
const DECODE_CONTEXT: usize = 64;
const DECODE_STEPS: usize = 64;
const SEQS_MAX: usize = 32;
/// Blocks one sequence may use.
const SEQ_BLOCKS: usize = PROMPT_TOKENS / KV_BLOCK_TOKENS + 1;

/// Inputs of a step that computes positions `from .. to` of each of `seqs` sequences.
fn step(seqs: usize, from: usize, to: usize) -> StepInputs {
    let rows = seqs * (to - from);
    let each = |row: usize| (row / (to - from), from + row % (to - from));
    let slot = |(seq, position): (usize, usize)| {
        let token = seq * SEQ_BLOCKS * KV_BLOCK_TOKENS + position;
        i64::try_from(token).expect("a small number")
    };
    StepInputs {
        token_ids: (0..rows).map(|row| 1000 + (each(row).1 as u32 * 37 % 4000)).collect(),
        last_token_slot: vec![0; rows],
        positions: (0..rows).map(|row| each(row).1 as u32).collect(),
        slot_mapping: (0..rows).map(|row| slot(each(row))).collect(),
        cu_seqlens_q: (0..=seqs).map(|seq| (seq * (to - from)) as u32).collect(),
        seq_lens: vec![to as u32; seqs],
        block_tables: (0..(seqs * SEQ_BLOCKS) as u32).collect(),
        block_table_stride: SEQ_BLOCKS,
        sample_rows: (1..=seqs).map(|seq| (seq * (to - from) - 1) as u32).collect(),
        adapter_ids: vec![0; rows],
        block_copies: Vec::new(),
    }
}

fn main() {
    let path = std::env::var_os("CANDELA_BENCH_MODEL").map(PathBuf::from);
    let path = path.expect("CANDELA_BENCH_MODEL names a GGUF file");
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Arc::new(CpuPool::new(threads).expect("threads"));
    let (config, weights) = load(&WeightFiles::Gguf(path)).expect("loads");
    let limits = RuntimeLimits {
        step_tokens_max: PROMPT_TOKENS,
        logits_rows_max: SEQS_MAX,
        kv_blocks: SEQS_MAX * SEQ_BLOCKS,
        context_tokens_max: SEQ_BLOCKS * KV_BLOCK_TOKENS,
    };
    let model = Llama::new(config, weights, limits, pool).expect("fits");
    let run = |inputs: &StepInputs| {
        let slots: Vec<u32> = (0..inputs.seqs() as u32).collect();
        model.forward(inputs, &slots).expect("runs");
    };

    run(&step(1, 0, PROMPT_TOKENS));
    let start = Instant::now();
    run(&step(1, 0, PROMPT_TOKENS));
    let rate = PROMPT_TOKENS as f64 / start.elapsed().as_secs_f64();
    println!("{{\"prefill_tokens\":{PROMPT_TOKENS},\"tokens_per_second\":{rate:.1}}}");

    for seqs in [1, 4, 8, SEQS_MAX] {
        for seq in 0..DECODE_CONTEXT {
            run(&step(seqs, seq, seq + 1));
        }
        let start = Instant::now();
        for index in 0..DECODE_STEPS {
            let position = DECODE_CONTEXT + index;
            run(&step(seqs, position, position + 1));
        }
        let rate = (seqs * DECODE_STEPS) as f64 / start.elapsed().as_secs_f64();
        println!("{{\"decode_seqs\":{seqs},\"tokens_per_second\":{rate:.1}}}");
    }
}
