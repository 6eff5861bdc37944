//! What kills a process at a write, and what has to hold for the file that it leaves.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use candela::{
    clock::Clock,
    ledger::{
        Ledger, LedgerOptions, Span,
        book::{RateLimit, inspect},
        db::{Db, Row, Sqlite},
        lease::LeaseLimits,
        schema::migrate,
        thread::LedgerThread,
    },
};
use tempfile::TempDir;

use super::world::{World, cost, file_in, rates, used};

pub const MODES: [&str; 3] = ["kill", "unsynced", "torn"];
/// Output tokens that may be lost of each live sequence, on either process.
pub const OUTSTANDING: u64 = 4;

/// The preloaded library, and the file it counts in.
pub struct Shim {
    dir: TempDir,
}

/// Compiles `tests/{name}.c` into `dir` as a library to preload.
pub fn compile(name: &str, dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(name).with_extension("c");
    let library = dir.join(name).with_extension("so");
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-O1", "-Wall", "-o"]).arg(&library).arg(source);
    let built = cc.args(["-ldl", "-lpthread"]).output().expect("cc, which Rust links with");
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    library
}

impl Shim {
    pub fn build() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        compile("crash", dir.path());
        Self { dir }
    }

    fn counter(&self) -> PathBuf {
        self.dir.path().join("counter")
    }

    /// The environment of a process that dies at operation `at`, or never for 0.
    pub fn variables(&self, at: u64, mode: &str) -> Vec<(String, String)> {
        std::fs::write(self.counter(), [0; 8]).expect("writes");
        let path = |path: PathBuf| path.to_str().expect("UTF-8").to_owned();
        [
            ("LD_PRELOAD", path(self.dir.path().join("crash.so"))),
            ("CRASH_COUNTER", path(self.counter())),
            ("CRASH_AT", at.to_string()),
            ("CRASH_SEED", at.to_string()),
            ("CRASH_MODE", mode.to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    pub fn count(&self) -> u64 {
        let bytes = std::fs::read(self.counter()).expect("reads");
        u64::from_ne_bytes(bytes.try_into().expect("eight bytes"))
    }
}

/// What was delivered of a request, as far as anyone outside the process could tell.
#[derive(Clone, Debug, Default)]
pub struct Delivered {
    pub tokens: u64,
    /// The charge that was told.
    pub bill: Option<i128>,
}

pub type Seen = BTreeMap<String, Delivered>;

/// A ledger with budgets at every level and nothing running.
pub fn base() -> Arc<TempDir> {
    let mut world = World::new();
    for (scope, span) in [
        ("global", Span::Total),
        ("org:acme", Span::Day),
        ("tenant:red", Span::Hour),
        ("key:k0", Span::Total),
    ] {
        world.budget(scope, span, "UTC", 10_000_000);
    }
    let limit = RateLimit { sequences_max: Some(100), ..RateLimit::default() };
    world.write(|book| book.set_rate_limit("tenant:red", &limit));
    world.dir.clone()
}

/// In memory where there is such a place: what survives is the library's to say, not the disk's.
pub fn copy(base: &TempDir) -> Arc<TempDir> {
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    let dir = dir.expect("a directory");
    for suffix in ["", "-wal"] {
        let name = format!("ledger.sqlite{suffix}");
        if base.path().join(&name).exists() {
            std::fs::copy(base.path().join(&name), dir.path().join(&name)).expect("copies");
        }
    }
    Arc::new(dir)
}

fn sums(db: &mut Sqlite, when: &str) {
    assert_eq!(db.damage().expect(when), Vec::<String>::new(), "{when}");
    let problems = inspect(db, |book| book.verify()).expect(when);
    assert!(problems.is_empty(), "{when}: {problems:#?}");
}

/// As the next server finds the file and leaves it: every sum holds before and after, no hold is
/// left, and nobody is charged more than was delivered. `buffered` tokens may not have been read.
pub fn check(dir: &Path, seen: &Seen, buffered: u64, when: &str) {
    let mut db = Sqlite::open_existing(&file_in(dir), Clock::system()).expect(when);
    sums(&mut db, when);
    let (ledger, thread) = start(dir, "check");
    ledger.stop();
    thread.join().expect(when);
    sums(&mut db, when);
    let open = "SELECT COUNT(*) FROM request WHERE state = 'open'";
    let held = "SELECT CAST(COALESCE(SUM(held), 0) AS BIGINT) FROM window_total";
    let sequences = "SELECT CAST(COALESCE(SUM(sequences), 0) AS BIGINT) FROM rate_limit";
    for sql in [open, held, sequences, "SELECT COUNT(*) FROM lease"] {
        assert_eq!(db.query(sql, &[]).expect(when)[0].int(0).expect(when), 0, "{when}: {sql}");
    }
    let sql = "SELECT id, state, posted, output, granted, choices, uncached_input FROM request";
    let rows: BTreeMap<String, Row> = db
        .query(sql, &[])
        .expect(when)
        .into_iter()
        .map(|row| (row.text(0).expect(when).to_owned(), row))
        .collect();
    for (id, delivered) in seen {
        assert!(
            rows.contains_key(id) || delivered.tokens == 0,
            "{when}: {id} has no hold: {delivered:?}"
        );
    }
    for (id, row) in &rows {
        let delivered = seen.get(id).cloned().unwrap_or_default();
        let number = |index| row.int(index).expect(when) as u64;
        let (posted, output, granted, choices) = (number(2), number(3), number(4), number(5));
        let what = format!("{when}: {id} {row:?} {delivered:?}");
        assert!(
            output <= delivered.tokens + buffered,
            "charged for more than was delivered: {what}"
        );
        let hold = cost(&rates(150, 75, 600), &used(0, delivered.tokens));
        assert!(i128::from(granted) >= hold, "delivered without a durable hold: {what}");
        match (row.text(1).expect(when), delivered.bill) {
            ("done", Some(bill)) => assert_eq!(i128::from(posted), bill, "{what}"),
            (_, Some(_)) => panic!("a bill was told before it was durable: {what}"),
            ("crashed", None) => {
                let lost = delivered.tokens.saturating_sub(output);
                assert!(lost <= OUTSTANDING * choices, "{lost} tokens lost: {what}");
            }
            _ => assert!(output >= delivered.tokens, "{what}"),
        }
    }
}

pub fn start(dir: &Path, replica: &str) -> (Ledger, std::thread::JoinHandle<()>) {
    let mut db = Sqlite::open(&file_in(dir), Clock::system()).expect("opens");
    migrate(&mut db).expect("migrates");
    let options = LedgerOptions {
        replica: format!("{replica}-{}", std::process::id()),
        name: "test".into(),
        exclusive: true,
        replica_ttl: Duration::from_secs(10),
        clock_error_max: Duration::from_secs(1),
        lease: LeaseLimits {
            outstanding_tokens_max: OUTSTANDING,
            wait_max: Duration::from_secs(1),
        },
    };
    let started = Ledger::start(Box::new(db), Clock::system(), options, |_| {});
    let LedgerThread { ledger, thread } = started.expect("starts");
    (ledger, thread)
}
