//! Admission with a hold, and posts, on SQLite and on a PostgreSQL server of its own: one line each.
//!
//! The files lie in the temporary directory (`TMPDIR`), whose disk is what is measured.

#[allow(dead_code, reason = "made for tests, which use all of it")]
#[path = "../tests/common/books.rs"]
mod books;
#[allow(dead_code, reason = "made for tests, which use all of it")]
#[path = "../tests/common/postgres.rs"]
mod postgres;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use candela::{
    clock::Clock,
    ledger::{
        Ledger, Opening, Payer, Policy, Span,
        book::{Budget, KeySpec, Role, key_hash},
        db::{Db, Sqlite},
        rows::EndCause,
        thread::LedgerThread,
    },
    types::{KeyId, OrgId, TenantId},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::runtime::Runtime;

/// Tenants and keys.
const SIZES: [(usize, usize); 3] = [(1, 10), (100, 1_000), (10_000, 100_000)];
const CLIENTS: [usize; 2] = [1, 64];
/// Requests of one measurement.
const REQUESTS: usize = 4_000;
/// Rows of one transaction while setting up.
const SET_UP_GROUP: usize = 5_000;
/// Far above what is spent.
const LIMIT_NANO: i128 = 1_000_000_000_000_000;

fn main() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    println!(
        "| database | tenants | keys | clients | commit p50/p99 ms | open p50/p99 ms | requests/s |"
    );
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    let cluster = postgres::Cluster::start();
    for (tenants, keys) in SIZES {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("ledger.sqlite");
        let file: Opener = &|| Box::new(Sqlite::open(&path, Clock::system()).expect("opens"));
        measure(&runtime, "SQLite", tenants, keys, file);
        let url = cluster.database(&format!("of_{tenants}"));
        measure(&runtime, "PostgreSQL", tenants, keys, &|| Box::new(cluster.open(&url)));
    }
}

type Opener<'a> = &'a dyn Fn() -> Box<dyn Db>;

fn measure(runtime: &Runtime, name: &str, tenants: usize, keys: usize, open: Opener<'_>) {
    let mut db = open();
    set_up(&mut *db, tenants, keys);
    let commit = commits(&mut *db);
    drop(db);
    for clients in CLIENTS {
        let ledger = books::replica(open(), &format!("bench-{clients}"), Duration::from_secs(60));
        let (opens, rate) = load(runtime, &ledger, keys, clients);
        println!(
            "| {name} | {tenants} | {keys} | {clients} | {} | {} | {rate:.0} |",
            show(commit),
            show(opens)
        );
        books::stop(ledger);
    }
}

fn show((p50, p99): (Duration, Duration)) -> String {
    format!("{:.2} / {:.2}", p50.as_secs_f64() * 1e3, p99.as_secs_f64() * 1e3)
}

/// Every tenant has a budget, as have its organisation and the whole.
fn set_up(db: &mut dyn Db, tenants: usize, keys: usize) {
    books::set_up(db, &[]);
    let org = OrgId::new("acme");
    let budget = |scope: &str| Budget { span: Span::Day, ..books::budget(scope, LIMIT_NANO) };
    for first in (0..tenants).step_by(SET_UP_GROUP) {
        let done = books::run(db, |book| {
            for index in first..tenants.min(first + SET_UP_GROUP) {
                let id = TenantId::new(format!("t{index}"));
                book.add_tenant(&id, &org, "", &Policy::default())?;
                book.set_budget(&budget(&format!("tenant:{id}")))?;
            }
            Ok(())
        });
        done.expect("tenants");
    }
    for first in (0..keys).step_by(SET_UP_GROUP) {
        let done = books::run(db, |book| {
            for index in first..keys.min(first + SET_UP_GROUP) {
                book.add_key(&KeySpec {
                    id: KeyId::new(format!("k{index}")),
                    tenant: TenantId::new(format!("t{}", index % tenants)),
                    hash: key_hash(&index.to_string()),
                    name: String::new(),
                    role: Role::Tenant,
                    policy: Policy::default(),
                    expires_ns: None,
                })?;
            }
            Ok(())
        });
        done.expect("keys");
    }
    for scope in ["org:acme", "global"] {
        books::run(db, |book| book.set_budget(&budget(scope))).expect("a budget");
    }
}

/// A transaction that writes one row: what any commit of this database takes.
fn commits(db: &mut dyn Db) -> (Duration, Duration) {
    let one = |_| {
        let begun = Instant::now();
        books::run(db, |book| book.audit("bench", "commit", "", "", "")).expect("commits");
        begun.elapsed()
    };
    percentiles((0..200).map(one).collect())
}

/// Clients that open a request, and close it with what it used. Returns the time to open, and
/// requests settled a second.
fn load(
    runtime: &Runtime,
    ledger: &LedgerThread,
    keys: usize,
    clients: usize,
) -> ((Duration, Duration), f64) {
    let run = Arc::new(uuid::Uuid::now_v7().simple().to_string());
    let begun = Instant::now();
    let tasks: Vec<_> = (0..clients)
        .map(|client| {
            let (ledger, run) = (ledger.ledger.clone(), run.clone());
            let requests = if clients == 1 { REQUESTS / 8 } else { REQUESTS / clients };
            runtime.spawn(client_of(ledger, run, keys, client, requests))
        })
        .collect();
    let times: Vec<Duration> =
        tasks.into_iter().flat_map(|task| runtime.block_on(task).expect("no panic")).collect();
    let rate = times.len() as f64 / begun.elapsed().as_secs_f64();
    (percentiles(times), rate)
}

async fn client_of(
    ledger: Ledger,
    run: Arc<String>,
    keys: usize,
    client: usize,
    requests: usize,
) -> Vec<Duration> {
    let mut random = StdRng::seed_from_u64(client as u64);
    let mut times = Vec::with_capacity(requests);
    for request in 0..requests {
        let key = random.random_range(0..keys);
        let opening = Opening {
            payer: Payer::Key(KeyId::new(format!("k{key}"))),
            ..books::opening("", &format!("{run}-{client}-{request}"), 100)
        };
        let begun = Instant::now();
        let mut lease = ledger.open(opening).await.expect("admitted");
        times.push(begun.elapsed());
        lease.use_input(100, 0);
        lease.use_output(1);
        books::close(lease, EndCause::Finished).await.expect("a bill");
    }
    times
}

fn percentiles(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort();
    (times[times.len() / 2], times[times.len() * 99 / 100])
}
