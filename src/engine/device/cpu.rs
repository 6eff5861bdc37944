//! The CPU as a device: a launch computes the step at once and keeps the outcome for `collect`.

use std::{collections::VecDeque, sync::OnceLock};

use crate::{
    clock::Clock,
    model::Llama,
    ops::CpuPool,
    sampling::{SampleRow, Sampled, Sampler, TokenLogprobs, token_logprobs},
};

use super::{Device, DeviceError, DeviceOutcome, DeviceStep, ScoreSpec};

/// A model on the CPU and what it keeps per seat.
pub struct CpuDevice {
    model: Llama,
    sampler: Sampler,
    /// Last token drawn in each seat; the next step of the sequence starts from it.
    last_tokens: Vec<u32>,
    done: VecDeque<DeviceOutcome>,
    clock: Clock,
}

impl CpuDevice {
    pub fn new(model: Llama, seats: usize, clock: Clock) -> Self {
        let vocab = model.config().vocab_size;
        Self {
            model,
            sampler: Sampler::new(seats, vocab),
            last_tokens: vec![0; seats],
            done: VecDeque::new(),
            clock,
        }
    }

    fn compute(&mut self, step: &DeviceStep) -> Result<DeviceOutcome, DeviceError> {
        let started_ns = self.clock.now_ns();
        for begin in &step.begins {
            self.sampler.end(begin.slot);
            self.sampler.begin(
                begin.slot,
                &begin.params,
                begin.choice,
                &begin.prompt,
                &begin.output,
            );
        }
        let failed = |error: &dyn std::fmt::Display| DeviceError(error.to_string());
        self.model.forward(&step.inputs, &self.last_tokens).map_err(|error| failed(&error))?;
        let rows: Vec<SampleRow<'_>> = step
            .samples
            .iter()
            .map(|spec| SampleRow {
                logits_row: spec.logits_row,
                slot: spec.slot,
                position: spec.position,
                banned: &spec.banned,
            })
            .collect();
        let (sampler, model) = (&mut self.sampler, &self.model);
        let pool = model.pool().map_err(|error| failed(&error))?;
        let (sampled, scores) = model
            .with_logits(step.inputs.sample_rows.len(), |logits| {
                let scores = score(model, pool, &step.scores, logits);
                let mut sampled: Vec<Sampled> = Vec::with_capacity(rows.len());
                sampler.sample(pool, &rows, logits, &mut sampled);
                (sampled, scores)
            })
            .map_err(|error| failed(&error))?;
        for drawn in &sampled {
            self.last_tokens[drawn.slot.0 as usize] = drawn.token;
        }
        let sampled = sampled.into_iter().map(|drawn| (drawn.token, drawn.logprobs)).collect();
        Ok(DeviceOutcome { sampled, scores, device_ns: self.clock.now_ns() - started_ns })
    }
}

/// Log-probabilities of given tokens, over the threads.
fn score(model: &Llama, pool: &CpuPool, specs: &[ScoreSpec], logits: &[f32]) -> Vec<TokenLogprobs> {
    let vocab = model.config().vocab_size;
    let scores: Vec<OnceLock<TokenLogprobs>> = specs.iter().map(|_| OnceLock::new()).collect();
    pool.each(specs.len(), 1, &|range| {
        for index in range {
            let spec = &specs[index];
            let row = &logits[spec.logits_row as usize * vocab..][..vocab];
            // A unit runs once, so that the place is empty.
            let _ = scores[index].set(token_logprobs(row, spec.token, spec.top));
        }
    });
    scores.into_iter().filter_map(OnceLock::into_inner).collect()
}

impl Device for CpuDevice {
    fn launch(&mut self, step: DeviceStep) -> Result<(), DeviceError> {
        let outcome = self.compute(&step)?;
        self.done.push_back(outcome);
        Ok(())
    }

    fn collect(&mut self) -> Result<DeviceOutcome, DeviceError> {
        self.done.pop_front().ok_or_else(|| DeviceError("no step was launched".into()))
    }
}
