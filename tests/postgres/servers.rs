//! Two server processes on one database, with real weights.

use std::{
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use candela::{
    clock::Clock,
    ledger::{
        Policy,
        book::transact,
        db::{Db, Postgres},
        schema::migrate,
    },
    price::usd,
    types::{NanoUsd, OrgId, TenantId},
};
use futures_util::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::common::{
    books::{INPUT_NANO, MODEL, OUTPUT_NANO, budget, price, prove, total, watch},
    postgres::Cluster,
    server::{DEADLINE, Server},
};

const TENANT: &str = "tenant:local";
const LIMIT: i128 = 1_000_000;

/// Without a key the tenant `local` pays.
fn set_up(db: &mut dyn Db) {
    migrate(db).expect("migrates");
    let done = transact(db, |book| {
        let (org, local) = (OrgId::new("local"), TenantId::new("local"));
        book.add_org(&org, "this server")?;
        book.add_tenant(&local, &org, "without a key", &Policy::default())?;
        book.set_price(&price(MODEL))?;
        book.set_budget(&budget(TENANT, LIMIT))
    });
    done.expect("sets up");
}

/// The cost of an answer, or `None` where the budget refused it.
async fn ask(server: &Server, index: u64) -> Option<i128> {
    let body = json!({"model": MODEL, "prompt": format!("Number {index} is"), "ignore_eos": true,
        "max_tokens": 8 + index % 40, "seed": index});
    let (status, answer) = server.post("/v1/completions", body).await;
    if status == 429 {
        assert_eq!(answer["error"]["code"], "insufficient_quota", "{answer}");
        return None;
    }
    assert_eq!(status, 200, "{answer}");
    let usage = &answer["usage"];
    let cost = usage["cost"].to_string();
    let cost = usd::parse(cost.trim_matches('"')).expect("an amount").0;
    let tokens = |name: &str| i128::from(usage[name].as_u64().expect("a number"));
    let expected = tokens("prompt_tokens") * INPUT_NANO + tokens("completion_tokens") * OUTPUT_NANO;
    assert_eq!(cost, expected, "{usage}");
    Some(cost)
}

fn held(db: &mut Postgres) -> i64 {
    total(db, TENANT).expect("a total").1
}

#[test]
fn two_servers_never_pass_a_budget_together() {
    let cluster = Cluster::start();
    let url = cluster.database("ledger");
    let mut db = cluster.open(&url);
    set_up(&mut db);
    let over = Arc::new(AtomicBool::new(false));
    let watched = watch(Box::new(cluster.open(&url)), TENANT, over.clone());
    let servers = [(); 2].map(|()| Server::start(&["--ledger", &url, "--threads", "1"]));
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let answers =
        runtime.block_on(join_all((0..60).map(|index| ask(&servers[index as usize % 2], index))));
    let costs: Vec<i128> = answers.iter().flatten().copied().collect();
    let (posted, left) = total(&mut db, TENANT).expect("a total");
    println!("{} answers cost {posted} of {LIMIT}, {} refused", costs.len(), 60 - costs.len());
    assert_eq!((i128::from(posted), left), (costs.iter().sum::<i128>(), 0));
    // Whether the last ones are refused or cut short depends on the machine; that it is used up does not.
    assert!(i128::from(posted) > LIMIT * 9 / 10, "{posted} of {LIMIT}");
    for server in &servers {
        assert!(!server.log().contains("pass-hidden"), "the password is logged");
    }

    // One is killed in the middle of its answers: what it held comes back.
    transact(&mut db, |book| book.set_budget(&budget(TENANT, 2 * LIMIT))).expect("a budget");
    let [living, dying] = servers;
    let request = dying.http.post(format!("{}/v1/completions", dying.url));
    let body = json!({"model": MODEL, "prompt": "Once", "max_tokens": 2000, "ignore_eos": true, "stream": true});
    runtime.block_on(async {
        let mut stream = request.body(body.to_string()).send().await.expect("answers");
        assert_eq!(stream.status(), 200);
        stream.chunk().await.expect("a chunk").expect("not over");
        drop(dying);
    });
    let killed = Instant::now();
    assert!(held(&mut db) > 0, "it dies with a hold");
    while held(&mut db) > 0 {
        assert!(killed.elapsed() < DEADLINE, "it never comes back");
        std::thread::sleep(Duration::from_millis(20));
    }
    println!("the holds of a killed server came back after {:?}", killed.elapsed());
    // Its last word may have been a second earlier than its death.
    assert!(killed.elapsed() > Duration::from_secs(7), "sooner than safe: {:?}", killed.elapsed());
    let crashed = "SELECT posted FROM request WHERE state = 'crashed'";
    assert_eq!(db.query(crashed, &[]).expect("rows").len(), 1);
    let after = runtime.block_on(ask(&living, 3));
    assert!(after.is_some(), "the other one serves on");
    over.store(true, Ordering::SeqCst);
    let (most, looks) = watched.join().expect("no panic");
    assert!(i128::from(most) <= 2 * LIMIT && looks > 100, "{most} in {looks} looks");
    assert!(NanoUsd(total(&mut db, TENANT).expect("a total").0.into()) <= NanoUsd(2 * LIMIT));
    prove(&mut db);
}

/// What operators read: each statement of usage, costs and requests, and the commands.
fn operators_read(server: &Server, runtime: &Runtime, url: &str) {
    for path in [
        "/v1/organization/usage/completions?start_time=1&bucket_width=1d&group_by=model&group_by=project_id",
        "/v1/organization/costs?start_time=1&group_by=line_item&project_ids=local",
        "/admin/v1/requests?limit=5&tenant=local",
        "/admin/v1/tenants",
        "/admin/v1/keys?tenant=local",
        "/admin/v1/prices",
        "/admin/v1/budgets",
        "/admin/v1/limits",
        "/admin/v1/events",
        "/admin/v1/audit",
    ] {
        let answer = runtime.block_on(async {
            let response = server.send(Method::GET, path, &Value::Null).await;
            (response.status(), response.text().await.expect("text"))
        });
        assert_eq!(answer.0, 200, "{path}: {}", answer.1);
    }
    for (line, part) in [
        (&["ledger", "verify"][..], "every sum holds"),
        (&["tenant", "list"], "local"),
        (&["budget", "list"], "local"),
        (&["price", "list"], MODEL),
        (&["usage"], MODEL),
    ] {
        let done = command(line, url);
        let text = String::from_utf8_lossy(&done.stdout);
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success() && text.contains(part), "{line:?}: {text} {errors}");
    }
    let done = command(&["ledger", "backup", "copy.sqlite"], url);
    let errors = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && errors.contains("pg_dump"), "{errors}");
}

fn command(line: &[&str], url: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_candela"));
    command.args(line).env("CANDELA_LEDGER", url).output().expect("runs")
}

/// A client hears 503 while the database is away, a running answer goes on, and then all is well.
#[test]
fn a_server_survives_its_database() {
    let mut cluster = Cluster::start();
    let url = cluster.database("ledger");
    let mut db = cluster.open(&url);
    set_up(&mut db);
    let server = Server::start(&["--ledger", &url]);
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let body = json!({"model": MODEL, "prompt": "Once", "max_tokens": 20, "ignore_eos": true});
    assert!(runtime.block_on(ask(&server, 1)).is_some());
    operators_read(&server, &runtime, &url);
    cluster.kill();
    let answer: Value = runtime.block_on(async {
        let (status, answer) = server.post("/v1/completions", body.clone()).await;
        assert_eq!(status, 503, "{answer}");
        answer
    });
    assert_eq!(answer["error"]["code"], "ledger_unavailable", "{answer}");
    assert!(!answer.to_string().contains("pass-hidden"), "{answer}");
    cluster.resume();
    let back = Instant::now();
    while runtime.block_on(server.post("/v1/completions", body.clone())).0 != 200 {
        assert!(back.elapsed() < DEADLINE, "it never comes back");
    }
    println!("served again {:?} after the database", back.elapsed());
    operators_read(&server, &runtime, &url);
    let mut db = Postgres::connect(&url, Clock::system()).expect("is back");
    prove(&mut db);
}
