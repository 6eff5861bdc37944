//! `candela bench` as a process against a small server over real sockets.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::{Value, json};
use tokio::sync::mpsc;

/// Time between two tokens of the test's server.
const TOKEN: Duration = Duration::from_millis(5);
const INPUT_TOKENS: u64 = 11;

#[derive(Default)]
struct Seen {
    running: AtomicUsize,
    running_max: AtomicUsize,
    requests: AtomicUsize,
}

/// Streams `max_tokens` tokens, every event cut in two. The word `refuse` in a prompt is refused,
/// `break` breaks the stream off.
async fn answer(
    State(seen): State<Arc<Seen>>,
    headers: HeaderMap,
    Json(body): Json<Value>,
) -> Response {
    if headers.get("authorization").is_none_or(|key| key != "Bearer sk-bench-1") {
        return (StatusCode::UNAUTHORIZED, Json(json!({"error": {"message": "bad key"}})))
            .into_response();
    }
    let prompt =
        body["messages"][0]["content"].as_str().or(body["prompt"].as_str()).unwrap_or_default();
    if prompt.contains("refuse") {
        return (
            StatusCode::TOO_MANY_REQUESTS,
            Json(json!({"error": {"message": "queue is full"}})),
        )
            .into_response();
    }
    let breaks = prompt.contains("break");
    let is_chat = body["messages"].is_array();
    let tokens = body["max_tokens"].as_u64().unwrap_or(0);
    assert_eq!(
        (&body["stream"], &body["stream_options"]["include_usage"]),
        (&json!(true), &json!(true))
    );
    seen.requests.fetch_add(1, SeqCst);
    seen.running_max.fetch_max(seen.running.fetch_add(1, SeqCst) + 1, SeqCst);
    let (sender, receiver) = mpsc::channel::<Result<Bytes, std::io::Error>>(4);
    tokio::spawn(async move {
        let send = async |data: &str| {
            let event = format!("data: {data}\n\n").into_bytes();
            let (start, end) = event.split_at(event.len() / 2);
            for part in [start, end] {
                let _ = sender.send(Ok(Bytes::copy_from_slice(part))).await;
            }
        };
        for _ in 0..tokens {
            tokio::time::sleep(TOKEN).await;
            let choice =
                if is_chat { json!({"delta": {"content": "é"}}) } else { json!({"text": "é"}) };
            send(&json!({"choices": [choice]}).to_string()).await;
        }
        seen.running.fetch_sub(1, SeqCst);
        if !breaks {
            let usage = json!({"prompt_tokens": INPUT_TOKENS, "completion_tokens": tokens});
            send(&json!({"choices": [], "usage": usage}).to_string()).await;
            send("[DONE]").await;
        }
    });
    Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(receiver)).into_response()
}

async fn serve() -> (SocketAddr, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let router = Router::new()
        .route(
            "/v1/models",
            get(async || Json(json!({"data": [{"id": "first"}, {"id": "second"}]}))),
        )
        .route("/v1/chat/completions", post(answer))
        .route("/v1/completions", post(answer))
        .with_state(seen.clone());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move { axum::serve(listener, router).await });
    (address, seen)
}

/// Runs the benchmark; returns its output and its JSON.
async fn bench(address: SocketAddr, dir: &Path, key: &str, line: &[&str]) -> (Output, Value) {
    let json = dir.join("report.json");
    let mut command = Command::new(env!("CARGO_BIN_EXE_candela"));
    command
        .arg("bench")
        .args(["--url", &format!("http://{address}"), "--json"])
        .arg(&json)
        .args(line);
    command.env_clear().env("CANDELA_API_KEY", key).current_dir(dir);
    let out = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let report = fs::read_to_string(json).unwrap_or_default();
    (out, serde_json::from_str(&report).unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn measures_a_server() {
    let dir = tempfile::tempdir().unwrap();
    for endpoint in ["chat", "completions"] {
        let (address, seen) = serve().await;
        let line = [
            "--endpoint",
            endpoint,
            "--num-prompts",
            "12",
            "--concurrency",
            "3",
            "--output-len",
            "6",
            "--goodput",
            "ttft:60000",
            "e2el:60000",
        ];
        let (out, report) = bench(address, dir.path(), "sk-bench-1", &line).await;
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{endpoint}: {text}{}", String::from_utf8_lossy(&out.stderr));
        assert_eq!(report["model"], "first");
        assert_eq!((&report["completed"], &report["failed"]), (&json!(12), &json!(0)));
        assert_eq!(report["input_tokens"], json!(12 * INPUT_TOKENS));
        assert_eq!(report["output_tokens"], json!(12 * 6));
        assert_eq!(report["itl_ms"]["count"], json!(12 * 5));
        assert_eq!(report["goodput_requests_per_s"], report["request_throughput_per_s"]);
        assert_eq!(seen.requests.load(SeqCst), 12);
        assert_eq!(seen.running_max.load(SeqCst), 3, "{endpoint}: requests in flight");
        // A sleep never ends early, so that these bounds hold on the busiest machine.
        let token_ms = TOKEN.as_secs_f64() * 1e3;
        assert!(report["ttft_ms"]["p50"].as_f64().unwrap() >= token_ms, "{report}");
        assert!(report["e2el_ms"]["p50"].as_f64().unwrap() >= 6.0 * token_ms, "{report}");
        assert!(text.contains("TTFT") && text.contains("p99"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rate_spreads_the_requests() {
    let dir = tempfile::tempdir().unwrap();
    let (address, _) = serve().await;
    let line =
        ["--num-prompts", "20", "--request-rate", "40", "--burstiness", "100", "--output-len", "1"];
    let (out, report) = bench(address, dir.path(), "sk-bench-1", &line).await;
    assert!(out.status.success());
    // 19 gaps of 25 ms, steady to a tenth.
    assert!(report["duration_s"].as_f64().unwrap() > 0.4, "{report}");
    assert_eq!(report["completed"], json!(20));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_counted_and_shown() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = dir.path().join("prompts.txt");
    fs::write(&prompts, "fine\nrefuse\nbreak\n").unwrap();
    let file = prompts.to_str().unwrap();
    let (address, _) = serve().await;
    let line = ["--dataset", file, "--num-prompts", "6", "--output-len", "2"];
    let (out, report) = bench(address, dir.path(), "sk-bench-1", &line).await;
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}");
    assert_eq!((&report["completed"], &report["failed"]), (&json!(2), &json!(4)));
    assert!(text.contains("2 x HTTP 429") && text.contains("queue is full"), "{text}");
    assert!(text.contains("broke off"), "{text}");

    let (out, report) = bench(address, dir.path(), "sk-wrong-1", &["--num-prompts", "2"]).await;
    assert_eq!((out.status.code(), &report["failed"]), (Some(1), &json!(2)));
    assert!(String::from_utf8_lossy(&out.stdout).contains("2 x HTTP 401"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_command_lines_say_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.txt");
    fs::write(&empty, "\n").unwrap();
    let (address, _) = serve().await;
    let check = async |line: &[&str], part: &str| {
        let (out, _) = bench(address, dir.path(), "sk-bench-1", line).await;
        let text = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(1), "{line:?}: {text}");
        assert!(text.contains(part), "{line:?}: {text:?} lacks {part:?}");
    };
    check(&["--num-prompts", "0"], "--num-prompts").await;
    check(&["--concurrency", "0"], "--concurrency").await;
    check(&["--concurrency", "100000"], "--concurrency").await;
    check(&["--request-rate", "0"], "--request-rate").await;
    check(&["--request-rate", "nan"], "--request-rate").await;
    check(&["--burstiness", "0"], "--burstiness").await;
    check(&["--range-ratio", "1"], "--range-ratio").await;
    check(&["--goodput", "itl:3"], "--goodput").await;
    check(&["--dataset", "absent.txt"], "absent.txt").await;
    check(&["--dataset", empty.to_str().unwrap()], "no prompts").await;
    // Port 1 is reserved and nothing listens there.
    let line = ["bench", "--url", "http://127.0.0.1:1"];
    let out = Command::new(env!("CARGO_BIN_EXE_candela")).args(line).env_clear().output().unwrap();
    assert!(String::from_utf8_lossy(&out.stderr).contains("is the server running"));
}
