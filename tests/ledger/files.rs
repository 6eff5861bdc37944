//! `candela ledger` as an operator uses it, and that no sum can be wrong unseen.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use candela::{
    ledger::{
        EndCause, Extension, Opening, Payer, Span,
        book::RateLimit,
        db::{Db, Sqlite},
    },
    types::{KeyId, NanoUsd, TenantId},
};

use super::world::{World, file_in, used};

fn candela(data_dir: &Path, line: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_candela"))
        .arg("ledger")
        .args(line)
        .current_dir(data_dir)
        .env_clear()
        .env("CANDELA_DATA_DIR", data_dir)
        .output()
        .expect("runs")
}

/// Asserts the exit code, and that both streams together contain `part`.
fn check(data_dir: &Path, line: &[&str], code: i32, part: &str) {
    let out = candela(data_dir, line);
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert_eq!(out.status.code(), Some(code), "{line:?}: {text}");
    assert!(text.contains(part), "{line:?} lacks {part:?}: {text}");
}

/// One request of each state, budgets over all of them, a refund and a credit.
fn ledger() -> World {
    let mut world = World::new();
    for (scope, span) in
        [("global", Span::Total), ("org:acme", Span::Month), ("key:k0", Span::Hour)]
    {
        world.budget(scope, span, "UTC", 1 << 40);
    }
    let limit = RateLimit { sequences_max: Some(9), ..RateLimit::default() };
    world.write(|book| book.set_rate_limit("tenant:red", &limit));
    let lost = world.opening("red", 5);
    world.open(&lost).expect("admitted");
    world.crash(|_| Ok(()));
    let done = world.opening("red", 10);
    let done = Opening { payer: Payer::Key(KeyId::new("k0")), ..done };
    world.open(&done).expect("admitted");
    world.close(&done.request, &used(10, 1), EndCause::Finished).expect("open");
    world.write(|book| book.refund(&done.request, NanoUsd(7), "kindness"));
    world.write(|book| book.credit(&TenantId::new("red"), NanoUsd(1000), "paid"));
    let open = world.opening("red", 20);
    world.open(&open).expect("admitted");
    let asked = Extension {
        request: open.request,
        used: used(20, 1),
        wanted: NanoUsd(9000),
        least: NanoUsd(4200),
    };
    world.extend(&asked);
    world
}

#[test]
fn a_sum_that_does_not_hold_is_found() {
    for (sql, part) in [
        ("UPDATE account SET debits = debits + 1 WHERE id = 'tenant:red'", "account tenant:red"),
        ("DELETE FROM account WHERE id = 'operator:revenue'", "account operator:revenue"),
        ("INSERT INTO account VALUES ('tenant:ghost', 5, 5)", "account tenant:ghost"),
        ("DELETE FROM transfer WHERE kind = 'charge'", "posted"),
        ("DELETE FROM transfer WHERE kind = 'refund'", "window"),
        ("UPDATE transfer SET amount = amount + 1 WHERE kind = 'credit'", "account"),
        ("UPDATE transfer SET amount = -amount WHERE kind = 'credit'", "is a \"credit\""),
        ("UPDATE transfer SET kind = 'gift' WHERE kind = 'credit'", "\"gift\""),
        ("UPDATE transfer SET tenant_id = 'blue' WHERE kind = 'charge'", "another payer"),
        ("UPDATE transfer SET request_id = 'none' WHERE kind = 'charge'", "\"none\" is missing"),
        (
            "UPDATE transfer SET window_ns = window_ns - 3600000000000 WHERE kind = 'charge'",
            "window",
        ),
        ("UPDATE window_total SET posted = posted + 1", "window"),
        ("UPDATE window_total SET held = held - 1", "window"),
        ("DELETE FROM window_total WHERE span = 'month'", "window"),
        ("DELETE FROM budget WHERE span = 'month'", "which is no budget"),
        ("UPDATE request SET posted = posted + 1 WHERE state = 'done'", "posted"),
        ("UPDATE request SET output = output + 1 WHERE state = 'done'", "for its tokens"),
        ("UPDATE request SET output = output + 1 WHERE state = 'open'", "for its tokens"),
        (
            "UPDATE request SET uncached_input = 9, cached_input = 1 WHERE state = 'done'",
            "for its tokens",
        ),
        ("UPDATE request SET token_cost = 0 WHERE state = 'done'", "cost"),
        ("UPDATE request SET granted = granted + 1 WHERE state = 'open'", "granted"),
        ("UPDATE request SET granted = 0 WHERE state = 'done'", "more than was held"),
        ("UPDATE request SET state = 'done' WHERE state = 'open'", "should not be there"),
        ("UPDATE request SET unrecorded_max = 0 WHERE state = 'crashed'", "crashed"),
        ("UPDATE request SET end_cause = '' WHERE state = 'done'", "ended by"),
        ("UPDATE request SET price_version = 99 WHERE state = 'done'", "with a price"),
        ("UPDATE price SET output = output + 1000000", "for its tokens"),
        ("DELETE FROM lease", "granted"),
        ("UPDATE lease SET amount = amount + 1", "granted"),
        ("UPDATE lease SET posted = amount + 1", "should not be there"),
        (
            "INSERT INTO lease SELECT id, 9, 0, 5, 0 FROM request WHERE state = 'done'",
            "should not be there",
        ),
        ("UPDATE rate_limit SET sequences = 2", "sequences of tenant:red"),
        ("INSERT INTO tenant VALUES ('lone', 'nowhere', '', '{}', 0)", "names a row"),
    ] {
        let mut world = ledger();
        check(world.dir.path(), &["verify"], 0, "every sum holds");
        world.db().batch("PRAGMA foreign_keys = OFF").expect("set");
        world.db().batch(sql).expect(sql);
        check(world.dir.path(), &["verify"], 1, part);
    }
}

#[test]
fn what_is_no_ledger_is_refused() {
    let world = ledger();
    let dir = world.dir.path();
    let empty = tempfile::tempdir().expect("a directory");
    check(empty.path(), &["verify"], 1, "no such ledger");
    check(empty.path(), &["backup", "copy"], 1, "no such ledger");
    check(empty.path(), &["restore", "copy"], 1, "no such ledger");
    assert!(!file_in(empty.path()).exists(), "none was made");
    fs::write(
        dir.join("text"),
        "This is no database at all, as anyone can see at a glance.".repeat(99),
    )
    .expect("writes");
    check(dir, &["verify", "text"], 1, "restore a backup");
    fs::write(dir.join("nothing"), "").expect("writes");
    check(dir, &["verify", "nothing"], 1, "is no ledger");
    check(dir, &["verify"], 0, "every sum holds");
    for version in ["0", "999"] {
        let mut other = ledger();
        let sql = format!("UPDATE meta SET value = {version} WHERE name = 'schema'");
        other.db().batch(&sql).expect("writes");
        check(other.dir.path(), &["verify"], 1, "schema version");
    }
    check(dir, &[], 2, "Usage");
    check(dir, &["restore"], 2, "FILE");
}

#[test]
fn a_backup_while_others_write_has_what_is_committed() {
    let mut world = ledger();
    let dir = world.dir.path().to_owned();
    let path = dir.join("copy");
    let copy = path.to_str().expect("UTF-8");
    let requests = world.number("SELECT COUNT(*) FROM request");
    world.db().begin().expect("begins");
    world.db().execute("UPDATE account SET debits = debits + 1", &[]).expect("writes");
    check(&dir, &["backup", copy], 0, "verified copy");
    check(&dir, &["verify"], 0, "every sum holds");
    world.db().rollback();
    check(&dir, &["verify", copy], 0, "every sum holds");
    check(&dir, &["backup", copy], 1, "there already");
    check(&dir, &["backup", "/nowhere/at/all"], 1, "/nowhere/at/all");
    let mut copied = Sqlite::open_existing(&path, world.clock.clone()).expect("opens");
    let rows = copied.query("SELECT COUNT(*) FROM request", &[]).expect("reads");
    assert_eq!(rows[0].int(0).expect("a number"), requests);
    // A ledger whose sums do not hold is not copied as if they did.
    world.db().batch("UPDATE account SET debits = debits + 1").expect("writes");
    check(&dir, &["backup", "other"], 1, "account");
    assert!(!dir.join("other").exists() && !dir.join("other.part").exists());
}

#[test]
fn restore_refuses_what_it_should_and_keeps_what_was_there() {
    let mut world = ledger();
    let dir = world.dir.path().to_owned();
    check(&dir, &["backup", "copy"], 0, "verified copy");
    let later = world.opening("red", 10);
    world.open(&later).expect("admitted");
    let count = "SELECT COUNT(*) FROM request";
    let (before, clock) = (world.number(count), world.clock.clone());
    check(&dir, &["restore", "copy"], 1, "--force");
    let lock = fs::File::create(dir.join("server.lock")).expect("made");
    lock.lock().expect("locked");
    check(&dir, &["restore", "copy", "--force"], 1, "another candela");
    drop(lock);
    fs::copy(dir.join("copy"), dir.join("bad")).expect("copies");
    let mut bad = Sqlite::open_existing(&dir.join("bad"), clock.clone()).expect("opens");
    bad.batch("UPDATE window_total SET held = held + 1").expect("writes");
    drop(bad);
    check(&dir, &["restore", "bad", "--force"], 1, "window");
    fs::write(dir.join("half"), &fs::read(dir.join("copy")).expect("reads")[..40_000])
        .expect("writes");
    check(&dir, &["restore", "half", "--force"], 1, "candela:");
    assert_eq!(world.number(count), before, "nothing of it touched the ledger");
    check(&dir, &["restore", "copy", "--force"], 0, "is restored");
    let rows = |path: &Path| {
        let mut db = Sqlite::open_existing(path, clock.clone()).expect("opens");
        db.query(count, &[]).expect("reads")[0].int(0).expect("a number")
    };
    assert_eq!(rows(&file_in(&dir)), before - 1, "as it was when it was copied");
    let entries = fs::read_dir(&dir).expect("reads").map(|entry| entry.expect("an entry").path());
    let old: Vec<_> = entries
        .filter(|path| {
            let name = path.to_string_lossy();
            name.contains(".replaced-") && !name.ends_with("-wal") && !name.ends_with("-shm")
        })
        .collect();
    assert_eq!((old.len(), rows(&old[0])), (1, before), "the old one is beside it");
    check(&dir, &["verify"], 0, "every sum holds");
    let empty = tempfile::tempdir().expect("a directory");
    let copy = dir.join("copy");
    check(empty.path(), &["restore", copy.to_str().expect("UTF-8")], 0, "is restored");
    check(empty.path(), &["verify"], 0, "every sum holds");
}
