//! Many streams on leases of the real thread, driven as the engine drives them: tokens launched
//! ahead, input counted when it is computed, clients that leave.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use candela::{
    clock::Clock,
    ledger::{
        Bill, Demand, EndCause, Lease, Ledger, LedgerOptions, Opening, Payer, Span,
        book::RateLimit,
        db::{Db, DbError, Question, Row, Sqlite, Val},
        lease::LeaseLimits,
        thread::LedgerThread,
    },
    price::Rates,
    types::{KeyId, ModelId, NanoUsd, RequestId},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::world::{MODEL, World, budget, cost, file_in, price, rates, used};

const DEADLINE: Duration = Duration::from_secs(90);

/// Looks at every budget before each commit, with the eyes of the transaction.
struct Audited {
    db: Sqlite,
    commits: Arc<AtomicU64>,
    overrun: Arc<Mutex<Vec<String>>>,
}

impl Db for Audited {
    fn begin_asking(&mut self, first: &[Question]) -> Result<Vec<Vec<Row>>, DbError> {
        self.db.begin_asking(first)
    }

    fn commit(&mut self) -> Result<(), DbError> {
        let sql = "SELECT window_total.scope, posted, held, limit_nano FROM window_total
            JOIN budget ON budget.scope = window_total.scope AND budget.span = window_total.span
            WHERE posted + held > limit_nano";
        for row in self.db.query(sql, &[])? {
            self.overrun.lock().expect("not poisoned").push(format!("{row:?}"));
        }
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.db.commit()
    }

    fn rollback(&mut self) {
        self.db.rollback();
    }

    fn query(&mut self, sql: &'static str, values: &[Val]) -> Result<Vec<Row>, DbError> {
        self.db.query(sql, values)
    }

    fn execute(&mut self, sql: &'static str, values: &[Val]) -> Result<u64, DbError> {
        self.db.execute(sql, values)
    }

    fn batch(&mut self, sql: &str) -> Result<(), DbError> {
        self.db.batch(sql)
    }

    fn now_ns(&mut self) -> Result<i64, DbError> {
        self.db.now_ns()
    }
}

/// A load, and what it runs into.
struct Load {
    streams: usize,
    budgets: &'static [(&'static str, Span, i128)],
    rates: Rates,
    /// Output tokens of a stream, at most.
    tokens_max: u64,
    choices_max: u32,
    /// Whether some have caps, and some leave midway.
    varied: bool,
    outstanding_tokens_max: u64,
    /// Simulated seconds a real one.
    speed: u32,
    /// Simulated time over which they arrive.
    arrive_over: Duration,
}

impl Default for Load {
    fn default() -> Self {
        Self {
            streams: 100,
            budgets: &[],
            rates: rates(150, 75, 600),
            tokens_max: 60,
            choices_max: 1,
            varied: true,
            outstanding_tokens_max: 256,
            speed: 1,
            arrive_over: Duration::ZERO,
        }
    }
}

/// A stream as its client saw it.
struct Seen {
    id: RequestId,
    input: u64,
    delivered: u64,
    cap: Option<i128>,
    /// `None` for one that was dropped.
    end: Option<(EndCause, Option<Bill>)>,
}

/// Output tokens delivered by each live request, and its sequences.
type Live = Arc<Mutex<HashMap<RequestId, (u64, u64)>>>;

struct Stream {
    input: u64,
    tokens: u64,
    choices: u64,
    leaves_after: Option<u64>,
    random: StdRng,
}

impl Stream {
    /// Until it has ended, one way or another.
    async fn run(mut self, mut lease: Lease, id: RequestId, cap: Option<i128>, live: Live) -> Seen {
        let (mut in_flight, mut delivered, mut input) = (0, 0, 0);
        let seen = |input, delivered, end| Seen { id: id.clone(), input, delivered, cap, end };
        loop {
            lease.renew(Demand { sequences: self.choices, in_flight, left: u64::MAX });
            if let Some(cause) = lease.end(in_flight) {
                return seen(input, delivered, Some((cause, close(lease, cause).await)));
            }
            if self.leaves_after.is_some_and(|after| delivered >= after) {
                drop(lease);
                return seen(input, delivered, None);
            }
            // Two steps of every choice are launched before the first is committed, and the first
            // before the input that it follows.
            let most = (2 * self.choices).min(self.tokens - delivered);
            while in_flight < most && lease.affordable() > in_flight {
                in_flight += 1;
            }
            if in_flight == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            }
            if input < self.input {
                input = self.input;
                lease.use_input(input, 0);
            }
            let commits = self.random.random_range(1..=in_flight);
            for _ in 0..commits {
                in_flight -= 1;
                lease.use_output(1);
                delivered += 1;
            }
            live.lock().expect("not poisoned").insert(id.clone(), (delivered, self.choices));
            if delivered == self.tokens {
                return seen(
                    input,
                    delivered,
                    Some((EndCause::Finished, close(lease, EndCause::Finished).await)),
                );
            }
            tokio::task::yield_now().await;
        }
    }
}

async fn close(lease: Lease, cause: EndCause) -> Option<Bill> {
    let (told, bill) = tokio::sync::oneshot::channel();
    lease.close(cause, move |bill| told.send(bill).expect("waited for"));
    bill.await.expect("told")
}

/// What is left once all have ended.
struct After {
    seen: Vec<Seen>,
    refused: usize,
    world: World,
}

impl Load {
    async fn run(&self, name: &str) -> After {
        let mut world = World::new();
        world.write(|book| {
            for (scope, span, limit) in self.budgets {
                book.set_budget(&budget(scope, *span, "UTC", *limit))?;
            }
            let limit = RateLimit { sequences_max: Some(1 << 20), ..RateLimit::default() };
            book.set_rate_limit("tenant:red", &limit)?;
            book.set_price(&price(MODEL, self.rates))
        });
        let (overrun, commits) =
            (Arc::<Mutex<Vec<String>>>::default(), Arc::<AtomicU64>::default());
        let db = Sqlite::open(&file_in(world.dir.path()), world.clock.clone()).expect("opens");
        let db = Audited { db, commits: commits.clone(), overrun: overrun.clone() };
        let LedgerThread { ledger, thread } =
            Ledger::start(Box::new(db), world.clock.clone(), self.options(), |_| {})
                .expect("starts");
        let over = Arc::new(AtomicBool::new(false));
        let ticker = tick(world.clock.clone(), self.speed, over.clone());
        let live = Live::default();
        let watcher = tokio::spawn(watch(
            ledger.clone(),
            live.clone(),
            self.outstanding_tokens_max,
            over.clone(),
        ));
        let (seen, refused) = self.drive(&ledger, &mut world, &live).await;
        over.store(true, Ordering::Release);
        let looked = watcher.await.expect("sees nothing wrong");
        ticker.join().expect("ticks");
        ledger.stop();
        tokio::task::spawn_blocking(|| thread.join()).await.expect("joins").expect("ends well");
        let overrun = overrun.lock().expect("not poisoned");
        assert!(overrun.is_empty(), "{name}: {overrun:#?}");
        let commits = commits.load(Ordering::Relaxed);
        println!(
            "{name}: {} streams, {refused} refused, {commits} commits, {looked} looks",
            seen.len()
        );
        After { seen, refused, world }
    }

    fn options(&self) -> LedgerOptions {
        LedgerOptions {
            replica: "streams".into(),
            name: "test".into(),
            exclusive: true,
            replica_ttl: Duration::from_secs(3600),
            clock_error_max: Duration::from_secs(1),
            lease: LeaseLimits {
                outstanding_tokens_max: self.outstanding_tokens_max,
                wait_max: Duration::from_secs(2) * self.speed,
            },
        }
    }

    async fn drive(&self, ledger: &Ledger, world: &mut World, live: &Live) -> (Vec<Seen>, usize) {
        let mut random = StdRng::seed_from_u64(7);
        let begun_ns = world.clock.now_ns();
        let streams: Vec<_> = (0..self.streams)
            .map(|index| {
                let cap = (self.varied && random.random_ratio(1, 4))
                    .then(|| random.random_range(10_000..60_000));
                let choices = random.random_range(1..=self.choices_max);
                let stream = Stream {
                    input: random.random_range(1..40),
                    tokens: if self.varied {
                        random.random_range(1..=self.tokens_max)
                    } else {
                        self.tokens_max
                    },
                    choices: choices.into(),
                    leaves_after: (self.varied && random.random_ratio(1, 4))
                        .then(|| random.random_range(0..20)),
                    random: StdRng::seed_from_u64(index as u64),
                };
                let opening = world.opening("red", stream.input);
                let payer =
                    if index % 2 == 0 { Payer::Key(KeyId::new("k0")) } else { opening.payer };
                let opening = Opening {
                    payer,
                    model: ModelId::new(MODEL),
                    choices,
                    cap: cap.map(NanoUsd),
                    ..opening
                };
                let (ledger, live, clock) = (ledger.clone(), live.clone(), world.clock.clone());
                let arrives = self.arrive_over * index as u32 / self.streams as u32;
                let arrives_ns = begun_ns + arrives.as_nanos() as u64;
                tokio::spawn(async move {
                    while clock.now_ns() < arrives_ns {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                    let id = opening.request.clone();
                    let lease = ledger.open(opening).await.ok()?;
                    let seen = stream.run(lease, id.clone(), cap, live.clone()).await;
                    live.lock().expect("not poisoned").remove(&id);
                    Some(seen)
                })
            })
            .collect();
        let (mut seen, mut refused) = (Vec::new(), 0);
        for stream in streams {
            match tokio::time::timeout(DEADLINE, stream).await.expect("ends").expect("no panic") {
                Some(one) => seen.push(one),
                None => refused += 1,
            }
        }
        (seen, refused)
    }

    /// What holds for every load.
    async fn check(&self, name: &str) -> After {
        let mut after = self.run(name).await;
        after.world.write(|_| Ok(()));
        for one in &after.seen {
            let charge = cost(&self.rates, &used(one.input, one.delivered));
            let sql = "SELECT posted, output, uncached_input FROM request WHERE id = $1 AND state = 'done'";
            let rows = after.world.db().query(sql, &[one.id.as_str().into()]).expect("reads");
            let row = &rows[0];
            let row = (
                row.int(0).expect("posted"),
                row.int(1).expect("output"),
                row.int(2).expect("input"),
            );
            let expected = (charge as i64, one.delivered as i64, one.input as i64);
            assert_eq!(row, expected, "{name}: {} ends {:?}", one.id, one.end);
            assert!(one.cap.is_none_or(|cap| charge <= cap), "{name}: {charge} of {:?}", one.cap);
            if let Some((_, bill)) = &one.end {
                assert_eq!(
                    bill.as_ref().map(|bill| bill.cost.0),
                    Some(charge),
                    "{name}: {}",
                    one.id
                );
            }
        }
        let open = "SELECT COUNT(*) FROM request WHERE state = 'open'";
        let held = "SELECT CAST(COALESCE(SUM(held), 0) AS BIGINT) FROM window_total";
        let sequences = "SELECT CAST(COALESCE(SUM(sequences), 0) AS BIGINT) FROM rate_limit";
        for sql in [open, held, sequences, "SELECT COUNT(*) FROM lease"] {
            assert_eq!(after.world.number(sql), 0, "{name}: {sql}");
        }
        after
    }
}

/// Time passes.
fn tick(clock: Clock, speed: u32, over: Arc<AtomicBool>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut last = Instant::now();
        while !over.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_micros(500));
            clock.advance(last.elapsed() * speed);
            last = Instant::now();
        }
    })
}

/// Looks again and again whether the sums hold, and whether a crash now would cost more than it may.
async fn watch(ledger: Ledger, live: Live, outstanding_max: u64, over: Arc<AtomicBool>) -> u32 {
    let mut looked = 0;
    while !over.load(Ordering::Acquire) {
        let delivered = live.lock().expect("not poisoned").clone();
        let rows = ledger.run(move |book| {
            let problems = book.verify()?;
            assert!(problems.is_empty(), "{problems:#?}");
            let mut lost = Vec::new();
            for (id, (delivered, sequences)) in &delivered {
                // A request that has ended meanwhile has all of it on record.
                let recorded = book.bill(id)?.map_or(0, |bill| bill.used.output);
                let loss = delivered.saturating_sub(recorded);
                lost.extend((loss > outstanding_max * sequences).then(|| format!("{id}: {loss}")));
            }
            Ok(lost)
        });
        assert_eq!(rows.await.expect("answers"), Vec::<String>::new());
        looked += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    looked
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_streams_of_one_tenant_pass_none_of_three_budgets() {
    // About what they want in all, so that every budget bites at some time.
    let budgets: &[_] = &[
        ("key:k0", Span::Day, 3_000_000),
        ("tenant:red", Span::Month, 6_500_000),
        ("org:acme", Span::Total, 6_000_000),
        ("global", Span::Week, 1 << 40),
    ];
    let load = Load { streams: 500, budgets, choices_max: 3, ..Load::default() };
    let after = load.check("500 streams").await;
    let causes: Vec<EndCause> =
        after.seen.iter().filter_map(|one| Some(one.end.as_ref()?.0)).collect();
    for cause in [EndCause::Finished, EndCause::CostCap, EndCause::Budget] {
        assert!(causes.contains(&cause), "nothing ended by {cause:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_is_used_to_within_one_token() {
    for (limit, output) in [(1_000_000, 600), (777_777, 601), (500_000, 13)] {
        let budgets: &'static [_] = Box::leak(Box::new([("tenant:red", Span::Total, limit)]));
        let rates = rates(150, 75, output);
        let load = Load {
            streams: 40,
            budgets,
            rates,
            tokens_max: 100_000,
            varied: false,
            ..Load::default()
        };
        let mut after = load.check("to the last token").await;
        let (posted, _) = after.world.window("tenant:red", Span::Total, "UTC");
        let left = limit - i128::from(posted);
        assert!((0..output).contains(&left), "{left} left, a token costs {output}");
        assert!(
            after
                .seen
                .iter()
                .all(|one| one.end.as_ref().is_some_and(|end| end.0 == EndCause::Budget))
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn windows_roll_over_under_load() {
    // An hour takes two seconds.
    let budgets: &[_] = &[("tenant:red", Span::Hour, 4_000_000), ("global", Span::Day, 1 << 40)];
    let arrive_over = Duration::from_secs(2 * 3600);
    let load = Load {
        streams: 200,
        budgets,
        tokens_max: 300,
        speed: 1800,
        arrive_over,
        ..Load::default()
    };
    let mut after = load.check("rolling windows").await;
    let windows =
        after.world.number("SELECT COUNT(*) FROM window_total WHERE span = 'hour' AND posted > 0");
    assert!(windows >= 2, "{windows} windows with spend, {} refused", after.refused);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_leases_and_fine_prices() {
    let fine =
        |millionths| Rates { input: NanoUsd(1), output: NanoUsd(millionths), ..Rates::default() };
    for (outstanding_tokens_max, rates) in [
        (1, rates(150, 75, 600)),
        (3, rates(150, 75, 600)),
        (256, fine(300_000)),
        (2, fine(1)),
        (4, fine(0)),
        (256, Rates { request: NanoUsd(5_000), ..rates(0, 0, 600) }),
    ] {
        let budgets: &[_] = &[("tenant:red", Span::Total, 900_000)];
        let load = Load {
            streams: 60,
            budgets,
            rates,
            choices_max: 4,
            outstanding_tokens_max,
            ..Load::default()
        };
        load.check("small").await;
    }
}
