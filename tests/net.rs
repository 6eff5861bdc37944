//! Stopping by a real signal. Alone in its binary, as a signal is for the whole process.

use std::{net::SocketAddr, process::Command, time::Duration};

use axum::{Router, routing::get};
use candela::cli::net::{DrainHooks, Stopped, bind, serve_http};

#[tokio::test]
async fn sigterm_and_sigint_drain() {
    for name in ["TERM", "INT"] {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(async || "here"));
        let (drained, mut drains) = tokio::sync::mpsc::unbounded_channel();
        let hooks = DrainHooks {
            on_drain: Box::new(move || drained.send(()).unwrap()),
            on_abort: Box::new(|| panic!("nothing was running")),
        };
        let server = tokio::spawn(serve_http(router, listener, hooks, Duration::from_secs(60)));
        // An answer shows that the server runs, and so listens for signals.
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let answer = client.get(format!("http://{address}/")).send().await.unwrap();
        assert_eq!(answer.text().await.unwrap(), "here");

        let own = std::process::id().to_string();
        assert!(Command::new("kill").args(["-s", name, &own]).status().unwrap().success());
        let stopped = tokio::time::timeout(Duration::from_secs(20), server).await.unwrap();
        assert_eq!(stopped.unwrap().unwrap(), Stopped::Drained, "{name}");
        assert_eq!(drains.recv().await, Some(()));
        assert!(std::net::TcpStream::connect(address).is_err(), "{name}: still accepting");
    }
}
