//! Prices by device time: no cap and no budget is passed, whatever steps take; what nobody held is
//! the operator's loss, on record.

mod common;

use std::{
    process::Command,
    time::{Duration, Instant},
};

use candela::{
    clock::Clock,
    ledger::{
        Demand, Opening,
        book::PriceSpec,
        db::{Db, Sqlite},
        rows::EndCause,
    },
    price::{Billing, Rates},
    types::NanoUsd,
};
use common::{
    books::{self, MODEL},
    server::Server,
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// Nano-USD a nanosecond would be 1e9 a second: this is a third of that, so that charges round.
const SECOND_NANO: i128 = 333_333_333;
const TOKEN_BOUND_NS: u64 = 1_000_000;
const INPUT_BOUND_NS: u64 = 20 * TOKEN_BOUND_NS;

fn by_time() -> PriceSpec {
    let rates = Rates {
        device_second: NanoUsd(SECOND_NANO),
        request: NanoUsd(1_000),
        ..books::price(MODEL).rates
    };
    PriceSpec { rates, billing: Billing::Device, ..books::price(MODEL) }
}

/// Sums of one kind of entries.
fn moved(db: &mut dyn Db, kind: &str) -> i64 {
    let sql = "SELECT CAST(COALESCE(SUM(amount), 0) AS BIGINT) FROM transfer WHERE kind = $1";
    db.query(sql, &[kind.into()]).expect("reads")[0].int(0).expect("a sum")
}

/// A request whose steps take up to three times their bound.
async fn generate(
    ledger: &candela::ledger::Ledger,
    opening: Opening,
    random: &mut StdRng,
) -> Option<(NanoUsd, EndCause)> {
    let cap = opening.cap;
    let mut lease = ledger.open(opening).await.ok()?;
    let (mut left, mut input_ns) = (random.random_range(0..200), INPUT_BOUND_NS);
    let cause = loop {
        lease.bound_device(input_ns, TOKEN_BOUND_NS);
        lease.renew(Demand { sequences: 1, in_flight: 0, left: u64::MAX });
        if let Some(cause) = lease.end(0) {
            break cause;
        }
        if left == 0 {
            break EndCause::Finished;
        }
        if lease.affordable() > 0 {
            let bound_ns = std::mem::take(&mut input_ns) + TOKEN_BOUND_NS;
            let before = lease.counted().used;
            let taken_ns = random.random_range(0..3 * bound_ns);
            let lost_ns = lease.use_device(taken_ns, bound_ns);
            let after = lease.counted().used;
            assert_eq!(after.device_ns, before.device_ns + taken_ns);
            let billed_ns = after.billable_device_ns - before.billable_device_ns;
            assert_eq!(billed_ns + lost_ns, taken_ns, "charged or lost, all of it");
            assert!(billed_ns <= bound_ns);
            // One affordable token was held for, so a step within its bound loses nothing.
            assert!(taken_ns > bound_ns || lost_ns == 0, "{taken_ns} of {bound_ns}: {lost_ns}");
            lease.use_output(1);
            left -= 1;
        }
        assert!(cap.is_none_or(|cap| lease.cost() <= cap), "over the cap");
        tokio::task::yield_now().await;
    };
    let bill = books::close(lease, cause).await.expect("a bill");
    assert!(cap.is_none_or(|cap| bill.cost <= cap), "{bill:?}");
    let rates = by_time().rates;
    assert_eq!(bill.device_cost, rates.device_cost(bill.used.device_ns), "all of it is on record");
    Some((bill.cost, cause))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn charges_stay_within_holds_caps_and_budgets() {
    let dir = tempfile::tempdir().expect("a directory");
    let open = || -> Box<dyn Db> {
        Box::new(Sqlite::open(&dir.path().join("l"), Clock::system()).expect("opens"))
    };
    let mut db = open();
    books::set_up(&mut *db, &["a", "b"]);
    books::run(&mut *db, |book| book.set_price(&by_time())).expect("a price");
    // Of tenant b everything is spent before its requests are done; a has its caps alone.
    books::limit(&mut *db, "tenant:b", 100_000_000);
    books::limit(&mut *db, "global", 100_000_000_000);
    let ledger = books::replica(open(), "one", Duration::from_secs(60));
    let mut tasks = Vec::new();
    for seed in 0..60u64 {
        let ledger = ledger.ledger.clone();
        tasks.push(tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed);
            let tenant = if seed % 2 == 0 { "a" } else { "b" };
            let cap = (random.random_range(0..4) > 0)
                .then(|| NanoUsd(random.random_range(8_000_000..60_000_000)));
            let opening = Opening {
                device_bound_ns: INPUT_BOUND_NS + TOKEN_BOUND_NS,
                cap,
                ..books::opening(tenant, &format!("r{seed}"), 100)
            };
            generate(&ledger, opening, &mut random).await
        }));
    }
    let (mut charged, mut causes) = (0, Vec::new());
    for task in tasks {
        let Some((cost, cause)) = task.await.expect("no panic") else { continue };
        charged += cost.0;
        causes.push(cause);
    }
    for cause in [EndCause::Finished, EndCause::CostCap, EndCause::Budget] {
        assert!(causes.contains(&cause), "no request ended by {cause:?}: {causes:?}");
    }
    assert_eq!(i128::from(moved(&mut *db, "charge")), charged);
    let (posted, held) = books::total(&mut *db, "tenant:b").expect("reads");
    assert!(posted <= 100_000_000 && held == 0, "{posted} {held}");
    assert!(posted > 80_000_000, "most of it is used: {posted}");
    assert!(moved(&mut *db, "writeoff") > 0, "steps took longer than their bounds");
    let sql = "SELECT debits FROM account WHERE id = 'operator:gpu_writeoff'";
    let lost = db.query(sql, &[]).expect("reads")[0].int(0).expect("a sum");
    assert_eq!(lost, moved(&mut *db, "writeoff"));
    books::prove(&mut *db);
    books::stop(ledger);
}

fn says(dir: &std::path::Path, line: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_candela"));
    let out = command.args(line).env("CANDELA_DATA_DIR", dir).output().expect("runs");
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(out.status.success(), "{line:?}: {text}");
    text
}

fn nano(text: &Value) -> i128 {
    let text = text.as_str().unwrap_or_else(|| panic!("{text} is no amount"));
    candela::price::usd::parse(text).expect("an amount").0
}

async fn get(server: &Server, path: &str) -> Value {
    server.send(Method::GET, path, &Value::Null).await.json().await.expect("json")
}

fn body(tokens: u32, cap: Option<&str>) -> Value {
    let prompt = "The history of the city begins with a river and a bridge over it. ";
    let mut body = json!({"model": "m", "prompt": prompt, "max_tokens": tokens,
        "ignore_eos": true, "temperature": 0});
    if let Some(cap) = cap {
        body["max_cost_usd"] = cap.into();
    }
    body
}

#[tokio::test]
async fn a_server_that_bills_gpu_time() {
    let server = Server::start(&[]);
    // A USD a second, so that a cost is a time.
    let price = ["price", "set", "m", "--tenant", "local", "--gpu-hour", "3600"];
    says(server.data_dir(), &[&price[..], &["--billing", "device"]].concat());
    let path = "/v1/cost/estimate";
    let (status, estimate) = server.post(path, body(2000, None)).await;
    assert_eq!(status, StatusCode::OK, "{estimate}");
    let (hold, worst) = (nano(&estimate["hold_usd"]), nano(&estimate["worst_case_usd"]));
    assert!(0 < hold && hold < worst, "{estimate}");
    let (status, refused) = server.post("/v1/completions", body(2000, Some("0.000001"))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST, "{refused}");

    let cap = usd(hold * 2);
    let (status, answer) = server.post("/v1/completions", body(2000, Some(&cap))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["choices"][0]["candela"]["stop_cause"], "cost_cap", "{answer}");
    let (cost, tokens) = (nano(&answer["usage"]["cost"]), &answer["usage"]["completion_tokens"]);
    assert!(cost <= hold * 2 && tokens.as_u64() > Some(0), "{answer}");
    let gpu_ns = answer["usage"]["cost_details"]["gpu_ms"].as_f64().expect("time") * 1e6;
    assert!(cost as f64 <= gpu_ns + 1.0, "no more than what it took: {answer}");

    // Six at once want several times the budget. The bound has moved with the steps since.
    let (_, estimate) = server.post(path, body(2000, None)).await;
    let hold = nano(&estimate["hold_usd"]);
    let limit = cost + hold * 3;
    let month = usd(limit);
    says(server.data_dir(), &["budget", "set", "--tenant", "local", "--total", &month]);
    let asked = (0..6).map(|_| server.post("/v1/completions", body(2000, None)));
    let (mut ended, mut refusals) = (Vec::new(), Vec::new());
    for (status, answer) in futures_util::future::join_all(asked).await {
        match status {
            StatusCode::OK => ended.push(answer["choices"][0]["candela"]["stop_cause"].clone()),
            _ => {
                assert_eq!(status, StatusCode::TOO_MANY_REQUESTS, "{answer}");
                refusals.push(answer["error"]["message"].to_string());
            }
        }
    }
    assert!(ended.contains(&json!("budget")), "{ended:?} {refusals:?} of {limit}, {hold} held");
    let budgets = get(&server, "/admin/v1/budgets").await;
    let spent = nano(&budgets["data"][0]["spent_usd"]);
    assert!(spent <= limit && spent > cost, "{budgets}");
    let rows = get(&server, "/admin/v1/requests").await;
    let rows = rows["data"].as_array().expect("rows");
    for row in rows {
        let (billable, taken) = (&row["billable_gpu_ns"], &row["gpu_ns"]);
        assert!(billable.as_u64() <= taken.as_u64(), "{row}");
        assert_eq!(nano(&row["cost_usd"]), i128::from(billable.as_u64().expect("time")), "{row}");
    }
    assert_eq!(rows.iter().map(|row| nano(&row["cost_usd"])).sum::<i128>(), spent);
    let lost_s = server.metric("candela:device_written_off_seconds_total").await;
    let lost_ns: u64 = rows.iter().fold(0, |sum, row| {
        sum + row["gpu_ns"].as_u64().expect("time") - row["billable_gpu_ns"].as_u64().expect("time")
    });
    assert!((lost_s - lost_ns as f64 / 1e9).abs() < 1e-6, "{lost_s} s and {lost_ns} ns");
    let begun = Instant::now();
    while server.metric("candela:live_sequences").await > 0.0 {
        assert!(begun.elapsed() < common::server::DEADLINE, "sequences leak");
    }
    assert!(says(server.data_dir(), &["ledger", "verify"]).contains("every sum holds"));
}

fn usd(nano: i128) -> String {
    candela::price::usd::format(NanoUsd(nano))
}
