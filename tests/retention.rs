//! Old requests are rolled up into daily sums: random histories on both databases, after which every
//! sum holds and every report says what it said before. `CANDELA_RETENTION_SEEDS` makes it longer.

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use candela::{
    admin::{Authority, COSTS, Call, Fresh, Given, Route, USAGE, Work},
    clock::Clock,
    config::RETENTION_DAYS_LEAST,
    ledger::{
        EnergyRow, Opening, Payer, Policy, Span, Zone,
        book::{Budget, DAY_NS, KeySpec, PriceSpec, RETENTION_DAYS_MIN, Role, inspect, key_hash},
        db::{Db, Sqlite},
        rows::{EndCause, Extension},
        schema::{SCHEMA_VERSION, migrate, version},
    },
    price::{Billing, Rates, Tally},
    types::{KeyId, ModelId, NanoUsd, OrgId, RequestId, TenantId},
};
use common::{
    books::{self, run},
    postgres::Cluster,
    rig::{Rig, Switches},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

const TENANTS: [&str; 3] = ["a", "b", "c"];
const MODELS: [&str; 2] = ["m", "by-time"];
/// A history is this long, and its old half is rolled up.
const DAYS: u64 = 80;
const RETENTION_NS: i64 = 40 * DAY_NS;

/// A ledger whose clock the test turns.
struct World {
    db: Box<dyn Db>,
    switches: Arc<Switches>,
    random: StdRng,
    requests: u64,
    open: Vec<(RequestId, Tally)>,
    closed: Vec<RequestId>,
}

impl World {
    fn new(inner: Box<dyn Db>, seed: u64) -> Self {
        let (mut db, switches) = Rig::around(inner);
        switches.shift(Duration::from_secs(DAYS * 86_400), true);
        books::set_up(&mut *db, &TENANTS);
        let set_up = run(&mut *db, |book| {
            let other = OrgId::new("other");
            book.add_org(&other, "Other")?;
            book.add_tenant(&TenantId::new("d"), &other, "d", &Policy::default())?;
            for tenant in TENANTS {
                book.add_key(&KeySpec {
                    id: KeyId::new(format!("key-{tenant}")),
                    tenant: TenantId::new(tenant),
                    hash: key_hash(tenant),
                    name: String::new(),
                    role: Role::Tenant,
                    policy: Policy::default(),
                    expires_ns: None,
                })?;
            }
            let rates = Rates { device_second: NanoUsd(777_777_777), ..books::price("m").rates };
            book.set_price(&PriceSpec {
                rates,
                billing: Billing::Device,
                ..books::price("by-time")
            })?;
            // Zones whose days are not those of UTC, one of them at a quarter of an hour.
            for (scope, span, zone) in [
                ("tenant:a", Span::Hour, "Asia/Kathmandu"),
                ("tenant:a", Span::Month, "Europe/Berlin"),
                ("tenant:b", Span::Day, "America/St_Johns"),
                ("key:key-c", Span::Week, "Pacific/Kiritimati"),
                ("org:acme", Span::Month, "UTC"),
                ("global", Span::Total, "UTC"),
                ("tenant:c", Span::Total, "UTC"),
            ] {
                let zone = Zone::parse(zone).expect("a zone");
                let budget = books::budget(scope, 1_000_000_000_000);
                book.set_budget(&Budget { span, zone, ..budget })?;
            }
            book.join("server", "server", i64::MAX / 2)
        });
        set_up.expect("sets up");
        let random = StdRng::seed_from_u64(seed);
        Self { db, switches, random, requests: 0, open: Vec::new(), closed: Vec::new() }
    }

    fn pass(&mut self, most: Duration) {
        let ns = self.random.random_range(0..most.as_nanos() as u64);
        self.switches.shift(Duration::from_nanos(ns), false);
    }

    fn begin(&mut self) {
        let tenant = TENANTS[self.random.random_range(0..TENANTS.len())];
        let payer = match self.random.random_range(0..2) {
            0 => Payer::Key(KeyId::new(format!("key-{tenant}"))),
            _ => Payer::Tenant(TenantId::new(tenant)),
        };
        self.requests += 1;
        let opening = Opening {
            payer,
            model: ModelId::new(MODELS[self.random.random_range(0..2)]),
            user_label: ["", "u1", "u2"][self.random.random_range(0..3)].into(),
            device_bound_ns: 1_000_000,
            idempotency: Some((format!("again-{}", self.requests), [7; 32])),
            ..books::opening(tenant, &format!("r{}", self.requests), 50)
        };
        let opened = run(&mut *self.db, |book| book.open(&opening, "server")).expect("runs");
        opened.expect("admitted");
        self.open.push((opening.request, Tally::default()));
    }

    /// More is held for one of the open requests, and then used.
    fn extend(&mut self) {
        let Some((request, used)) = self.pick() else { return };
        let wanted = NanoUsd(1_000_000_000);
        let asked = Extension { request: request.clone(), used: *used, wanted, least: wanted };
        used.uncached_input = 50;
        used.output += 3;
        used.device_ns += 900_000;
        used.billable_device_ns += 700_000;
        run(&mut *self.db, |book| book.extend(&asked)).expect("extends");
    }

    fn pick(&mut self) -> Option<&mut (RequestId, Tally)> {
        let count = self.open.len();
        let index = if count == 0 { 0 } else { self.random.random_range(0..count) };
        self.open.get_mut(index)
    }

    fn end(&mut self) {
        let Some((request, used)) = self.pick().cloned() else { return };
        self.open.retain(|(open, _)| *open != request);
        let energy = EnergyRow { request: request.clone(), total_uj: 70, estimated_uj: 7 };
        run(&mut *self.db, |book| {
            book.close(&request, &used, EndCause::Finished, 3)?;
            book.note_energy(&energy)
        })
        .expect("closes");
        self.closed.push(request);
    }

    /// The server dies with all that it runs, and another takes its name.
    fn crash(&mut self) {
        run(&mut *self.db, |book| {
            book.recover("server")?;
            book.join("server", "server", i64::MAX / 2)
        })
        .expect("recovers");
        self.closed.extend(self.open.drain(..).map(|(request, _)| request));
    }

    /// Of any request, however old: that one is not rolled up for as long as the refund is young.
    fn refund(&mut self) {
        let count = self.closed.len();
        if count == 0 {
            return;
        }
        let request = self.closed[self.random.random_range(0..count)].clone();
        run(&mut *self.db, |book| book.refund(&request, NanoUsd(5), "sorry")).expect("runs");
    }

    fn live(&mut self, steps: usize, pace: Duration) {
        for _ in 0..steps {
            self.pass(pace);
            match self.random.random_range(0..20) {
                0..6 => self.begin(),
                6..12 => self.extend(),
                12..17 => self.end(),
                17 => self.refund(),
                18 => {
                    let tenant = TenantId::new(TENANTS[self.random.random_range(0..3)]);
                    let credited =
                        run(&mut *self.db, |book| book.credit(&tenant, NanoUsd(9), "paid"));
                    assert!(credited.expect("runs"));
                }
                _ if self.random.random_range(0..5) == 0 => self.crash(),
                _ => {}
            }
        }
    }

    fn count(&mut self, sql: &'static str) -> i64 {
        self.db.query(sql, &[]).expect("reads")[0].int(0).expect("a number")
    }

    fn report(&mut self, route: &Route, days: i64) -> Vec<Value> {
        let Work::Read(work) = route.work else { panic!("{} changes", route.name) };
        let now_ns = self.db.now_ns().expect("a clock");
        let groups = json!(["project_id", "api_key_id", "model", "user_id"]);
        let mut found = Vec::new();
        let mut page = None;
        loop {
            let given = Given::default()
                .with("start_time", json!((now_ns / DAY_NS - days) * 86_400))
                .with("end_time", json!((now_ns / DAY_NS + 1) * 86_400))
                .with("bucket_width", json!("1d"))
                .with("limit", json!(180))
                .with("group_by", groups.clone())
                .with("page", page.take());
            let authority = Authority::Owner("test".into());
            let fresh = Fresh::draw().expect("random");
            let answer = work(&mut *self.db, &Call { authority, only: None, given, fresh });
            let answer = answer.expect("an answer");
            found.extend(answer["data"].as_array().expect("buckets").iter().cloned());
            match answer["next_page"].as_str() {
                Some(next) => page = Some(json!(next)),
                None => return found,
            }
        }
    }

    /// All that a roll-up must leave as it is.
    fn sums(&mut self) -> Vec<Value> {
        let mut sums = self.report(&USAGE, DAYS as i64 + 1);
        sums.extend(self.report(&COSTS, DAYS as i64 + 1));
        let sql = "SELECT id, debits, credits FROM account ORDER BY id";
        let accounts = self.db.query(sql, &[]).expect("reads");
        sums.extend(accounts.iter().map(|row| json!(format!("{row:?}"))));
        let scopes = ["tenant:a", "tenant:b", "tenant:c", "key:key-c", "org:acme", "global"];
        let states = inspect(&mut *self.db, |book| {
            scopes.iter().map(|scope| book.budget_states(scope)).collect::<Result<Vec<_>, _>>()
        });
        sums.push(json!(format!("{:?}", states.expect("reads"))));
        sums
    }

    /// Rolls up in small transactions, with proof after each. Returns how many requests.
    fn roll_up(&mut self, seed: u64) -> u64 {
        let mut rolled = 0;
        loop {
            let most = self.random.random_range(1..30);
            let done = run(&mut *self.db, |book| book.roll_up(RETENTION_NS, most)).expect("rolls");
            self.prove(seed);
            rolled += done;
            if done < most as u64 {
                return rolled;
            }
        }
    }

    fn prove(&mut self, seed: u64) {
        let problems = inspect(&mut *self.db, |book| book.verify()).expect("reads");
        assert!(problems.is_empty(), "seed {seed}: {problems:#?}");
    }
}

fn check(inner: Box<dyn Db>, seed: u64) {
    let mut world = World::new(inner, seed);
    let pace = Duration::from_secs(DAYS * 86_400 / 200);
    // Twice as long as half a step takes on average: the history ends about now.
    world.live(400, pace);
    world.crash();
    world.prove(seed);
    let rows = world.count("SELECT COUNT(*) FROM request");
    let entries = world.count("SELECT COUNT(*) FROM transfer");
    let before = world.sums();
    assert!(before[0]["object"] == "bucket" && before.len() > DAYS as usize, "seed {seed}");
    let rolled = world.roll_up(seed) as i64;
    assert!(rolled > rows / 4, "seed {seed}: only {rolled} of {rows}");
    assert_eq!(world.count("SELECT COUNT(*) FROM request"), rows - rolled, "seed {seed}");
    assert!(world.count("SELECT COUNT(*) FROM transfer") < entries, "seed {seed}");
    assert!(world.count("SELECT COUNT(*) FROM usage_day") <= rolled, "seed {seed}");
    for (before, after) in before.iter().zip(&world.sums()) {
        assert_eq!(before, after, "seed {seed}");
    }
    let gone = world.count(
        "SELECT COUNT(*) FROM idempotency LEFT JOIN request ON request.id = idempotency.request_id
        WHERE request.id IS NULL",
    );
    assert_eq!(gone, 0, "seed {seed}");
    // It goes on: what was young is old a month later, and joins the days that are there.
    world.live(60, pace);
    world.crash();
    let before = world.sums();
    world.roll_up(seed);
    assert_eq!(before, world.sums(), "seed {seed}");
    // A budget that is new counts what was rolled up before it was there.
    run(&mut *world.db, |book| book.set_budget(&books::budget("key:key-a", 1 << 50))).expect("set");
    run(&mut *world.db, |book| book.set_budget(&books::budget("org:acme", 1 << 50))).expect("set");
    world.prove(seed);
}

/// A ledger of the first version, with a history, is brought up to date with all that is in it.
fn check_migration(inner: Box<dyn Db>) {
    let mut world = World::new(inner, 1);
    world.live(100, Duration::from_secs(3600));
    let before = world.sums();
    let first = "DROP TABLE usage_day; DROP TABLE transfer_day; DROP TABLE rolling;
        ALTER TABLE request DROP COLUMN energy_estimated_uj;
        UPDATE meta SET value = 1 WHERE name = 'schema'";
    world.db.batch(first).expect("undone");
    migrate(&mut *world.db).expect("migrates");
    assert_eq!(version(&mut *world.db).expect("reads"), SCHEMA_VERSION);
    world.prove(1);
    assert_eq!(before, world.sums());
}

#[test]
fn random_histories_on_sqlite() {
    let dir = tempfile::tempdir().expect("a directory");
    let old = dir.path().join("old.sqlite");
    check_migration(Box::new(Sqlite::open(&old, Clock::system()).expect("opens")));
    let seeds = std::env::var("CANDELA_RETENTION_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    for seed in 0..seeds.unwrap_or(12) {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("ledger.sqlite");
        check(Box::new(Sqlite::open(&file, Clock::system()).expect("opens")), seed);
    }
}

#[test]
fn random_histories_on_postgres() {
    let cluster = Cluster::start();
    let old = cluster.database("old");
    check_migration(Box::new(cluster.open(&old)));
    for seed in [101, 102] {
        let url = cluster.database(&format!("retention_{seed}"));
        check(Box::new(cluster.open(&url)), seed);
    }
}

#[test]
fn what_is_young_or_open_stays() {
    assert_eq!(RETENTION_DAYS_LEAST, RETENTION_DAYS_MIN, "one limit, told by two modules");
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("ledger.sqlite");
    let inner = Box::new(Sqlite::open(&file, Clock::system()).expect("opens"));
    let mut world = World::new(inner, 0);
    let days = |days: u64| Duration::from_secs(days * 86_400);
    world.begin();
    world.begin();
    world.end();
    world.switches.shift(days(34), false);
    // Less than the least is taken for the least: windows of a month must stay whole.
    let roll = |world: &mut World| run(&mut *world.db, |book| book.roll_up(0, 9)).expect("rolls");
    assert_eq!(roll(&mut world), 0, "34 days old");
    world.switches.shift(days(3), false);
    assert_eq!(roll(&mut world), 0, "one that is as old is open");
    world.prove(0);
    world.end();
    assert_eq!(roll(&mut world), 1);
    world.prove(0);
}

/// The server's own thread does it, and admission goes on meanwhile.
#[tokio::test]
async fn a_running_ledger_rolls_up_by_itself() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("ledger.sqlite");
    let open = || -> Box<dyn Db> { Box::new(Sqlite::open(&file, Clock::system()).expect("opens")) };
    let mut world = World::new(open(), 5);
    world.live(600, Duration::from_secs(DAYS * 86_400 / 600));
    world.crash();
    let rows = world.count("SELECT COUNT(*) FROM request");
    drop(world);
    let ledger = books::replica(open(), "next", Duration::from_secs(60));
    ledger.ledger.retain(Duration::from_secs(RETENTION_DAYS_LEAST * 86_400));
    let mut db = open();
    let (begun, mut slowest) = (Instant::now(), Duration::ZERO);
    let mut number = 0;
    loop {
        number += 1;
        let asked = Instant::now();
        let opening = books::opening("a", &format!("new-{number}"), 10);
        let lease = ledger.ledger.open(opening).await.expect("admitted");
        slowest = slowest.max(asked.elapsed());
        books::close(lease, EndCause::Finished).await.expect("a bill");
        let sql = "SELECT COUNT(*) FROM usage_day";
        let days = db.query(sql, &[]).expect("reads")[0].int(0).expect("a number");
        let sql = "SELECT COUNT(*) FROM request WHERE id NOT LIKE 'new-%'";
        let left = db.query(sql, &[]).expect("reads")[0].int(0).expect("a number");
        if days > 0 && left < rows * 3 / 4 {
            break;
        }
        assert!(begun.elapsed() < common::server::DEADLINE, "{left} of {rows} left, {days} days");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(slowest < Duration::from_secs(2), "admission waited {slowest:?}");
    books::prove(&mut *db);
    books::stop(ledger);
}
