//! The loop of the engine thread.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
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

use super::{
    Event, Submission,
    books::{Books, BooksWriter, keep_books},
    calibrate::measure,
    device::{Device, DeviceError},
    handle::{EngineHandle, Shared},
    live::Live,
    metering::Metering,
    request::RequestError,
    snapshot::EngineSnapshot,
};
use crate::{
    cache::BlockKey,
    clock::Clock,
    meter::{DeviceStep, Overhead, Owner, StepWork, Tokens},
    scheduler::{Limits, Scheduler, SeqSpec, StepPlan},
    text::Tokenizer,
    types::{FinishReason, ModelId, RequestId, SeqId, TokenId},
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
    /// How long steps are timed before anyone is served; zero does without.
    pub calibration: Duration,
    /// Whether device time is divided and booked. Without, nobody can be charged for it and the books
    /// stay empty: for measuring what it costs.
    pub metered: bool,
}

/// A running engine thread.
pub struct EngineThread {
    pub handle: EngineHandle,
    pub thread: JoinHandle<()>,
    /// Who used the device.
    pub books: Books,
    /// Keeps the books; ends after the engine, once it has told all that it knows.
    pub keeper: JoinHandle<()>,
    /// What the device calls itself, if it is a GPU.
    pub gpu_uuid: Option<String>,
}

/// Starts the thread; `make` builds the device on it, and its error is returned here.
pub fn start<D: Device>(
    options: EngineOptions,
    tokenizer: Tokenizer,
    clock: Clock,
    make: impl FnOnce() -> Result<D, DeviceError> + Send + 'static,
) -> Result<EngineThread, DeviceError> {
    let (ready, made) = sync_channel(1);
    let thread = std::thread::Builder::new().name("candela-engine".into()).spawn(move || {
        let engine = make()
            .and_then(|device| EngineWithoutThread::new(options, tokenizer, clock, device))
            .and_then(|mut made| made.engine.calibrate().map(|()| made));
        match engine {
            Ok(EngineWithoutThread { engine, inbox, handle, books, keeper }) => {
                engine.publish();
                let gpu_uuid = engine.device.gpu_uuid();
                let _ = ready.send(Ok((handle, books, keeper, gpu_uuid)));
                engine.run(&inbox);
            }
            Err(error) => drop(ready.send(Err(error))),
        }
    });
    let thread = thread.map_err(|error: io::Error| DeviceError(error.to_string()))?;
    let died = || Err(DeviceError("the engine thread died".into()));
    let (handle, books, keeper, gpu_uuid) = made.recv().unwrap_or_else(|_| died())?;
    Ok(EngineThread { handle, thread, books, keeper, gpu_uuid })
}

/// An engine whose caller takes the turns that its thread would: for simulations.
pub struct EngineWithoutThread<D> {
    engine: Engine<D>,
    inbox: Receiver<Event>,
    pub handle: EngineHandle,
    books: Books,
    keeper: JoinHandle<()>,
}

impl<D: Device> EngineWithoutThread<D> {
    pub fn new(
        options: EngineOptions,
        tokenizer: Tokenizer,
        clock: Clock,
        device: D,
    ) -> Result<Self, DeviceError> {
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
        let kept = keep_books(clock.clone()).map_err(|error| DeviceError(error.to_string()))?;
        let (books, records, keeper) = kept;
        let (sender, inbox) = sync_channel(options.waiting_requests_max + 16);
        let handle = EngineHandle { inbox: sender, shared: shared.clone() };
        let engine = Engine::new(options, tokenizer, clock, device, shared, records);
        Ok(Self { engine, inbox, handle, books, keeper })
    }

    /// Takes what has arrived and runs a step. Returns whether anything happened; after an error the
    /// engine is dead.
    pub fn turn(&mut self) -> Result<bool, DeviceError> {
        self.engine.take_arrived(&self.inbox);
        let turned = self.engine.turn();
        turned.inspect_err(|error| self.engine.fail(&error.0))
    }

    /// Ends everything that is live, and waits until all of it is in the books.
    pub fn end(mut self) -> Books {
        self.engine.shut_down();
        drop(self.engine);
        // A keeper that panicked has kept what came before.
        let _ = self.keeper.join();
        self.books
    }
}

/// A launched step, and what its results mean.
pub(super) struct InFlight {
    pub(super) plan: StepPlan,
    pub(super) work: StepWork,
    /// Request of every score, in order.
    pub(super) scores: Vec<SeqId>,
    /// Request of every token drawn, in order.
    pub(super) draws: Vec<SeqId>,
    pub(super) launched_ns: u64,
}

pub(super) struct Engine<D> {
    pub(super) options: EngineOptions,
    pub(super) tokenizer: Tokenizer,
    pub(super) clock: Clock,
    pub(super) device: D,
    pub(super) shared: Arc<Shared>,
    pub(super) scheduler: Scheduler,
    /// By the sequence of the first choice, and so the oldest first.
    pub(super) live: BTreeMap<SeqId, Live>,
    /// Sequence to request and choice index.
    pub(super) owners: HashMap<SeqId, (SeqId, usize)>,
    pub(super) in_flight: VecDeque<InFlight>,
    pub(super) metering: Metering,
    pub(super) books: BooksWriter,
    /// Used since the last record.
    pub(super) used: Vec<(Owner, Tokens)>,
    /// Ended since the last record.
    pub(super) ended: Vec<RequestId>,
    pub(super) recorded_ns: u64,
    pub(super) next_seq: u64,
    pub(super) counters: EngineSnapshot,
    pub(super) stopping: bool,
}

impl<D: Device> Engine<D> {
    fn new(
        options: EngineOptions,
        tokenizer: Tokenizer,
        clock: Clock,
        device: D,
        shared: Arc<Shared>,
        books: BooksWriter,
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
            live: BTreeMap::new(),
            owners: HashMap::new(),
            in_flight: VecDeque::new(),
            metering,
            books,
            used: Vec::new(),
            ended: Vec::new(),
            recorded_ns: 0,
            next_seq: 0,
            counters: EngineSnapshot::default(),
            stopping: false,
        };
        engine.publish();
        engine
    }

    /// Times steps; what that takes is the operator's.
    fn calibrate(&mut self) -> Result<(), DeviceError> {
        let options = &self.options;
        if options.calibration.is_zero() {
            return Ok(());
        }
        self.books.begin(self.clock.now_ns());
        let samples = measure(
            &mut self.device,
            &options.limits,
            options.kv_blocks,
            options.context_tokens_max,
            self.metering.window(),
            options.calibration,
            &self.clock,
        )?;
        self.metering.calibrate(&samples);
        let mut step = DeviceStep { end_ns: self.clock.now_ns(), ..DeviceStep::default() };
        step.overhead_ns[Overhead::WarmUp as usize] =
            samples.iter().map(|sample| sample.device_ns).sum();
        self.record(step, Vec::new());
        Ok(())
    }

    fn run(mut self, events: &Receiver<Event>) {
        let mut progressed = true;
        while !self.stopping {
            self.take_events(events, progressed);
            match self.turn() {
                Ok(moved) => progressed = moved,
                Err(error) => return self.fail(&error.0),
            }
        }
        self.shut_down();
    }

    fn turn(&mut self) -> Result<bool, DeviceError> {
        self.reap();
        self.settle_leases();
        let panicked = |_| Err(DeviceError("a panic on the engine thread".into()));
        let moved = catch_unwind(AssertUnwindSafe(|| self.step())).unwrap_or_else(panicked)?;
        self.publish();
        Ok(moved)
    }

    fn shut_down(&mut self) {
        self.abort_all(&RequestError::ShuttingDown, FinishReason::Abort);
        self.flush_books();
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

    /// Takes what has arrived; waits for the next event when there is nothing to do.
    fn take_events(&mut self, events: &Receiver<Event>, progressed: bool) {
        if !progressed || self.live.is_empty() {
            self.flush_books();
            let wait = if self.live.is_empty() { IDLE_SLEEP } else { STALLED_SLEEP };
            match events.recv_timeout(wait) {
                Ok(event) => self.take_event(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => self.stopping = true,
            }
        }
        self.take_arrived(events);
    }

    fn take_arrived(&mut self, events: &Receiver<Event>) {
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
        let bound = self.metering.bound(&self.options.limits);
        let live = Live::new(submission, &seqs, &self.tokenizer, &self.options.model, bound);
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
        self.flush_books();
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
            device_bound: Some(self.metering.bound(&self.options.limits)),
            ..self.counters.clone()
        };
        let mut slot =
            self.shared.snapshot.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        *slot = Arc::new(snapshot);
    }
}
