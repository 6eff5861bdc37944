//! A step: planned with what every request can pay, launched, committed.

use std::{cell::RefCell, collections::HashMap, sync::atomic::Ordering};

use super::{
    books::StepRecord,
    device::{Device, DeviceError, DeviceOutcome, DeviceStep, SampleSpec, ScoreSpec, SlotBegin},
    inputs,
    live::Ended,
    metering::blocks_of,
    run::{Engine, InFlight},
};
use crate::{
    meter::{self, StepWork},
    sampling::TokenLogprobs,
    scheduler::StepPlan,
    types::{FinishReason, RequestId, SeqId, SlotId, TokenId},
};

impl<D: Device> Engine<D> {
    pub(super) fn plan(&mut self) -> StepPlan {
        let depth = self.options.pipeline_depth;
        let (live, owners) = (&self.live, &self.owners);
        // Tokens that this plan takes of each request: its choices share one lease, in index order.
        let taken: RefCell<HashMap<SeqId, u64>> = RefCell::default();
        // Asked twice of a sequence that enters the batch: for its seat, and for its first rows. The
        // seat is of use only with the same answer.
        let answers: RefCell<HashMap<SeqId, usize>> = RefCell::default();
        let answer = |seq: SeqId| {
            let Some((owner, _)) = owners.get(&seq) else { return 0 };
            let Some(request) = live.get(owner).filter(|live| live.has_room(depth)) else {
                return 0;
            };
            let mut taken = taken.borrow_mut();
            let taken = taken.entry(*owner).or_insert(0);
            let left = request.lease.affordable().saturating_sub(request.in_flight + *taken);
            *taken += u64::from(left > 0);
            usize::from(left > 0)
        };
        let payable = |seq| *answers.borrow_mut().entry(seq).or_insert_with(|| answer(seq));
        let plan = self.scheduler.plan(&payable);
        self.counters.preemptions += plan.preempted.len() as u64;
        for admission in &plan.admitted {
            let Some((request, _)) = self.owners.get(&admission.seq) else { continue };
            if let Some(live) = self.live.get_mut(request)
                && !std::mem::replace(&mut live.admitted, true)
            {
                self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
            }
        }
        plan
    }

    pub(super) fn launch(&mut self, plan: StepPlan) -> Result<(), DeviceError> {
        let mut step = DeviceStep {
            inputs: inputs::build(&plan, &self.scheduler, self.options.limits.block_tokens),
            ..DeviceStep::default()
        };
        for admission in plan.admitted.iter().chain(&plan.forked) {
            step.begins.extend(self.slot_begin(admission.seq, admission.slot));
        }
        let (mut scores, mut draws) = (Vec::new(), Vec::new());
        let mut row = 0;
        for planned in &plan.seqs {
            if planned.score {
                self.add_scores(planned, row, &mut step, &mut scores);
                row += planned.new_tokens as u32 - 1;
            }
            for target in &planned.samples {
                let owner = self.owners.get(&target.seq).map_or(target.seq, |(owner, _)| *owner);
                self.count_in_flight(owner, 1);
                draws.push(owner);
                step.samples.push(SampleSpec {
                    logits_row: row,
                    slot: target.slot,
                    position: target.position as u32,
                    banned: self.banned(target.seq, target.position),
                });
            }
            row += u32::from(planned.score || !planned.samples.is_empty());
        }
        let launched_ns = self.clock.now_ns();
        self.books.begin(launched_ns);
        self.device.launch(step)?;
        self.counters.steps += 1;
        let work = self.metering.work(&plan);
        self.in_flight.push_back(InFlight { plan, work, scores, draws, launched_ns });
        Ok(())
    }

    fn count_in_flight(&mut self, owner: SeqId, tokens: i64) {
        if let Some(live) = self.live.get_mut(&owner) {
            live.in_flight = live.in_flight.saturating_add_signed(tokens);
        }
    }

    pub(super) fn slot_begin(&self, seq: SeqId, slot: SlotId) -> Option<SlotBegin> {
        let (request, choice) = *self.owners.get(&seq)?;
        let request = &self.live.get(&request)?.request;
        let sequence = self.scheduler.get(seq)?;
        Some(SlotBegin {
            slot,
            params: request.sampling.clone(),
            choice: choice as u32,
            prompt: request.prompt.to_vec(),
            output: sequence.output().to_vec(),
        })
    }

    /// Row `r` of a scored chunk predicts the prompt token after it.
    pub(super) fn add_scores(
        &self,
        planned: &crate::scheduler::PlannedSeq,
        first_row: u32,
        step: &mut DeviceStep,
        scores: &mut Vec<SeqId>,
    ) {
        let Some((owner, _)) = self.owners.get(&planned.seq) else { return };
        let Some(live) = self.live.get(owner) else { return };
        let top = live.request.prompt_logprobs.unwrap_or(0);
        for offset in 0..planned.new_tokens {
            if let Some(&token) = live.request.prompt.get(planned.first + offset + 1) {
                step.scores.push(ScoreSpec { logits_row: first_row + offset as u32, token, top });
                scores.push(*owner);
            }
        }
    }

    /// End tokens may not be drawn before `min_tokens`.
    pub(super) fn banned(&self, seq: SeqId, position: usize) -> Vec<TokenId> {
        let request = self.owners.get(&seq).and_then(|(request, _)| self.live.get(request));
        let early = request.is_some_and(|live| {
            position < live.request.prompt.len() + live.request.stop.min_tokens as usize
        });
        if early { self.options.eos_token_ids.clone() } else { Vec::new() }
    }

    pub(super) fn commit(&mut self, step: InFlight, outcome: DeviceOutcome) {
        self.counters.device_busy_ns += outcome.device_ns;
        let (step_time, requests) = match self.options.metered {
            true => self.charge_device(step.work, outcome.device_ns),
            false => Default::default(),
        };
        for (owner, score) in step.scores.into_iter().zip(outcome.scores) {
            if let Some(live) = self.live.get_mut(&owner) {
                live.add_score(score);
            }
        }
        // A choice may have ended since; what it drew has arrived for its request all the same.
        for owner in step.draws {
            self.count_in_flight(owner, -1);
        }
        let mut drawn = outcome.sampled.into_iter();
        for planned in &step.plan.seqs {
            self.commit_prompt(planned.seq, planned.first + planned.new_tokens);
            for target in &planned.samples {
                if let Some((token, logprobs)) = drawn.next() {
                    self.commit_token(target.seq, token, logprobs);
                }
            }
        }
        self.record(step_time, requests);
    }

    /// Charges every request its part of a step, and says how the step is to be booked and, in the
    /// order of its owners, on which requests.
    pub(super) fn charge_device(
        &mut self,
        work: StepWork,
        device_ns: u64,
    ) -> (meter::DeviceStep, Vec<RequestId>) {
        // Of the steps before: what was held when this one was launched.
        let bound = self.metering.bound(&self.options.limits);
        let owners = &self.owners;
        let (shares, overhead_ns) =
            self.metering.commit(work, device_ns, |seq| owners.contains_key(&seq));
        let mut owned_ns = Vec::with_capacity(shares.len());
        let mut requests = Vec::with_capacity(shares.len());
        for share in shares {
            let owner = owners.get(&share.seq).map(|(owner, _)| *owner);
            let Some(live) = owner.and_then(|owner| self.live.get_mut(&owner)) else { continue };
            self.counters.device_written_off_ns += live.use_device(&share, &bound);
            owned_ns.push((live.owner.clone(), share.device_ns));
            requests.push(live.request.id.clone());
        }
        (meter::DeviceStep { end_ns: self.clock.now_ns(), owned_ns, overhead_ns }, requests)
    }

    /// Books a step and what was used since the one before.
    pub(super) fn record(&mut self, step: meter::DeviceStep, requests: Vec<RequestId>) {
        if !self.options.metered {
            self.used.clear();
            self.ended.clear();
            return;
        }
        for live in self.live.values_mut() {
            self.used.extend(live.take_unbooked());
        }
        let seqs = self
            .live
            .values()
            .flat_map(|live| live.choices.iter().map(|choice| (choice.seq, live.owner.clone())));
        let blocks = blocks_of(&self.scheduler, seqs);
        let blocks_from_ns = std::mem::replace(&mut self.recorded_ns, step.end_ns);
        let (tokens, ended) = (std::mem::take(&mut self.used), std::mem::take(&mut self.ended));
        let record = StepRecord { step, requests, tokens, blocks, blocks_from_ns, ended };
        self.books.add(record, self.in_flight.front().map(|next| next.launched_ns));
    }

    /// Books what ended between steps, when none may follow for long.
    pub(super) fn flush_books(&mut self) {
        if !self.ended.is_empty() || !self.used.is_empty() {
            let end_ns = self.clock.now_ns();
            self.record(meter::DeviceStep { end_ns, ..Default::default() }, Vec::new());
        }
        self.books.flush(self.in_flight.front().map(|next| next.launched_ns));
    }

    /// Rows up to `end` are computed; ends a request that wants no output.
    pub(super) fn commit_prompt(&mut self, seq: SeqId, end: usize) {
        let Some(&(owner, _)) = self.owners.get(&seq) else { return };
        let Some(live) = self.live.get_mut(&owner) else { return };
        if live.commit_prompt(end) {
            for seq in live.choices.iter().map(|choice| choice.seq).collect::<Vec<_>>() {
                self.finish(seq, FinishReason::Length);
            }
        }
    }

    pub(super) fn commit_token(
        &mut self,
        seq: SeqId,
        token: TokenId,
        logprobs: Option<TokenLogprobs>,
    ) {
        if self.scheduler.commit(seq, token).is_none() {
            self.counters.discarded_tokens += 1;
            return;
        }
        let Some(&(owner, index)) = self.owners.get(&seq) else { return };
        let Some(live) = self.live.get_mut(&owner) else { return };
        let ends = self.options.eos_token_ids.contains(&token);
        let silent = self.tokenizer.is_special(token);
        self.counters.generation_tokens += 1;
        match live.commit_token(index, token, logprobs, ends, silent) {
            Some(Ended::ByItself(reason)) => self.finish(seq, reason),
            Some(Ended::Cut(cause)) => {
                self.cut(owner, index, seq, cause);
                self.close_if_done(owner);
            }
            None => {}
        }
    }
}
