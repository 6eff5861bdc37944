//! A ledger in a real file under a simulated clock, which is checked after every transaction.

use std::{collections::BTreeMap, path::Path, sync::Arc, time::Duration};

use candela::{
    clock::Clock,
    ledger::{
        Bill, Book, EndCause, Extension, Grant, Opened, Opening, Payer, Policy, Refusal, Span,
        Zone,
        book::{Budget, KeySpec, PriceSpec, Role, inspect, key_hash, transact},
        db::{Db, DbError, Row, Sqlite},
        schema::migrate,
    },
    price::{Billing, Rates, Tally},
    types::{KeyId, ModelId, NanoUsd, OrgId, RequestId, TenantId},
};

/// Saturday evening before the clocks of Europe go forward.
pub const START: &str = "2026-03-28T20:00:00Z";
pub const NS_PER_S: i64 = 1_000_000_000;
pub const MODEL: &str = "m";
/// Two organisations; the second tenant has no key.
pub const TENANTS: [(&str, &str); 3] = [("acme", "red"), ("acme", "blue"), ("globex", "green")];
pub const KEYS: [(&str, &str); 4] =
    [("k0", "red"), ("k1", "red"), ("k2", "green"), ("k3", "green")];

pub struct World {
    pub dir: Arc<tempfile::TempDir>,
    /// `None` only between a crash and the start after it.
    db: Option<Sqlite>,
    pub clock: Clock,
    pub replica: String,
    lives: u32,
    requests: u32,
}

/// Posted and held by window, and the limit over it.
type Windows = BTreeMap<(String, String, i64), (i64, i64)>;

impl World {
    pub fn new() -> Self {
        let clock = Clock::simulated();
        let start: jiff::Timestamp = START.parse().expect("a time");
        clock.set_wall(start.as_second() * NS_PER_S);
        let dir = Arc::new(tempfile::tempdir().expect("a directory"));
        let mut world =
            Self { dir, db: None, clock, replica: String::new(), lives: 0, requests: 0 };
        world.start();
        world.set_up();
        world
    }

    /// As a server starts: gives up what the one before left open.
    fn start(&mut self) {
        let mut db = Sqlite::open(&self.path(), self.clock.clone()).expect("opens");
        migrate(&mut db).expect("migrates");
        self.db = Some(db);
        let before = std::mem::replace(&mut self.replica, format!("server-{}", self.lives));
        self.lives += 1;
        let replica = self.replica.clone();
        self.write(|book| {
            book.recover(&before)?;
            book.join(&replica, "test", NS_PER_S)
        });
    }

    fn set_up(&mut self) {
        self.write(|book| {
            for (org, tenant) in TENANTS {
                book.add_org(&OrgId::new(org), org)?;
                book.add_tenant(&TenantId::new(tenant), &OrgId::new(org), "", &Policy::default())?;
            }
            for (key, tenant) in KEYS {
                book.add_key(&key_spec(key, tenant))?;
            }
            book.set_price(&price(MODEL, rates(150, 75, 600)))?;
            Ok(())
        });
    }

    fn path(&self) -> std::path::PathBuf {
        self.dir.path().join("ledger.sqlite")
    }

    pub fn db(&mut self) -> &mut Sqlite {
        self.db.as_mut().expect("the world runs")
    }

    /// One transaction that must succeed and leave every sum right.
    pub fn write<T>(&mut self, work: impl FnOnce(&mut Book<'_>) -> Result<T, DbError>) -> T {
        let (value, _) = transact(self.db(), work).expect("commits");
        let problems = inspect(self.db(), |book| book.verify()).expect("reads");
        assert!(problems.is_empty(), "{problems:#?}");
        value
    }

    /// As `write`, for what requests do: no window that grows by it may pass its limit.
    fn grant<T>(&mut self, work: impl FnOnce(&mut Book<'_>) -> Result<T, DbError>) -> T {
        let before = self.windows();
        let value = self.write(work);
        for (window, (sum, limit)) in self.windows() {
            let old = before.get(&window).map_or(0, |(old, _)| *old);
            assert!(sum <= old.max(limit), "{window:?}: {old} grew to {sum} of {limit}");
        }
        value
    }

    fn windows(&mut self) -> Windows {
        let sql = "SELECT window_total.scope, window_total.span, start_s, posted + held, limit_nano
            FROM window_total JOIN budget ON budget.scope = window_total.scope
            AND budget.span = window_total.span";
        let rows = self.db().query(sql, &[]).expect("reads");
        let row = |row: &Row| {
            let key = (row.text(0)?.to_owned(), row.text(1)?.to_owned(), row.int(2)?);
            Ok((key, (row.int(3)?, row.int(4)?)))
        };
        rows.iter().map(row).collect::<Result<_, DbError>>().expect("well-formed")
    }

    pub fn open(&mut self, opening: &Opening) -> Result<Opened, Refusal> {
        let replica = self.replica.clone();
        self.grant(|book| book.open(opening, &replica))
    }

    pub fn extend(&mut self, asked: &Extension) -> Grant {
        self.grant(|book| book.extend(asked))
    }

    pub fn close(&mut self, id: &RequestId, used: &Tally, cause: EndCause) -> Option<Bill> {
        self.grant(|book| book.close(id, used, cause, 1))
    }

    /// Sets a budget without end, or with one.
    pub fn budget(&mut self, scope: &str, span: Span, zone: &str, limit: i128) {
        let budget = budget(scope, span, zone, limit);
        self.write(|book| book.set_budget(&budget));
    }

    /// The process dies, in the middle of a transaction if `work` is one; what the kernel has of the
    /// file survives, and another process starts on it.
    pub fn crash(&mut self, work: impl FnOnce(&mut Book<'_>) -> Result<(), DbError>) {
        let (dir, path) = (tempfile::tempdir().expect("a directory"), self.path());
        let copied = transact(self.db(), |book| {
            work(book)?;
            for suffix in ["", "-wal"] {
                let name = format!("ledger.sqlite{suffix}");
                let from = path.with_file_name(&name);
                if from.exists() {
                    std::fs::copy(from, dir.path().join(name)).expect("copies");
                }
            }
            Err::<(), _>(DbError::Unavailable("the process dies".into()))
        });
        assert!(copied.is_err());
        self.db = None;
        self.dir = Arc::new(dir);
        self.start();
    }

    /// A request of a tenant without a key; 1 choice, no cap.
    pub fn opening(&mut self, tenant: &str, input_tokens: u64) -> Opening {
        self.requests += 1;
        Opening {
            request: RequestId::new(format!("r{}", self.requests)),
            payer: Payer::Tenant(TenantId::new(tenant)),
            model: ModelId::new(MODEL),
            user_label: String::new(),
            metadata: "{}".into(),
            input_tokens,
            choices: 1,
            device_bound_ns: 0,
            cap: None,
            parts: 1,
            idempotency: None,
        }
    }

    pub fn advance(&self, seconds: u64) {
        self.clock.advance(Duration::from_secs(seconds));
    }

    /// Numbers of a request's row.
    pub fn request(&mut self, id: &str) -> Row {
        let sql = "SELECT posted, uncached_input, output, state, end_cause, granted FROM request
            WHERE id = $1";
        let mut rows = self.db().query(sql, &[id.into()]).expect("reads");
        assert_eq!(rows.len(), 1, "request {id}");
        rows.remove(0)
    }

    /// One number of one row.
    pub fn number(&mut self, sql: &'static str) -> i64 {
        self.db().query(sql, &[]).expect("reads")[0].int(0).expect("a number")
    }

    /// Posted and held of the window that holds the present.
    pub fn window(&mut self, scope: &str, span: Span, zone: &str) -> (i64, i64) {
        let now_ns = inspect(self.db(), |book| Ok(book.now_ns())).expect("reads");
        let zone = Zone::parse(zone).expect("a zone");
        let start_s = candela::ledger::window::start_s(span, &zone, now_ns);
        let sql =
            "SELECT posted, held FROM window_total WHERE scope = $1 AND span = $2 AND start_s = $3";
        let rows = self.db().query(sql, &[scope.into(), span.name().into(), start_s.into()]);
        let rows = rows.expect("reads");
        rows.first().map_or((0, 0), |row| (row.int(0).expect("posted"), row.int(1).expect("held")))
    }
}

pub fn budget(scope: &str, span: Span, zone: &str, limit: i128) -> Budget {
    Budget {
        scope: scope.into(),
        span,
        zone: Zone::parse(zone).expect("a zone"),
        limit: NanoUsd(limit),
        soft_percent: vec![50, 80, 95],
    }
}

pub fn key_spec(key: &str, tenant: &str) -> KeySpec {
    KeySpec {
        id: KeyId::new(key),
        tenant: TenantId::new(tenant),
        hash: key_hash(key),
        name: key.into(),
        role: Role::Tenant,
        policy: Policy::default(),
        expires_ns: None,
    }
}

/// Token prices in nano-USD per token.
pub fn rates(input: i128, cached_input: i128, output: i128) -> Rates {
    let million = |price: i128| NanoUsd(price * 1_000_000);
    Rates {
        input: million(input),
        cached_input: million(cached_input),
        output: million(output),
        ..Rates::default()
    }
}

pub fn price(model: &str, rates: Rates) -> PriceSpec {
    PriceSpec {
        model: ModelId::new(model),
        tenant: None,
        rates,
        billing: Billing::Tokens,
        from_ns: None,
        until_ns: None,
        origin: "test",
    }
}

pub fn used(uncached_input: u64, output: u64) -> Tally {
    Tally { uncached_input, output, ..Tally::default() }
}

/// What the price says, written a second time: request fee plus millionths rounded up once.
pub fn cost(rates: &Rates, used: &Tally) -> i128 {
    let millionths = i128::from(used.uncached_input) * rates.input.0
        + i128::from(used.cached_input) * rates.cached_input.0
        + i128::from(used.output) * rates.output.0;
    let anything = *used != Tally::default();
    let whole = millionths / 1_000_000 + i128::from(millionths % 1_000_000 > 0);
    if anything { rates.request.0 + whole } else { 0 }
}

/// Ten input tokens and one of output.
pub const HOLD: i128 = 10 * 150 + 600;

pub fn ask(id: &RequestId, used: Tally, wanted: i128, least: i128) -> Extension {
    Extension { request: id.clone(), used, wanted: NanoUsd(wanted), least: NanoUsd(least) }
}

/// Where a file of the program lies below a data directory.
pub fn file_in(dir: &Path) -> std::path::PathBuf {
    dir.join("ledger.sqlite")
}
