//! What went wrong elsewhere, by name.

use std::time::Instant;

use candela::{
    ledger::{
        Denial, EndCause, Extension, Opening, Payer, Policy, Refusal, Span,
        book::{PriceSpec, RateLimit, transact},
        db::{Db, DbError, Sqlite},
    },
    price::{Rates, Tally, usd},
    types::{KeyId, ModelId, NanoUsd, RequestId, TenantId},
};

use super::world::{MODEL, NS_PER_S, World, cost, file_in, price, rates, used};

/// Ten input tokens and one of output.
const HOLD: i128 = 10 * 150 + 600;

fn ask(id: &RequestId, used: Tally, wanted: i128, least: i128) -> Extension {
    Extension { request: id.clone(), used, wanted: NanoUsd(wanted), least: NanoUsd(least) }
}

#[test]
fn concurrent_requests_overrun_the_cap() {
    for (holds, rest) in [(0, 0), (1, 0), (7, 0), (7, HOLD - 1), (20, 1)] {
        let mut world = World::new();
        world.budget("tenant:red", Span::Day, "UTC", holds * HOLD + rest);
        // All in one transaction, as the group of one commit.
        let openings: Vec<Opening> = (0..30).map(|_| world.opening("red", 10)).collect();
        let admitted = world.write(|book| {
            let mut admitted = 0;
            for opening in &openings {
                admitted += i128::from(book.open(opening, "server")?.is_ok());
            }
            Ok(admitted)
        });
        assert_eq!(admitted, holds.min(30), "{holds} holds and {rest}");
        assert_eq!(world.window("tenant:red", Span::Day, "UTC"), (0, (holds * HOLD) as i64));
    }
}

#[test]
fn every_replica_allows_the_whole_cap() {
    let mut world = World::new();
    world.budget("tenant:red", Span::Day, "UTC", 5 * HOLD);
    let path = file_in(world.dir.path());
    let mut replicas: Vec<Sqlite> =
        (0..3).map(|_| Sqlite::open(&path, world.clock.clone()).expect("opens")).collect();
    let mut admitted = 0;
    for turn in 0..12 {
        let opening = world.opening("red", 10);
        let replica = format!("replica-{}", turn % 3);
        let opened = transact(&mut replicas[turn % 3], |book| book.open(&opening, &replica));
        admitted += usize::from(opened.expect("commits").0.is_ok());
    }
    assert_eq!(admitted, 5);
    world.write(|_| Ok(()));
}

#[test]
fn an_admitted_stream_overruns_because_tokens_count_at_its_end() {
    let mut world = World::new();
    world.budget("tenant:red", Span::Day, "UTC", HOLD + 5 * 600 + 599);
    let opening = world.opening("red", 10);
    let opened = world.open(&opening).expect("admitted");
    let (mut tokens, mut granted) = (1, opened.granted.0);
    let denied = loop {
        let so_far = used(10, tokens);
        let after = |more| cost(&opened.terms.rates, &used(10, tokens + more));
        let grant = world.extend(&ask(&opening.request, so_far, after(50), after(1)));
        granted = granted.max(grant.granted.0);
        if let Some(denied) = grant.denied {
            break denied;
        }
        tokens += 1;
    };
    assert_eq!((tokens, denied), (6, Denial::BudgetForGood), "one of the hold and five more");
    assert_eq!(granted, HOLD + 5 * 600);
}

#[test]
fn a_hold_is_shrunk_to_what_is_left_and_admitted_anyway() {
    for (limit, fits) in [(HOLD, true), (HOLD - 1, false), (1, false), (0, false)] {
        for scope in ["global", "org:acme", "tenant:red"] {
            let mut world = World::new();
            world.budget(scope, Span::Month, "UTC", limit);
            let opening = world.opening("red", 10);
            let opened = world.open(&opening);
            assert_eq!(opened.is_ok(), fits, "{limit} at {scope}: {opened:?}");
            let held = if fits { HOLD as i64 } else { 0 };
            assert_eq!(world.window(scope, Span::Month, "UTC"), (0, held));
        }
    }
    // The same for a cap of the request, of its tenant, and one that parts share.
    for (cap, parts, fits) in
        [(HOLD, 1, true), (HOLD - 1, 1, false), (2 * HOLD - 1, 2, false), (0, 1, false)]
    {
        let mut world = World::new();
        let opening = world.opening("red", 10);
        let opened = world.open(&Opening { cap: Some(NanoUsd(cap)), parts, ..opening });
        assert_eq!(opened.is_ok(), fits, "cap {cap} in {parts}: {opened:?}");
    }
}

#[test]
fn an_unknown_price_is_free() {
    let past = |from: i64, until: Option<i64>| {
        move |now: i64| (now + from * NS_PER_S, until.map(|s| now + s * NS_PER_S))
    };
    type When = Box<dyn Fn(i64) -> (i64, Option<i64>)>;
    let cases: [(When, bool); 4] = [
        (Box::new(past(-10, None)), true),
        (Box::new(past(10, None)), false),
        (Box::new(past(-10, Some(-5))), false),
        (Box::new(past(-10, Some(0))), false),
    ];
    for (index, (when, known)) in cases.iter().enumerate() {
        let mut world = World::new();
        world.write(|book| {
            let (from_ns, until_ns) = when(book.now_ns());
            let price = price("other", rates(1, 1, 1));
            book.set_price(&PriceSpec { from_ns: Some(from_ns), until_ns, ..price })
        });
        let opening = world.opening("red", 10);
        let opened = world.open(&Opening { model: ModelId::new("other"), ..opening });
        match known {
            true => assert!(opened.is_ok(), "{index}: {opened:?}"),
            false => {
                assert!(matches!(opened, Err(Refusal::UnknownPrice(_))), "{index}: {opened:?}")
            }
        }
    }
    // A price of one tenant is nobody else's.
    let mut world = World::new();
    let own = PriceSpec { tenant: Some(TenantId::new("blue")), ..price("own", Rates::default()) };
    world.write(|book| book.set_price(&own));
    for (tenant, known) in [("blue", true), ("red", false), ("green", false)] {
        let opening = world.opening(tenant, 10);
        let opened = world.open(&Opening { model: ModelId::new("own"), ..opening });
        assert_eq!(opened.is_ok(), known, "{tenant}: {opened:?}");
    }
}

#[test]
fn a_changed_price_reprices_what_was_admitted() {
    let mut world = World::new();
    let opening = world.opening("red", 10);
    let first = world.open(&opening).expect("admitted").terms.version;
    world.write(|book| book.set_price(&price(MODEL, rates(1500, 750, 6000))));
    let bill = world.close(&opening.request, &used(10, 1), EndCause::Finished).expect("open");
    assert_eq!((bill.cost.0, bill.price_version), (HOLD, first));
}

#[test]
fn holds_are_never_released_after_errors() {
    let causes = [
        EndCause::Finished,
        EndCause::CostCap,
        EndCause::Budget,
        EndCause::Revoked,
        EndCause::NaturalStop,
        EndCause::LedgerLost,
        EndCause::Aborted,
        EndCause::Failed,
    ];
    for cause in causes {
        let mut world = World::new();
        world.budget("org:acme", Span::Day, "UTC", HOLD);
        for output in [0, 1] {
            let opening = world.opening("red", 10);
            let limit = if output == 0 { HOLD } else { 2 * HOLD };
            world.budget("org:acme", Span::Day, "UTC", limit);
            world.open(&opening).expect("the hold before was released");
            world.close(&opening.request, &used(output * 10, output), cause).expect("open");
        }
        assert_eq!(world.window("org:acme", Span::Day, "UTC"), (HOLD as i64, 0), "{cause:?}");
    }
}

#[test]
fn a_failed_clean_up_counts_twice() {
    let mut world = World::new();
    world.budget("global", Span::Total, "UTC", 1 << 40);
    let opening = world.opening("red", 10);
    world.open(&opening).expect("admitted");
    let id = opening.request.clone();
    let failed = transact(world.db(), |book| {
        book.close(&id, &used(10, 1), EndCause::Finished, 1)?;
        Err::<(), _>(DbError::Unavailable("the disk is full".into()))
    });
    assert!(failed.is_err());
    assert_eq!(world.window("global", Span::Total, "UTC"), (0, HOLD as i64), "as if never tried");
    assert!(world.close(&id, &used(10, 1), EndCause::Finished).is_some());
    for again in 0..3 {
        assert_eq!(world.close(&id, &used(10, 1), EndCause::Finished), None, "{again}");
        let grant = world.extend(&ask(&id, used(10, 5), 1 << 20, 1));
        assert_eq!(grant.denied, Some(Denial::Lost));
        assert_eq!(world.window("global", Span::Total, "UTC"), (HOLD as i64, 0), "{again}");
    }
}

#[test]
fn a_new_budget_counts_open_holds_twice() {
    let mut world = World::new();
    world.budget("tenant:red", Span::Day, "UTC", 1 << 40);
    let opening = world.opening("red", 10);
    world.open(&opening).expect("admitted");
    for (span, zone) in [(Span::Month, "UTC"), (Span::Total, "UTC"), (Span::Month, "Asia/Kolkata")]
    {
        world.budget("tenant:red", span, zone, 1 << 40);
        assert_eq!(world.window("tenant:red", span, zone), (0, HOLD as i64), "{span:?} {zone}");
        assert_eq!(
            world.window("tenant:red", Span::Day, "UTC"),
            (0, HOLD as i64),
            "{span:?} {zone}"
        );
    }
    world.close(&opening.request, &used(10, 1), EndCause::Finished).expect("open");
    for span in [Span::Day, Span::Total] {
        assert_eq!(world.window("tenant:red", span, "UTC"), (HOLD as i64, 0), "{span:?}");
    }
}

#[test]
fn a_retry_reports_success_and_meters_nothing() {
    let mut world = World::new();
    let named = |opening: Opening, body: u8| Opening {
        idempotency: Some(("key".into(), [body; 32])),
        ..opening
    };
    let first = named(world.opening("red", 10), 1);
    // The id is claimed in a transaction that fails: it is not claimed.
    let replica = world.replica.clone();
    let failed = transact(world.db(), |book| {
        assert!(book.open(&first, &replica)?.is_ok());
        Err::<(), _>(DbError::Unavailable("lost".into()))
    });
    assert!(failed.is_err());
    world.open(&first).expect("admitted at the second try");
    let again = named(world.opening("red", 10), 1);
    let running = world.open(&again);
    assert_eq!(running, Err(Refusal::IdempotencyRunning(first.request.clone())));
    let other = named(world.opening("red", 10), 2);
    assert_eq!(world.open(&other), Err(Refusal::IdempotencyMismatch));
    let elsewhere = named(world.opening("blue", 10), 2);
    world.open(&elsewhere).expect("another tenant's key is another key");
    world.close(&first.request, &used(10, 1), EndCause::Finished).expect("open");
    assert_eq!(world.open(&again), Err(Refusal::IdempotencyDone(first.request.clone())));
    assert_eq!(
        world.number("SELECT COUNT(*) FROM transfer WHERE tenant_id = 'red'"),
        1,
        "charged once"
    );
}

#[test]
fn an_early_close_loses_or_refunds_usage() {
    // What was used when the client left, and the charge.
    for (tally, charge) in [
        (used(0, 0), 0),
        (used(10, 0), 1500),
        (used(10, 1), HOLD),
        (Tally { cached_input: 10, ..used(0, 1) }, 750 + 600),
    ] {
        let mut world = World::new();
        world.budget("tenant:red", Span::Day, "UTC", HOLD);
        let opening = world.opening("red", 10);
        world.open(&opening).expect("admitted");
        let bill = world.close(&opening.request, &tally, EndCause::Aborted).expect("open");
        assert_eq!((bill.cost.0, bill.used), (charge, tally), "neither lost nor estimated");
        assert_eq!(world.window("tenant:red", Span::Day, "UTC"), (charge as i64, 0));
    }
}

#[test]
fn a_request_that_never_ran_pays_the_fee() {
    for (tally, charge) in [(used(0, 0), 0), (used(1, 0), 5150), (used(10, 1), 5000 + HOLD)] {
        let mut world = World::new();
        let rates = Rates { request: NanoUsd(5000), ..rates(150, 75, 600) };
        world.write(|book| book.set_price(&price(MODEL, rates)));
        let opening = world.opening("red", 10);
        assert_eq!(world.open(&opening).expect("admitted").granted.0, 5000 + HOLD);
        let bill = world.close(&opening.request, &tally, EndCause::Aborted).expect("open");
        assert_eq!(bill.cost.0, charge, "{tally:?}");
    }
}

#[test]
fn cached_tokens_are_charged_on_top_of_input() {
    for (uncached, cached, output) in [(100, 0, 1), (0, 100, 1), (40, 60, 1)] {
        let mut world = World::new();
        let opening = world.opening("red", 100);
        let opened = world.open(&opening).expect("admitted");
        let tally = Tally { cached_input: cached, ..used(uncached, output) };
        let bill = world.close(&opening.request, &tally, EndCause::Finished).expect("open");
        let expected = i128::from(uncached) * 150 + i128::from(cached) * 75 + 600;
        assert_eq!(bill.cost.0, expected);
        assert!(bill.cost <= opened.granted, "the hold took all of it for uncached");
    }
}

#[test]
fn float_money_drifts() {
    // 0.1 + 0.2 and its like: many charges of amounts that binary fractions cannot hold.
    let rates =
        Rates { input: NanoUsd(100_000_007), output: NanoUsd(200_000_003), ..Rates::default() };
    let mut world = World::new();
    world.write(|book| book.set_price(&price(MODEL, rates)));
    world.budget("tenant:red", Span::Total, "UTC", 1 << 50);
    let mut sum = 0;
    for output in 1..60 {
        let opening = world.opening("red", 3);
        let opened = world.open(&opening).expect("admitted");
        let after = |tokens| cost(&rates, &used(3, tokens));
        world.extend(&ask(
            &opening.request,
            used(3, 1),
            after(output),
            after(2).min(after(output)),
        ));
        let bill =
            world.close(&opening.request, &used(3, output), EndCause::Finished).expect("open");
        assert_eq!((bill.cost.0, opened.terms.rates), (after(output), rates));
        sum += after(output);
    }
    assert_eq!(i128::from(world.window("tenant:red", Span::Total, "UTC").0), sum);
    assert_eq!(usd::format(NanoUsd(662_000_000)), "0.662");
}

#[test]
fn the_reset_wipes_fresh_spend() {
    // Seconds from 20:00 UTC on Saturday the 28th of March 2026 to just before the window ends.
    for (span, zone, last_s) in [
        (Span::Hour, "UTC", 3_599),
        (Span::Hour, "Asia/Kolkata", 1_799),
        (Span::Day, "UTC", 4 * 3_600 - 1),
        (Span::Day, "Europe/Berlin", 3 * 3_600 - 1),
        (Span::Week, "Europe/Berlin", 3 * 3_600 + 23 * 3_600 - 1),
        (Span::Month, "UTC", (4 + 3 * 24) * 3_600 - 1),
    ] {
        let mut world = World::new();
        world.budget("tenant:red", span, zone, 2 * HOLD);
        world.advance(last_s);
        let old = world.opening("red", 10);
        world.open(&old).expect("admitted");
        let spent = world.opening("red", 10);
        world.open(&spent).expect("admitted");
        world.close(&spent.request, &used(10, 1), EndCause::Finished).expect("open");
        let third = world.opening("red", 10);
        assert!(world.open(&third).is_err(), "{span:?} {zone}: the window is full");
        assert_eq!(world.window("tenant:red", span, zone), (HOLD as i64, HOLD as i64));
        world.advance(1);
        assert_eq!(world.window("tenant:red", span, zone), (0, 0), "{span:?} {zone} begins anew");
        let fresh = world.opening("red", 10);
        world.open(&fresh).expect("admitted");
        // The end of a lease of the window before does not touch the new one.
        world.close(&old.request, &used(10, 1), EndCause::Finished).expect("open");
        assert_eq!(world.window("tenant:red", span, zone), (0, HOLD as i64), "{span:?} {zone}");
        let rows =
            world.number("SELECT COUNT(*) FROM window_total WHERE posted = 4200 AND held = 0");
        assert_eq!(rows, 1, "{span:?} {zone}: what was spent before is on record");
    }
}

#[test]
fn a_clock_that_steps_back_reopens_a_window() {
    let mut world = World::new();
    world.budget("tenant:red", Span::Hour, "UTC", HOLD);
    world.advance(3_600);
    let first = world.opening("red", 10);
    world.open(&first).expect("admitted");
    for back_s in [1, 3_600, 7_200, 400_000_000] {
        world.clock.set_wall(world.clock.unix_ns() - back_s * NS_PER_S);
        let again = world.opening("red", 10);
        let refused = world.open(&again);
        assert!(matches!(refused, Err(Refusal::Budget { .. })), "{back_s} s back: {refused:?}");
    }
}

#[test]
fn a_budget_that_changes_under_streams() {
    // The limit after a hold of one request and a spend of another, and whether a third is let in.
    for (limit, admitted) in [(3 * HOLD, true), (2 * HOLD + 599, false), (HOLD, false), (0, false)]
    {
        let mut world = World::new();
        world.budget("tenant:red", Span::Day, "UTC", 2 * HOLD);
        let (running, spent) = (world.opening("red", 10), world.opening("red", 10));
        world.open(&running).expect("admitted");
        world.open(&spent).expect("admitted");
        world.close(&spent.request, &used(10, 1), EndCause::Finished).expect("open");
        world.budget("tenant:red", Span::Day, "UTC", limit);
        let third = world.opening("red", 10);
        assert_eq!(world.open(&third).is_ok(), admitted, "{limit}");
        let grant = world.extend(&ask(&running.request, used(10, 1), 2 * HOLD, HOLD + 600));
        assert!(grant.denied.is_some(), "{limit}: nothing is left for more");
        assert_eq!(grant.granted.0, HOLD, "what was granted stays");
        assert!(world.write(|book| book.delete_budget("tenant:red", Span::Day)));
        let grant = world.extend(&ask(&running.request, used(10, 1), 2 * HOLD, HOLD + 600));
        assert_eq!((grant.granted.0, grant.denied), (2 * HOLD, None), "without a budget");
        world.budget("tenant:red", Span::Day, "UTC", 1);
        let held = if admitted { 2 * HOLD } else { HOLD };
        assert_eq!(world.window("tenant:red", Span::Day, "UTC"), (2 * HOLD as i64, held as i64));
    }
}

#[test]
fn a_revoked_or_expired_key_goes_on() {
    for (revoked_in_s, later_s, ended) in
        [(0, 0, true), (60, 59, false), (60, 60, true), (-5, 0, true)]
    {
        let mut world = World::new();
        let opening = world.opening("red", 10);
        let opening = Opening { payer: Payer::Key(KeyId::new("k0")), ..opening };
        world.open(&opening).expect("admitted");
        world.write(|book| {
            let at_ns = book.now_ns() + revoked_in_s * NS_PER_S;
            book.revoke_key(&KeyId::new("k0"), at_ns)
        });
        world.advance(later_s);
        let grant = world.extend(&ask(&opening.request, used(10, 1), 2 * HOLD, HOLD + 600));
        assert_eq!(
            grant.denied == Some(Denial::Revoked),
            ended,
            "{revoked_in_s} {later_s}: {grant:?}"
        );
        let next = world.opening("red", 10);
        let next = world.open(&Opening { payer: Payer::Key(KeyId::new("k0")), ..next });
        assert_eq!(next == Err(Refusal::Key), ended, "{next:?}");
        let charge = cost(&rates(150, 75, 600), &used(10, 1));
        let bill = world.close(&opening.request, &used(10, 1), EndCause::Revoked).expect("open");
        assert_eq!(bill.cost.0, charge, "what was delivered is charged");
    }
}

#[test]
fn a_refused_request_uses_up_its_rate() {
    let limits = [
        RateLimit { requests_per_minute: Some(1), ..RateLimit::default() },
        RateLimit { tokens_per_minute: Some(15), ..RateLimit::default() },
        RateLimit { sequences_max: Some(1), ..RateLimit::default() },
    ];
    for limit in limits {
        let mut world = World::new();
        world.write(|book| book.set_rate_limit("tenant:red", &limit));
        world.budget("org:acme", Span::Day, "UTC", HOLD - 1);
        for _ in 0..3 {
            let refused = world.opening("red", 10);
            assert!(matches!(world.open(&refused), Err(Refusal::Budget { .. })), "{limit:?}");
        }
        world.budget("org:acme", Span::Day, "UTC", 1 << 40);
        let opening = world.opening("red", 10);
        world.open(&opening).expect("nothing was used up");
        let over = world.opening("red", 10);
        assert!(world.open(&over).is_err(), "{limit:?}");
    }
}

#[test]
fn refunds_and_credits_are_not_more_than_there_is() {
    let mut world = World::new();
    world.budget("tenant:red", Span::Day, "UTC", HOLD);
    let opening = world.opening("red", 10);
    world.open(&opening).expect("admitted");
    let early = world.write(|book| book.refund(&opening.request, NanoUsd(1), ""));
    assert_eq!(early, None, "it still runs");
    world.close(&opening.request, &used(10, 1), EndCause::Finished).expect("open");
    for (asked, given) in [(100, 100), (0, 0), (-5, 0), (1 << 40, HOLD - 100), (1, 0)] {
        let refunded = world.write(|book| book.refund(&opening.request, NanoUsd(asked), ""));
        assert_eq!(refunded, Some(NanoUsd(given)), "{asked}");
    }
    assert_eq!(world.window("tenant:red", Span::Day, "UTC"), (0, 0));
    assert!(!world.write(|book| book.credit(&TenantId::new("nobody"), NanoUsd(1), "")));
}

#[test]
fn a_budget_read_scans_the_spend_log() {
    let mut world = World::new();
    for span in Span::ALL {
        world.budget("tenant:red", span, "UTC", 1 << 50);
    }
    let admissions = |world: &mut World| {
        let opening = |world: &mut World| world.opening("red", 10);
        let openings: Vec<Opening> = (0..200).map(|_| opening(world)).collect();
        let start = Instant::now();
        for opening in &openings {
            transact(world.db(), |book| book.open(opening, "server"))
                .expect("commits")
                .0
                .expect("admitted");
        }
        for opening in &openings {
            let close = |book: &mut candela::ledger::Book<'_>| {
                book.close(&opening.request, &used(10, 1), EndCause::Finished, 1)
            };
            transact(world.db(), close).expect("commits");
        }
        start.elapsed()
    };
    let empty = admissions(&mut world);
    let sql = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 200000)
        INSERT INTO transfer SELECT 1000000 + i, 0, (SELECT MAX(window_ns) FROM transfer), 'charge',
        'tenant:red', 'operator:revenue', 1, 'x', 'acme', 'red', '', '' FROM n";
    world.db().batch(sql).expect("inserts");
    let full = admissions(&mut world);
    assert!(full < empty * 4, "200 requests took {empty:?}, beside 200,000 transfers {full:?}");
}

#[test]
fn a_limit_that_is_not_understood_is_no_limit() {
    // A policy of a newer version is refused where it would be misread, not read as no limit.
    let unknown = r#"{"max_cost_usd": "0.000001", "max_cost_eur": "1"}"#;
    assert!(serde_json::from_str::<Policy>(unknown).is_err());
    let mut world = World::new();
    let sql = "UPDATE tenant SET settings = $1 WHERE id = 'red'";
    world.db().execute(sql, &[unknown.into()]).expect("writes");
    let opening = world.opening("red", 10);
    let refused = transact(world.db(), |book| book.open(&opening, "server"));
    assert!(matches!(refused, Err(DbError::Corrupt(_))), "{refused:?}");
}
