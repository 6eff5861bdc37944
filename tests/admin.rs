//! Operators' side: REST and the command line on a running server, roles, secrets, usage.

mod common;

use std::{
    path::Path,
    process::{Command, Output},
    time::{Duration, Instant},
};

use candela::{
    admin::{ROUTES, Verb},
    ledger::book::{Role, key_hash},
};
use common::server::{DEADLINE, Server};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

/// Runs the program on a data directory, with nothing of this test's environment.
fn run(dir: &Path, variables: &[(&str, &str)], line: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_candela"))
        .args(line)
        .current_dir(dir)
        .env_clear()
        .env("HOME", dir)
        .env("USER", "ada")
        .env("CANDELA_DATA_DIR", dir)
        .envs(variables.iter().copied())
        .output()
        .expect("runs")
}

/// What a command that succeeds prints.
fn says(dir: &Path, line: &[&str]) -> String {
    let out = run(dir, &[], line);
    let text = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    assert!(out.status.success(), "{line:?}: {text} {}", String::from_utf8_lossy(&out.stderr));
    text
}

fn json_of(dir: &Path, line: &[&str]) -> Value {
    let text = says(dir, &[line, &["--json"]].concat());
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{line:?}: {error} in {text}"))
}

/// Asserts that a command fails, with all of `parts` in what it says.
fn refuses(dir: &Path, line: &[&str], parts: &[&str]) {
    let out = run(dir, &[], line);
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    assert!(matches!(out.status.code(), Some(1 | 2)), "{line:?}: {text}");
    for part in parts {
        assert!(text.contains(part), "{line:?} lacks {part:?}: {text}");
    }
}

async fn call(
    server: &Server,
    key: Option<&str>,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> (StatusCode, Value) {
    let mut request = server.http.request(method, format!("{}{path}", server.url));
    if let Some(key) = key {
        request = request.bearer_auth(key);
    }
    if let Some(body) = body {
        request = request.body(body.to_string());
    }
    let response = request.send().await.expect("answers");
    let status = response.status();
    (status, response.json().await.expect("json"))
}

fn method(verb: Verb) -> Method {
    match verb {
        Verb::Get => Method::GET,
        Verb::Post => Method::POST,
        Verb::Put => Method::PUT,
        Verb::Patch => Method::PATCH,
        Verb::Delete => Method::DELETE,
    }
}

/// The status of a completion of `tokens` tokens with a key, and its answer.
async fn complete(server: &Server, key: &str, tokens: u32) -> (StatusCode, Value) {
    let body = json!({"model": "m", "prompt": "The sky is", "max_tokens": tokens,
        "temperature": 0, "ignore_eos": true, "user": "u1"});
    call(server, Some(key), Method::POST, "/v1/completions", Some(&body)).await
}

/// Keys of tenant `acme`.
struct Keys {
    tenant: String,
    operator: String,
    admin: String,
}

fn set_up(dir: &Path) -> Keys {
    says(dir, &["org", "create", "umbrella"]);
    says(dir, &["tenant", "create", "acme", "--org", "umbrella", "--name", "ACME Inc."]);
    says(dir, &["price", "set", "m", "--input", "100", "--output", "400"]);
    let key = |role: &str| {
        says(dir, &["key", "create", "--tenant", "acme", "--id", role, "--role", role])
    };
    Keys { tenant: key("tenant"), operator: key("operator"), admin: key("admin") }
}

#[tokio::test]
async fn operators_on_a_running_server() {
    let server = Server::start(&[]);
    let dir = server.data_dir();
    // Before the first key, whoever reaches the loopback address is the operator.
    let (status, _) = call(&server, None, Method::GET, "/admin/v1/keys", None).await;
    assert_eq!(status, 200);
    let keys = set_up(dir);
    every_route_checks_its_role(&server, &keys).await;
    mistakes_name_their_field(&server, &keys).await;
    money_from_budget_to_refund(&server, &keys).await;
    estimates_hold_nothing(&server, &keys).await;
    keys_rotate_and_end(&server, &keys).await;
    the_command_line_over_rest(&server, &keys);
    mistakes_on_the_command_line(dir);
    the_audit_log_says_who_and_what(&server, &keys).await;
    secrets_are_nowhere(&server, &keys).await;
}

async fn every_route_checks_its_role(server: &Server, keys: &Keys) {
    let callers = [
        (None, None),
        (Some(keys.tenant.as_str()), Some(Role::Tenant)),
        (Some(keys.operator.as_str()), Some(Role::Operator)),
        (Some(keys.admin.as_str()), Some(Role::Admin)),
    ];
    // A change is seen within a second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for route in ROUTES {
        let path = route.path.replace("{id}", "no-such").replace("{scope}", "tenant:no-such");
        let path = path.replace("{span}", "day");
        for (key, role) in callers {
            // Nothing that is missing or unknown may be told to those who may not ask.
            let body = json!({"no_such_field": 1});
            let (status, answer) = call(server, key, method(route.verb), &path, Some(&body)).await;
            let expected = match role {
                None => Some(401),
                Some(role) if role < route.least => Some(403),
                Some(_) => None,
            };
            match expected {
                Some(expected) => assert_eq!(status, expected, "{} {role:?} {answer}", route.name),
                None => assert!(
                    [200, 400, 404].contains(&status.as_u16()),
                    "{} {role:?} {status} {answer}",
                    route.name
                ),
            }
        }
    }
    let upper = keys.admin.to_uppercase();
    for key in [upper.as_str(), &keys.admin[..60], &format!("{}0", keys.admin), "", "cnd-"] {
        let (status, answer) = call(server, Some(key), Method::GET, "/admin/v1/keys", None).await;
        assert_eq!(status, 401, "{answer}");
    }
}

async fn mistakes_name_their_field(server: &Server, keys: &Keys) {
    let check = async |method: Method, path: &str, body: Value, status: u16, param: &str| {
        let (found, answer) = call(server, Some(&keys.admin), method, path, Some(&body)).await;
        assert_eq!(found, status, "{path} {body} {answer}");
        assert_eq!(answer["error"]["param"], param, "{path} {body} {answer}");
        assert_eq!(answer["error"]["type"], "invalid_request_error", "{path} {body}");
    };
    let (post, put) = (Method::POST, Method::PUT);
    let orgs = "/admin/v1/orgs";
    check(post.clone(), orgs, json!({}), 400, "id").await;
    check(post.clone(), orgs, json!({"id": null}), 400, "id").await;
    check(post.clone(), orgs, json!({"id": "A"}), 400, "id").await;
    check(post.clone(), orgs, json!({"id": "a".repeat(65)}), 400, "id").await;
    check(post.clone(), orgs, json!({"id": "a", "nmae": "x"}), 400, "nmae").await;
    check(post.clone(), orgs, json!({"id": "a", "name": "x\ny"}), 400, "name").await;
    check(post.clone(), orgs, json!({"id": "umbrella"}), 409, "id").await;
    let tenants = "/admin/v1/tenants";
    check(post.clone(), tenants, json!({"id": "x", "org": "nobody"}), 404, "org").await;
    check(post.clone(), tenants, json!({"id": "acme"}), 409, "id").await;
    check(post.clone(), tenants, json!({"id": "x", "max_cost_usd": 1}), 400, "max_cost_usd").await;
    check(post.clone(), tenants, json!({"id": "x", "models": "m"}), 400, "models").await;
    check(
        post.clone(),
        tenants,
        json!({"id": "x", "soft_landing_percent": 101}),
        400,
        "soft_landing_percent",
    )
    .await;
    let create = "/admin/v1/keys";
    check(post.clone(), create, json!({"tenant": "nobody"}), 404, "tenant").await;
    check(post.clone(), create, json!({"tenant": "acme", "role": "root"}), 400, "role").await;
    check(post.clone(), create, json!({"tenant": "acme", "id": "admin"}), 409, "id").await;
    check(post.clone(), create, json!({"tenant": "acme", "expires_at": 1}), 400, "expires_at")
        .await;
    check(post.clone(), create, json!({"tenant": "acme", "secret": "mine"}), 400, "secret").await;
    check(post.clone(), "/admin/v1/keys/nobody/revoke", json!({}), 404, "id").await;
    check(post.clone(), "/admin/v1/keys/admin/rotate", json!({"overlap_s": -1}), 400, "overlap_s")
        .await;
    check(post.clone(), "/admin/v1/keys/admin/rotate", json!({"id": "x"}), 400, "id").await;
    let budget = |scope: &str, span: &str, limit: &str| json!({"scope": scope, "span": span, "limit_usd": limit});
    let budgets = "/admin/v1/budgets";
    check(put.clone(), budgets, budget("tenant:nobody", "day", "1"), 404, "scope").await;
    check(put.clone(), budgets, budget("everyone", "day", "1"), 400, "scope").await;
    check(put.clone(), budgets, budget("global", "year", "1"), 400, "span").await;
    check(put.clone(), budgets, budget("global", "day", "-1"), 400, "limit_usd").await;
    check(put.clone(), budgets, budget("global", "day", "1e9"), 400, "limit_usd").await;
    let with = |field: &str, value: Value| {
        let mut body = budget("global", "day", "1");
        body[field] = value;
        body
    };
    check(put.clone(), budgets, with("zone", json!("Mars/Olympus")), 400, "zone").await;
    check(put.clone(), budgets, with("soft_percent", json!([0])), 400, "soft_percent").await;
    check(put.clone(), budgets, with("soft_percent", json!(vec![1; 63])), 400, "soft_percent")
        .await;
    check(Method::DELETE, "/admin/v1/budgets/global/day", json!({}), 404, "span").await;
    let limits = "/admin/v1/limits";
    check(
        put,
        limits,
        json!({"scope": "global", "tokens_per_minute": -1}),
        400,
        "tokens_per_minute",
    )
    .await;
    let price = |field: &str, value: &str| {
        let mut price = json!({"model": "m", "input_usd": "1", "output_usd": "1"});
        price[field] = value.into();
        price
    };
    let prices = "/admin/v1/prices";
    check(post.clone(), prices, json!({"model": "m", "input_usd": "1"}), 400, "output_usd").await;
    check(post.clone(), prices, json!({"model": "m", "output_usd": "1"}), 400, "input_usd").await;
    check(post.clone(), prices, price("cached_input_usd", "2"), 400, "cached_input_usd").await;
    check(post.clone(), prices, price("billing", "device"), 400, "gpu_hour_usd").await;
    check(post.clone(), prices, price("gpu", "abacus"), 400, "gpu").await;
    check(post.clone(), prices, price("tenant", "nobody"), 404, "tenant").await;
    check(
        post.clone(),
        "/admin/v1/credits",
        json!({"tenant": "acme", "amount_usd": "0"}),
        400,
        "amount_usd",
    )
    .await;
    check(
        post.clone(),
        "/admin/v1/credits",
        json!({"tenant": "acme", "amount_usd": "1000000.1"}),
        400,
        "amount_usd",
    )
    .await;
    check(post.clone(), "/admin/v1/refunds", json!({"request": "nobody"}), 404, "request").await;
    check(post, "/admin/v1/orgs?id=x", json!({}), 400, "id").await;
    let get = async |path: &str, param: &str| check(Method::GET, path, json!({}), 400, param).await;
    get("/admin/v1/keys?limit=0", "limit").await;
    get("/admin/v1/keys?limit=x", "limit").await;
    get("/admin/v1/keys?limit=1&limit=2", "limit").await;
    get("/admin/v1/keys?colour=red", "colour").await;
    get("/admin/v1/requests?after=x", "after").await;
    get("/v1/organization/costs", "start_time").await;
    get("/v1/organization/costs?start_time=0&end_time=0", "end_time").await;
    get("/v1/organization/costs?start_time=0&bucket_width=1w", "bucket_width").await;
    get("/v1/organization/costs?start_time=0&bucket_width=1h&limit=169", "limit").await;
    get("/v1/organization/costs?start_time=0&group_by=colour", "group_by").await;
    get("/v1/organization/costs?start_time=0&page=x", "page").await;
}

async fn money_from_budget_to_refund(server: &Server, keys: &Keys) {
    let dir = server.data_dir();
    // Prices are 0.0001 and 0.0004 USD a token: 3 + 4 tokens of this prompt and answer.
    says(dir, &["budget", "set", "--tenant", "acme", "--month", "1", "--zone", "Europe/Berlin"]);
    let (status, answer) = complete(server, &keys.tenant, 4).await;
    assert_eq!(status, 200, "{answer}");
    let (input, cost) = (
        answer["usage"]["prompt_tokens"].as_u64().expect("tokens"),
        answer["usage"]["cost"].as_str().expect("a cost").to_owned(),
    );
    assert_eq!(cost, format!("0.{:04}", input + 16), "{answer}");
    let budgets = json_of(dir, &["budget", "list"]);
    assert_eq!(budgets[0]["spent_usd"], cost, "{budgets}");
    assert_eq!(budgets[0]["held_usd"], "0", "{budgets}");
    assert_eq!(budgets[0]["left_usd"], format!("0.{}", 10_000 - input - 16), "{budgets}");
    assert_eq!(budgets[0]["soft_percent"], json!([50, 80, 95]), "{budgets}");

    let usage = "/v1/organization/usage/completions?start_time=0&limit=1&bucket_width=1d";
    let (status, first) = call(server, Some(&keys.tenant), Method::GET, usage, None).await;
    assert_eq!(status, 200, "{first}");
    assert_eq!((&first["has_more"], &first["next_page"]), (&json!(true), &json!("page_1")));
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let day = now_s.expect("a time").as_secs() / 86_400 * 86_400;
    let query =
        format!("start_time={}&group_by=project_id&group_by[]=model&group_by=user", day - 86_400);
    let sum_of = async |path: &str, key: &str, query: &str| {
        let path = format!("{path}?{query}");
        let (status, answer) = call(server, Some(key), Method::GET, &path, None).await;
        assert_eq!(status, 200, "{answer}");
        let results = answer["data"].as_array().expect("buckets").iter();
        results
            .flat_map(|bucket| bucket["results"].as_array().expect("results").clone())
            .collect::<Vec<_>>()
    };
    let usage = "/v1/organization/usage/completions";
    let found = sum_of(usage, &keys.tenant, &query).await;
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0]["input_tokens"], input);
    assert_eq!(found[0]["output_tokens"], 4);
    assert_eq!(found[0]["num_model_requests"], 1);
    assert_eq!(found[0]["project_id"], "acme");
    assert_eq!(found[0]["user_id"], "u1");
    assert_eq!(found[0]["api_key_id"], Value::Null);
    let costs = "/v1/organization/costs";
    let found = sum_of(costs, &keys.operator, &query).await;
    assert_eq!(found[0]["amount"]["decimal"], cost, "{found:?}");
    assert_eq!(found[0]["amount"]["value"].to_string(), cost, "{found:?}");
    let others = format!("{query}&project_ids=other");
    assert_eq!(sum_of(usage, &keys.operator, &others).await, Vec::<Value>::new());

    // Another tenant's key sees nothing of it, whatever it asks for.
    says(dir, &["tenant", "create", "rival"]);
    let rival = says(dir, &["key", "create", "--tenant", "rival"]);
    for query in [query.as_str(), &format!("{query}&project_ids=acme")] {
        assert_eq!(sum_of(usage, &rival, query).await, Vec::<Value>::new());
        assert_eq!(sum_of(costs, &rival, query).await, Vec::<Value>::new());
    }

    let rows = says(dir, &["usage", "--jsonl"]);
    let row: Value = serde_json::from_str(&rows).expect("one line");
    assert_eq!((&row["cost_usd"], &row["tenant"]), (&json!(cost), &json!("acme")), "{row}");
    let csv = says(dir, &["usage", "--csv", "--tenant", "acme"]);
    assert_eq!(csv.lines().count(), 2, "{csv}");
    assert!(csv.starts_with("id,org,tenant,key,model,user,"), "{csv}");
    let report = says(dir, &["usage", "--by", "tenant,user"]);
    assert!(report.contains("acme") && report.contains(&cost), "{report}");
    let id = row["id"].as_str().expect("an id").to_owned();
    let story = says(dir, &["explain", &id]);
    for part in ["acme", "version", "finished", &cost, "operator:revenue", "lease"] {
        assert!(story.contains(part), "{part:?} in {story}");
    }

    let refunded = says(dir, &["refund", &id, "0.0001", "--memo", "sorry"]);
    assert!(refunded.contains("0.0001"), "{refunded}");
    let rest = json_of(dir, &["refund", &id]);
    assert_eq!(rest["amount_usd"], format!("0.{:04}", input + 15), "only what is left");
    assert_eq!(json_of(dir, &["refund", &id])["amount_usd"], "0", "and nothing after that");
    assert_eq!(sum_of(costs, &keys.operator, &query).await[0]["amount"]["decimal"], "0");
    let lines = sum_of(costs, &keys.operator, &format!("{query}&group_by=line_item")).await;
    assert_eq!(lines.len(), 2, "{lines:?}");

    // Lowered below what runs cost, a budget refuses; raised or with a credit, it lets in again.
    says(dir, &["budget", "set", "--tenant", "acme", "--month", "0.0001"]);
    assert_eq!(json_of(dir, &["budget", "list"])[0]["zone"], "Europe/Berlin", "the zone stays");
    let (status, answer) = complete(server, &keys.tenant, 4).await;
    assert_eq!(status, 429, "{answer}");
    assert_eq!(answer["error"]["type"], "insufficient_quota", "{answer}");
    assert!(says(dir, &["events"]).contains("budget_hard"));
    says(dir, &["credit", "acme", "0.5", "--memo", "prepaid"]);
    assert_eq!(complete(server, &keys.tenant, 4).await.0, 200);
    says(dir, &["budget", "delete", "--tenant", "acme", "month"]);
    assert_eq!(json_of(dir, &["budget", "list"]), json!([]));
    says(dir, &["limit", "set", "--tenant", "acme", "--requests", "0"]);
    assert_eq!(complete(server, &keys.tenant, 4).await.0, 429);
    says(dir, &["limit", "delete", "--tenant", "acme"]);
    assert_eq!(complete(server, &keys.tenant, 4).await.0, 200);
}

async fn estimates_hold_nothing(server: &Server, keys: &Keys) {
    let dir = server.data_dir();
    says(dir, &["budget", "set", "--key", "tenant", "--total", "1"]);
    let before = json_of(dir, &["budget", "list"]);
    let mut body = json!({"model": "m", "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 10, "n": 2, "temperature": 0});
    let path = "/v1/cost/estimate";
    let (status, answer) = call(server, Some(&keys.tenant), Method::POST, path, Some(&body)).await;
    assert_eq!(status, 200, "{answer}");
    let input = answer["input_tokens"].as_u64().expect("tokens");
    assert_eq!(answer["output_tokens_max"], 20);
    assert_eq!(answer["hold_usd"], format!("0.{:04}", input + 8), "{answer}");
    assert_eq!(
        answer["worst_case_usd"].as_str().map(|text| text.parse::<f64>().ok()),
        Some(Some((input + 80) as f64 / 1e4))
    );
    assert_eq!(json_of(dir, &["budget", "list"]), before);
    body["max_cost_usd"] = "0.005".into();
    let (_, capped) = call(server, Some(&keys.tenant), Method::POST, path, Some(&body)).await;
    assert_eq!(
        (&capped["worst_case_usd"], &capped["max_cost_usd"]),
        (&json!("0.005"), &json!("0.005"))
    );
    let (_, whole) =
        call(server, Some(&keys.tenant), Method::POST, "/v1/chat/completions", Some(&body)).await;
    assert_eq!(whole["usage"]["prompt_tokens"], input, "{whole}");
    body["messages"] = json!([]);
    let (status, _) = call(server, Some(&keys.tenant), Method::POST, path, Some(&body)).await;
    assert_eq!(status, 400);
    let (status, _) = call(server, None, Method::POST, path, Some(&body)).await;
    assert_eq!(status, 401);
    says(dir, &["budget", "delete", "--key", "tenant", "total"]);
}

async fn keys_rotate_and_end(server: &Server, keys: &Keys) {
    let dir = server.data_dir();
    let old = says(dir, &["key", "create", "--tenant", "acme", "--id", "ci", "--model", "m"]);
    assert_eq!(complete(server, &old, 1).await.0, 200);
    let body = json!({"new_id": "ci-2", "overlap_s": 3600});
    let path = "/admin/v1/keys/ci/rotate";
    let (status, answer) = call(server, Some(&keys.admin), Method::POST, path, Some(&body)).await;
    assert_eq!(status, 200, "{answer}");
    let new = answer["secret"].as_str().expect("a secret").to_owned();
    assert!(new.starts_with("cnd-") && new.len() == 68 && new != old, "{}", new.len());
    assert_eq!(answer["policy"]["models"], json!(["m"]), "the policy goes with it");
    assert_eq!(complete(server, &old, 1).await.0, 200, "both, while they overlap");
    assert_eq!(complete(server, &new, 1).await.0, 200);
    let (status, _) =
        call(server, Some(&keys.admin), Method::POST, "/admin/v1/keys/ci/revoke", None).await;
    assert_eq!(status, 200);
    assert_eq!(complete(server, &old, 1).await.0, 401, "at once");
    assert_eq!(complete(server, &new, 1).await.0, 200);
    refuses(dir, &["key", "rotate", "ci"], &["has ended"]);

    says(dir, &["key", "set", "ci-2", "--model", "another"]);
    assert_eq!(complete(server, &new, 1).await.0, 403);
    says(dir, &["key", "set", "ci-2", "--unset", "models", "--max-cost-usd", "0.0001"]);
    assert_eq!(complete(server, &new, 1).await.0, 400, "the cap is too low");
    let soon =
        says(dir, &["key", "create", "--tenant", "acme", "--id", "brief", "--expires", "2s"]);
    assert_eq!(complete(server, &soon, 1).await.0, 200);
    tokio::time::sleep(Duration::from_millis(2100)).await;
    assert_eq!(complete(server, &soon, 1).await.0, 401, "expired");
    let states = json_of(dir, &["key", "list", "--tenant", "acme"]);
    let state = |id: &str| {
        let keys = states.as_array().expect("keys").iter();
        keys.clone().find(|key| key["id"] == id).map(|key| key["state"].clone())
    };
    assert_eq!(state("ci"), Some("revoked".into()), "{states}");
    assert_eq!(state("brief"), Some("expired".into()), "{states}");
    assert_eq!(state("ci-2"), Some("active".into()), "{states}");
}

fn the_command_line_over_rest(server: &Server, keys: &Keys) {
    let dir = tempfile::tempdir().expect("a directory");
    let on = |key: &str, line: &[&str]| {
        let line = [line, &["--server", &server.url]].concat();
        let out = run(dir.path(), &[("CANDELA_ADMIN_KEY", key)], &line);
        let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
        (out.status.success(), text)
    };
    let check = |key: &str, line: &[&str], succeeds: bool, part: &str| {
        let (success, text) = on(key, line);
        assert!(success == succeeds && text.contains(part), "{line:?}: {text}");
        assert!(key.is_empty() || !text.contains(key), "the key is shown");
    };
    check(&keys.admin, &["tenant", "list"], true, "ACME Inc.");
    check(&keys.admin, &["tenant", "create", "remote", "--model", "m"], true, "remote");
    check(
        &keys.admin,
        &["budget", "set", "--tenant", "remote", "--day", "2"],
        true,
        "tenant:remote",
    );
    check(&keys.admin, &["budget", "delete", "--tenant", "remote", "day"], true, "gone");
    check(&keys.operator, &["usage", "--since", "2d"], true, "acme");
    check(&keys.operator, &["usage", "--csv"], true, "req-");
    check(&keys.operator, &["price", "list"], true, "in_force");
    check(&keys.operator, &["price", "history", "m"], true, "api");
    check(&keys.operator, &["tenant", "create", "x"], false, "role admin");
    check(&keys.tenant, &["budget", "list"], false, "role operator");
    check("wrong", &["budget", "list"], false, "CANDELA_ADMIN_KEY");
    check("", &["budget", "list"], false, "CANDELA_ADMIN_KEY");
    check(&keys.admin, &["explain", "a/b?c#d"], false, "no request `a/b?c#d`");
}

fn mistakes_on_the_command_line(dir: &Path) {
    refuses(dir, &["tenant", "create", "Acme"], &["id"]);
    refuses(dir, &["tenant", "create", "acme"], &["already"]);
    refuses(dir, &["tenant", "show", "nobody"], &["nobody"]);
    refuses(dir, &["key", "create"], &["--tenant"]);
    refuses(dir, &["key", "create", "--tenant", "acme", "--expires", "soon"], &["soon", "30d"]);
    refuses(dir, &["budget", "set", "--month", "1"], &["--tenant", "--global"]);
    refuses(dir, &["budget", "set", "--global"], &["--month"]);
    refuses(dir, &["budget", "set", "--global", "--tenant", "acme", "--day", "1"], &["--tenant"]);
    refuses(dir, &["budget", "set", "--global", "--day", "ten"], &["limit_usd"]);
    refuses(dir, &["price", "set", "m", "--input", "1"], &["output"]);
    refuses(dir, &["credit", "acme", "-5"], &["-5"]);
    refuses(dir, &["usage", "--by", "colour"], &["colour", "tenant"]);
    let elsewhere = tempfile::tempdir().expect("a directory");
    let path = elsewhere.path().join("typo");
    refuses(dir, &["budget", "list", "--data-dir", path.to_str().expect("text")], &["no ledger"]);
    assert!(!path.exists(), "a look makes nothing");
    let wanted = json_of(
        dir,
        &[
            "price",
            "set",
            "m",
            "--tenant",
            "acme",
            "--input",
            "1",
            "--output",
            "2",
            "--gpu-hour",
            "3.6",
            "--from",
            "1d",
        ],
    );
    assert_eq!(wanted["gpu_second_usd"], Value::Null, "a list of one: {wanted}");
    assert_eq!(wanted[0]["gpu_second_usd"], "0.001", "{wanted}");
}

async fn the_audit_log_says_who_and_what(server: &Server, keys: &Keys) {
    let rows = json_of(server.data_dir(), &["audit", "--all"]);
    let rows = rows.as_array().expect("rows");
    let find = |action: &str, target: &str| {
        let found = rows.iter().find(|row| row["action"] == action && row["target"] == target);
        found.unwrap_or_else(|| panic!("no {action} of {target}"))
    };
    let created = find("tenant.create", "tenant:acme");
    assert_eq!((&created["actor"], &created["before"]), (&json!("cli:ada"), &Value::Null));
    assert_eq!(created["after"]["name"], "ACME Inc.");
    assert_eq!(find("tenant.create", "tenant:remote")["actor"], "key:admin");
    let revoked = find("key.revoke", "key:ci");
    assert_eq!(
        (&revoked["before"]["state"], &revoked["after"]["state"]),
        (&json!("active"), &json!("revoked"))
    );
    let deleted = find("budget.delete", "budget:tenant:acme:month");
    assert_eq!(deleted["before"]["limit_usd"], "0.0001");
    assert_eq!(deleted["after"], Value::Null);
    for action in
        ["limit.set", "limit.delete", "credit.create", "price.set", "key.rotate", "key.change"]
    {
        assert!(rows.iter().any(|row| row["action"] == action), "{action}");
    }
    let page = "/admin/v1/audit?after=1&limit=2";
    let (_, page) = call(server, Some(&keys.operator), Method::GET, page, None).await;
    let ids: Vec<_> = page["data"].as_array().expect("rows").iter().map(|row| &row["id"]).collect();
    assert_eq!((ids, &page["has_more"]), (vec![&json!(2), &json!(3)], &json!(true)));
    assert!(says(server.data_dir(), &["audit", "-n", "500"]).contains("state: active -> revoked"));
}

async fn secrets_are_nowhere(server: &Server, keys: &Keys) {
    let dir = server.data_dir();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let mut shown = server.log();
    for line in [["key", "list"].as_slice(), &["audit", "--all"], &["events", "--all"]] {
        shown += &json_of(dir, line).to_string();
        shown += &says(dir, line);
    }
    let (_, one) = call(server, Some(&keys.admin), Method::GET, "/admin/v1/keys/admin", None).await;
    shown += &one.to_string();
    let files = ["ledger.sqlite", "ledger.sqlite-wal"].map(|name| std::fs::read(dir.join(name)));
    let files = files.map(|file| String::from_utf8_lossy(&file.unwrap_or_default()).into_owned());
    for secret in [&keys.tenant, &keys.operator, &keys.admin] {
        assert!(shown.len() > 10_000 && !shown.contains(secret.as_str()), "a secret is shown");
        assert!(!shown.contains(&hex(&key_hash(secret))), "a hash is shown");
        assert!(files.iter().all(|file| !file.contains(secret.as_str())), "a secret is on disk");
    }
}

#[tokio::test]
async fn a_broken_price_file_keeps_a_stale_map_silently() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("candela.toml");
    let write = |output: &str| {
        let text = format!("[[price]]\nmodel = \"m\"\ninput = \"1\"\noutput = \"{output}\"\n");
        std::fs::write(&file, text).expect("written");
    };
    write("2");
    let server = Server::start(&["--config", file.to_str().expect("text")]);
    let prices = || json_of(server.data_dir(), &["price", "history", "m"]);
    let first = prices();
    assert_eq!((&first[0]["output_usd"], &first[0]["origin"]), (&json!("2"), &json!("file")));
    let hang_up = || {
        let done = Command::new("kill").args(["-HUP", &server.id().to_string()]).status();
        assert!(done.expect("kill").success());
    };
    write("3 USD");
    hang_up();
    server.logged(&["the prices stay as they are", "line 4", "output"]).await;
    assert_eq!(prices(), first);
    std::fs::remove_file(&file).expect("removed");
    hang_up();
    server.logged(&["the prices stay as they are", "candela.toml", "No such file"]).await;
    assert_eq!(prices(), first);
    write("3");
    hang_up();
    let start = Instant::now();
    while prices()[0]["output_usd"] != "3" {
        assert!(start.elapsed() < DEADLINE, "{}", prices());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    hang_up();
    server.logged(&["prices read again", "\"set\":0"]).await;
    assert_eq!(prices().as_array().map(Vec::len), Some(2), "what is the same is not set again");
    let audit = json_of(server.data_dir(), &["audit"]);
    assert!(audit.as_array().expect("rows").iter().all(|row| row["actor"] == "file"), "{audit}");
}
