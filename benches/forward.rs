//! Tokens per second of the forward alone: prefill of one prompt, decode of 1 to 32 sequences from
//! two contexts, and the memory it took; one JSON line each. `CANDELA_BENCH_MODEL` names a GGUF file;
//! `CANDELA_ISA_MAX` and `CANDELA_KV_CACHE_DTYPE` count as for the server.
//!
//! `benches/compare.py` runs it interleaved with other builds and with llama.cpp.

use std::{path::PathBuf, sync::Arc, time::Instant};

use candela::{
    cli::assemble::{isa_max, kv_dtype},
    model::{Llama, ModelWeights, RuntimeLimits, WeightFiles, load},
    ops::{CpuPool, KV_BLOCK_TOKENS, KvDtype, StepInputs, simd},
};

const PROMPTS: [usize; 2] = [512, 2048];
/// Longer prompts run in chunks, as the server does by default.
const STEP_TOKENS_MAX: usize = 512;
const DECODE_SEQS: [usize; 4] = [1, 4, 8, SEQS_MAX];
/// Contexts at which decoding starts.
const DECODE_CONTEXTS: [usize; 2] = [64, 1024];
const DECODE_STEPS: usize = 32;
const SEQS_MAX: usize = 32;
/// Blocks of the first sequence, which prefills, and of each other one, which only decodes.
const PROMPT_BLOCKS: usize = PROMPTS[1] / KV_BLOCK_TOKENS;
const DECODE_BLOCKS: usize = (DECODE_CONTEXTS[1] + DECODE_STEPS).div_ceil(KV_BLOCK_TOKENS);
const KV_BLOCKS: usize = PROMPT_BLOCKS + (SEQS_MAX - 1) * DECODE_BLOCKS;

fn main() {
    let path = std::env::var_os("CANDELA_BENCH_MODEL").map(PathBuf::from);
    let path = path.expect("CANDELA_BENCH_MODEL names a GGUF file");
    // As the server's settings of these names.
    if let Ok(name) = std::env::var("CANDELA_ISA_MAX") {
        simd::limit(isa_max(name.parse().expect("CANDELA_ISA_MAX")));
    }
    let kv_dtype = match std::env::var("CANDELA_KV_CACHE_DTYPE") {
        Ok(name) => kv_dtype(name.parse().expect("CANDELA_KV_CACHE_DTYPE")),
        Err(_) => KvDtype::F16,
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Arc::new(CpuPool::new(threads).expect("threads"));
    let (config, weights) = load(&WeightFiles::Gguf(path)).expect("loads");
    let limits = RuntimeLimits {
        step_tokens_max: STEP_TOKENS_MAX,
        logits_rows_max: SEQS_MAX,
        kv_blocks: KV_BLOCKS,
        kv_dtype,
        context_tokens_max: PROMPTS[1],
    };
    let weight_bytes = bytes(&weights);
    let kv_bytes = KV_BLOCKS * Llama::kv_bytes_per_block(&config, kv_dtype);
    let workspace_bytes = Llama::workspace_bytes(&config, &limits);
    let model = Llama::new(config, weights, limits, pool).expect("fits");

    prefill(&model, PROMPTS[0]);
    for tokens in PROMPTS {
        let start = Instant::now();
        prefill(&model, tokens);
        print_rate(&format!("prefill{tokens}"), tokens, start);
    }
    copy_first(&model);
    for context in DECODE_CONTEXTS {
        for seqs in DECODE_SEQS {
            run(&model, &step(seqs, context, context + 1));
            let start = Instant::now();
            for position in context..context + DECODE_STEPS {
                run(&model, &step(seqs, position, position + 1));
            }
            print_rate(&format!("decode{seqs}@{context}"), seqs * DECODE_STEPS, start);
        }
    }
    let rss_bytes = resident_bytes();
    println!(
        "{{\"rss_bytes\":{rss_bytes},\"weight_bytes\":{weight_bytes},\"kv_bytes\":{kv_bytes},\
         \"workspace_bytes\":{workspace_bytes}}}"
    );
}

fn print_rate(measure: &str, tokens: usize, start: Instant) {
    let rate = tokens as f64 / start.elapsed().as_secs_f64();
    println!("{{\"measure\":\"{measure}\",\"tokens_per_second\":{rate:.1}}}");
}

fn prefill(model: &Llama, tokens: usize) {
    for from in (0..tokens).step_by(STEP_TOKENS_MAX) {
        run(model, &step(1, from, (from + STEP_TOKENS_MAX).min(tokens)));
    }
}

/// Gives every sequence the context of the first, in blocks of its own: memory never written would
/// read as one page of zeros.
fn copy_first(model: &Llama) {
    let mut inputs = step(1, 0, 1);
    for seq in 1..SEQS_MAX {
        let blocks = 0..DECODE_BLOCKS as u32;
        inputs.block_copies.extend(blocks.map(|block| (block, first_block(seq) + block)));
    }
    run(model, &inputs);
}

fn run(model: &Llama, inputs: &StepInputs) {
    let slots: Vec<u32> = (0..inputs.seqs() as u32).collect();
    model.forward(inputs, &slots).expect("runs");
}

fn first_block(seq: usize) -> u32 {
    (if seq == 0 { 0 } else { PROMPT_BLOCKS + (seq - 1) * DECODE_BLOCKS }) as u32
}

/// Inputs of a step that computes positions `from .. to` of each of `seqs` sequences.
fn step(seqs: usize, from: usize, to: usize) -> StepInputs {
    let rows = seqs * (to - from);
    let each = |row: usize| (row / (to - from), from + row % (to - from));
    let slot = |(seq, position): (usize, usize)| {
        let token = first_block(seq) as usize * KV_BLOCK_TOKENS + position;
        i64::try_from(token).expect("a small number")
    };
    let blocks = to.div_ceil(KV_BLOCK_TOKENS) as u32;
    StepInputs {
        token_ids: (0..rows).map(|row| 1000 + (each(row).1 as u32 * 37 % 4000)).collect(),
        last_token_slot: vec![0; rows],
        positions: (0..rows).map(|row| each(row).1 as u32).collect(),
        slot_mapping: (0..rows).map(|row| slot(each(row))).collect(),
        cu_seqlens_q: (0..=seqs).map(|seq| (seq * (to - from)) as u32).collect(),
        seq_lens: vec![to as u32; seqs],
        block_tables: (0..seqs)
            .flat_map(|seq| (0..blocks).map(move |block| first_block(seq) + block))
            .collect(),
        block_table_stride: blocks as usize,
        sample_rows: (1..=seqs).map(|seq| (seq * (to - from) - 1) as u32).collect(),
        adapter_ids: vec![0; rows],
        block_copies: Vec::new(),
    }
}

fn bytes(weights: &ModelWeights) -> usize {
    let layers = weights.layers.iter().map(|layer| {
        layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes()
    });
    let tied = Arc::ptr_eq(&weights.embed, &weights.lm_head);
    let head = if tied { 0 } else { weights.lm_head.bytes() };
    weights.embed.bytes() + head + layers.sum::<usize>()
}

/// Memory of this process that is in RAM; 0 where the system does not tell.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<usize>().ok());
    kib.unwrap_or(0) * 1024
}
