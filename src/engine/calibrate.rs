//! Times a few steps before anyone is served, so that shares and bounds of device time are right
//! from the first request on.

use std::time::Duration;

use super::device::{Device, DeviceError, DeviceStep};
use crate::{
    clock::Clock,
    meter::{Sample, SeqWork, StepWork},
    ops::StepInputs,
    scheduler::Limits,
    types::SeqId,
};

/// Sequences, tokens before, and new tokens of each: prefill chunks and decodes that tell the four
/// coefficients apart.
const SHAPES: [(usize, usize, usize); 12] = [
    (1, 0, 1),
    (1, 0, 16),
    (8, 16, 1),
    (1, 64, 1),
    (4, 64, 1),
    (1, 0, 64),
    (8, 64, 1),
    (1, 256, 1),
    (4, 256, 1),
    (1, 0, 128),
    (1, 128, 64),
    (1, 256, 64),
];

/// Times the budget, on a device so slow that not every shape had its turn within it.
const BUDGET_FACTOR_MAX: u32 = 5;

/// Runs the shapes that fit, again and again, for about `budget`, and each at least once: bounds would
/// be worth little for all requests after if a busy moment at start had let none be timed. The first
/// of all steps warms the device up and does not count.
pub fn measure(
    device: &mut impl Device,
    limits: &Limits,
    kv_blocks: usize,
    context_tokens_max: usize,
    window: Option<u32>,
    budget: Duration,
    clock: &Clock,
) -> Result<Vec<Sample>, DeviceError> {
    let begun_ns = clock.now_ns();
    let end_ns = begun_ns + budget.as_nanos() as u64;
    let latest_ns = begun_ns + (budget * BUDGET_FACTOR_MAX).as_nanos() as u64;
    let fits = |(seqs, first, new): (usize, usize, usize)| {
        let blocks = seqs * (first + new).div_ceil(limits.block_tokens);
        first + new <= context_tokens_max
            && seqs * new <= limits.step_tokens_max
            && seqs <= limits.running_seqs_max.min(limits.logits_rows_max)
            && blocks <= kv_blocks
    };
    let shapes: Vec<_> = SHAPES.into_iter().filter(|shape| fits(*shape)).collect();
    let mut samples = Vec::new();
    let mut steps = shapes.iter().cycle();
    let is_due = |timed: usize| {
        let now_ns = clock.now_ns();
        now_ns < end_ns || (timed <= shapes.len() && now_ns < latest_ns)
    };
    while is_due(samples.len())
        && let Some(&(seqs, first, new)) = steps.next()
    {
        let inputs = inputs(seqs, first, new, limits.block_tokens);
        device.launch(DeviceStep { inputs, ..DeviceStep::default() })?;
        let device_ns = device.collect()?.device_ns;
        let work =
            (0..seqs as u64).map(|seq| SeqWork::new(SeqId(seq), first as u32, new as u32, window));
        let work = StepWork { seqs: work.collect(), padding_tokens: 0 };
        samples.push(Sample { load: work.load(), device_ns });
    }
    Ok(samples.split_off(samples.len().min(1)))
}

/// A step of equal sequences, each on blocks of its own.
fn inputs(seqs: usize, first: usize, new: usize, block_tokens: usize) -> StepInputs {
    let blocks = (first + new).div_ceil(block_tokens);
    let mut inputs =
        StepInputs { cu_seqlens_q: vec![0], block_table_stride: blocks, ..StepInputs::default() };
    for seq in 0..seqs {
        for position in first..first + new {
            inputs.token_ids.push(0);
            inputs.last_token_slot.push(0);
            inputs.positions.push(position as u32);
            inputs.slot_mapping.push((seq * blocks * block_tokens + position) as i64);
            inputs.adapter_ids.push(0);
        }
        inputs.sample_rows.push(inputs.token_ids.len() as u32 - 1);
        inputs.cu_seqlens_q.push(inputs.token_ids.len() as u32);
        inputs.seq_lens.push((first + new) as u32);
        inputs.block_tables.extend((seq * blocks..(seq + 1) * blocks).map(|block| block as u32));
    }
    inputs
}
