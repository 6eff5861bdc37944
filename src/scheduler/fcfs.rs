//! First come, first served, with chunked prefill and recompute.
//!
//! A step takes the decodes of the batch first, oldest first, then prefill chunks until the token
//! budget is full. A sequence enters the batch only when seats for all its choices and blocks for
//! all its known tokens are there, so prefill never runs out midway. When a decode finds no block,
//! the newest sequence of the batch gives up its own and waits again.

use std::collections::{BTreeMap, HashMap};

use crate::{
    cache::{BlockKey, BlockPool},
    types::{BlockId, SeqId, SlotId, TokenId},
};

use super::{
    plan::{Admission, Limits, PlannedSeq, SampleTarget, StepPlan},
    sequence::{SeqSpec, Sequence, WaitKey},
};

/// Queues, seats and blocks of one model replica.
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    seqs: HashMap<SeqId, Sequence>,
    waiting: BTreeMap<WaitKey, SeqId>,
    running: BTreeMap<WaitKey, SeqId>,
    seats: Vec<SlotId>,
    arrivals: u64,
    recomputed_tokens: u64,
}

impl Scheduler {
    pub fn new(limits: Limits, blocks: usize) -> Self {
        let seats = (0..limits.running_seqs_max as u32).rev().map(SlotId).collect();
        Self {
            limits,
            pool: BlockPool::new(blocks),
            seqs: HashMap::new(),
            waiting: BTreeMap::new(),
            running: BTreeMap::new(),
            seats,
            arrivals: 0,
            recomputed_tokens: 0,
        }
    }

    /// Puts a request into the waiting set. The caller has checked that `prompt + max_tokens` fits
    /// into all blocks together and the choices into all seats.
    pub fn add(&mut self, spec: SeqSpec) {
        let arrival = self.arrivals;
        self.arrivals += 1;
        let mut siblings = spec.choices.iter().copied();
        let Some(leader) = siblings.next() else { return };
        let sequence = Sequence {
            id: leader,
            key: (arrival, 0),
            tokens: spec.prompt.to_vec(),
            prompt_len: spec.prompt.len(),
            max_tokens: spec.max_tokens,
            computed: 0,
            in_flight: 0,
            blocks: Vec::new(),
            slot: None,
            unforked: siblings.collect(),
            computed_max: 0,
            score_from: spec.score_prompt.then_some(0),
            root: spec.root,
            keyed_blocks: 0,
        };
        self.waiting.insert(sequence.key, leader);
        self.seqs.insert(leader, sequence);
    }

    /// The next step. `payable` says how many tokens a sequence can pay for and deliver now; at 0 it
    /// sits out and keeps its seat.
    pub fn plan(&mut self, payable: &dyn Fn(SeqId) -> usize) -> StepPlan {
        let mut plan = StepPlan::default();
        let mut budget = Budget {
            tokens: self.limits.step_tokens_max,
            logits_rows: self.limits.logits_rows_max,
        };
        self.plan_decodes(payable, &mut budget, &mut plan);
        if plan.preempted.is_empty() {
            self.admit(payable, &mut plan);
        }
        self.plan_prefills(payable, &mut budget, &mut plan);
        plan
    }

    /// Appends a drawn token, or says that its sequence is gone.
    pub fn commit(&mut self, seq: SeqId, token: TokenId) -> Option<&Sequence> {
        let sequence = self.seqs.get_mut(&seq)?;
        assert!(sequence.in_flight > 0, "commit without a draw of {seq:?}");
        sequence.in_flight -= 1;
        sequence.tokens.push(token);
        key_full_blocks(&mut self.pool, sequence, self.limits.block_tokens);
        Some(sequence)
    }

    /// Forgets a sequence and frees what it holds. Siblings that still wait for its prompt survive:
    /// the next of them computes it. Returns whether it was known.
    pub fn finish(&mut self, seq: SeqId) -> bool {
        let Some(mut sequence) = self.seqs.remove(&seq) else {
            return self.remove_unforked(seq);
        };
        if let Some(&heir) = sequence.unforked.first() {
            sequence.unforked.remove(0);
            self.replace(sequence.key, heir);
            sequence.id = heir;
            self.seqs.insert(heir, sequence);
            return true;
        }
        self.waiting.remove(&sequence.key);
        self.running.remove(&sequence.key);
        self.free(&mut sequence);
        true
    }

    pub fn get(&self, seq: SeqId) -> Option<&Sequence> {
        self.seqs.get(&seq)
    }

    pub fn waiting_len(&self) -> usize {
        self.waiting.len()
    }

    pub fn running_len(&self) -> usize {
        self.running.len()
    }

    pub fn live_len(&self) -> usize {
        self.seqs.len()
    }

    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// Tokens computed again after a preemption, since start.
    pub fn recomputed_tokens(&self) -> u64 {
        self.recomputed_tokens
    }

    fn plan_decodes(
        &mut self,
        payable: &dyn Fn(SeqId) -> usize,
        budget: &mut Budget,
        plan: &mut StepPlan,
    ) {
        let ids: Vec<SeqId> = self.running.values().copied().collect();
        for id in ids {
            let ready = self.seqs.get(&id).is_some_and(|sequence| {
                sequence.slot.is_some() && sequence.is_decode() && !sequence.is_drawn_out()
            });
            if !ready || budget.tokens == 0 || budget.logits_rows == 0 || payable(id) == 0 {
                continue;
            }
            if self.make_writable(id, plan) {
                budget.tokens -= 1;
                budget.logits_rows -= 1;
                self.take(id, 1, plan);
            }
        }
    }

    /// Sees to it that the block of the next row is there and is the sequence's own. Preempts from
    /// the newest end of the batch; false when that was the sequence itself.
    fn make_writable(&mut self, id: SeqId, plan: &mut StepPlan) -> bool {
        loop {
            let sequence = &self.seqs[&id];
            let index = sequence.computed / self.limits.block_tokens;
            let held = sequence.blocks.get(index).copied();
            if held.is_some_and(|block| !self.pool.is_shared(block)) {
                return true;
            }
            if let Some(fresh) = self.pool.alloc() {
                if let Some(shared) = held {
                    plan.copies.push((shared, fresh));
                    self.pool.release(shared);
                }
                if let Some(sequence) = self.seqs.get_mut(&id) {
                    match held {
                        Some(_) => sequence.blocks[index] = fresh,
                        None => sequence.blocks.push(fresh),
                    }
                }
                return true;
            }
            let Some((&key, &victim)) = self.running.last_key_value() else { return false };
            self.preempt(key, victim, plan);
            if victim == id {
                return false;
            }
        }
    }

    fn preempt(&mut self, key: WaitKey, victim: SeqId, plan: &mut StepPlan) {
        self.running.remove(&key);
        self.waiting.insert(key, victim);
        if let Some(mut sequence) = self.seqs.remove(&victim) {
            self.free(&mut sequence);
            sequence.computed = 0;
            sequence.keyed_blocks = 0;
            self.seqs.insert(victim, sequence);
        }
        plan.preempted.push(victim);
    }

    /// Gives back blocks and seats.
    fn free(&mut self, sequence: &mut Sequence) {
        for block in sequence.blocks.drain(..) {
            self.pool.release(block);
        }
        if let Some(slot) = sequence.slot.take() {
            self.seats.push(slot);
        }
    }

    fn admit(&mut self, payable: &dyn Fn(SeqId) -> usize, plan: &mut StepPlan) {
        let mut seats_promised: usize =
            self.running.values().map(|id| self.seqs[id].unforked.len()).sum();
        let candidates: Vec<(WaitKey, SeqId)> =
            self.waiting.iter().take(self.seats.len()).map(|(key, id)| (*key, *id)).collect();
        for (key, id) in candidates {
            let sequence = &self.seqs[&id];
            let seats = 1 + sequence.unforked.len();
            // A token still in flight is not known, so its sequence cannot be recomputed yet.
            if self.seats.len() < seats_promised + seats || sequence.in_flight > 0 {
                return;
            }
            if payable(id) == 0 {
                continue;
            }
            let Some(blocks) =
                self.pool.alloc_many(sequence.tokens.len().div_ceil(self.limits.block_tokens))
            else {
                return;
            };
            let Some(slot) = self.seats.pop() else { return };
            seats_promised += seats - 1;
            self.waiting.remove(&key);
            self.running.insert(key, id);
            if let Some(sequence) = self.seqs.get_mut(&id) {
                sequence.blocks = blocks;
                sequence.slot = Some(slot);
            }
            plan.admitted.push(Admission { seq: id, slot });
        }
    }

    fn plan_prefills(
        &mut self,
        payable: &dyn Fn(SeqId) -> usize,
        budget: &mut Budget,
        plan: &mut StepPlan,
    ) {
        let ids: Vec<SeqId> = self.running.values().copied().collect();
        for id in ids {
            let sequence = &self.seqs[&id];
            if sequence.uncomputed() == 0 || sequence.is_decode() || budget.tokens == 0 {
                continue;
            }
            let scoring = sequence.score_from.is_some_and(|from| from < sequence.prompt_len);
            let rows_max =
                if scoring { budget.tokens.min(budget.logits_rows) } else { budget.tokens };
            let new_tokens = sequence.uncomputed().min(rows_max);
            let completes = new_tokens == sequence.uncomputed();
            if new_tokens == 0 || (completes && budget.logits_rows == 0) || payable(id) == 0 {
                continue;
            }
            budget.tokens -= new_tokens;
            budget.logits_rows -= if scoring { new_tokens } else { usize::from(completes) };
            self.take(id, new_tokens, plan);
        }
    }

    /// Writes a sequence's rows into the plan and counts them as launched.
    fn take(&mut self, id: SeqId, new_tokens: usize, plan: &mut StepPlan) {
        let Some(sequence) = self.seqs.get_mut(&id) else { return };
        let first = sequence.computed;
        let again = sequence.computed_max.min(first + new_tokens).saturating_sub(first);
        self.recomputed_tokens += again as u64;
        sequence.computed += new_tokens;
        sequence.computed_max = sequence.computed_max.max(sequence.computed);
        let position = sequence.computed;
        let score = sequence.score_from.is_some_and(|from| from < sequence.prompt_len);
        if score {
            sequence.score_from = Some(sequence.computed);
        }
        let mut samples = Vec::new();
        if sequence.uncomputed() == 0 && sequence.drawn() < sequence.max_tokens {
            if let Some(slot) = sequence.slot {
                samples.push(SampleTarget { seq: id, slot, position });
            }
            sequence.in_flight += 1;
            for target in self.fork(id, plan) {
                samples.push(target);
            }
        }
        plan.seqs.push(PlannedSeq {
            seq: id,
            first,
            new_tokens,
            recomputed: again,
            samples,
            score,
        });
    }

    /// Lets the siblings of a just prefilled sequence share its blocks, each with a seat of its own.
    fn fork(&mut self, leader: SeqId, plan: &mut StepPlan) -> Vec<SampleTarget> {
        let Some(sequence) = self.seqs.get_mut(&leader) else { return Vec::new() };
        let siblings = std::mem::take(&mut sequence.unforked);
        let (arrival, first_choice) = sequence.key;
        let mut targets = Vec::with_capacity(siblings.len());
        for (index, id) in siblings.into_iter().enumerate() {
            let leader = &self.seqs[&leader];
            let slot = self.seats.pop();
            let slot = slot.unwrap_or_else(|| panic!("no seat kept for {id:?}"));
            let sibling = Sequence {
                id,
                key: (arrival, first_choice + 1 + index as u32),
                tokens: leader.tokens.clone(),
                prompt_len: leader.prompt_len,
                max_tokens: leader.max_tokens,
                computed: leader.computed,
                in_flight: 1,
                blocks: leader.blocks.clone(),
                slot: Some(slot),
                unforked: Vec::new(),
                computed_max: leader.computed_max,
                score_from: None,
                root: leader.root,
                keyed_blocks: leader.keyed_blocks,
            };
            for block in &sibling.blocks {
                self.pool.retain(*block);
            }
            targets.push(SampleTarget { seq: id, slot, position: sibling.computed });
            plan.forked.push(Admission { seq: id, slot });
            self.running.insert(sibling.key, id);
            self.seqs.insert(id, sibling);
        }
        targets
    }

    fn remove_unforked(&mut self, seq: SeqId) -> bool {
        for sequence in self.seqs.values_mut() {
            if let Some(index) = sequence.unforked.iter().position(|sibling| *sibling == seq) {
                sequence.unforked.remove(index);
                return true;
            }
        }
        false
    }

    fn replace(&mut self, key: WaitKey, heir: SeqId) {
        for set in [&mut self.waiting, &mut self.running] {
            if let Some(entry) = set.get_mut(&key) {
                *entry = heir;
            }
        }
    }
}

struct Budget {
    tokens: usize,
    logits_rows: usize,
}

/// Gives every block that is full of tokens known to the host its key.
fn key_full_blocks(pool: &mut BlockPool, sequence: &mut Sequence, block_tokens: usize) {
    let full = sequence.computed.min(sequence.tokens.len()) / block_tokens;
    while sequence.keyed_blocks < full.min(sequence.blocks.len()) {
        let index = sequence.keyed_blocks;
        let parent = index
            .checked_sub(1)
            .and_then(|before| pool.key(sequence.blocks[before]))
            .unwrap_or(sequence.root);
        let tokens = &sequence.tokens[index * block_tokens..(index + 1) * block_tokens];
        let block: BlockId = sequence.blocks[index];
        pool.set_key(block, BlockKey::child(&parent, tokens));
        sequence.keyed_blocks += 1;
    }
}
