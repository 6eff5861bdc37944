//! Two hundred clients of mixed lengths, a third of which leave midway, for two minutes
//! (`CANDELA_SOAK_SECONDS` changes that): nothing leaks, and every answer is what a request alone
//! would get.

mod common;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use common::server::{DEADLINE, Server};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};

const CLIENTS: u64 = 200;
const SECONDS: u64 = 120;
/// What memory may grow from the first quarter to the end.
const GROWTH_BYTES_MAX: u64 = 48 << 20;

/// Requests that differ in length, sampling and choices.
fn bodies() -> Vec<Value> {
    let subjects = ["the sea", "a small red fox", "trains", "old maps", "bread", "winter"];
    let body = |index: usize| {
        let subject = subjects[index % subjects.len()];
        json!({
            "model": "m", "prompt": format!("{}A text about {subject}:", "Words. ".repeat(index * index / 2)),
            "max_tokens": 2 + index * 2, "seed": index, "n": 1 + index % 3 / 2, "stream": true,
            "temperature": if index.is_multiple_of(2) { 0.0 } else { 1.0 }, "ignore_eos": index.is_multiple_of(4),
        })
    };
    (0..12).map(body).collect()
}

/// The text of every choice; `None` when the client left after `leave_after` parts.
async fn ask(server: &Server, body: &Value, leave_after: Option<usize>) -> Option<Vec<String>> {
    let request = server.http.post(format!("{}/v1/completions", server.url));
    let mut response = request.body(body.to_string()).send().await.expect("answers");
    assert_eq!(response.status(), 200);
    let (mut text, mut parts) = (Vec::new(), 0);
    while let Some(part) = response.chunk().await.expect("a part") {
        text.extend_from_slice(&part);
        parts += 1;
        if leave_after.is_some_and(|after| parts >= after) {
            return None;
        }
    }
    let text = String::from_utf8(text).expect("UTF-8");
    assert!(text.ends_with("data: [DONE]\n\n"), "{text}");
    let mut choices = vec![String::new(); body["n"].as_u64().expect("n") as usize];
    for data in text.lines().filter_map(|line| line.strip_prefix("data: {")) {
        let chunk: Value = serde_json::from_str(&format!("{{{data}")).expect("json");
        let choice = &chunk["choices"][0];
        let index = choice["index"].as_u64().expect("an index") as usize;
        choices[index].push_str(choice["text"].as_str().expect("text"));
    }
    Some(choices)
}

fn resident_bytes(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.id())).expect("there");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_leaks_and_nobody_gets_anything_else() {
    let seconds = std::env::var("CANDELA_SOAK_SECONDS").ok().and_then(|text| text.parse().ok());
    let time = Duration::from_secs(seconds.unwrap_or(SECONDS));
    let server =
        Arc::new(Server::start(&["--waiting-requests-max", "400", "--kv-cache-memory", "256MiB"]));
    let mut alone = Vec::new();
    for body in bodies() {
        let texts = ask(&server, &body, None).await.expect("whole");
        alone.push((body, texts));
    }
    let alone = Arc::new(alone);
    let start = Instant::now();
    let clients = (0..CLIENTS).map(|seed| {
        let (server, alone) = (server.clone(), alone.clone());
        tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(seed);
            let (mut whole, mut left) = (0u64, 0u64);
            while start.elapsed() < time {
                let (body, texts) = &alone[random.random_range(0..alone.len())];
                let leave_after = random.random_ratio(1, 3).then(|| random.random_range(1..4));
                match ask(&server, body, leave_after).await {
                    Some(answer) => {
                        assert_eq!(&answer, texts, "{body}");
                        whole += 1;
                    }
                    None => left += 1,
                }
            }
            (whole, left)
        })
    });
    let clients: Vec<_> = clients.collect();
    tokio::time::sleep(time / 4).await;
    let early_bytes = resident_bytes(&server);
    let (mut whole, mut left) = (0, 0);
    for client in clients {
        let counts = client.await.expect("no client fails");
        whole += counts.0;
        left += counts.1;
    }
    let late_bytes = resident_bytes(&server);
    println!("{whole} answers, {left} left midway, {early_bytes} then {late_bytes} bytes resident");
    assert!(whole > CLIENTS / 2 && left > CLIENTS / 4, "{whole} whole, {left} left");
    assert!(late_bytes < early_bytes + GROWTH_BYTES_MAX, "{early_bytes} grew to {late_bytes}");
    for name in ["candela:live_sequences", "candela:kv_blocks_used", "vllm:num_requests_waiting"] {
        let start = Instant::now();
        while server.metric(name).await > 0.0 {
            assert!(start.elapsed() < DEADLINE, "{name} stays above zero");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    // Idle connections of the client's pool have a task each; nothing else may be left.
    let tasks = server.metric("candela:async_tasks").await;
    assert!(tasks <= CLIENTS as f64 + 16.0, "{tasks} tasks");
}
