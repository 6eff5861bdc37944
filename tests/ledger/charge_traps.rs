//! What went wrong elsewhere with holds, charges and prices, by name.

use candela::{
    ledger::{
        Denial, EndCause, Opening, Policy, Refusal, Span,
        book::{PriceSpec, transact},
        db::{Db, DbError},
    },
    price::{Rates, Tally, usd},
    types::{ModelId, NanoUsd, TenantId},
};

use super::world::{HOLD, MODEL, NS_PER_S, World, ask, cost, price, rates, used};

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
