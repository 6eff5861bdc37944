//! PostgreSQL is killed under load and comes back.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use candela::{
    ledger::{LedgerError, Refusal, db::Db, rows::EndCause},
    types::NanoUsd,
};

use crate::common::{
    books::{INPUT_NANO, close, generate, limit, opening, prove, replica, set_up, stop, total},
    postgres::Cluster,
    rig::Rig,
};

const TENANT: &str = "tenant:a";
const CLIENTS: u64 = 40;
const ROUNDS: usize = 3;

#[test]
fn a_database_killed_under_load_comes_back_with_its_sums() {
    let mut cluster = Cluster::start();
    let url = cluster.database("ledger");
    let mut db = cluster.open(&url);
    set_up(&mut db, &["a"]);
    limit(&mut db, TENANT, 1_000_000_000);
    let ttl = Duration::from_secs(30);
    let ledgers = ["one", "two"].map(|name| replica(Box::new(cluster.open(&url)), name, ttl));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let (over, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let turned_away = Arc::new(AtomicU64::new(0));
    let tasks: Vec<_> = (0..CLIENTS)
        .map(|client| {
            let ledger = ledgers[client as usize % 2].ledger.clone();
            let (over, done, turned_away) = (over.clone(), done.clone(), turned_away.clone());
            runtime.spawn(async move {
                let mut delivered = 0;
                let mut round = 0;
                while !over.load(Ordering::SeqCst) {
                    round += 1;
                    let asked = opening("a", &format!("q{client}-{round}"), 1 + client % 3);
                    match generate(&ledger, asked, 60, client * 1000 + round).await {
                        Ok(ran) => {
                            done.fetch_add(1, Ordering::SeqCst);
                            // Without money for longer than it waits, it ends with that cause.
                            let causes = [EndCause::Finished, EndCause::LedgerLost];
                            assert!(causes.contains(&ran.cause), "{ran:?}");
                            if let Some(bill) = &ran.bill {
                                assert_eq!(bill.cost, NanoUsd(ran.delivered));
                            }
                            delivered += ran.delivered;
                        }
                        Err(LedgerError::Unavailable(_)) => {
                            turned_away.fetch_add(1, Ordering::SeqCst);
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                        Err(other) => panic!("{other}"),
                    }
                }
                delivered
            })
        })
        .collect();
    for round in 0..ROUNDS {
        wait(|| done.load(Ordering::SeqCst) > (round as u64 + 1) * CLIENTS, "requests run");
        let mut lease = runtime
            .block_on(ledgers[0].ledger.open(opening("a", &format!("x{round}"), 1)))
            .expect("admitted");
        lease.use_input(1, 0);
        cluster.kill();
        let before = turned_away.load(Ordering::SeqCst);
        wait(|| turned_away.load(Ordering::SeqCst) > before + 5, "new work is turned away");
        assert!(lease.affordable() > 0, "a running request goes on within what it holds");
        lease.use_output(1);
        std::thread::sleep(Duration::from_millis(300 * round as u64));
        cluster.resume();
        let opened = Instant::now();
        wait(
            || {
                runtime
                    .block_on(ledgers[1].ledger.open(opening(
                        "a",
                        &format!("y{round}-{:?}", opened.elapsed()),
                        1,
                    )))
                    .is_ok()
            },
            "new work is let in again",
        );
        let bill = runtime.block_on(close(lease, EndCause::Finished)).expect("a bill");
        assert!(bill.cost.0 > INPUT_NANO, "{bill:?}");
    }
    over.store(true, Ordering::SeqCst);
    let delivered: i128 =
        tasks.into_iter().map(|task| runtime.block_on(task).expect("no panic")).sum();
    ledgers.into_iter().for_each(stop);
    let (requests, turned_away) = (done.load(Ordering::SeqCst), turned_away.load(Ordering::SeqCst));
    println!("{ROUNDS} kills, {requests} requests, {turned_away} turned away");
    db.begin().expect("is back");
    db.rollback();
    let (posted, held) = total(&mut db, TENANT).expect("a total");
    let lone = (INPUT_NANO + crate::common::books::OUTPUT_NANO) * ROUNDS as i128;
    assert_eq!((i128::from(posted), held), (delivered + lone, 0), "every token once");
    prove(&mut db);
}

fn wait(mut done: impl FnMut() -> bool, what: &str) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What PostgreSQL says of a full disk, raised by a trigger in the real one.
#[test]
fn a_full_disk_turns_new_work_away_and_passes() {
    let cluster = Cluster::start();
    let url = cluster.database("ledger");
    let mut db = cluster.open(&url);
    set_up(&mut db, &["a"]);
    limit(&mut db, TENANT, 1_000_000_000);
    let (rigged, _) = Rig::around(Box::new(cluster.open(&url)));
    let ledger = replica(rigged, "one", Duration::from_secs(30));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let open = |id: &str| runtime.block_on(ledger.ledger.open(opening("a", id, 1)));
    let mut lease = open("r1").expect("admitted");
    lease.use_input(1, 0);
    cluster.admin(
        "ledger",
        "
        CREATE FUNCTION full_disk() RETURNS trigger AS $$ BEGIN
            RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100';
        END $$ LANGUAGE plpgsql;
        CREATE TRIGGER full_disk BEFORE INSERT ON request EXECUTE FUNCTION full_disk();
        CREATE TRIGGER full_disk BEFORE INSERT ON transfer EXECUTE FUNCTION full_disk()",
    );
    for index in 0..3 {
        match open(&format!("f{index}")) {
            Err(LedgerError::Unavailable(what)) => assert!(what.contains("53100"), "{what}"),
            Err(LedgerError::Refused(Refusal::Key)) | Ok(_) => panic!("admitted"),
            Err(other) => panic!("{other}"),
        }
    }
    assert!(lease.affordable() > 0, "it runs on within what it holds");
    lease.use_output(1);
    let cost = lease.cost();
    let closing = runtime.spawn(close(lease, EndCause::Finished));
    std::thread::sleep(Duration::from_millis(500));
    assert!(!closing.is_finished(), "the bill waits for the disk");
    cluster
        .admin("ledger", "DROP TRIGGER full_disk ON request; DROP TRIGGER full_disk ON transfer");
    let bill = runtime.block_on(closing).expect("no panic").expect("a bill");
    assert_eq!(bill.cost, cost);
    drop(open("r2").expect("admitted"));
    stop(ledger);
    prove(&mut db);
}
