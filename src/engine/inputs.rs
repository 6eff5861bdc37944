//! Builds the one metadata layout from a plan: the only place that does.

use crate::{
    ops::{
        StepInputs,
        step_inputs::{PAD_SLOT, TOKEN_FROM_DEVICE},
    },
    scheduler::{Scheduler, StepPlan},
};

/// The inputs of a planned step. Row `r` of the logits belongs to `sample_rows[r]`; the caller maps
/// samples and scores to rows in the order of `plan.seqs`.
pub fn build(plan: &StepPlan, scheduler: &Scheduler, block_tokens: usize) -> StepInputs {
    let mut inputs = StepInputs { cu_seqlens_q: vec![0], ..StepInputs::default() };
    inputs.block_copies = plan.copies.iter().map(|(from, to)| (from.0, to.0)).collect();
    let stride = plan
        .seqs
        .iter()
        .filter_map(|planned| scheduler.get(planned.seq))
        .map(|sequence| sequence.blocks.len())
        .max()
        .unwrap_or(0);
    inputs.block_table_stride = stride;
    for planned in &plan.seqs {
        let Some(sequence) = scheduler.get(planned.seq) else { continue };
        let end = planned.first + planned.new_tokens;
        for position in planned.first..end {
            let known = sequence.tokens.get(position).copied();
            inputs.token_ids.push(known.unwrap_or(TOKEN_FROM_DEVICE));
            inputs.last_token_slot.push(sequence.slot.map_or(0, |slot| slot.0));
            inputs.positions.push(position as u32);
            let block = sequence.blocks.get(position / block_tokens);
            inputs.slot_mapping.push(block.map_or(PAD_SLOT, |block| {
                i64::from(block.0) * block_tokens as i64 + (position % block_tokens) as i64
            }));
            inputs.adapter_ids.push(0);
            if planned.score && position + 1 < end {
                inputs.sample_rows.push(inputs.token_ids.len() as u32 - 1);
            }
        }
        if planned.score || !planned.samples.is_empty() {
            inputs.sample_rows.push(inputs.token_ids.len() as u32 - 1);
        }
        inputs.cu_seqlens_q.push(inputs.token_ids.len() as u32);
        inputs.seq_lens.push(end as u32);
        let row = inputs.block_tables.len();
        inputs.block_tables.extend(sequence.blocks.iter().map(|block| block.0));
        inputs.block_tables.resize(row + stride, 0);
    }
    inputs
}
