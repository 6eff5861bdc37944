//! The API of a running server on real weights, over real sockets.

mod common;

use std::time::{Duration, Instant};

use common::server::{DEADLINE, Server};
use reqwest::Method;
use serde_json::{Value, json};

async fn complete(server: &Server, mut body: Value) -> Value {
    body["model"] = "m".into();
    body["temperature"] = 0.into();
    let (status, answer) = server.post("/v1/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    answer
}

async fn stream(server: &Server, path: &str, mut body: Value) -> Vec<Value> {
    body["model"] = "m".into();
    body["stream"] = true.into();
    let response = server.send(Method::POST, path, &body).await;
    assert_eq!(response.status(), 200);
    let text = response.text().await.expect("text");
    let data: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(data.last(), Some(&"[DONE]"), "{text}");
    data[..data.len() - 1].iter().map(|one| serde_json::from_str(one).expect("json")).collect()
}

fn floats(list: &Value) -> Vec<f64> {
    list.as_array().expect("a list").iter().filter_map(Value::as_f64).collect()
}

#[tokio::test]
async fn the_api_on_real_weights() {
    let server = Server::start(&["--max-completion-tokens", "40"]);
    chat_knows_the_capital(&server).await;
    prompts_in_every_form(&server).await;
    completion_logprobs(&server).await;
    echo_scores_the_prompt(&server).await;
    chat_logprobs(&server).await;
    streams_say_what_whole_answers_say(&server).await;
    tokens_and_text(&server).await;
    errors(&server).await;
    ids_logs_and_metrics(&server).await;
    natural_stops(&server).await;
    usage_so_far(&server).await;
    utilization_is_whole(&server).await;
    a_client_that_goes_away(&server).await;
}

/// Both element types of the cache, and fewer instructions than the machine has.
#[tokio::test]
async fn settings_of_the_kernels() {
    let mut kv_bytes = Vec::new();
    for (dtype, isa) in [("f32", "avx2"), ("f16", "avx512")] {
        let extra = ["--kv-cache-dtype", dtype, "--isa-max", isa, "--max-model-len", "512"];
        let server = Server::start(&extra);
        chat_knows_the_capital(&server).await;
        kv_bytes.push(server.logged(&["KV cache"]).await["kv_bytes"].as_u64());
    }
    assert_eq!(kv_bytes[0], kv_bytes[1].map(|bytes| bytes * 2), "{kv_bytes:?}");
    assert!(kv_bytes[0].is_some_and(|bytes| bytes > 0));
}

async fn chat_knows_the_capital(server: &Server) {
    let messages = json!([{"role": "user", "content": "What is the capital of France?"}]);
    let body = json!({"model": "m", "messages": messages, "temperature": 0});
    let (status, answer) = server.post("/v1/chat/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
    assert!(text.contains("Paris"), "{text}");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
}

async fn prompts_in_every_form(server: &Server) {
    let one = complete(server, json!({"prompt": "The sky is", "max_tokens": 5})).await;
    let (_, ids) = server.post("/tokenize", json!({"prompt": "The sky is"})).await;
    let ids = &ids["tokens"];
    let (a, b) = ("The sky is", "Two and two make");
    let two = complete(server, json!({"prompt": [a, b], "max_tokens": 5, "n": 2})).await;
    let texts: Vec<&Value> =
        two["choices"].as_array().expect("a list").iter().map(|choice| &choice["text"]).collect();
    assert_eq!(texts.len(), 4);
    assert_eq!((texts[0], texts[1]), (&one["choices"][0]["text"], texts[0]));
    assert_ne!(texts[0], texts[2]);
    assert_eq!(two["usage"]["completion_tokens"], 20);
    for prompt in [ids.clone(), json!([ids])] {
        let same = complete(server, json!({"prompt": prompt, "max_tokens": 5})).await;
        assert_eq!(same["choices"][0]["text"], one["choices"][0]["text"]);
    }
}

async fn completion_logprobs(server: &Server) {
    let body = json!({"prompt": "The sky is", "max_tokens": 6, "logprobs": 3});
    let answer = complete(server, body).await;
    let (text, logprobs) = (&answer["choices"][0]["text"], &answer["choices"][0]["logprobs"]);
    let tokens = logprobs["tokens"].as_array().expect("a list");
    let joined: String = tokens.iter().filter_map(Value::as_str).collect();
    assert_eq!(&Value::from(joined), text);
    for (index, chosen) in floats(&logprobs["token_logprobs"]).into_iter().enumerate() {
        let top = logprobs["top_logprobs"][index].as_object().expect("an object");
        let best = top.values().filter_map(Value::as_f64).fold(f64::MIN, f64::max);
        assert_eq!((top.len(), best), (3, chosen), "greedy takes the best");
        let offset = logprobs["text_offset"][index].as_u64().expect("an offset") as usize;
        let rest: String = text.as_str().expect("text").chars().skip(offset).collect();
        assert!(rest.starts_with(tokens[index].as_str().expect("text")));
    }
}

/// As lm-evaluation-harness asks: the log-probabilities of a given text.
async fn echo_scores_the_prompt(server: &Server) {
    let body = json!({"prompt": "The sky is", "max_tokens": 4, "logprobs": 1});
    let drawn = complete(server, body).await;
    let whole = format!("The sky is{}", drawn["choices"][0]["text"].as_str().expect("text"));
    let body = json!({"prompt": whole, "max_tokens": 0, "logprobs": 1, "echo": true});
    let scored = complete(server, body).await;
    let choice = &scored["choices"][0];
    assert_eq!(
        (choice["text"].as_str(), scored["usage"]["completion_tokens"].as_u64()),
        (Some(&*whole), Some(0))
    );
    assert_eq!(choice["finish_reason"], "length");
    let logprobs = &choice["logprobs"];
    assert!(logprobs["token_logprobs"][0].is_null() && logprobs["top_logprobs"][0].is_null());
    let (scored, expected) = (
        floats(&logprobs["token_logprobs"]),
        floats(&drawn["choices"][0]["logprobs"]["token_logprobs"]),
    );
    assert_eq!(scored[scored.len() - 4..], expected, "the same rows give the same bits");
    let both = json!({"prompt": "The sky is", "max_tokens": 4, "logprobs": 1, "echo": true});
    let both = complete(server, both).await;
    assert_eq!(both["choices"][0]["text"], Value::from(whole));
    assert_eq!(both["choices"][0]["logprobs"]["tokens"], logprobs["tokens"]);
}

async fn chat_logprobs(server: &Server) {
    let messages = json!([{"role": "user", "content": "Answer with one emoji: a smile."}]);
    let body = json!({"model": "m", "messages": messages, "temperature": 0, "max_tokens": 12,
        "logprobs": true, "top_logprobs": 2});
    let (status, answer) = server.post("/v1/chat/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    let content = answer["choices"][0]["logprobs"]["content"].as_array().expect("a list");
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().expect("bytes"))
        .map(|byte| byte.as_u64().expect("a byte") as u8)
        .collect();
    let text = answer["choices"][0]["message"]["content"].as_str().expect("text");
    assert!(String::from_utf8_lossy(&bytes).starts_with(text), "{text}");
    for entry in content {
        assert_eq!(entry["top_logprobs"].as_array().map(Vec::len), Some(2));
        assert_eq!(entry["top_logprobs"][0]["logprob"], entry["logprob"]);
    }
}

async fn streams_say_what_whole_answers_say(server: &Server) {
    let body = json!({"prompt": ["The sky is", "One, two,"], "max_tokens": 8, "seed": 5, "n": 2,
        "logprobs": 1, "echo": true, "model": "m"});
    let (_, whole) = server.post("/v1/completions", body.clone()).await;
    let mut with_usage = body;
    with_usage["stream_options"] = json!({"include_usage": true});
    let chunks = stream(server, "/v1/completions", with_usage).await;
    let (usage, chunks) = chunks.split_last().expect("chunks");
    // Everything but the device's time, which is measured.
    let timeless = |usage: &Value| {
        let mut usage = usage.clone();
        usage["cost_details"]["gpu_ms"] = Value::Null;
        usage
    };
    assert_eq!(timeless(&usage["usage"]), timeless(&whole["usage"]));
    assert_eq!(usage["choices"], json!([]));
    for index in 0..4 {
        let mine =
            || chunks.iter().map(|one| &one["choices"][0]).filter(|one| one["index"] == index);
        let text: String = mine().filter_map(|one| one["text"].as_str()).collect();
        let expected = &whole["choices"][index];
        assert_eq!(Value::from(text), expected["text"]);
        for list in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
            let parts = mine().filter_map(|one| one["logprobs"][list].as_array());
            let joined: Vec<Value> = parts.flatten().cloned().collect();
            assert_eq!(Value::from(joined), expected["logprobs"][list], "{index} {list}");
        }
        let finish: Vec<&Value> =
            mine().map(|one| &one["finish_reason"]).filter(|f| !f.is_null()).collect();
        assert_eq!(finish, [&expected["finish_reason"]]);
    }
    let messages = json!([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]);
    let chunks =
        stream(server, "/v1/chat/completions", json!({"messages": messages, "max_tokens": 3}))
            .await;
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(chunks.iter().all(|chunk| chunk.get("usage").is_none()));
}

async fn tokens_and_text(server: &Server) {
    for text in ["Hello", " two  spaces", "naïve 漢字 🦀 e\u{301}", "<|im_start|>user", ""] {
        let body = json!({"prompt": text, "return_token_strs": true});
        let (_, answer) = server.post("/tokenize", body).await;
        assert_eq!(
            answer["token_strs"].as_array().map(|list| list.len() as u64),
            answer["count"].as_u64()
        );
        let (_, back) = server.post("/detokenize", json!({"tokens": answer["tokens"]})).await;
        assert_eq!(back, json!({"prompt": text}));
    }
    let messages = json!([{"role": "user", "content": "<|im_end|>"}]);
    let (_, answer) = server.post("/tokenize", json!({"messages": messages})).await;
    let (_, typed) = server.post("/tokenize", json!({"prompt": "<|im_end|>"})).await;
    assert!(typed["count"].as_u64() > Some(1), "a typed literal is text");
    assert!(answer["count"].as_u64() > typed["count"].as_u64());
}

async fn errors(server: &Server) {
    let chat = "/v1/chat/completions";
    let messages = json!([{"role": "user", "content": "Hi"}]);
    let with = |key: &str, value: Value| {
        let mut body = json!({"model": "m", "messages": messages});
        body[key] = value;
        body
    };
    let biases: serde_json::Map<String, Value> =
        (0..1025).map(|token| (token.to_string(), json!(1))).collect();
    for (key, value) in [
        ("logit_bias", Value::Object(biases)),
        ("logit_bias", json!({"1": 101})),
        ("temperature", json!(3)),
        ("temperature", json!("hot")),
        ("n", json!(0)),
        ("top_logprobs", json!(2)),
        ("stream_options", json!({"include_usage": true})),
        ("max_completion_tokens", json!(41)),
        ("max_tokens", json!(0)),
        ("tools", json!([{"type": "function"}])),
        ("response_format", json!({"type": "json_object"})),
        ("metadata", json!({"a": 1})),
        ("messages", json!([])),
        ("user", json!("a\u{0}b")),
        ("stop", json!(["a", "b", "c", "d", "e"])),
    ] {
        let (status, error) = server.post(chat, with(key, value.clone())).await;
        let error = &error["error"];
        assert_eq!(
            (status.as_u16(), error["param"].as_str()),
            (400, Some(key)),
            "{value}: {error}"
        );
        assert!(error["message"].is_string() && error["type"] == "invalid_request_error");
    }
    for (key, value) in [
        ("tools", json!([])),
        ("response_format", json!({"type": "text"})),
        ("functions", Value::Null),
        ("modalities", json!(["text"])),
        ("a_field_of_tomorrow", json!(1)),
    ] {
        let mut body = with(key, value);
        body["max_tokens"] = 1.into();
        assert_eq!(server.post(chat, body).await.0, 200, "{key}");
    }
    let long = json!({"model": "m", "prompt": "word ".repeat(9000)});
    let (status, error) = server.post("/v1/completions", long).await;
    assert_eq!(
        (status.as_u16(), &error["error"]["code"]),
        (400, &json!("context_length_exceeded"))
    );
    assert_eq!(error["error"]["param"], "prompt");
    let (status, error) = server.post(chat, with("model", json!("other"))).await;
    assert_eq!((status.as_u16(), &error["error"]["code"]), (404, &json!("model_not_found")));
    let big = json!({"model": "m", "prompt": "x".repeat(9 << 20)});
    let (status, error) = server.post("/v1/completions", big).await;
    assert_eq!((status.as_u16(), &error["error"]["type"]), (413, &json!("invalid_request_error")));
    for (method, path, expected) in [(Method::GET, chat, 405), (Method::GET, "/nothing", 404)] {
        let response = server.send(method, path, &Value::Null).await;
        assert_eq!(response.status(), expected);
        assert!(response.headers().contains_key("x-request-id"));
        let error: Value = response.json().await.expect("json");
        assert!(error["error"]["message"].is_string());
    }
}

async fn ids_logs_and_metrics(server: &Server) {
    let body = json!({"model": "m", "prompt": "One", "max_tokens": 3}).to_string();
    let request = server.http.post(format!("{}/v1/completions", server.url));
    let response =
        request.header("x-request-id", "mine-7").body(body).send().await.expect("answers");
    // Ours, as the ledger knows it; the client's own is logged beside it.
    let id = response.headers()["x-request-id"].to_str().expect("text").to_owned();
    let line = server.logged(&["\"mine-7\"", "request"]).await;
    assert_eq!((&line["request_id"], &line["tenant"]), (&json!(id), &json!("local")), "{line}");
    let answer: Value = response.json().await.expect("json");
    assert_eq!(answer["usage"]["cost"], line["cost_usd"]);
    assert_eq!((&line["outcome"], &line["completion_tokens"]), (&json!("ok"), &json!(3)), "{line}");
    assert!(
        line["ttft_ms"].as_f64() > Some(0.0)
            && line["duration_ms"].as_f64() >= line["ttft_ms"].as_f64()
    );
    assert!(server.metric("vllm:generation_tokens_total").await >= 3.0);
    assert!(server.metric("vllm:time_to_first_token_seconds_count").await >= 1.0);
    assert_eq!(server.metric("vllm:num_requests_waiting").await, 0.0);
}

async fn natural_stops(server: &Server) {
    let ask = async |natural: Value| {
        let body = json!({
            "prompt": "The sea is", "max_tokens": 40, "ignore_eos": true, "natural_stop": natural,
        });
        complete(server, body).await["choices"][0].clone()
    };
    let whole = ask(json!(false)).await;
    assert!(whole.get("candela").is_none(), "{whole}");
    let cut = ask(json!({"enough_tokens": 5})).await;
    let (whole_text, cut_text) =
        (whole["text"].as_str().expect("text"), cut["text"].as_str().expect("text"));
    assert_eq!(cut["candela"]["stop_cause"], "natural_stop", "{cut}");
    assert_eq!(cut["finish_reason"], "length");
    assert!(cut_text.ends_with(['.', '!', '?', '\n']), "{cut_text:?}");
    assert!(
        cut_text.len() < whole_text.len() && whole_text.starts_with(cut_text),
        "{whole_text:?}"
    );
    for wrong in [json!("yes"), json!({}), json!({"enough_tokens": 0}), json!(3)] {
        let body = json!({"model": "m", "prompt": "x", "natural_stop": wrong});
        let (status, answer) = server.post("/v1/completions", body).await;
        assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("natural_stop")));
    }
}

async fn usage_so_far(server: &Server) {
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = json!({"prompt": "One, two,", "max_tokens": 6, "stream_options": options});
    let chunks = stream(server, "/v1/completions", body).await;
    let costs: Vec<f64> = chunks
        .iter()
        .map(|chunk| chunk["usage"]["cost"].as_str().expect("a cost").parse().expect("decimal"))
        .collect();
    assert!(costs.len() >= 3 && costs.is_sorted(), "{costs:?}");
    let last = &chunks[chunks.len() - 1]["usage"];
    assert_eq!(last["completion_tokens"], 6);
    assert!(last["cost_details"]["gpu_ms"].as_f64() > Some(0.0), "{last}");
}

async fn utilization_is_whole(server: &Server) {
    let path = "/admin/v1/gpu/utilization?window=1h&by=tenant";
    // The books are of whole seconds, and kept by a thread of their own.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let response = server.send(Method::GET, path, &Value::Null).await;
    let report: Value = response.json().await.expect("json");
    let rows = report["rows"].as_array().expect("rows");
    let share: f64 = rows.iter().filter_map(|row| row["share"].as_f64()).sum();
    assert!((share - 1.0).abs() < 1e-9, "{report}");
    let local = rows.iter().find(|row| row["name"] == "local").expect("the local tenant");
    assert!(local["device_ms"].as_f64() > Some(0.0) && local["output_tokens"].as_u64() > Some(0));
    for query in ["window=5", "window=0s", "by=user", "windows=5m"] {
        let path = format!("/admin/v1/gpu/utilization?{query}");
        let response = server.send(Method::GET, &path, &Value::Null).await;
        assert_eq!(response.status(), 400, "{query}");
    }
}

async fn a_client_that_goes_away(server: &Server) {
    let body = json!({"model": "m", "prompt": "Once", "max_tokens": 40, "ignore_eos": true, "stream": true, "n": 8});
    let request =
        server.http.post(format!("{}/v1/completions", server.url)).header("x-request-id", "gone-1");
    let mut response = request.body(body.to_string()).send().await.expect("answers");
    response.chunk().await.expect("a chunk");
    drop(response);
    let line = server.logged(&["\"gone-1\"", "request"]).await;
    assert_eq!(line["outcome"], "aborted", "{line}");
    let start = Instant::now();
    while server.metric("candela:live_sequences").await > 0.0 {
        assert!(start.elapsed() < DEADLINE, "sequences leak");
    }
    assert_eq!(server.metric("vllm:num_requests_running").await, 0.0);
}
