//! The loop of the engine thread.

use std::{
    collections::{HashMap, VecDeque},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, sync_channel},
    },
    thread::JoinHandle,
    time::Duration,
};

use tokio::sync::mpsc::Sender;

use crate::{
    cache::BlockKey,
    clock::Clock,
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
    output::ChoiceOutput,
    request::{GenerateRequest, RequestError, RequestUsage, StreamEvent},
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
}

/// A running engine thread.
pub struct EngineThread {
    pub handle: EngineHandle,
    pub thread: JoinHandle<()>,
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
        Engine::new(options, tokenizer, clock, device, shared).run(&events);
    });
    let thread = thread.map_err(|error: io::Error| DeviceError(error.to_string()))?;
    made.recv().unwrap_or_else(|_| Err(DeviceError("the engine thread died".into())))?;
    Ok(EngineThread { handle, thread })
}

/// A request while any of its choices lives.
struct Live {
    request: GenerateRequest,
    events: Sender<StreamEvent>,
    choices: Vec<Choice>,
    usage: RequestUsage,
    scores: Vec<Option<TokenLogprobs>>,
    scores_sent: bool,
    /// When its send buffer was first seen full.
    full_since_ns: Option<u64>,
    admitted: bool,
}

struct Choice {
    seq: SeqId,
    output: ChoiceOutput,
    done: bool,
}

impl Live {
    /// Room for all that the steps in flight and one more can send, with the closing events.
    fn has_room(&self, depth: usize) -> bool {
        self.events.capacity() >= self.choices.len() * 2 * (depth + 1) + 3
    }
}

/// A launched step, and what its results mean.
struct InFlight {
    plan: StepPlan,
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
    ) -> Self {
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
        let payable = |seq: SeqId| {
            let request = owners.get(&seq).and_then(|(request, _)| live.get(request));
            usize::from(request.is_some_and(|request| request.has_room(depth)))
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
        self.in_flight.push_back(InFlight { plan, scores });
        Ok(())
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
        for (owner, score) in step.scores.into_iter().zip(outcome.scores) {
            if let Some(live) = self.live.get_mut(&owner) {
                live.scores.push(Some(score));
            }
        }
        let mut drawn = outcome.sampled.into_iter();
        for planned in &step.plan.seqs {
            self.commit_prompt(planned.seq);
            for target in &planned.samples {
                if let Some((token, logprobs)) = drawn.next() {
                    self.commit_token(target.seq, token, logprobs);
                }
            }
        }
    }

    /// Sends the prompt's log-probabilities once complete, and ends a request that wants no more.
    fn commit_prompt(&mut self, seq: SeqId) {
        let Some(&(owner, _)) = self.owners.get(&seq) else { return };
        let Some(live) = self.live.get_mut(&owner) else { return };
        let prompt_done = self
            .scheduler
            .get(seq)
            .is_some_and(|sequence| sequence.computed >= live.request.prompt.len());
        if live.request.prompt_logprobs.is_some()
            && !live.scores_sent
            && live.scores.len() == live.request.prompt.len()
        {
            live.scores_sent = true;
            let scores = std::mem::take(&mut live.scores);
            // A closed channel is found by `reap`; room was kept by `has_room`.
            let _ = live.events.try_send(StreamEvent::PromptLogprobs(scores));
        }
        if live.request.stop.max_tokens == 0 && prompt_done {
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
        let choice = &mut live.choices[index];
        let piece = choice.output.push(token, logprobs, ends, silent);
        live.usage.completion_tokens += 1;
        self.counters.generation_tokens += 1;
        let wants_tokens = live.request.sampling.logprobs.is_some() && !piece.tokens.is_empty();
        if !piece.text.is_empty() || wants_tokens {
            let delta =
                StreamEvent::Delta { choice: index as u32, text: piece.text, tokens: piece.tokens };
            let _ = live.events.try_send(delta);
        }
        if let Some(reason) = piece.finish {
            self.finish(seq, reason);
        }
    }

    /// Ends one choice; the last one closes the request.
    fn finish(&mut self, seq: SeqId, reason: FinishReason) {
        self.scheduler.finish(seq);
        let Some((owner, index)) = self.owners.remove(&seq) else { return };
        self.count_finish(reason);
        let Some(live) = self.live.get_mut(&owner) else { return };
        live.choices[index].done = true;
        let _ = live.events.try_send(StreamEvent::Finish { choice: index as u32, reason });
        if live.choices.iter().all(|choice| choice.done)
            && let Some(live) = self.live.remove(&owner)
        {
            self.counters.prompt_tokens += u64::from(live.usage.prompt_tokens);
            let _ = live.events.try_send(StreamEvent::Done(live.usage));
        }
    }

    fn count_finish(&mut self, reason: FinishReason) {
        let counter = match reason {
            FinishReason::Eos => &mut self.counters.finished_eos,
            FinishReason::StopString => &mut self.counters.finished_stop,
            FinishReason::Length => &mut self.counters.finished_length,
            FinishReason::Abort => &mut self.counters.finished_abort,
            FinishReason::Error => &mut self.counters.finished_error,
        };
        *counter += 1;
    }

    /// Ends a whole request early.
    fn abort(&mut self, owner: SeqId, reason: FinishReason, error: Option<RequestError>) {
        let Some(live) = self.live.remove(&owner) else { return };
        if !live.admitted {
            self.shared.waiting.fetch_sub(1, Ordering::AcqRel);
        }
        self.counters.prompt_tokens += u64::from(live.usage.prompt_tokens);
        // From the last choice, so that no sibling inherits the prompt only to be dropped next.
        for choice in live.choices.iter().rev().filter(|choice| !choice.done) {
            self.scheduler.finish(choice.seq);
            self.owners.remove(&choice.seq);
            self.count_finish(reason);
        }
        if let Some(error) = error {
            let _ = live.events.try_send(StreamEvent::Error(error));
        }
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
        for (owner, live) in &mut self.live {
            if live.events.is_closed() {
                ended.push((*owner, None));
            } else if live.has_room(self.options.pipeline_depth) {
                live.full_since_ns = None;
            } else if now_ns - *live.full_since_ns.get_or_insert(now_ns) > stall_max_ns {
                let stall_s = self.options.client_stall_max.as_secs();
                ended.push((*owner, Some(RequestError::ReaderStalled(stall_s))));
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
        let Submission { request, events } = submission;
        let first = self.next_seq;
        self.next_seq += u64::from(request.choices.max(1));
        let seqs: Vec<SeqId> = (first..self.next_seq).map(SeqId).collect();
        let owner = seqs[0];
        for (index, seq) in seqs.iter().enumerate() {
            self.owners.insert(*seq, (owner, index));
        }
        self.scheduler.add(SeqSpec {
            choices: seqs.clone(),
            prompt: request.prompt.clone(),
            max_tokens: request.stop.max_tokens as usize,
            score_prompt: request.prompt_logprobs.is_some(),
            root: BlockKey::root(self.options.model.as_str(), 0, &[]),
        });
        let choices = seqs.into_iter().map(|seq| Choice {
            seq,
            output: ChoiceOutput::new(&self.tokenizer, &request.prompt, request.stop.clone()),
            done: false,
        });
        let usage =
            RequestUsage { prompt_tokens: request.prompt.len() as u32, ..RequestUsage::default() };
        let live = Live {
            choices: choices.collect(),
            events,
            usage,
            // Nothing precedes the first token, so it has no probability.
            scores: vec![None],
            scores_sent: false,
            full_since_ns: None,
            admitted: false,
            request,
        };
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
