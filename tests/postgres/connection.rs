//! Connecting, losing the connection, and what the server's errors mean.

use std::time::{Duration, Instant};

use candela::{
    clock::Clock,
    ledger::{
        book::transact,
        db::{Db, DbError, Postgres},
        schema::migrate,
    },
    types::{OrgId, RequestId},
};

use crate::common::{
    books::{limit, opening, prove, run, set_up},
    postgres::Cluster,
};

#[derive(Debug, PartialEq)]
enum Kind {
    Unavailable,
    Unusable,
    Rejected,
}

fn kind(error: &DbError) -> Kind {
    match error {
        DbError::Unavailable(_) => Kind::Unavailable,
        DbError::Unusable(_) => Kind::Unusable,
        DbError::Rejected(_) => Kind::Rejected,
        other => panic!("{other}"),
    }
}

#[test]
fn a_connection_that_cannot_be_made_says_what_to_do() {
    let cluster = Cluster::start();
    cluster.admin("postgres", "CREATE ROLE guest LOGIN PASSWORD 'guest-pass'");
    cluster.admin("postgres", "CREATE ROLE nobody NOLOGIN PASSWORD 'guest-pass'");
    let url = cluster.url("postgres");
    let elsewhere = url
        .replace("@127.0.0.1:", "@127.0.0.1:1,127.0.0.1:")
        .replace(url.rsplit(':').next().expect("a port"), "2/postgres");
    let cases = [
        (
            cluster.url_of("candela", "wrong-pass", "postgres"),
            Kind::Unusable,
            "correct user and password",
        ),
        (
            cluster.url_of("stranger", "wrong-pass", "postgres"),
            Kind::Unusable,
            "correct user and password",
        ),
        (
            cluster.url_of("nobody", "guest-pass", "postgres"),
            Kind::Unusable,
            "correct user and password",
        ),
        (cluster.url("missing"), Kind::Unusable, "create the database"),
        (format!("{url}?sslmode=require"), Kind::Unusable, "TLS"),
        (elsewhere, Kind::Unavailable, "127.0.0.1:1"),
        (
            "postgres://u:wrong-pass@host.invalid/db".into(),
            Kind::Unavailable,
            "host.invalid:5432/db",
        ),
        ("postgres://u:wrong-pass@".into(), Kind::Unusable, "postgres://user:password@host"),
        ("postgres://u:wro@ng-pass@127.0.0.1/db".into(), Kind::Unusable, "%40"),
        (
            format!("{url}?no_such_option=wrong-pass"),
            Kind::Unusable,
            "postgres://user:password@host",
        ),
        ("".into(), Kind::Unusable, "postgres://user:password@host"),
    ];
    for (url, expected, part) in cases {
        let Err(error) = Postgres::connect(&url, Clock::system()) else { panic!("{url} connects") };
        let text = error.to_string();
        assert_eq!(kind(&error), expected, "{url}: {text}");
        assert!(text.contains(part), "{url}: {text}");
        assert!(!text.contains("-pass"), "a password is shown: {text}");
    }
    let guest = cluster.url_of("guest", "guest-pass", "postgres");
    let error = migrate(&mut cluster.open(&guest)).expect_err("may not create tables");
    assert_eq!(kind(&error), Kind::Unusable, "{error}");
    assert!(error.to_string().contains("grant it CREATE"), "{error}");
}

#[test]
fn errors_of_the_server_have_their_kinds() {
    let cluster = Cluster::start();
    let mut db = cluster.open(&cluster.database("ledger"));
    set_up(&mut db, &["a"]);
    for (code, expected) in [
        ("53100", Kind::Unavailable), // disk full
        ("53200", Kind::Unavailable), // out of memory
        ("57P01", Kind::Unavailable), // shut down by its operator
        ("08006", Kind::Unavailable), // connection failure
        ("55P03", Kind::Unavailable), // lock not available
        ("57014", Kind::Unavailable), // statement timeout
        ("40001", Kind::Unavailable), // serialisation failure
        ("25006", Kind::Unavailable), // read-only
        ("58030", Kind::Unavailable), // I/O error
        ("XX000", Kind::Unavailable), // internal error
        ("0A000", Kind::Unavailable), // another version's table
        ("42501", Kind::Unusable),
        ("42P01", Kind::Unusable),
        ("28P01", Kind::Unusable),
        ("26000", Kind::Unusable), // a pool of transactions
        ("23505", Kind::Rejected),
        ("23503", Kind::Rejected),
        ("22021", Kind::Rejected),
    ] {
        db.begin().expect("begins");
        let sql = format!("DO $$ BEGIN RAISE EXCEPTION 'told' USING ERRCODE = '{code}'; END $$");
        let error = db.batch(&sql).expect_err("raises");
        assert_eq!(kind(&error), expected, "{code}: {error}");
        let error = db.commit().expect_err("a failed transaction is not committed");
        assert!(matches!(error, DbError::Unavailable(_)), "{code}: {error}");
        db.rollback();
        run(&mut db, |book| book.has_keys())
            .unwrap_or_else(|error| panic!("after {code}: {error}"));
    }
    let nul = run(&mut db, |book| book.add_org(&OrgId::new("a\0b"), "x"));
    assert_eq!(kind(&nul.expect_err("no text")), Kind::Rejected);
    run(&mut db, |book| book.has_keys()).expect("goes on");
}

#[test]
fn servers_that_start_together_migrate_once() {
    let cluster = Cluster::start();
    let url = cluster.database("ledger");
    let start = || {
        let mut db = Postgres::connect(&url, Clock::system()).expect("connects");
        migrate(&mut db).expect("migrates");
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(start);
        }
    });
    let mut db = cluster.open(&url);
    let rows = db.query("SELECT COUNT(*) FROM meta", &[]).expect("rows");
    assert_eq!(rows[0].int(0).expect("a number"), 7, "6 counters and the schema");
}

#[test]
fn a_server_that_was_restarted_is_found_again() {
    let mut cluster = Cluster::start();
    let mut db = cluster.open(&cluster.database("ledger"));
    set_up(&mut db, &["a"]);
    limit(&mut db, "tenant:a", 1_000_000);
    cluster.kill();
    cluster.resume();
    run(&mut db, |book| book.open(&opening("a", "r1", 1), "r"))
        .expect("the loss is not noticed between transactions")
        .expect("admitted");
    cluster.kill();
    let begun = Instant::now();
    for _ in 0..100 {
        let error = db.begin().expect_err("nobody is there");
        assert_eq!(kind(&error), Kind::Unavailable, "{error}");
        db.rollback();
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "no attempt waits for another");
    cluster.resume();
    let begun = Instant::now();
    while run(&mut db, |book| book.has_keys()).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(5), "it stays lost");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Within a transaction everything before is gone, and the caller hears of it.
    let done = transact(&mut db, |book| {
        book.open(&opening("a", "r2", 1), "r")?.expect("admitted");
        cluster.kill();
        cluster.resume();
        book.open(&opening("a", "r3", 1), "r")
    });
    assert_eq!(kind(&done.expect_err("lost")), Kind::Unavailable);
    for (request, expected) in [("r1", true), ("r2", false), ("r3", false)] {
        let id = RequestId::new(request);
        let found = run(&mut db, |book| book.bill(&id)).expect("answers").is_some();
        assert_eq!(found, expected, "{request}");
    }
    prove(&mut db);
}

/// The kernel of a hung server still acknowledges what it gets: nothing but a limit on every call
/// notices.
#[test]
fn a_hung_server_or_writer_does_not_hang_the_ledger() {
    let cluster = Cluster::start();
    let url = cluster.database("ledger");
    let (mut one, mut two) = (cluster.open(&url), cluster.open(&url));
    migrate(&mut one).expect("migrates");
    // A server of ours that stops within a transaction: the others wait, and get the lock when the
    // database has ended its session.
    one.begin().expect("begins");
    let begun = Instant::now();
    let mut refused = 0;
    while two.begin().is_err() {
        refused += 1;
        assert!(begun.elapsed() < Duration::from_secs(10), "the lock is never free");
    }
    assert!(
        begun.elapsed() > Duration::from_secs(2),
        "after {:?}, {refused} refused",
        begun.elapsed()
    );
    two.rollback();
    assert!(one.commit().is_err(), "its transaction is gone");
    one.rollback();
    run(&mut one, |book| book.has_keys()).expect("goes on");

    cluster.freeze(true);
    let begun = Instant::now();
    let error = one.begin().expect_err("nobody answers");
    assert_eq!(kind(&error), Kind::Unavailable, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    cluster.freeze(false);
    let begun = Instant::now();
    while run(&mut one, |book| book.has_keys()).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(10), "it stays lost");
        std::thread::sleep(Duration::from_millis(20));
    }
}
