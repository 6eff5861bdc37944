//! One server: door, ledger and engine without threads of their own.

use std::{
    path::Path,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use candela::{
    admission::{Anonymous, Door},
    clock::Clock,
    engine::{EngineOptions, EngineSnapshot, EngineWithoutThread},
    ledger::{Desk, Ledger, LedgerOptions, db::Sqlite, lease::LeaseLimits},
    meter::By,
    scheduler::Limits,
    types::ModelId,
};
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

use super::{
    audit::{Audited, Switches},
    client::Front,
    model::{END, FakeModel, tokenizer},
};

pub const MODEL: &str = "m";
pub const CONTEXT_MAX: usize = 64;
/// What a reader may keep the engine waiting.
pub const STALL_MAX: Duration = Duration::from_secs(5);
/// How long a request without money waits for some.
pub const WAIT_MAX: Duration = Duration::from_secs(2);
pub const REPLICA_TTL: Duration = Duration::from_secs(10);

/// What the servers of a story have in common.
#[derive(Clone, Debug)]
pub struct Setting {
    pub servers: usize,
    pub limits: Limits,
    pub blocks: usize,
    pub waiting_max: usize,
    pub depth: usize,
    pub stream_events: usize,
    pub outstanding_tokens_max: u64,
    /// The ledger takes one turn in so many.
    pub ledger_pace: u32,
    /// Steps until a device fails, in a few stories.
    pub device_fails_in: Option<u32>,
}

impl Setting {
    pub fn new(random: &mut StdRng) -> Self {
        let limits = Limits {
            step_tokens_max: random.random_range(3..50),
            running_seqs_max: random.random_range(3..10),
            logits_rows_max: random.random_range(3..14),
            block_tokens: 4,
        };
        Self {
            servers: if random.random_ratio(1, 3) { 2 } else { 1 },
            limits,
            blocks: random.random_range(CONTEXT_MAX / 4..60),
            waiting_max: random.random_range(2..20),
            depth: random.random_range(1..=2),
            stream_events: random.random_range(8..80),
            outstanding_tokens_max: [1, 2, 4, 16, 256][random.random_range(0..5)],
            ledger_pace: [1, 1, 3, 30][random.random_range(0..4)],
            device_fails_in: random.random_ratio(1, 12).then(|| random.random_range(5..200)),
        }
    }

    fn engine(&self) -> EngineOptions {
        EngineOptions {
            model: ModelId::new(MODEL),
            limits: self.limits,
            kv_blocks: self.blocks,
            context_tokens_max: CONTEXT_MAX,
            waiting_requests_max: self.waiting_max,
            pipeline_depth: self.depth,
            stream_buffer_events_max: self.stream_events,
            client_stall_max: STALL_MAX,
            eos_token_ids: vec![END],
            sliding_window: None,
            calibration: Duration::ZERO,
            metered: true,
        }
    }

    fn ledger(&self, replica: String) -> LedgerOptions {
        LedgerOptions {
            name: replica.clone(),
            replica,
            exclusive: self.servers == 1,
            replica_ttl: REPLICA_TTL,
            clock_error_max: Duration::from_secs(2),
            lease: LeaseLimits {
                outstanding_tokens_max: self.outstanding_tokens_max,
                wait_max: WAIT_MAX,
            },
        }
    }
}

pub struct Server {
    pub front: Front,
    pub switches: Arc<Switches>,
    desk: Desk,
    engine: EngineWithoutThread<FakeModel>,
    setting: Setting,
    clock: Clock,
    random: StdRng,
    turns: u32,
}

impl Server {
    pub fn start(setting: &Setting, file: &Path, clock: &Clock, life: u32, seed: u64) -> Self {
        let switches = Arc::<Switches>::default();
        let db = Sqlite::open(file, clock.clone()).expect("opens");
        let db = Box::new(Audited::new(db, switches.clone()));
        let options = setting.ledger(format!("life-{life}"));
        let (ledger, desk) =
            Ledger::without_thread(db, clock.clone(), options, |_| {}).expect("joins");
        let mut random = StdRng::seed_from_u64(seed);
        let engine = engine(setting, clock, &mut random, setting.device_fails_in);
        let door = Door::new(ledger.clone(), clock.clone(), Anonymous::Never);
        let front = Front { door: Rc::new(door), ledger, engine: engine.handle.clone() };
        let (setting, clock) = (setting.clone(), clock.clone());
        Self { front, switches, desk, engine, setting, clock, random, turns: 0 }
    }

    /// Returns whether anything happened.
    pub fn turn(&mut self) -> bool {
        self.turns += 1;
        let before = self.switches.commits.load(Ordering::Relaxed);
        if self.turns.is_multiple_of(self.setting.ledger_pace) {
            self.desk.turn();
        }
        let moved = self.engine.turn().unwrap_or_else(|_| {
            // The engine is started anew, on a device that works.
            let made = engine(&self.setting, &self.clock, &mut self.random, None);
            self.front.engine = made.handle.clone();
            close_books(std::mem::replace(&mut self.engine, made), &self.clock);
            true
        });
        let snapshot = self.engine.handle.snapshot();
        assert!(snapshot.kv_blocks_used <= self.setting.blocks);
        assert!(snapshot.running_seqs <= self.setting.limits.running_seqs_max);
        moved || self.switches.commits.load(Ordering::Relaxed) > before
    }

    pub fn snapshot(&self) -> Arc<EngineSnapshot> {
        self.engine.handle.snapshot()
    }

    /// Whether nothing is live or waiting, and no block is held.
    pub fn is_idle(&self) -> bool {
        let snapshot = self.engine.handle.snapshot();
        snapshot.live_seqs + snapshot.kv_blocks_used + snapshot.waiting_requests == 0
    }

    /// Ends as after a signal: what runs is aborted, charged and settled.
    pub fn stop(self) {
        let Self { mut desk, engine, switches, clock, .. } = self;
        switches.cut.store(false, Ordering::Relaxed);
        close_books(engine, &clock);
        // One turn for what a failing commit leaves over, one to do it.
        for _ in 0..3 {
            desk.turn();
        }
        desk.leave();
    }
}

fn engine(
    setting: &Setting,
    clock: &Clock,
    random: &mut StdRng,
    fails_in: Option<u32>,
) -> EngineWithoutThread<FakeModel> {
    let sizes = (setting.blocks, setting.limits.block_tokens, setting.limits.running_seqs_max);
    let random = StdRng::seed_from_u64(random.next_u64());
    let device = FakeModel::new(clock.clone(), random, sizes, fails_in);
    EngineWithoutThread::new(setting.engine(), tokenizer(), clock.clone(), device).expect("starts")
}

/// All that the device did has an owner or a reason, and every token is in the books.
fn close_books(engine: EngineWithoutThread<FakeModel>, clock: &Clock) {
    let handle = engine.handle.clone();
    let books = engine.end();
    let end = handle.snapshot();
    assert_eq!((end.live_seqs, end.kv_blocks_used), (0, 0), "something is left: {end:?}");
    assert_eq!(books.late_ns(), 0);
    // To the end of the last window; a story is shorter than what is remembered.
    let until_ns = clock.now_ns() + 1_000_000_000;
    let report = books.utilization(until_ns, u64::MAX / 2, By::Tenant);
    let total = report.total();
    assert_eq!(total.device_ns, report.to_ns - report.from_ns, "wall time: {report:?}");
    assert_eq!(total.device_ns - report.idle.device_ns, end.device_busy_ns, "{report:?}");
    assert_eq!(total.tokens.output, end.generation_tokens, "{report:?}");
}
