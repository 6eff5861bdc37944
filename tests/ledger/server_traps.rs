//! What went wrong elsewhere in servers that charge, by name, on the running one.

use std::time::{Duration, Instant};

use candela::ledger::Span;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{
    common::server::DEADLINE,
    server::{INPUT, OUTPUT, PROMPT, Shop, dollars},
};

/// Routes that take a body and cost nothing. A new one is written here, or has to meet the budget.
const FREE: [&str; 3] = ["/tokenize", "/detokenize", "/v1/cost/estimate"];

#[tokio::test]
async fn some_routes_skip_the_budget() {
    let mut shop = Shop::open_with(&[], &[]);
    shop.world.budget("tenant:red", Span::Total, "UTC", 0);
    let document = shop.server.send(Method::GET, "/openapi.json", &Value::Null).await;
    let document: Value = document.json().await.expect("json");
    let paths = document["paths"].as_object().expect("paths");
    let billable = paths.iter().filter(|(path, route)| {
        let free = FREE.contains(&path.as_str()) || path.starts_with("/admin/");
        route.get("post").is_some() && !free
    });
    let mut routes = 0;
    for (path, _) in billable {
        routes += 1;
        let body = json!({
            "prompt": PROMPT, "messages": [{"role": "user", "content": PROMPT}], "input": PROMPT,
        });
        let keys: &[&str] = match path.as_str() {
            "/v1/completions" => &["prompt"],
            "/v1/chat/completions" => &["messages"],
            _ => &["prompt", "messages", "input"],
        };
        for stream in [false, true] {
            let mut asked = json!({"stream": stream});
            keys.iter().for_each(|key| asked[key] = body[key].clone());
            let response = shop.request("k0", path, &asked).send().await.expect("answers");
            let status = response.status();
            let answer: Value = response.json().await.expect("json");
            assert_eq!(status, 429, "{path}: {answer}");
            assert_eq!(answer["error"]["code"], "insufficient_quota", "{path}: {answer}");
        }
    }
    assert!(routes >= 2, "{paths:?}");
    assert_eq!(shop.world.number("SELECT COUNT(*) FROM request"), 0);
}

/// Without a `max_tokens` the hold is for what is sure, and the budget alone says where it ends.
#[tokio::test]
async fn a_missing_max_tokens_is_guessed() {
    const PAID: i128 = 37;
    for max_tokens in [Value::Null, json!(12_000)] {
        let mut shop = Shop::open_with(&[], &[]);
        shop.world.budget("tenant:red", Span::Total, "UTC", INPUT + PAID * OUTPUT + OUTPUT - 1);
        let messages = json!([{"role": "user", "content": PROMPT}]);
        let body = json!({"messages": messages, "max_tokens": max_tokens});
        let answer = shop.request("k0", "/v1/chat/completions", &body).send().await;
        let answer: Value = answer.expect("answers").json().await.expect("json");
        let usage = &answer["usage"];
        assert_eq!(
            (&usage["prompt_tokens"], &usage["completion_tokens"], &usage["cost"]),
            (&json!(11), &json!(PAID as u64), &dollars(INPUT + PAID * OUTPUT)),
            "{answer}"
        );
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "length", "{answer}");
        assert_eq!(choice["candela"]["stop_cause"], "budget", "{answer}");
        shop.settled();
    }
}

#[tokio::test]
async fn a_key_is_found_by_injection_prefix_or_case() {
    let mut shop = Shop::open_with(&[], &[]);
    let secret = "k0";
    // The right one first, so that whatever is remembered of it is there to be found.
    let (status, _) = shop.complete(secret, json!({"prompt": PROMPT, "max_tokens": 1})).await;
    assert_eq!(status, 200);
    for wrong in [
        "K0",
        "k",
        "k0k0",
        "k0 ",
        "k0\u{a0}",
        "' OR '1'='1",
        "k0' --",
        "k0'; DROP TABLE api_key; --",
        "\" OR 1=1 --",
        "%",
        "k_",
        "*",
    ] {
        let request = shop.request(secret, "/v1/completions", &json!({"prompt": PROMPT}));
        let value = [b"Bearer ", wrong.as_bytes()].concat();
        let value = reqwest::header::HeaderValue::from_bytes(&value).expect("a header");
        let mut request = request.build().expect("a request");
        request.headers_mut().insert("authorization", value);
        let response = shop.server.http.execute(request).await.expect("answers");
        let trimmed = wrong.trim_end_matches(' ') == secret;
        let expected = if trimmed { StatusCode::OK } else { StatusCode::UNAUTHORIZED };
        assert_eq!(response.status(), expected, "{wrong:?}");
        let text = response.text().await.expect("text");
        assert!(trimmed || wrong.len() < 4 || !text.contains(wrong), "the key is told: {text}");
    }
    let (status, _) = shop.complete(secret, json!({"prompt": PROMPT, "max_tokens": 1})).await;
    assert_eq!(status, 200, "the table is still there");
    shop.settled();
}

/// Too few blocks for all of them: prompts are computed again and again, and paid for once.
#[tokio::test]
async fn recomputed_tokens_are_charged_again() {
    let memory = ["--kv-cache-memory", "1MiB", "--kv-cache-dtype", "f32"];
    let mut shop = Shop::open_with(&memory, &[]);
    let streams = (0..8).map(|_| {
        let body = json!({"prompt": PROMPT, "max_tokens": 400, "n": 2});
        shop.complete("k0", body)
    });
    let answers = futures_util::future::join_all(streams).await;
    for (status, answer) in answers {
        assert_eq!(status, 200, "{answer}");
        let usage = &answer["usage"];
        assert_eq!(
            (&usage["prompt_tokens"], &usage["completion_tokens"]),
            (&json!(11), &json!(800))
        );
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 0, "recomputed is not cached");
        assert_eq!(usage["cost"], dollars(INPUT + 800 * OUTPUT));
    }
    assert!(shop.server.metric("vllm:num_preemptions_total").await > 0.0, "nothing was recomputed");
    shop.settled();
}

#[tokio::test]
async fn aborted_requests_are_missing_from_the_metrics() {
    let mut shop = Shop::open_with(&[], &[]);
    let body = json!({"prompt": PROMPT, "max_tokens": 12_000});
    let read = shop.try_read("k0", &body, |read| read.text.len() < 30).await.expect("admitted");
    let (output, cause) = shop.closed(&read.id).await;
    assert_eq!(cause, "aborted");
    let start = Instant::now();
    loop {
        let text = shop.server.send(Method::GET, "/metrics", &Value::Null).await;
        let text = text.text().await.expect("text");
        let line = text.lines().find(|line| {
            line.starts_with("vllm:request_success_total") && line.contains("\"abort\"")
        });
        if line.is_some_and(|line| line.ends_with(" 1")) {
            break;
        }
        assert!(start.elapsed() < DEADLINE, "{text}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let made = shop.server.metric("vllm:generation_tokens_total").await;
    assert_eq!(made as i128, output, "its tokens are counted, and none after it left");
    assert_eq!(shop.server.metric("vllm:prompt_tokens_total").await, 11.0);
    shop.settled();
}
