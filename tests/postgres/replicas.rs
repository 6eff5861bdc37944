//! Several servers on one budget: the sum never passes it, and what a dead one held comes back when
//! that is safe.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use candela::{
    ledger::{LedgerError, Refusal, db::Db, rows::EndCause},
    types::RequestId,
};
use tokio::runtime::Runtime;

use crate::common::{
    books::{
        INPUT_NANO, OUTPUT_NANO, close, generate, limit, opening, prove, replica, run, set_up,
        stop, total, watch,
    },
    postgres::Cluster,
    rig::Rig,
};

const LIMIT: i128 = 2_000_000;
const TENANT: &str = "tenant:a";

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
}

#[test]
fn the_sum_over_servers_never_passes_the_limit() {
    let cluster = Cluster::start();
    for (servers, requests) in [(2usize, 300u64), (3, 300)] {
        let url = cluster.database(&format!("of_{servers}"));
        let mut db = cluster.open(&url);
        set_up(&mut db, &["a", "b"]);
        limit(&mut db, TENANT, LIMIT);
        limit(&mut db, "org:acme", LIMIT + LIMIT / 2);
        let over = Arc::new(AtomicBool::new(false));
        let watched = watch(Box::new(cluster.open(&url)), TENANT, over.clone());
        let ledgers: Vec<_> = (0..servers)
            .map(|index| {
                replica(Box::new(cluster.open(&url)), &format!("r{index}"), Duration::from_secs(10))
            })
            .collect();
        let runtime = runtime();
        let tasks: Vec<_> = (0..requests)
            .map(|index| {
                let ledger = ledgers[index as usize % servers].ledger.clone();
                let tenant = if index % 5 == 0 { "b" } else { "a" };
                let asked = opening(tenant, &format!("q{index}"), 1 + index % 7);
                runtime.spawn(async move { generate(&ledger, asked, 5 + index % 40, index).await })
            })
            .collect();
        let (mut ran, mut refused, mut broke, mut delivered) = (0, 0, 0, 0);
        for task in tasks {
            match runtime.block_on(task).expect("no panic") {
                Ok(one) => {
                    ran += 1;
                    delivered += one.delivered;
                    broke += usize::from(one.cause == EndCause::Budget);
                    if let Some(bill) = &one.bill {
                        assert_eq!(bill.cost.0, one.delivered, "{one:?}");
                    }
                    assert!(matches!(one.cause, EndCause::Finished | EndCause::Budget), "{one:?}");
                }
                Err(LedgerError::Refused(Refusal::Budget { .. })) => refused += 1,
                Err(other) => panic!("{other}"),
            }
        }
        ledgers.into_iter().for_each(stop);
        over.store(true, Ordering::SeqCst);
        let (most, looks) = watched.join().expect("no panic");
        let (posted, held) = total(&mut db, "org:acme").expect("a total");
        println!(
            "{servers} servers: {ran} ran, {broke} out of budget, {refused} refused, at most {most} of {LIMIT} in {looks} looks"
        );
        assert!(i128::from(most) <= LIMIT && looks > 50, "{most} in {looks} looks");
        assert_eq!((i128::from(posted), held), (delivered, 0), "every token and no more");
        let (spent, _) = total(&mut db, TENANT).expect("a total");
        // What the last ones give back comes too late for those that gave up waiting for it: how much
        // that is depends on the machine.
        assert!(i128::from(spent) > LIMIT * 9 / 10, "the budget is used: {spent}");
        assert!(refused + broke > 0, "the budget was met");
        prove(&mut db);
    }
}

#[test]
fn what_a_silent_server_held_comes_back_when_that_is_safe() {
    let ttl = Duration::from_secs(3);
    let cluster = Cluster::start();
    let url = cluster.database("ledger");
    let mut db = cluster.open(&url);
    set_up(&mut db, &["a"]);
    // Room for one request alone.
    let first = 10 * INPUT_NANO + OUTPUT_NANO;
    limit(&mut db, TENANT, first + 2 * OUTPUT_NANO);
    let (rigged, switches) = Rig::around(Box::new(cluster.open(&url)));
    let silent = replica(rigged, "silent", ttl);
    let other = replica(Box::new(cluster.open(&url)), "other", ttl);
    let runtime = runtime();
    let mut lease = runtime.block_on(silent.ledger.open(opening("a", "r1", 10))).expect("admitted");
    lease.use_input(10, 0);
    assert_eq!(lease.affordable(), 1);
    switches.cut(true);
    let cut = Instant::now();
    assert!(lease.affordable() > 0, "it runs on within what it holds");
    let mut ended = None;
    let returned = loop {
        let asked = opening("a", &format!("o{}", cut.elapsed().as_millis()), 10);
        let opened = runtime.block_on(other.ledger.open(asked));
        // Read after the answer: what is usable now was usable when the hold was given back.
        let usable = lease.affordable() > 0;
        if !usable && ended.is_none() {
            ended = Some(cut.elapsed());
        }
        match opened {
            Ok(opened) => {
                assert!(!usable, "two servers use one hold");
                break opened;
            }
            Err(LedgerError::Refused(Refusal::Budget { .. })) => {}
            Err(error) => panic!("{error}"),
        }
        assert!(cut.elapsed() < 4 * ttl, "it never comes back");
        std::thread::sleep(Duration::from_millis(5));
    };
    let (ended, came_back) = (ended.expect("it ended"), cut.elapsed());
    println!("leases end {ended:?} after the last word at most, and come back after {came_back:?}");
    // The last word was at most one beat before the cut.
    assert!(came_back > ttl / 2 && came_back < ttl * 2, "{came_back:?}");
    assert!(ended < came_back && ended < ttl, "{ended:?}");
    // The silent server speaks again: it is one of them, and its old lease is not valid again.
    switches.cut(false);
    let start = Instant::now();
    while lease.end(0) != Some(EndCause::LedgerLost) {
        assert_eq!(lease.affordable(), 0, "a hold that was given back is used");
        assert!(start.elapsed() < ttl, "it does not hear of it");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(lease.affordable(), 0);
    assert_eq!(runtime.block_on(close(lease, EndCause::LedgerLost)), None);
    let bill = runtime.block_on(close(returned, EndCause::Finished)).expect("a bill");
    assert_eq!(bill.cost.0, 0);
    let again = runtime.block_on(silent.ledger.open(opening("a", "r2", 10))).expect("admitted");
    assert!(again.affordable() > 0);
    drop(again);
    stop(silent);
    stop(other);
    assert_eq!(total(&mut db, TENANT).expect("a total"), (0, 0));
    prove(&mut db);
}

#[test]
fn a_server_that_dies_leaves_no_hold_behind() {
    let ttl = Duration::from_secs(2);
    let cluster = Cluster::start();
    let url = cluster.database("ledger");
    let mut db = cluster.open(&url);
    set_up(&mut db, &["a"]);
    limit(&mut db, TENANT, LIMIT);
    let (rigged, switches) = Rig::around(Box::new(cluster.open(&url)));
    let dying = replica(rigged, "dying", ttl);
    let other = replica(Box::new(cluster.open(&url)), "other", ttl);
    let runtime = runtime();
    let open = async |index: u64| {
        let ledger = if index.is_multiple_of(2) { &dying } else { &other };
        ledger.ledger.open(opening("a", &format!("r{index}"), 3)).await.expect("admitted")
    };
    let leases: Vec<_> = (0..100).map(|index| runtime.block_on(open(index))).collect();
    let each = (3 * INPUT_NANO + OUTPUT_NANO) as i64;
    assert_eq!(total(&mut db, TENANT).expect("a total"), (0, 100 * each));
    switches.cut(true);
    let cut = Instant::now();
    while total(&mut db, TENANT).expect("a total").1 > 50 * each {
        assert!(cut.elapsed() < 4 * ttl, "they never come back");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(cut.elapsed() > ttl / 2, "{:?}", cut.elapsed());
    assert_eq!(
        total(&mut db, TENANT).expect("a total"),
        (0, 50 * each),
        "all of its own, no other's"
    );
    let crashed = "SELECT id FROM request WHERE state = 'crashed' AND replica = 'dying'";
    assert_eq!(db.query(crashed, &[]).expect("rows").len(), 50);
    let usable = leases.iter().filter(|lease| lease.affordable() > 0).count();
    assert_eq!(usable, 50, "those of the living go on");
    drop(leases);
    stop(dying);
    stop(other);
    assert_eq!(total(&mut db, TENANT).expect("a total").1, 0);
    prove(&mut db);
}

/// The commit happened and its answer was lost.
#[test]
fn an_answer_that_is_lost_leaves_no_hold_and_no_bill_behind() {
    let cluster = Cluster::start();
    let url = cluster.database("ledger");
    let mut db = cluster.open(&url);
    set_up(&mut db, &["a"]);
    limit(&mut db, TENANT, LIMIT);
    let (rigged, switches) = Rig::around(Box::new(cluster.open(&url)));
    // Beats are far apart, so that the answer that is lost is the one meant.
    let ledger = replica(rigged, "one", Duration::from_secs(100));
    let runtime = runtime();
    for round in 0..20 {
        switches.lose_answer.store(true, Ordering::SeqCst);
        let lost = runtime.block_on(ledger.ledger.open(opening("a", &format!("l{round}"), 1)));
        let Err(error) = lost else { continue };
        assert!(matches!(error, LedgerError::Unavailable(_)), "{error}");
        let start = Instant::now();
        while total(&mut db, TENANT).expect("a total").1 > 0 {
            assert!(start.elapsed() < Duration::from_secs(5), "its hold leaks");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let found = db.query("SELECT id FROM request WHERE end_cause = 'ledger_lost'", &[]);
    let found = found.expect("rows").len();
    // Beats lose their answers too, one a second.
    assert!(found >= 10, "{found} answers were lost");
    for round in 0..20 {
        let id = format!("c{round}");
        let mut lease =
            runtime.block_on(ledger.ledger.open(opening("a", &id, 1))).expect("admitted");
        lease.use_input(1, 0);
        lease.use_output(1);
        let cost = lease.cost();
        switches.lose_answer.store(true, Ordering::SeqCst);
        let bill = runtime.block_on(close(lease, EndCause::Finished)).expect("a bill");
        assert_eq!(bill.cost, cost);
        switches.lose_answer.store(false, Ordering::SeqCst);
        let id = RequestId::new(&id);
        assert_eq!(run(&mut db, |book| book.settled(&id)).expect("answers"), Some(bill));
    }
    stop(ledger);
    prove(&mut db);
}
