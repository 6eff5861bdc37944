//! The loop of the engine thread.

use std::{
    cell::RefCell,
    collections::{HashMap, VecDeque},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use crate::{
    cache::BlockKey,
    clock::Clock,
    ledger::EndCause,
    meter::{self, Owner, StepWork, Tokens},
    sampling::TokenLogprobs,
    scheduler::{Limits, Scheduler, SeqSpec, StepPlan},
    text::Tokenizer,
    types::{FinishReason, ModelId, SeqId, SlotId, TokenId},
};

use super::{
    Event, Submission,
    device::{Device, DeviceError, DeviceOutcome, DeviceStep, SampleSpec, ScoreSpec, SlotBegin},
    handle::{EngineHandle, Shared},
    inputs,
    live::{Ended, Live, Lost},
    metering::{Books, Metering, StepRecord, blocks_of, keep_books},
    request::RequestError,
    snapshot::EngineSnapshot,
};

/// How long the thread sleeps when every live sequence sits out.
const STALLED_SLEEP: Duration = Duration::from_millis(5);
/// How often a fully idle thread wakes without an event.
const IDLE_SLEEP: Duration = Duration::from_secs(3600);

/// What an engine needs to know beyond its device.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    pub model: ModelId,
    pub limits: Limits,
    pub kv_blocks: usize,
    /// Longest prompt plus output the model takes; bounded by the KV blocks as well.
    pub context_tokens_max: usize,
    pub waiting_requests_max: usize,
    /// 1 commits a step before the next is launched, 2 after.
    pub pipeline_depth: usize,
    pub stream_buffer_events_max: usize,
    pub client_stall_max: Duration,
    pub eos_token_ids: Vec<TokenId>,
    /// Of the model's attention, for what a step costs.
    pub sliding_window: Option<usize>,
}

/// A running engine thread.
pub struct EngineThread {
    pub handle: EngineHandle,
    pub thread: JoinHandle<()>,
    /// Who used the device.
    pub books: Books,
}

/// Starts the thread; `make` builds the device on it, and its error is returned here.
pub fn start<D: Device>(
    options: EngineOptions,
    tokenizer: Tokenizer,
    clock: Clock,
    make: impl FnOnce() -> Result<D, DeviceError> + Send + 'static,
) -> Result<EngineThread, DeviceError> {
    let context_tokens_max =
        options.context_tokens_max.min(options.kv_blocks * options.limits.block_tokens);
    let shared = Arc::new(Shared {
        snapshot: RwLock::default(),
        waiting: AtomicUsize::new(0),
        waiting_max: options.waiting_requests_max,
        context_tokens_max,
        choices_max: options.limits.running_seqs_max,
        stream_events: options.stream_buffer_events_max,
        draining: AtomicBool::new(false),
        alive: AtomicBool::new(true),
    });
    let kept = keep_books(clock.now_ns()).map_err(|error| DeviceError(error.to_string()))?;
    let (books, records, _) = kept;
    let (inbox, events) = sync_channel(options.waiting_requests_max + 16);
    let handle = EngineHandle { inbox, shared: shared.clone() };
    let (ready, made) = sync_channel(1);
    let thread = std::thread::Builder::new().name("candela-engine".into()).spawn(move || {
        let device = match make() {
            Ok(device) => device,
            Err(error) => {
                shared.alive.store(false, Ordering::Release);
                let _ = ready.send(Err(error));
                return;
            }
        };
        let _ = ready.send(Ok(()));
        Engine::new(options, tokenizer, clock, device, shared, records).run(&events);
    });
    let thread = thread.map_err(|error: io::Error| DeviceError(error.to_string()))?;
    made.recv().unwrap_or_else(|_| Err(DeviceError("the engine thread died".into())))?;
    Ok(EngineThread { handle, thread, books })
}

/// A launched step, and what its results mean.
struct InFlight {
    plan: StepPlan,
    work: StepWork,
    /// Request of every score, in order.
    scores: Vec<SeqId>,
}

struct Engine<D> {
    options: EngineOptions,
    tokenizer: Tokenizer,
    clock: Clock,
    device: D,
    shared: Arc<Shared>,
    scheduler: Scheduler,
    /// By the sequence of the first choice.
    live: HashMap<SeqId, Live>,
    /// Sequence to request and choice index.
    owners: HashMap<SeqId, (SeqId, usize)>,
    in_flight: VecDeque<InFlight>,
    metering: Metering,
    books: Sender<StepRecord>,
    /// Used since the last record.
    used: Vec<(Owner, Tokens)>,
    recorded_ns: u64,
    next_seq: u64,
    counters: EngineSnapshot,
    stopping: bool,
}

impl<D: Device> Engine<D> {
    fn new(
        options: EngineOptions,
        tokenizer: Tokenizer,
        clock: Clock,
        device: D,
        shared: Arc<Shared>,
        books: Sender<StepRecord>,
    ) -> Self {
        let metering = Metering::new(options.sliding_window);
        let scheduler = Scheduler::new(options.limits, options.kv_blocks);
        let engine = Self {
            options,
            tokenizer,
            clock,
            device,
            shared,
            scheduler,
            live: HashMap::new(),
            owners: HashMap::new(),
            in_flight: VecDeque::new(),
            metering,
            books,
            used: Vec::new(),
            recorded_ns: 0,
            next_seq: 0,
            counters: EngineSnapshot::default(),
            stopping: false,
        };
        engine.publish();
        engine
    }

    fn run(mut self, events: &Receiver<Event>) {
        let mut progressed = true;
        while !self.stopping {
            self.take_events(events, progressed);
            self.reap();
            self.settle_leases();
            let step = catch_unwind(AssertUnwindSafe(|| self.step()));
            match step {
                Ok(Ok(moved)) => progressed = moved,
                Ok(Err(error)) => return self.fail(&error.0),
                Err(_) => return self.fail("a panic on the engine thread"),
            }
            self.publish();
        }
        self.abort_all(&RequestError::ShuttingDown, FinishReason::Abort);
        self.shared.alive.store(false, Ordering::Release);
        self.publish();
    }

    /// Launches the next step, and commits the oldest once the pipeline is full or nothing new
    /// can be launched. Returns whether anything happened.
    fn step(&mut self) -> Result<bool, DeviceError> {
        let plan = self.plan();
        let launched = !plan.is_empty();
        if launched {
            self.launch(plan)?;
        }
        let depth = self.options.pipeline_depth.max(1);
        let committed = self.in_flight.len() >= depth || (!launched && !self.in_flight.is_empty());
        if committed {
            let outcome = self.device.collect()?;
            if let Some(step) = self.in_flight.pop_front() {
                self.commit(step, outcome);
            }
        }
        Ok(launched || committed)
    }

    fn plan(&mut self) -> StepPlan {
        let depth = self.options.pipeline_depth;
        let (live, owners) = (&self.live, &self.owners);
        // Tokens that this plan takes of each request: its choices share one lease, in index order.
        let taken: RefCell<HashMap<SeqId, u64>> = RefCell::default();
        let payable = |seq: SeqId| {
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

    fn launch(&mut self, plan: StepPlan) -> Result<(), DeviceError> {
        let mut step = DeviceStep {
            inputs: inputs::build(&plan, &self.scheduler, self.options.limits.block_tokens),
            ..DeviceStep::default()
        };
        for admission in plan.admitted.iter().chain(&plan.forked) {
            step.begins.extend(self.slot_begin(admission.seq, admission.slot));
        }
        let mut scores = Vec::new();
        let mut row = 0;
        for planned in &plan.seqs {
            if planned.score {
                self.add_scores(planned, row, &mut step, &mut scores);
                row += planned.new_tokens as u32 - 1;
            }
            for target in &planned.samples {
                self.count_in_flight(target.seq, 1);
                step.samples.push(SampleSpec {
                    logits_row: row,
                    slot: target.slot,
                    position: target.position as u32,
                    banned: self.banned(target.seq, target.position),
                });
            }
            row += u32::from(planned.score || !planned.samples.is_empty());
        }
        self.device.launch(&step)?;
        self.counters.steps += 1;
        let work = self.metering.work(&plan);
        self.in_flight.push_back(InFlight { plan, work, scores });
        Ok(())
    }

    fn count_in_flight(&mut self, seq: SeqId, tokens: i64) {
        let owner = self.owners.get(&seq).map(|(owner, _)| *owner);
        if let Some(live) = owner.and_then(|owner| self.live.get_mut(&owner)) {
            live.in_flight = live.in_flight.saturating_add_signed(tokens);
        }
    }

    fn slot_begin(&self, seq: SeqId, slot: SlotId) -> Option<SlotBegin> {
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
    fn add_scores(
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
    fn banned(&self, seq: SeqId, position: usize) -> Vec<TokenId> {
        let request = self.owners.get(&seq).and_then(|(request, _)| self.live.get(request));
        let early = request.is_some_and(|live| {
            position < live.request.prompt.len() + live.request.stop.min_tokens as usize
        });
        if early { self.options.eos_token_ids.clone() } else { Vec::new() }
    }

    fn commit(&mut self, step: InFlight, outcome: DeviceOutcome) {
        self.counters.device_busy_ns += outcome.device_ns;
        let step_time = self.charge_device(step.work, outcome.device_ns);
        for (owner, score) in step.scores.into_iter().zip(outcome.scores) {
            if let Some(live) = self.live.get_mut(&owner) {
                live.add_score(score);
            }
        }
        let mut drawn = outcome.sampled.into_iter();
        for planned in &step.plan.seqs {
            self.commit_prompt(planned.seq, planned.first + planned.new_tokens);
            for target in &planned.samples {
                self.count_in_flight(target.seq, -1);
                if let Some((token, logprobs)) = drawn.next() {
                    self.commit_token(target.seq, token, logprobs);
                }
            }
        }
        self.record(step_time);
    }

    /// Charges every request its part of a step, and says how the step is to be booked.
    fn charge_device(&mut self, work: StepWork, device_ns: u64) -> meter::DeviceStep {
        let owners = &self.owners;
        let (shares, overhead_ns) =
            self.metering.commit(work, device_ns, |seq| owners.contains_key(&seq));
        let mut owned_ns = Vec::with_capacity(shares.len());
        for share in shares {
            let owner = owners.get(&share.seq).map(|(owner, _)| *owner);
            let Some(live) = owner.and_then(|owner| self.live.get_mut(&owner)) else { continue };
            live.lease.use_device(share.device_ns, share.bound_ns);
            owned_ns.push((live.owner.clone(), share.device_ns));
        }
        meter::DeviceStep { end_ns: self.clock.now_ns(), owned_ns, overhead_ns }
    }

    /// Books a step and what was used since the one before.
    fn record(&mut self, step: meter::DeviceStep) {
        for live in self.live.values_mut() {
            self.used.extend(live.take_unbooked());
        }
        let seqs = self
            .live
            .values()
            .flat_map(|live| live.choices.iter().map(|choice| (choice.seq, live.owner.clone())));
        let blocks = blocks_of(&self.scheduler, seqs);
        let blocks_from_ns = std::mem::replace(&mut self.recorded_ns, step.end_ns);
        let tokens = std::mem::take(&mut self.used);
        // Books that are gone are of a server that ends.
        let _ = self.books.send(StepRecord { step, tokens, blocks, blocks_from_ns });
    }

    /// Rows up to `end` are computed; ends a request that wants no output.
    fn commit_prompt(&mut self, seq: SeqId, end: usize) {
        let Some(&(owner, _)) = self.owners.get(&seq) else { return };
        let Some(live) = self.live.get_mut(&owner) else { return };
        if live.commit_prompt(end) {
            for seq in live.choices.iter().map(|choice| choice.seq).collect::<Vec<_>>() {
                self.finish(seq, FinishReason::Length);
            }
        }
    }

    fn commit_token(&mut self, seq: SeqId, token: TokenId, logprobs: Option<TokenLogprobs>) {
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

    /// Ends one choice; the last one closes the request.
    fn finish(&mut self, seq: SeqId, reason: FinishReason) {
        self.scheduler.finish(seq);
        let Some((owner, index)) = self.owners.remove(&seq) else { return };
        *self.counters.finished(reason) += 1;
        let Some(live) = self.live.get_mut(&owner) else { return };
        live.finish(index, reason);
        self.close_if_done(owner);
    }

    fn close_if_done(&mut self, owner: SeqId) {
        if self.live.get(&owner).is_some_and(Live::is_done)
            && let Some(mut live) = self.live.remove(&owner)
        {
            self.used.extend(live.take_unbooked());
            self.counters.prompt_tokens += live.prompt_tokens();
            live.close();
        }
    }

    /// Renews leases that run low, and ends requests whose money has ended.
    fn settle_leases(&mut self) {
        let mut ended = Vec::new();
        for (owner, live) in &mut self.live {
            if live.lease.bills_device() {
                let (seq, context) = live.longest(&self.scheduler);
                live.lease.bound_token(self.metering.token_bound_ns(seq, context));
            }
            live.lease.renew(live.live_sequences(), live.in_flight);
            if let Some(cause) = live.lease.end(live.in_flight) {
                ended.push((*owner, cause));
            }
        }
        for (owner, cause) in ended {
            let Some(live) = self.live.get(&owner) else { continue };
            let choices = live.choices.iter().enumerate().filter(|(_, choice)| !choice.done);
            let seqs: Vec<(usize, SeqId)> = choices.map(|(index, one)| (index, one.seq)).collect();
            // From the last choice, so that no sibling inherits the prompt only to be dropped next.
            for (index, seq) in seqs.into_iter().rev() {
                self.cut(owner, index, seq, cause);
            }
            self.close_if_done(owner);
        }
    }

    /// Ends one choice because of money or a rule.
    fn cut(&mut self, owner: SeqId, index: usize, seq: SeqId, cause: EndCause) {
        let Some(live) = self.live.get_mut(&owner) else { return };
        let reason = live.cut(index, cause);
        self.scheduler.finish(seq);
        self.owners.remove(&seq);
        *self.counters.finished(reason) += 1;
    }

    /// Ends a whole request early.
    fn abort(&mut self, owner: SeqId, reason: FinishReason, error: Option<RequestError>) {
        let Some(mut live) = self.live.remove(&owner) else { return };
        self.used.extend(live.take_unbooked());
        if !live.admitted {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        }
        self.counters.prompt_tokens += live.prompt_tokens();
        // From the last choice, so that no sibling inherits the prompt only to be dropped next.
        for choice in live.choices.iter().rev().filter(|choice| !choice.done) {
            self.scheduler.finish(choice.seq);
            self.owners.remove(&choice.seq);
            *self.counters.finished(reason) += 1;
        }
        let cause = match reason {
            FinishReason::Error => EndCause::Failed,
            _ => EndCause::Aborted,
        };
        live.abort(cause, error);
    }

    fn abort_all(&mut self, error: &RequestError, reason: FinishReason) {
        for owner in self.live.keys().copied().collect::<Vec<_>>() {
            self.abort(owner, reason, Some(error.clone()));
        }
    }

    /// Ends requests whose client went away or stopped reading.
    fn reap(&mut self) {
        let now_ns = self.clock.now_ns();
        let stall_max_ns = self.options.client_stall_max.as_nanos() as u64;
        let mut ended = Vec::new();
        let depth = self.options.pipeline_depth;
        for (owner, live) in &mut self.live {
            match live.is_lost(depth, now_ns, stall_max_ns) {
                Some(Lost::Gone) => ended.push((*owner, None)),
                Some(Lost::Stalled) => {
                    let stall_s = self.options.client_stall_max.as_secs();
                    ended.push((*owner, Some(RequestError::ReaderStalled(stall_s))));
                }
                None => {}
            }
        }
        for (owner, error) in ended {
            self.abort(owner, FinishReason::Abort, error);
        }
    }

    /// Takes what has arrived; waits for the next event when there is nothing to do.
    fn take_events(&mut self, events: &Receiver<Event>, progressed: bool) {
        if !progressed || self.live.is_empty() {
            let wait = if self.live.is_empty() { IDLE_SLEEP } else { STALLED_SLEEP };
            match events.recv_timeout(wait) {
                Ok(event) => self.take_event(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.stopping = true,
            }
        }
        while let Ok(event) = events.try_recv() {
            self.take_event(event);
        }
    }

    fn take_event(&mut self, event: Event) {
        match event {
            Event::Submit(submission) => self.accept(*submission),
            Event::AbortAll => self.abort_all(&RequestError::ShuttingDown, FinishReason::Abort),
            Event::Stop => self.stopping = true,
        }
    }

    fn accept(&mut self, submission: Submission) {
        let first = self.next_seq;
        self.next_seq += u64::from(submission.request.choices.max(1));
        let seqs: Vec<SeqId> = (first..self.next_seq).map(SeqId).collect();
        let owner = seqs[0];
        for (index, seq) in seqs.iter().enumerate() {
            self.owners.insert(*seq, (owner, index));
        }
        let live = Live::new(submission, &seqs, &self.tokenizer, &self.options.model);
        self.scheduler.add(SeqSpec {
            choices: seqs,
            prompt: live.request.prompt.clone(),
            max_tokens: live.request.stop.max_tokens as usize,
            score_prompt: live.request.prompt_logprobs.is_some(),
            root: BlockKey::root(self.options.model.as_str(), 0, &[]),
        });
        self.live.insert(owner, live);
    }

    /// The device is not to be trusted any more: everything fails and the thread ends.
    fn fail(&mut self, what: &str) {
        tracing::error!(error = what, "the engine stops: a step failed");
        self.shared.alive.store(false, Ordering::Release);
        self.abort_all(&RequestError::StepFailed(what.to_owned()), FinishReason::Error);
        self.publish();
    }

    fn publish(&self) {
        let snapshot = EngineSnapshot {
            waiting_requests: self.shared.waiting.load(Ordering::Acquire),
            running_seqs: self.scheduler.running_len(),
            kv_blocks_total: self.scheduler.pool().total(),
            kv_blocks_used: self.scheduler.pool().used(),
            live_seqs: self.scheduler.live_len(),
            recomputed_tokens: self.scheduler.recomputed_tokens(),
            ..self.counters.clone()
        };
        let mut slot =
            self.shared.snapshot.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        *slot = Arc::new(snapshot);
    }
}
