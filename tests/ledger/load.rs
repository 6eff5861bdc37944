//! The running server under load: many clients of one tenant with random caps, some of whom leave,
//! under budgets at three levels, while an hour ends. `CANDELA_LOAD_STREAMS` says how many run at once.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use candela::{
    clock::Clock,
    ledger::{
        Span,
        db::{Db, Sqlite},
    },
    price::usd,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

use super::{
    common::server::DEADLINE,
    crash::compile,
    server::{INPUT, OUTPUT, PROMPT, Read, Shop, dollars},
    world::file_in,
};

const STREAMS: usize = 100;

/// What a client got.
#[derive(Default)]
struct Got {
    /// Cost of each answer that was read to its end, by request.
    whole: Vec<(String, i128)>,
    /// Tokens read of each answer that was left.
    left: Vec<(String, i128)>,
    refused: usize,
    causes: Vec<Value>,
}

/// Requests one after another until `over`, at least one.
async fn client(shop: &Shop, seed: u64, over: &AtomicBool) -> Got {
    let mut random = StdRng::seed_from_u64(seed);
    let mut got = Got::default();
    loop {
        let key = if random.random_ratio(1, 2) { "k0" } else { "k1" };
        let choices = [1, 1, 1, 2, 3][random.random_range(0..5)];
        let max_tokens = random.random_range(1..300);
        let mut body = json!({"prompt": PROMPT, "max_tokens": max_tokens, "n": choices});
        let cap = random.random_ratio(1, 3).then(|| random.random_range(1_000..100_000));
        if let Some(cap) = cap {
            body["max_cost_usd"] = dollars(cap);
        }
        let leaves_after =
            if random.random_ratio(1, 4) { random.random_range(0..40) } else { usize::MAX };
        match shop.try_read(key, &body, |read| read.text.len() < leaves_after).await {
            Err(refused) => {
                let code = refused["error"]["code"].as_str();
                assert!(
                    matches!(code, Some("insufficient_quota" | "max_cost_too_low")),
                    "{refused}"
                );
                got.refused += 1;
                tokio::time::sleep(Duration::from_millis(random.random_range(5..50))).await;
            }
            Ok(read) if read.usage.is_null() => {
                got.left.push((read.id, read.text.len() as i128));
            }
            Ok(read) => got.whole.push(whole(&mut got.causes, read, cap)),
        }
        if over.load(Ordering::Acquire) {
            return got;
        }
    }
}

/// What is delivered is what is charged, and no more than the cap.
fn whole(causes: &mut Vec<Value>, read: Read, cap: Option<i128>) -> (String, i128) {
    let cost = usd::parse(read.usage["cost"].as_str().expect("a decimal")).expect("USD").0;
    assert_eq!(cost, INPUT + read.text.len() as i128 * OUTPUT, "{read:?}");
    assert!(cap.is_none_or(|cap| cost <= cap), "over {cap:?}: {read:?}");
    causes.push(read.cause);
    (read.id, cost)
}

/// Looks at all budgets until `over`: how often.
fn watch(mut db: Sqlite, over: Arc<AtomicBool>) -> std::thread::JoinHandle<usize> {
    std::thread::spawn(move || {
        let sql = "SELECT window_total.scope, start_s, posted, held, limit_nano FROM window_total
            JOIN budget ON budget.scope = window_total.scope AND budget.span = window_total.span
            WHERE posted + held > limit_nano";
        let mut looks = 0;
        while !over.load(Ordering::Acquire) {
            assert_eq!(db.query(sql, &[]).expect("reads"), [], "over the limit");
            looks += 1;
            std::thread::sleep(Duration::from_millis(3));
        }
        looks
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_budget_is_passed_while_an_hour_ends_under_load() {
    let streams = std::env::var("CANDELA_LOAD_STREAMS").ok().and_then(|text| text.parse().ok());
    let streams: usize = streams.unwrap_or(STREAMS);
    let dir = tempfile::tempdir().expect("a directory");
    let (shim, offset) = (compile("clock", dir.path()), dir.path().join("offset"));
    std::fs::write(&offset, 0i64.to_ne_bytes()).expect("writes");
    let more = [("LD_PRELOAD", shim.as_os_str()), ("CLOCK_OFFSET", offset.as_os_str())];
    let seats = ["--max-num-seqs", "128", "--waiting-requests-max", "2000"];
    let mut shop = Shop::open_with(&seats, &more);
    // For each client, who asks for about 130,000 at a time. The last is never reached.
    for (scope, span, limit) in [
        ("key:k0", Span::Hour, 60_000),
        ("tenant:red", Span::Hour, 110_000),
        ("global", Span::Day, 200_000),
        ("org:acme", Span::Total, 1 << 40),
    ] {
        shop.world.budget(scope, span, "UTC", limit * streams as i128);
    }
    let db = Sqlite::open_existing(&file_in(shop.world.dir.path()), Clock::system());
    let over = Arc::new(AtomicBool::new(false));
    let watched = watch(db.expect("opens"), over.clone());
    let clients = (0..streams as u64).map(|seed| client(&shop, seed, &over));
    let (got, ()) = tokio::join!(
        futures_util::future::join_all(clients),
        rolls(&shop, streams, &offset, &over)
    );
    let looks = watched.join().expect("sees nothing wrong");
    let start = Instant::now();
    while shop.world.number("SELECT COUNT(*) FROM request WHERE state = 'open'") > 0 {
        assert!(start.elapsed() < DEADLINE, "a request of a client that left stays open");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    shop.settled();
    account(&mut shop, &got, looks);
}

/// Ends the hour once a budget is used up in it, and the load once money was spent in the next.
async fn rolls(shop: &Shop, streams: usize, offset: &Path, over: &AtomicBool) {
    let file = file_in(shop.world.dir.path());
    let mut db = Sqlite::open_existing(&file, Clock::system()).expect("opens");
    let mut reach = async |sql, least: usize| {
        let start = Instant::now();
        while (db.query(sql, &[]).expect("reads")[0].int(0).expect("a number") as usize) < least {
            assert!(start.elapsed() < DEADLINE, "never {least}: {sql}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    reach("SELECT COUNT(*) FROM request WHERE state = 'done'", streams / 2).await;
    reach("SELECT COUNT(*) FROM request WHERE end_cause = 'budget'", 1).await;
    // Bit 62: it turned something away.
    reach("SELECT COUNT(*) FROM window_total WHERE fired >= 4611686018427387904", 1).await;
    std::fs::write(offset, 3600i64.to_ne_bytes()).expect("writes");
    let windows = "SELECT COUNT(*) FROM window_total WHERE scope = 'tenant:red' AND posted > 0";
    reach(windows, 2).await;
    let answers_after = "SELECT COUNT(*) FROM request WHERE state = 'done'
        AND closed_ns >= 1000000000 * (SELECT MAX(start_s) FROM window_total WHERE span = 'hour')";
    reach(answers_after, streams / 4).await;
    over.store(true, Ordering::Release);
}

/// Spend is the sum of rows is tokens times price, and what every client was told.
fn account(shop: &mut Shop, got: &[Got], looks: usize) {
    for (id, cost) in got.iter().flat_map(|one| &one.whole) {
        assert_eq!(i128::from(shop.world.request(id).int(0).expect("posted")), *cost, "{id}");
    }
    for (id, read) in got.iter().flat_map(|one| &one.left) {
        let output = shop.world.request(id).int(2).expect("output");
        assert!(i128::from(output) >= *read, "{id}: {read} read, {output} charged");
    }
    let mut number = |sql| i128::from(shop.world.number(sql));
    let spent = number("SELECT posted FROM window_total WHERE scope = 'org:acme'");
    assert_eq!(spent, number("SELECT CAST(SUM(posted) AS BIGINT) FROM request"));
    let input = number("SELECT CAST(SUM(uncached_input) AS BIGINT) FROM request");
    let output = number("SELECT CAST(SUM(output) AS BIGINT) FROM request");
    assert_eq!(spent, input * INPUT / 11 + output * OUTPUT);
    let (whole, left, refused) = got.iter().fold((0, 0, 0), |(whole, left, refused), one| {
        (whole + one.whole.len(), left + one.left.len(), refused + one.refused)
    });
    println!("{whole} whole answers, {left} left, {refused} refused, {spent} spent, {looks} looks");
    assert!(left > 0 && refused > 0 && looks > 100);
    for cause in [json!("budget"), json!("cost_cap"), Value::Null] {
        assert!(got.iter().any(|one| one.causes.contains(&cause)), "nothing ended by {cause}");
    }
}
