//! What went wrong elsewhere with budgets, windows, keys and rates, by name.

use std::time::Instant;

use candela::{
    ledger::{
        Denial, EndCause, Opening, Payer, Refusal, Span,
        book::{RateLimit, transact},
        db::{Db, Sqlite},
    },
    types::KeyId,
};

use super::world::{HOLD, NS_PER_S, World, ask, cost, file_in, rates, used};

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
