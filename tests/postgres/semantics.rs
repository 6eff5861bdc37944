//! The same statements on both databases: each test runs on SQLite and on PostgreSQL.

use std::{sync::Arc, time::Duration};

use candela::{
    clock::Clock,
    ledger::{
        Extension, Payer, Refusal, Span, Zone,
        book::{Book, Budget, KeySpec, RateLimit, Role, key_hash, replica_of},
        db::{Db, DbError, Sqlite, Val},
        rows::{Bill, Denial, EndCause, Opened},
        schema::{SCHEMA_VERSION, migrate},
    },
    price::Tally,
    types::{KeyId, ModelId, NanoUsd, OrgId, RequestId, TenantId},
};

use crate::common::{
    books::{INPUT_NANO, OUTPUT_NANO, budget, limit, opening, prove, run, set_up, total},
    postgres::Cluster,
    rig::{Rig, Switches},
};

/// Runs `test` on both databases, new and set up.
fn check(test: fn(&mut dyn Db, &Switches)) {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("ledger.sqlite");
    let sqlite = Sqlite::open(&path, Clock::system()).expect("opens");
    on(Box::new(sqlite), test);
    let cluster = Cluster::start();
    on(Box::new(cluster.open(&cluster.database("ledger"))), test);
}

fn on(db: Box<dyn Db>, test: fn(&mut dyn Db, &Switches)) {
    let (mut db, switches): (_, Arc<Switches>) = Rig::around(db);
    set_up(&mut *db, &["a", "b"]);
    test(&mut *db, &switches);
    prove(&mut *db);
}

fn open(db: &mut dyn Db, tenant: &str, request: &str, input: u64) -> Result<Opened, Refusal> {
    run(db, |book| book.open(&opening(tenant, request, input), "r")).expect("answers")
}

fn used(input: u64, output: u64) -> Tally {
    Tally { uncached_input: input, output, ..Tally::default() }
}

fn extend(
    db: &mut dyn Db,
    request: &str,
    used: Tally,
    least: i128,
    wanted: i128,
) -> (i128, Option<Denial>) {
    let asked = Extension {
        request: RequestId::new(request),
        used,
        wanted: NanoUsd(wanted),
        least: NanoUsd(least),
    };
    let grant = run(db, |book| book.extend(&asked)).expect("answers");
    (grant.granted.0, grant.denied)
}

fn close(db: &mut dyn Db, request: &str, used: Tally) -> Option<Bill> {
    let id = RequestId::new(request);
    run(db, |book| book.close(&id, &used, EndCause::Finished, 3)).expect("answers")
}

#[test]
fn holds_posts_and_bills() {
    check(|db, _| {
        limit(db, "tenant:a", 1_000_000);
        let first = 10 * INPUT_NANO + OUTPUT_NANO;
        assert_eq!(open(db, "a", "r1", 10).expect("admitted").granted.0, first);
        assert_eq!(total(db, "tenant:a").expect("a total"), (0, first as i64));
        let wanted = first + 9 * OUTPUT_NANO;
        assert_eq!(extend(db, "r1", used(10, 1), first + OUTPUT_NANO, wanted), (wanted, None));
        assert_eq!(total(db, "tenant:a").expect("a total").0, first as i64);
        prove(db);
        let bill = close(db, "r1", used(10, 4)).expect("a bill");
        assert_eq!(bill.cost.0, 10 * INPUT_NANO + 4 * OUTPUT_NANO);
        assert_eq!(bill.used, used(10, 4));
        assert_eq!(total(db, "tenant:a").expect("a total"), (bill.cost.0 as i64, 0));
        assert_eq!(close(db, "r1", used(10, 9)), None, "it is closed once");
        assert_eq!(extend(db, "r1", used(10, 9), 1, 2).1, Some(Denial::Lost));
        assert_eq!(close(db, "never", used(1, 1)), None);
        let id = RequestId::new("r1");
        assert_eq!(run(db, |book| book.settled(&id)).expect("answers"), Some(bill));
    });
}

#[test]
fn budgets_refuse_at_every_level_and_span() {
    check(|db, _| {
        let needed = 100 * INPUT_NANO + OUTPUT_NANO;
        let mut count = 0;
        for scope in ["tenant:a", "org:acme", "global"] {
            for span in Span::ALL {
                for (limit, fits) in [(needed - 1, false), (needed, true)] {
                    let zone = Zone::parse("Asia/Kolkata").expect("a zone");
                    let budget =
                        Budget { span, zone, limit: NanoUsd(limit), ..budget(scope, limit) };
                    run(db, |book| book.set_budget(&budget)).expect("a budget");
                    count += 1;
                    let request = format!("r{count}");
                    let opened = open(db, "a", &request, 100);
                    match &opened {
                        Ok(_) => assert!(fits, "{scope} {span:?} {limit}"),
                        Err(Refusal::Budget { scope: at, span: of, .. }) => {
                            assert!(!fits && at == scope && *of == span, "{opened:?}");
                        }
                        Err(other) => panic!("{other}"),
                    }
                    let id = RequestId::new(&request);
                    run(db, |book| book.forget(&id)).expect("forgets");
                    assert!(run(db, |book| book.delete_budget(scope, span)).expect("deletes"));
                }
            }
        }
    });
}

#[test]
fn a_budget_counts_what_was_before_it() {
    check(|db, _| {
        open(db, "a", "r1", 10).expect("admitted");
        let bill = close(db, "r1", used(10, 1)).expect("a bill").cost.0;
        open(db, "a", "r2", 10).expect("admitted");
        open(db, "b", "r3", 10).expect("admitted");
        for scope in ["tenant:a", "org:acme", "global"] {
            limit(db, scope, 1_000_000);
        }
        let held = (10 * INPUT_NANO + OUTPUT_NANO) as i64;
        assert_eq!(total(db, "tenant:a").expect("a total"), (bill as i64, held));
        assert_eq!(total(db, "org:acme").expect("a total"), (bill as i64, 2 * held));
        prove(db);
        // Below what is spent and held already: nothing more, and nothing is taken away.
        run(db, |book| book.set_budget(&budget("tenant:a", 1))).expect("a budget");
        assert!(matches!(open(db, "a", "r4", 1), Err(Refusal::Budget { .. })));
        assert_eq!(extend(db, "r2", used(10, 1), 1 << 20, 1 << 20).1, Some(Denial::BudgetForGood));
        assert!(close(db, "r2", used(10, 1)).is_some());
        run(db, |book| book.set_budget(&budget("tenant:a", 1_000_000))).expect("a budget");
    });
}

#[test]
fn caps_models_prices_and_keys_refuse() {
    check(|db, _| {
        let key = |id: &str, expires_ns| KeySpec {
            id: KeyId::new(id),
            tenant: TenantId::new("a"),
            hash: key_hash(id),
            name: id.to_owned(),
            role: Role::Tenant,
            policy: serde_json::from_value(serde_json::json!({"models": ["m"]})).expect("a policy"),
            expires_ns,
        };
        run(db, |book| book.add_key(&key("k1", None))).expect("a key");
        run(db, |book| book.add_key(&key("k2", Some(1)))).expect("a key");
        let known = run(db, |book| book.find_key(&key_hash("k1"))).expect("answers");
        assert_eq!(known.expect("known").id, KeyId::new("k1"));
        assert_eq!(run(db, |book| book.find_key(&key_hash("K1"))).expect("answers"), None);
        let mut count = 0;
        let mut ask = |db: &mut dyn Db, payer: Payer, model: &str, cap: Option<i128>| {
            count += 1;
            let mut asked = opening("a", &format!("r{count}"), 10);
            (asked.payer, asked.model, asked.cap) = (payer, ModelId::new(model), cap.map(NanoUsd));
            run(db, |book| book.open(&asked, "r")).expect("answers")
        };
        let tenant = |id: &str| Payer::Tenant(TenantId::new(id));
        let by_key = |id: &str| Payer::Key(KeyId::new(id));
        let least = 10 * INPUT_NANO + OUTPUT_NANO;
        assert_eq!(ask(db, tenant("nobody"), "m", None), Err(Refusal::Key));
        assert_eq!(ask(db, by_key("k3"), "m", None), Err(Refusal::Key));
        assert_eq!(ask(db, by_key("k2"), "m", None), Err(Refusal::Key), "expired");
        let other = ModelId::new("other");
        assert_eq!(ask(db, tenant("a"), "other", None), Err(Refusal::UnknownPrice(other.clone())));
        assert_eq!(ask(db, by_key("k1"), "other", None), Err(Refusal::ModelForbidden(other)));
        let low = ask(db, tenant("a"), "m", Some(least - 1));
        assert!(matches!(low, Err(Refusal::CapTooLow { .. })), "{low:?}");
        assert!(ask(db, by_key("k1"), "m", Some(least)).is_ok());
        let now_ns = run(db, |book| Ok(book.now_ns())).expect("answers");
        assert!(run(db, |book| book.revoke_key(&KeyId::new("k1"), now_ns)).expect("answers"));
        assert!(!run(db, |book| book.revoke_key(&KeyId::new("k9"), now_ns)).expect("answers"));
        assert_eq!(ask(db, by_key("k1"), "m", None), Err(Refusal::Key), "revoked");
        assert_eq!(extend(db, "r7", used(10, 1), 1 << 20, 1 << 20).1, Some(Denial::Revoked));
    });
}

#[test]
fn rates_refuse_and_are_paid_off() {
    check(|db, switches| {
        let set = |db: &mut dyn Db, requests, tokens, sequences| {
            let limit = RateLimit {
                requests_per_minute: requests,
                tokens_per_minute: tokens,
                sequences_max: sequences,
            };
            run(db, |book| book.set_rate_limit("tenant:a", &limit)).expect("a limit");
            assert_eq!(run(db, |book| book.rate_limit("tenant:a")).expect("answers"), limit);
        };
        set(db, Some(2), None, None);
        assert!(open(db, "a", "r1", 1).is_ok() && open(db, "a", "r2", 1).is_ok());
        assert!(matches!(open(db, "a", "r3", 1), Err(Refusal::RequestsPerMinute { .. })));
        assert!(open(db, "b", "r4", 1).is_ok(), "another tenant");
        switches.shift(Duration::from_secs(31), false);
        assert!(open(db, "a", "r5", 1).is_ok(), "one of two a minute is paid off");
        set(db, None, Some(100), None);
        assert!(matches!(open(db, "a", "r6", 101), Err(Refusal::InputOverRate { .. })));
        assert!(open(db, "a", "r7", 90).is_ok());
        assert!(matches!(open(db, "a", "r8", 50), Err(Refusal::TokensPerMinute { .. })));
        set(db, None, None, Some(4));
        assert!(matches!(open(db, "a", "r9", 1), Err(Refusal::Sequences { .. })), "4 are open");
        assert!(close(db, "r1", used(1, 1)).is_some());
        assert!(open(db, "a", "r9", 1).is_ok());
    });
}

#[test]
fn a_dead_server_is_given_up() {
    check(|db, _| {
        limit(db, "tenant:a", 1_000_000);
        run(db, |book| book.join("r", "one", 1_000)).expect("joins");
        open(db, "a", "r1", 10).expect("admitted");
        let first = 10 * INPUT_NANO + OUTPUT_NANO;
        extend(db, "r1", used(10, 1), first, first + 5 * OUTPUT_NANO);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(run(db, |book| book.expired_replicas(0)).expect("answers"), ["r"]);
        assert_eq!(run(db, |book| book.recover("r")).expect("recovers"), 1);
        assert_eq!(total(db, "tenant:a").expect("a total"), (first as i64, 0));
        assert_eq!(run(db, |book| book.recover("r")).expect("recovers"), 0, "once");
        let (sql, values) = replica_of("r");
        let found = db.query(sql, &values).expect("answers");
        let known = run(db, |book| book.heartbeat("r", 1, &found)).expect("answers");
        assert!(!known, "not known any more");
        assert_eq!(close(db, "r1", used(10, 6)), None);
        let id = RequestId::new("r1");
        assert_eq!(run(db, |book| book.settled(&id)).expect("answers"), None, "given up");
    });
}

#[test]
fn time_does_not_go_back() {
    check(|db, switches| {
        let now = |db: &mut dyn Db| run(db, |book| Ok(book.now_ns())).expect("answers");
        let hour = Budget { span: Span::Hour, ..budget("tenant:a", 1_000_000) };
        run(db, |book| book.set_budget(&hour)).expect("a budget");
        switches.shift(Duration::from_secs(7200), false);
        open(db, "a", "r1", 10).expect("admitted");
        let clock = db.query("SELECT value FROM meta WHERE name = 'clock'", &[]).expect("rows");
        let late_ns = clock[0].int(0).expect("a number");
        switches.shift(Duration::from_secs(7200), true);
        assert!(now(db) >= late_ns);
        // What was held in the later hour is posted there.
        close(db, "r1", used(10, 1)).expect("a bill");
        let sql = "SELECT start_s, posted, held FROM window_total WHERE scope = 'tenant:a'";
        let rows = db.query(sql, &[]).expect("rows");
        assert_eq!(rows.len(), 1, "{rows:?}");
        let (start_s, held) =
            (rows[0].int(0).expect("a number"), rows[0].int(2).expect("a number"));
        assert!(start_s * 1_000_000_000 > late_ns - 3_600_000_000_000 && held == 0, "{rows:?}");
    });
}

#[test]
fn an_idempotency_key_counts_once() {
    check(|db, _| {
        let ask = |db: &mut dyn Db, request: &str, body: u8| {
            let mut asked = opening("a", request, 1);
            asked.idempotency = Some(("same".into(), [body; 32]));
            run(db, |book| book.open(&asked, "r")).expect("answers")
        };
        ask(db, "r1", 1).expect("admitted");
        assert_eq!(ask(db, "r2", 2), Err(Refusal::IdempotencyMismatch));
        assert_eq!(ask(db, "r2", 1), Err(Refusal::IdempotencyRunning(RequestId::new("r1"))));
        let id = RequestId::new("r1");
        run(db, |book| book.forget(&id)).expect("forgets");
        ask(db, "r3", 1).expect("the first one came to nothing");
        close(db, "r3", used(1, 1)).expect("a bill");
        assert_eq!(ask(db, "r4", 1), Err(Refusal::IdempotencyDone(RequestId::new("r3"))));
    });
}

#[test]
fn credits_and_refunds_are_entries() {
    check(|db, _| {
        let tenant = TenantId::new("a");
        open(db, "a", "r1", 10).expect("admitted");
        let cost = close(db, "r1", used(10, 1)).expect("a bill").cost;
        let (id, half) = (RequestId::new("r1"), NanoUsd(cost.0 / 2));
        let refund = |db: &mut dyn Db, amount| {
            run(db, |book| book.refund(&id, amount, "sorry")).expect("answers")
        };
        assert_eq!(refund(db, half), Some(half));
        assert_eq!(refund(db, cost), Some(NanoUsd(cost.0 - half.0)), "no more than is left");
        assert_eq!(refund(db, cost), Some(NanoUsd(0)));
        assert!(run(db, |book| book.credit(&tenant, NanoUsd(7), "gift")).expect("answers"));
        let nobody = TenantId::new("nobody");
        assert!(!run(db, |book| book.credit(&nobody, NanoUsd(7), "gift")).expect("answers"));
        run(db, |book| book.audit("me", "credit", "tenant:a", "", "{}")).expect("an entry");
        let kinds =
            "SELECT kind, CAST(SUM(amount) AS BIGINT) FROM transfer GROUP BY kind ORDER BY kind";
        let rows = db.query(kinds, &[]).expect("rows");
        let kinds: Vec<_> = rows
            .iter()
            .map(|row| (row.text(0).expect("text"), row.int(1).expect("a number")))
            .collect();
        assert_eq!(kinds, [("charge", cost.0 as i64), ("credit", 7), ("refund", cost.0 as i64)]);
    });
}

#[test]
fn what_a_row_cannot_be_is_rejected_and_leaves_nothing() {
    check(|db, _| {
        let rejected = |done: Result<(), DbError>| {
            assert!(matches!(done, Err(DbError::Rejected(_))), "{done:?}");
        };
        let twice = |book: &mut Book<'_>| {
            for _ in 0..2 {
                book.open(&opening("a", "same", 1), "r")?.expect("admitted");
            }
            Ok(())
        };
        rejected(run(db, twice));
        let orphan = |book: &mut Book<'_>| {
            let (id, org) = (TenantId::new("c"), OrgId::new("nobody"));
            book.add_tenant(&id, &org, "c", &Default::default()).map(|_| ())
        };
        rejected(run(db, orphan));
        let sql = "SELECT id FROM request UNION ALL SELECT id FROM tenant WHERE id = 'c'";
        assert_eq!(db.query(sql, &[]).expect("rows"), [], "nothing of it happened");
        // A failed statement that nobody minds does not make a commit of half a transaction.
        db.begin().expect("begins");
        let sql = "INSERT INTO org (id, name, created_ns) VALUES ('half', $1, 0)";
        assert_eq!(db.execute(sql, &["x".into()]).expect("inserts"), 1);
        db.rollback();
        assert!(db.query("SELECT id FROM org WHERE id = 'half'", &[]).expect("rows").is_empty());
        open(db, "a", "same", 1).expect("and everything goes on");
    });
}

#[test]
fn values_come_back_as_they_went() {
    check(|db, _| {
        let sql = "INSERT INTO api_key (id, tenant_id, hash, name, role, settings, created_ns,
            expires_ns, revoked_ns) VALUES ($1, 'a', $2, $3, '', '', $4, $5, $6)";
        let cases: [(i64, &[u8], &str); 4] = [
            (i64::MAX, &[0, 255, 128], "naïve 😀 '\"\\ \n"),
            (i64::MIN, &[], ""),
            (0, b"'; DROP TABLE org", "'; DROP TABLE org; --"),
            (-1, &[7; 4096], "$1 %s ?"),
        ];
        for (index, (number, bytes, text)) in cases.iter().enumerate() {
            let values: [Val; 6] = [
                format!("k{index}").into(),
                (*bytes).into(),
                (*text).into(),
                (*number).into(),
                Val::Null,
                Some(*number).into(),
            ];
            assert_eq!(db.execute(sql, &values).expect("inserts"), 1);
            let sql = "SELECT id, hash, name, created_ns, expires_ns, revoked_ns FROM api_key
                WHERE id = $1 AND hash = $2 AND name = $3 AND created_ns = $4";
            let rows = db.query(sql, &values[..4]).expect("rows");
            assert_eq!(rows.iter().map(|row| &row.0[..]).collect::<Vec<_>>(), [&values[..]]);
        }
    });
}

#[test]
fn a_newer_schema_is_refused() {
    check(|db, _| {
        migrate(db).expect("again");
        let version = |db: &mut dyn Db, version: i64| {
            let sql = "UPDATE meta SET value = $1 WHERE name = 'schema'";
            assert_eq!(db.execute(sql, &[version.into()]).expect("updates"), 1);
        };
        for wrong in [SCHEMA_VERSION + 1, i64::MAX, -1] {
            version(db, wrong);
            let error = migrate(db).expect_err("refused");
            let text = error.to_string();
            assert!(
                matches!(error, DbError::Unusable(_)) && text.contains("upgrade candela"),
                "{text}"
            );
            assert!(text.contains(&wrong.to_string()), "{text}");
        }
        version(db, SCHEMA_VERSION);
        migrate(db).expect("and back");
    });
}
