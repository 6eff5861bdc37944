//! A SQLite ledger whose file is locked, or whose disk is full.

mod common;

use std::{
    fs,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use candela::{
    clock::Clock,
    ledger::{
        Desk, Ledger, LedgerError,
        db::{Db, DbError, Sqlite},
        rows::EndCause,
    },
};
use common::{
    books::{
        INPUT_NANO, OUTPUT_NANO, close, limit, opening, options, prove, replica, run, set_up, stop,
        total,
    },
    rig::Rig,
    server::Server,
};

const TENANT: &str = "tenant:a";

fn open(path: &std::path::Path) -> Sqlite {
    Sqlite::open(path, Clock::system()).expect("opens")
}

#[test]
fn a_file_that_another_process_writes_is_locked() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("ledger.sqlite");
    let (mut one, mut two) = (open(&path), open(&path));
    set_up(&mut one, &["a"]);
    one.begin().expect("begins");
    let begun = Instant::now();
    let error = run(&mut two, |book| book.has_keys()).expect_err("locked");
    assert!(matches!(error, DbError::Locked(_)), "{error}");
    assert!(error.to_string().contains("another process"), "{error}");
    assert!(begun.elapsed() > Duration::from_secs(1), "a short command beside it is waited for");
    one.rollback();
    run(&mut two, |book| book.has_keys()).expect("free again");
}

#[test]
fn files_that_are_no_ledger_say_so() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("ledger.sqlite");
    fs::write(&path, "no database at all, and long enough to be read as a page of one".repeat(64))
        .expect("writes");
    let Err(error) = Sqlite::open(&path, Clock::system()) else { panic!("opens") };
    assert!(matches!(error, DbError::Unusable(_)), "{error}");
    let text = error.to_string();
    assert!(text.contains("restore") && text.contains("ledger.sqlite"), "{text}");
    let Err(error) = Sqlite::open(dir.path(), Clock::system()) else { panic!("opens") };
    assert!(error.to_string().contains(&*dir.path().to_string_lossy()), "{error}");
}

#[test]
fn a_second_server_on_one_directory_is_refused() {
    let server = Server::start(&[]);
    let dir = server.data_dir().to_string_lossy().into_owned();
    let done = std::process::Command::new(env!("CARGO_BIN_EXE_candela"))
        .args(["serve", "--port", "0", "--data-dir", &dir, "--model"])
        .arg(common::default_model())
        .output()
        .expect("runs");
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && text.contains("another candela serves from"), "{text}");
    assert!(text.contains("--data-dir") && text.contains("--ledger"), "{text}");
}

/// SQLite itself refuses to grow the file, as on a full disk.
#[test]
fn a_full_disk_turns_new_work_away_and_passes() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("ledger.sqlite");
    let mut db = open(&path);
    set_up(&mut db, &["a"]);
    limit(&mut db, TENANT, 1_000_000_000);
    let pages = db.query("PRAGMA page_count", &[]).expect("rows")[0].int(0).expect("a number");
    let (rigged, switches) = Rig::around(Box::new(open(&path)));
    let ledger = replica(rigged, "one", Duration::from_secs(100));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let open = |id: &str| runtime.block_on(ledger.ledger.open(opening("a", id, 1)));
    let mut running = open("first").expect("admitted");
    running.use_input(1, 0);
    switches.pages_max.store(pages + 2, Ordering::SeqCst);
    let mut held = Vec::new();
    let full = loop {
        match open(&format!("r{}", held.len())) {
            Ok(lease) => held.push(lease),
            Err(error) => break error,
        }
        assert!(held.len() < 10_000, "the disk is never full");
    };
    assert!(matches!(&full, LedgerError::Unavailable(what) if what.contains("full")), "{full}");
    assert!(running.affordable() > 0, "it runs on within what it holds");
    running.use_output(1);
    let each = (INPUT_NANO + OUTPUT_NANO) as i64;
    let total_now = total(&mut db, TENANT).expect("a total");
    assert_eq!(total_now, (0, (held.len() as i64 + 1) * each), "nothing of it happened");
    // Closing gives room back and needs some: it happens, or waits for the disk.
    let closing = runtime.spawn(close(running, EndCause::Finished));
    drop(held);
    std::thread::sleep(Duration::from_millis(300));
    switches.pages_max.store(1 << 20, Ordering::SeqCst);
    let bill = runtime.block_on(closing).expect("no panic").expect("a bill");
    assert_eq!(bill.cost.0, INPUT_NANO + OUTPUT_NANO);
    drop(open("last").expect("admitted"));
    stop(ledger);
    assert_eq!(total(&mut db, TENANT).expect("a total"), (each, 0));
    prove(&mut db);
}

/// A row of the tenant is not what this program writes: its requests cannot be closed, those of
/// others can, and once an operator has mended the row it is caught up.
#[test]
fn a_request_that_cannot_be_closed_keeps_nobody_waiting() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("ledger.sqlite");
    let mut db = open(&path);
    set_up(&mut db, &["a", "b"]);
    limit(&mut db, TENANT, 1_000_000);
    let clock = Clock::simulated();
    let (rigged, _) = Rig::around(Box::new(open(&path)));
    let life = options("one", Duration::from_secs(10_000));
    let (ledger, mut desk) =
        Ledger::without_thread(rigged, clock.clone(), life, |_| {}).expect("joins");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build();
    let runtime = runtime.expect("a runtime");
    let admit = |desk: &mut Desk, tenant: &str, request: &str| {
        let (ledger, opening) = (ledger.clone(), opening(tenant, request, 1));
        let opened = runtime.spawn(async move { ledger.open(opening).await });
        while !opened.is_finished() {
            desk.turn();
        }
        runtime.block_on(opened).expect("no panic")
    };
    let mut broken = admit(&mut desk, "a", "r1").expect("admitted");
    broken.use_input(1, 0);
    broken.use_output(1);
    let mut zone = |zone: &str| {
        let sql = "UPDATE budget SET zone = $1 WHERE scope = 'tenant:a'";
        assert_eq!(db.execute(sql, &[zone.into()]).expect("writes"), 1);
    };
    zone("Nowhere/Land");
    let bill = runtime.spawn(close(broken, EndCause::Finished));
    let other = admit(&mut desk, "b", "r2").expect("admitted beside it");
    drop(other);
    while !bill.is_finished() {
        desk.turn();
    }
    assert_eq!(runtime.block_on(bill).expect("no panic"), None, "there is no bill to tell");
    let Err(tells) = admit(&mut desk, "a", "r3") else { panic!("its budget cannot be read") };
    assert!(tells.to_string().contains("budget of tenant:a"), "{tells}");
    let each = (INPUT_NANO + OUTPUT_NANO) as i64;
    let held = |path: &std::path::Path| total(&mut open(path), TENANT).expect("a total");
    assert_eq!(held(&path), (0, each), "still held");
    clock.advance(Duration::from_secs(61));
    desk.turn();
    assert_eq!(held(&path), (0, each), "tried, and still refused");
    zone("UTC");
    desk.turn();
    assert_eq!(held(&path), (0, each), "not before it is due again");
    clock.advance(Duration::from_secs(61));
    desk.turn();
    assert_eq!(held(&path), (each, 0), "caught up");
    desk.leave();
    prove(&mut open(&path));
}
