//! One sequence through the forward, as the engine would lay it out, in chunks of any size.

use std::sync::Arc;

use candela::{
    model::{Llama, ModelConfig, ModelWeights, RuntimeLimits},
    ops::{CpuPool, KV_BLOCK_TOKENS, KvDtype, StepInputs},
};

pub struct Runner {
    model: Llama,
    limits: RuntimeLimits,
}

impl Runner {
    pub fn new(
        config: ModelConfig,
        weights: ModelWeights,
        context: usize,
        chunk: usize,
        kv_dtype: KvDtype,
    ) -> Self {
        let limits = RuntimeLimits {
            step_tokens_max: chunk,
            logits_rows_max: chunk,
            kv_blocks: context.div_ceil(KV_BLOCK_TOKENS),
            kv_dtype,
            context_tokens_max: context,
        };
        let pool = Arc::new(CpuPool::new(2).expect("threads"));
        Self { model: Llama::new(config, weights, limits, pool).expect("fits"), limits }
    }

    /// Logits after each position of `wanted` (rising) of a fresh sequence fed `chunk` tokens at a
    /// time.
    pub fn logits(&self, tokens: &[u32], wanted: &[usize], chunk: usize) -> Vec<Vec<f32>> {
        let vocab = self.model.config().vocab_size;
        let mut logits = Vec::new();
        for first in (0..tokens.len()).step_by(chunk) {
            let end = (first + chunk).min(tokens.len());
            let rows: Vec<u32> = wanted
                .iter()
                .filter(|position| (first..end).contains(*position))
                .map(|position| (position - first) as u32)
                .collect();
            let count = rows.len();
            let inputs = self.inputs(&tokens[first..end], first, rows);
            self.model.forward(&inputs, &[0]).expect("runs");
            let read = |all: &mut [f32]| all.chunks(vocab).map(<[f32]>::to_vec).collect();
            let chunk: Vec<_> = self.model.with_logits(count, read).expect("logits");
            logits.extend(chunk);
        }
        logits
    }

    fn inputs(&self, tokens: &[u32], first: usize, sample_rows: Vec<u32>) -> StepInputs {
        let rows = tokens.len();
        // Against the order of positions, so that nothing can pass that does not read the table.
        let blocks: Vec<u32> = (0..self.limits.kv_blocks as u32).rev().collect();
        let slot = |position: usize| {
            let block = blocks[position / KV_BLOCK_TOKENS] as usize;
            (block * KV_BLOCK_TOKENS + position % KV_BLOCK_TOKENS) as i64
        };
        StepInputs {
            token_ids: tokens.to_vec(),
            last_token_slot: vec![0; rows],
            positions: (first..first + rows).map(|position| position as u32).collect(),
            slot_mapping: (first..first + rows).map(slot).collect(),
            cu_seqlens_q: vec![0, rows as u32],
            seq_lens: vec![(first + rows) as u32],
            block_table_stride: blocks.len(),
            block_tables: blocks,
            sample_rows,
            adapter_ids: vec![0; rows],
            block_copies: Vec::new(),
        }
    }
}

/// The largest logit's token.
pub fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.expect("a vocabulary").0 as u32
}

/// The largest difference, infinite where one is not a number.
pub fn error_max<'a>(pairs: impl Iterator<Item = (&'a f32, &'a f32)>) -> f32 {
    let errors = pairs.map(|(ours, theirs)| (ours - theirs).abs());
    errors.fold(0.0, |worst, error| if error.is_nan() { f32::INFINITY } else { worst.max(error) })
}
