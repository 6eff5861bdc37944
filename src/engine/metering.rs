//! Device time of every step, to those who used it.
//!
//! The engine splits a step and charges leases itself; the books over time are kept elsewhere.

use super::device_bound::DeviceBound;
use crate::{
    meter::{Coefficients, Overhead, Owner, Sample, SeqWork, StepModel, StepWork, split},
    scheduler::{Limits, Scheduler, StepPlan},
    types::SeqId,
};

/// Shares before anything was timed: a step's fixed part weighs as much as a few dozen tokens.
const FIRST_TERMS_NS: [f64; 4] = [1e6, 1e5, 10.0, 10.0];

/// A sequence's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    pub seq: SeqId,
    pub device_ns: u64,
    pub work: SeqWork,
}

/// The step model of one model on one device.
pub struct Metering {
    model: StepModel,
    window: Option<u32>,
}

impl Metering {
    pub fn new(window: Option<usize>) -> Self {
        let first = Coefficients::new(FIRST_TERMS_NS).expect("no negative term");
        let window = window.and_then(|window| u32::try_from(window).ok());
        Self { model: StepModel::new(first), window }
    }

    pub fn window(&self) -> Option<u32> {
        self.window
    }

    /// Learns from steps that were timed for that. Too few say nothing: then the steps of requests
    /// teach it.
    pub fn calibrate(&mut self, samples: &[Sample]) {
        match self.model.calibrate(samples) {
            Ok(()) => {
                let terms_ns = self.model.coefficients().terms_ns();
                tracing::info!(samples = samples.len(), ?terms_ns, "step times calibrated");
            }
            Err(error) => tracing::info!(%error, "step times are learned from requests"),
        }
    }

    /// What a plan asks of the device.
    pub fn work(&self, plan: &StepPlan) -> StepWork {
        let seqs = plan.seqs.iter().map(|planned| {
            let useful = planned.new_tokens - planned.recomputed;
            let rows = [planned.recomputed as u32, useful as u32, 0];
            SeqWork::divided(planned.seq, planned.first as u32, rows, self.window)
        });
        StepWork { seqs: seqs.collect(), padding_tokens: 0 }
    }

    /// What a request of now may be charged at most.
    pub fn bound(&self, limits: &Limits) -> DeviceBound {
        DeviceBound {
            step: self.model.bound(),
            window: self.window,
            chunk_tokens: limits.step_tokens_max,
            scored_chunk_tokens: limits.step_tokens_max.min(limits.logits_rows_max),
        }
    }

    /// Splits the time of a step; `lives` says whose rows were of any use.
    pub fn commit(
        &mut self,
        mut work: StepWork,
        device_ns: u64,
        lives: impl Fn(SeqId) -> bool,
    ) -> (Vec<Share>, [u64; Overhead::ALL.len()]) {
        for seq in &mut work.seqs {
            if !lives(seq.seq) {
                *seq = seq.into_discarded();
            }
        }
        let parts = split(&self.model.coefficients(), &work, device_ns);
        let shares = parts.seqs.iter().zip(&work.seqs).map(|(part, work)| Share {
            seq: part.seq,
            device_ns: part.useful_ns,
            work: *work,
        });
        let shares = shares.collect();
        self.model.observe(&work, device_ns);
        (shares, parts.overhead_ns())
    }
}

/// KV blocks of everyone who holds any.
pub fn blocks_of(
    scheduler: &Scheduler,
    seqs: impl Iterator<Item = (SeqId, Owner)>,
) -> Vec<(Owner, u64)> {
    seqs.filter_map(|(seq, owner)| Some((owner, scheduler.get(seq)?.blocks.len() as u64)))
        .filter(|(_, blocks)| *blocks > 0)
        .collect()
}
