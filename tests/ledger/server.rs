//! Money on the running server, over real sockets.

use std::{
    ffi::OsStr,
    time::{Duration, Instant},
};

use candela::{
    ledger::{
        EndCause, Span,
        book::{inspect, transact},
        db::Sqlite,
    },
    price::usd,
    types::{KeyId, NanoUsd},
};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};

use super::{
    common::{
        server::{DEADLINE, Server},
        tiny,
    },
    world::{World, file_in},
};

/// Eleven tokens.
pub const PROMPT: &str = "Count me up";
pub const INPUT: i128 = 11 * 150;
pub const OUTPUT: i128 = 600;

/// A server, and a second connection to its ledger.
pub struct Shop {
    pub server: Server,
    pub world: World,
}

/// What a client read of a stream.
#[derive(Debug)]
pub struct Read {
    pub id: String,
    /// One character a token.
    pub text: String,
    pub finish: Value,
    pub cause: Value,
    pub usage: Value,
}

impl Shop {
    fn open(extra: &[&str]) -> Self {
        Self::open_with(extra, &[])
    }

    /// With more in the server's environment.
    pub fn open_with(extra: &[&str], variables: &[(&str, &OsStr)]) -> Self {
        let world = World::new();
        let model = tempfile::tempdir().expect("a directory");
        tiny::write(model.path());
        let memory = ["--kv-cache-memory", "64MiB"];
        let memory = if extra.contains(&memory[0]) { &[][..] } else { &memory };
        let all = [memory, &["--threads", "1"], extra].concat();
        let server = Server::start_in(world.dir.clone(), model.path(), &all, variables);
        Self { server: server.unwrap_or_else(|log| panic!("{log}")), world }
    }

    pub fn request(&self, key: &str, path: &str, body: &Value) -> RequestBuilder {
        let mut body = body.clone();
        for (name, value) in
            [("model", json!("m")), ("ignore_eos", json!(true)), ("max_tokens", json!(20))]
        {
            if body.get(name).is_none() {
                body[name] = value;
            }
        }
        let request = self.server.http.request(Method::POST, format!("{}{path}", self.server.url));
        request.bearer_auth(key).body(body.to_string())
    }

    pub async fn complete(&self, key: &str, body: Value) -> (StatusCode, Value) {
        let response = self.request(key, "/v1/completions", &body).send().await.expect("answers");
        (response.status(), response.json().await.expect("json"))
    }

    /// Reads a stream, or as much of it as `goes_on` says after every part.
    async fn read(&self, key: &str, body: Value, goes_on: impl FnMut(&Read) -> bool) -> Read {
        let read = self.try_read(key, &body, goes_on).await;
        read.unwrap_or_else(|refused| panic!("{body}: {refused}"))
    }

    /// The same, or the refusal.
    pub async fn try_read(
        &self,
        key: &str,
        body: &Value,
        mut goes_on: impl FnMut(&Read) -> bool,
    ) -> Result<Read, Value> {
        let mut body = body.clone();
        body["stream"] = true.into();
        body["stream_options"] = json!({"include_usage": true});
        let mut response =
            self.request(key, "/v1/completions", &body).send().await.expect("answers");
        if response.status() != 200 {
            return Err(response.json().await.expect("json"));
        }
        let id = response.headers()["x-request-id"].to_str().expect("ASCII").to_owned();
        let mut read = Read {
            id,
            text: String::new(),
            finish: Value::Null,
            cause: Value::Null,
            usage: Value::Null,
        };
        let mut buffer = String::new();
        while let Some(part) = response.chunk().await.expect("a part") {
            buffer.push_str(std::str::from_utf8(&part).expect("UTF-8"));
            while let Some((event, rest)) = buffer.split_once("\n\n") {
                if let Some(data) = event.strip_prefix("data: {") {
                    read.take(&serde_json::from_str(&format!("{{{data}")).expect("json"));
                }
                buffer = rest.to_owned();
            }
            if !goes_on(&read) {
                break;
            }
        }
        Ok(read)
    }

    /// Once a request is closed: its output and why it ended. The charge is the price of what it used.
    pub async fn closed(&mut self, id: &str) -> (i128, String) {
        let start = Instant::now();
        loop {
            let row = self.world.request(id);
            if row.text(3).expect("a state") != "open" {
                let number = |index| i128::from(row.int(index).expect("a number"));
                let (posted, input, output) = (number(0), number(1), number(2));
                assert_eq!(posted, input * 150 + output * OUTPUT, "{id}");
                assert!(output == 0 || input == INPUT / 150, "{id}: {input} of the input charged");
                return (output, row.text(4).expect("a cause").to_owned());
            }
            assert!(start.elapsed() < DEADLINE, "{id} stays open");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn verify(&mut self) {
        let problems = inspect(self.world.db(), |book| book.verify()).expect("reads");
        assert!(problems.is_empty(), "{problems:#?}");
    }

    /// Nothing is open or held.
    pub fn settled(&mut self) {
        self.verify();
        let held = "SELECT CAST(COALESCE(SUM(held), 0) AS BIGINT) FROM window_total";
        for sql in [
            "SELECT COUNT(*) FROM request WHERE state = 'open'",
            "SELECT COUNT(*) FROM lease",
            held,
        ] {
            assert_eq!(self.world.number(sql), 0, "{sql}");
        }
    }
}

impl Read {
    fn take(&mut self, chunk: &Value) {
        if let Some(choice) = chunk["choices"].get(0) {
            self.text.push_str(choice["text"].as_str().expect("text"));
            if !choice["finish_reason"].is_null() {
                self.finish = choice["finish_reason"].clone();
                self.cause = choice["candela"]["stop_cause"].clone();
            }
        }
        if chunk["usage"].is_object() {
            self.usage = chunk["usage"].clone();
        }
    }
}

pub fn dollars(nano: i128) -> Value {
    usd::format(NanoUsd(nano)).into()
}

#[tokio::test]
async fn a_cap_ends_an_output_at_the_last_token_it_pays_for() {
    for depth in ["1", "2"] {
        let mut shop = Shop::open(&["--pipeline-depth", depth]);
        let cap = |tokens: i128, more: i128| dollars(INPUT + tokens * OUTPUT + more);
        for (cap, choices, tokens) in [
            (cap(1, 0), 1, 1),
            (cap(1, 599), 1, 1),
            (cap(2, 0), 1, 2),
            (cap(7, 0), 1, 7),
            (cap(7, -1), 1, 6),
            (cap(50, 1), 1, 50),
            (cap(64, 0), 1, 64),
            (cap(200, 0), 1, 200),
            (cap(3, 0), 3, 3),
            (cap(5, 0), 2, 5),
            (cap(50, 0), 4, 50),
            (cap(99, 599), 3, 99),
        ] {
            let body =
                json!({"prompt": PROMPT, "max_tokens": 400, "n": choices, "max_cost_usd": cap});
            let (status, answer) = shop.complete("k0", body.clone()).await;
            assert_eq!(status, 200, "{answer}");
            let usage = &answer["usage"];
            assert_eq!(usage["completion_tokens"], json!(tokens), "{body}: {usage}");
            assert_eq!(usage["cost"], dollars(INPUT + (tokens as i128) * OUTPUT), "{body}");
            let whole = answer["choices"].as_array().expect("a list");
            for choice in whole {
                assert_eq!(choice["finish_reason"], "length", "{choice}");
                assert_eq!(choice["candela"]["stop_cause"], "cost_cap", "{choice}");
            }
            let text: usize =
                whole.iter().map(|choice| choice["text"].as_str().expect("text").len()).sum();
            assert_eq!(text, tokens, "what is paid for is delivered");
        }
        // The lower of body and header holds, and one that pays for nothing is refused.
        let body = json!({"prompt": PROMPT, "max_cost_usd": cap(30, 0)});
        let request = shop.request("k0", "/v1/completions", &body);
        let request = request.header("x-candela-max-cost-usd", cap(4, 0).as_str().expect("text"));
        let answer: Value = request.send().await.expect("answers").json().await.expect("json");
        assert_eq!(answer["usage"]["completion_tokens"], 4);
        for cap in [cap(1, -1), json!("0"), json!("0.000000001")] {
            let (status, answer) =
                shop.complete("k0", json!({"prompt": PROMPT, "max_cost_usd": cap})).await;
            assert_eq!(
                (status.as_u16(), &answer["error"]["code"]),
                (400, &json!("max_cost_too_low")),
                "{answer}"
            );
        }
        for cap in [json!(-1), json!("a lot"), json!("0.0000000001"), json!([])] {
            let (status, _) =
                shop.complete("k0", json!({"prompt": PROMPT, "max_cost_usd": cap})).await;
            assert_eq!(status, 400, "{cap}");
        }
        shop.settled();
    }
}

#[tokio::test]
async fn many_streams_use_a_budget_to_the_last_token_and_no_further() {
    let mut shop = Shop::open(&["--max-num-seqs", "64", "--waiting-requests-max", "400"]);
    for (streams, limit) in [(40i128, 3_000_123), (150, 4_000_000)] {
        let before = i128::from(shop.world.window("tenant:red", Span::Total, "UTC").0);
        shop.world.budget("tenant:red", Span::Total, "UTC", before + limit);
        shop.world.budget("org:acme", Span::Month, "UTC", 1 << 50);
        shop.world.budget("key:k0", Span::Day, "UTC", 1 << 50);
        let streams = (0..streams).map(|index| {
            let key = if index % 2 == 0 { "k0" } else { "k1" };
            let body = json!({"prompt": PROMPT, "max_tokens": 4000});
            let shop = &shop;
            async move { shop.try_read(key, &body, |_| true).await }
        });
        let read = futures_util::future::join_all(streams).await;
        // Who comes when the others hold all of it is turned away.
        let (read, refused): (Vec<_>, Vec<_>) = read.into_iter().partition(Result::is_ok);
        let read: Vec<_> = read.into_iter().flatten().collect();
        assert!(read.len() > refused.len(), "{} were turned away", refused.len());
        for error in refused.into_iter().filter_map(Result::err) {
            assert_eq!(error["error"]["code"], "insufficient_quota");
        }
        let mut sum = 0;
        for one in &read {
            assert_eq!((&one.finish, &one.cause), (&json!("length"), &json!("budget")), "{one:?}");
            let cost = INPUT + one.text.len() as i128 * OUTPUT;
            assert_eq!(one.usage["cost"], dollars(cost), "what was delivered is charged");
            sum += cost;
        }
        assert!((0..OUTPUT).contains(&(limit - sum)), "{sum} of {limit} spent");
        shop.settled();
        let total = i128::from(shop.world.window("tenant:red", Span::Total, "UTC").0);
        assert_eq!(total - before, sum);
        // Every billable route meets the same door.
        for (path, body) in [
            ("/v1/completions", json!({"prompt": PROMPT})),
            ("/v1/completions", json!({"prompt": [PROMPT, PROMPT]})),
            ("/v1/completions", json!({"prompt": PROMPT, "n": 2, "stream": true})),
            (
                "/v1/completions",
                json!({"prompt": PROMPT, "echo": true, "logprobs": 1, "max_tokens": 0}),
            ),
        ] {
            let response = shop.request("k1", path, &body).send().await.expect("answers");
            assert_eq!(response.status(), 429, "{path} {body}");
            assert_eq!(response.headers()["x-should-retry"], "false");
            let answer: Value = response.json().await.expect("json");
            assert_eq!(answer["error"]["code"], "insufficient_quota");
        }
        shop.settled();
    }
}

/// Early close loses usage, a hold is refunded whole, generation goes on after the client left.
#[tokio::test]
async fn a_disconnect_is_charged_for_what_was_delivered() {
    let mut shop = Shop::open(&[]);
    shop.world.budget("tenant:red", Span::Total, "UTC", 1 << 50);
    let (tokens, mut delivered) = (12_000, 0);
    for leaves_after in [0, 1, 40, 700] {
        let body = json!({"prompt": PROMPT, "max_tokens": tokens});
        let read = shop.read("k0", body, |read| read.text.len() < leaves_after).await;
        let (output, cause) = shop.closed(&read.id).await;
        let seen = read.text.len() as i128;
        assert!(output >= seen && output < tokens, "{output} charged, {seen} read");
        assert_eq!(cause, EndCause::Aborted.name());
        delivered += output;
        let made = shop.server.metric("vllm:generation_tokens_total").await;
        assert_eq!(delivered, made as i128, "charged for what the engine delivered");
        shop.settled();
    }
    let total = shop.world.window("tenant:red", Span::Total, "UTC");
    let rows = shop.world.number("SELECT CAST(SUM(posted) AS BIGINT) FROM request");
    assert_eq!(total, (rows, 0));
}

#[tokio::test]
async fn an_idempotency_key_is_charged_once() {
    let mut shop = Shop::open(&[]);
    let named = |shop: &Shop, key: &str, name: &str, body: &Value| {
        shop.request(key, "/v1/completions", body).header("idempotency-key", name)
    };
    let long = json!({"prompt": PROMPT, "max_tokens": 6000});
    let mut running = {
        let body = json!({"prompt": PROMPT, "max_tokens": 6000, "stream": true});
        named(&shop, "k0", "one", &body).send().await.expect("answers")
    };
    assert_eq!(running.status(), 200);
    let id = running.headers()["x-request-id"].to_str().expect("ASCII").to_owned();
    running.chunk().await.expect("a part");
    let streamed = json!({"prompt": PROMPT, "max_tokens": 6000, "stream": true});
    for (key, body, status, code) in [
        ("k0", &streamed, 409, "idempotency_key_in_progress"),
        // Another key of the tenant shares its names.
        ("k1", &streamed, 409, "idempotency_key_in_progress"),
        ("k0", &long, 422, "idempotency_key_reused"),
    ] {
        let response = named(&shop, key, "one", body).send().await.expect("answers");
        assert_eq!(response.status().as_u16(), status, "{body}");
        // Clients of OpenAI's kind repeat a 409 unless they are told not to.
        let told = response.headers().get("x-should-retry").is_some_and(|value| value == "false");
        assert_eq!(told, status == 409, "{body}");
        let answer: Value = response.json().await.expect("json");
        assert_eq!(answer["error"]["code"], code);
    }
    let other = json!({"prompt": PROMPT, "max_tokens": 3});
    let response = named(&shop, "k2", "one", &other).send().await.expect("answers");
    assert_eq!(response.status(), 200, "another tenant's");
    drop(running);
    assert!(shop.closed(&id).await.0 > 0);
    for _ in 0..2 {
        let response = named(&shop, "k0", "one", &streamed).send().await.expect("answers");
        assert_eq!(response.status(), 409);
        assert_eq!(response.headers()["x-should-retry"], "false");
        let answer: Value = response.json().await.expect("json");
        assert_eq!(answer["error"]["code"], "idempotency_key_done");
    }
    let rows = "SELECT COUNT(*) FROM request WHERE tenant_id = 'red'";
    assert_eq!(shop.world.number(rows), 1, "one request, charged once");
    for name in ["", &"x".repeat(256)] {
        let response = named(&shop, "k0", name, &other).send().await.expect("answers");
        assert_eq!(response.status(), 400, "{name:?}");
    }
    shop.settled();
}

#[tokio::test]
async fn a_revoked_key_ends_its_running_stream() {
    let mut shop = Shop::open(&[]);
    let file = file_in(shop.world.dir.path());
    let mut db = Sqlite::open_existing(&file, shop.world.clock.clone()).expect("opens");
    let mut revoked = false;
    let body = json!({"prompt": PROMPT, "max_tokens": 14_000});
    let read = shop.read("k0", body, |read| {
        if read.text.len() > 50 && !std::mem::replace(&mut revoked, true) {
            let (known, _) = transact(&mut db, |book| {
                let at_ns = book.now_ns();
                book.revoke_key(&KeyId::new("k0"), at_ns)
            })
            .expect("commits");
            assert!(known);
        }
        true
    });
    let read = read.await;
    assert_eq!((&read.finish, &read.cause), (&json!("length"), &json!("revoked")), "{read:?}");
    let (output, cause) = shop.closed(&read.id).await;
    assert_eq!((output, &*cause), (read.text.len() as i128, "revoked"), "what was read is charged");
    let (status, _) = shop.complete("k0", json!({"prompt": PROMPT})).await;
    assert_eq!(status, 401);
    shop.settled();
}

#[tokio::test]
async fn cost_in_an_answer_is_the_row_of_the_ledger() {
    let mut shop = Shop::open(&[]);
    for (choices, tokens) in [(1, 1), (1, 33), (3, 40), (1, 500)] {
        let body = json!({"prompt": PROMPT, "max_tokens": tokens, "n": choices});
        let response = shop.request("k2", "/v1/completions", &body).send().await.expect("answers");
        let id = response.headers()["x-request-id"].to_str().expect("ASCII").to_owned();
        let answer: Value = response.json().await.expect("json");
        let row = shop.world.request(&id);
        let (posted, output) = (row.int(0).expect("posted"), row.int(2).expect("output"));
        assert_eq!(answer["usage"]["cost"], dollars(posted.into()), "durable before it is told");
        assert_eq!(answer["usage"]["completion_tokens"], output);
        assert_eq!(output, i64::from(choices * tokens));
        assert_eq!(i128::from(posted), INPUT + i128::from(output) * OUTPUT);
        assert_eq!(row.text(3).expect("a state"), "done");
    }
    let body = json!({"prompt": [PROMPT, PROMPT], "max_tokens": 5});
    let (_, answer) = shop.complete("k2", body).await;
    assert_eq!(answer["usage"]["cost"], dollars(2 * (INPUT + 5 * OUTPUT)), "one charge a prompt");
    shop.settled();
}
