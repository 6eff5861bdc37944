//! The server with clients: it dies at writes spread over its life, and at random ones under load. With
//! `CANDELA_CRASH_ROUNDS` it dies at every write of the short life, and so often under load.

use std::{ffi::OsStr, os::unix::process::ExitStatusExt, path::Path, sync::Arc};

use candela::{price::usd, types::NanoUsd};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{
    common::{server::Server, tiny},
    crash::{Delivered, MODES, OUTSTANDING, Seen, Shim, base, check, copy},
};

/// Tokens of a client's stream that may be in its send buffer, delivered and not yet read, when the
/// server dies.
const BUFFERED: u64 = 64;
/// Deaths in a short life, and under load.
const ROUNDS: [u64; 2] = [24, 8];

/// A client of the server that may die; what it saw of its request.
async fn client(server: &Server, body: Value, leaves_after: usize) -> Option<(String, Delivered)> {
    let request = server.http.post(format!("{}/v1/completions", server.url)).bearer_auth("k0");
    let mut response = request.body(body.to_string()).send().await.ok()?;
    let id = response.headers().get("x-request-id")?.to_str().ok()?.to_owned();
    let (mut text, mut delivered) = (String::new(), Delivered::default());
    while let Ok(Some(part)) = response.chunk().await {
        text.push_str(std::str::from_utf8(&part).expect("UTF-8"));
        while let Some((event, rest)) = text.split_once("\n\n") {
            if let Some(data) = event.strip_prefix("data: {") {
                let chunk: Value = serde_json::from_str(&format!("{{{data}")).expect("json");
                delivered.tokens += chunk["choices"][0]["text"].as_str().map_or(0, str::len) as u64;
                let bill =
                    chunk["usage"]["cost"].as_str().map(|cost| usd::parse(cost).expect("USD").0);
                delivered.bill = delivered.bill.or(bill);
            }
            text = rest.to_owned();
        }
        if delivered.tokens as usize >= leaves_after {
            break;
        }
    }
    Some((id, delivered))
}

/// Requests of every kind at once, then some more, until the server is dead or done with them.
async fn serve(server: &Server, clients: u64, seed: u64) -> Seen {
    let mut random = StdRng::seed_from_u64(seed);
    let mut seen = Seen::new();
    for _ in 0..2 {
        let requests = (0..clients).map(|index| {
            let body = json!({
                "model": "m", "prompt": "Say it", "stream": true, "ignore_eos": true,
                "max_tokens": random.random_range(1..60), "n": 1 + index % 3 / 2,
                "stream_options": {"include_usage": true},
                "max_cost_usd": usd::format(NanoUsd(random.random_range(2_000..60_000))),
            });
            let leaves_after = if index % 4 == 3 { 5 } else { usize::MAX };
            client(server, body, leaves_after)
        });
        let requests: Vec<_> = requests.collect();
        seen.extend(futures_util::future::join_all(requests).await.into_iter().flatten());
    }
    seen
}

/// One life of the server on a copy of `base`; whether it died, and its directory.
async fn life(
    shim: &Shim,
    base: &TempDir,
    model: &Path,
    at: u64,
    mode: &str,
    clients: u64,
) -> (bool, Arc<TempDir>, Seen) {
    let dir = copy(base);
    let variables = shim.variables(at, mode);
    let variables: Vec<(&str, &OsStr)> =
        variables.iter().map(|(name, value)| (&**name, OsStr::new(value))).collect();
    let outstanding = OUTSTANDING.to_string();
    let line = [
        "--threads",
        "1",
        "--kv-cache-memory",
        "16MiB",
        "--lease-outstanding-tokens-max",
        &outstanding,
    ];
    match Server::start_in(dir.clone(), model, &line, &variables) {
        Ok(mut server) => {
            let seen = serve(&server, clients, at).await;
            // It dies while it shuts down, or lives.
            server.terminate();
            let status = server.wait();
            let killed = status.signal() == Some(libc::SIGKILL);
            assert!(killed || status.success(), "{mode} at {at}: {status} {}", server.log());
            (killed, dir, seen)
        }
        Err(log) => {
            assert!(log.contains("signal: 9"), "{mode} at {at}: {log}");
            (true, dir, Seen::new())
        }
    }
}

#[tokio::test]
async fn a_server_may_die_at_any_write() {
    let rounds = std::env::var("CANDELA_CRASH_ROUNDS").ok().and_then(|n| n.parse().ok());
    let rounds = rounds.map_or(ROUNDS, |rounds| [u64::MAX, rounds]);
    let (shim, base) = (Shim::build(), base());
    let model = tempfile::tempdir().expect("a directory");
    tiny::write(model.path());
    for (clients, name, rounds) in [(4, "short", rounds[0]), (40, "loaded", rounds[1])] {
        let (died, dir, seen) = life(&shim, &base, model.path(), 0, "kill", clients).await;
        let writes = shim.count();
        assert!(!died && writes > 100 && !seen.is_empty(), "{name}: {writes} writes, {seen:?}");
        check(dir.path(), &seen, BUFFERED, name);
        let mut random = StdRng::seed_from_u64(3);
        let (mut deaths, count) = (0, if clients == 4 { rounds.min(writes) } else { rounds });
        for round in 0..count {
            let at = match clients {
                4 => 1 + round * writes / count,
                _ => random.random_range(writes / 8..writes),
            };
            let mode = MODES[round as usize % MODES.len()];
            let (died, dir, seen) = life(&shim, &base, model.path(), at, mode, clients).await;
            deaths += u64::from(died);
            check(dir.path(), &seen, BUFFERED, &format!("{name}: {mode} at {at} of {writes}"));
        }
        println!("{name}: {writes} writes, {deaths} deaths of {count}");
        assert!(deaths > count / 2, "{name}: {deaths} deaths of {count}");
    }
}
