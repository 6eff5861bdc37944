//! Listening, answering and stopping.

use std::{future::IntoFuture, io::ErrorKind, net::SocketAddr, pin::pin, time::Duration};

use anyhow::Context;
use axum::{Router, serve::ListenerExt};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time,
};

/// Connections the kernel keeps until they are accepted.
const BACKLOG_CONNECTIONS_MAX: i32 = 1024;
/// Unacknowledged bytes older than this close a connection: its peer is gone without a word.
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);
/// The one that stops and the one that ends at once.
const SIGNALS_MAX: usize = 2;
/// After an abort, clients get this long to read the error they were sent.
const ABORT_GRACE: Duration = Duration::from_secs(5);

/// What to do while stopping.
pub struct DrainHooks {
    /// Called once when stopping begins: not ready any more, new requests are refused.
    pub on_drain: Box<dyn Fn() + Send + Sync>,
    /// Called once when the time is over: running requests end with an error.
    pub on_abort: Box<dyn Fn() + Send + Sync>,
}

/// How serving ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Every request finished.
    Drained,
    /// Time ran out; what was left was aborted.
    Aborted,
    /// A second signal: nothing was waited for.
    AtOnce,
}

/// Listens on `address`; port 0 takes a free one.
///
/// # Errors
/// Says what to do when the port is taken or not allowed.
pub fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listen = || -> std::io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        // A restart must not wait for the last run's connections to time out.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG_CONNECTIONS_MAX)?;
        TcpListener::from_std(socket.into())
    };
    listen().map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::AddrInUse => {
                "the port is taken: stop what uses it or choose another with --port"
            }
            ErrorKind::PermissionDenied => "not allowed: choose a port from 1024 up with --port",
            ErrorKind::AddrNotAvailable => "no such address on this machine: choose another --host",
            _ => "choose another --host or --port",
        };
        anyhow::Error::new(error).context(format!("cannot listen on {address}: {advice}"))
    })
}

/// Answers with `router` until SIGTERM or SIGINT, then stops accepting and gives running requests
/// `timeout` to finish. A second signal ends it at once.
pub async fn serve_http(
    router: Router,
    listener: TcpListener,
    drain: DrainHooks,
    timeout: Duration,
) -> anyhow::Result<Stopped> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    let (sender, signals) = mpsc::channel(SIGNALS_MAX);
    let forward = tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            // Full or closed: the second signal is there already, a third changes nothing.
            let _ = sender.try_send(());
        }
    });
    let stopped = serve_until(router, listener, drain, timeout, signals).await;
    forward.abort();
    stopped
}

/// As [`serve_http`], with `signals` from elsewhere; the first stops, the second ends at once.
async fn serve_until(
    router: Router,
    listener: TcpListener,
    drain: DrainHooks,
    timeout: Duration,
    mut signals: mpsc::Receiver<()>,
) -> anyhow::Result<Stopped> {
    let (stop, mut stopping) = watch::channel(false);
    let server = axum::serve(listener.tap_io(tune), router)
        .with_graceful_shutdown(async move {
            // An error means the sender is gone, which also is the end.
            let _ = stopping.wait_for(|stop| *stop).await;
        })
        .into_future();
    let mut server = pin!(server);
    tokio::select! {
        ended = &mut server => {
            ended.context("the server ended by itself")?;
            return Ok(Stopped::Drained);
        }
        _ = signals.recv() => {}
    }
    tracing::info!(timeout_s = timeout.as_secs(), "stopping: running requests may finish");
    (drain.on_drain)();
    stop.send_replace(true);
    tokio::select! {
        ended = &mut server => {
            ended.context("while draining")?;
            return Ok(Stopped::Drained);
        }
        Some(()) = signals.recv() => return Ok(Stopped::AtOnce),
        () = time::sleep(timeout) => {}
    }
    tracing::warn!("drain timeout is over: aborting what is left");
    (drain.on_abort)();
    tokio::select! {
        ended = &mut server => ended.context("while aborting")?,
        Some(()) = signals.recv() => return Ok(Stopped::AtOnce),
        () = time::sleep(ABORT_GRACE) => {}
    }
    Ok(Stopped::Aborted)
}

/// A token is a small packet that must not wait for the next one. A connection that refuses an
/// option still works, so that is only worth a line.
fn tune(stream: &mut TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    if let Err(error) = SockRef::from(&*stream).set_tcp_user_timeout(Some(TCP_USER_TIMEOUT)) {
        tracing::debug!(%error, "TCP_USER_TIMEOUT");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    };

    use axum::routing::get;
    use tokio::sync::Notify;

    use super::*;

    /// Stops a server with one request of `request_ms` running; returns how it ended, whether the
    /// client was answered, and how often drain and abort were called. An abort ends the request.
    async fn stop(
        request_ms: u64,
        timeout_ms: u64,
        signals: usize,
    ) -> (Stopped, bool, usize, usize) {
        let (begun, abort) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let router = Router::new().route("/", {
            let (begun, abort) = (begun.clone(), abort.clone());
            get(async move || {
                begun.notify_one();
                tokio::select! {
                    () = time::sleep(Duration::from_millis(request_ms)) => "done",
                    () = abort.notified() => "aborted",
                }
            })
        });
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        let (drains, aborts) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let hooks = DrainHooks {
            on_drain: Box::new({
                let drains = drains.clone();
                move || {
                    drains.fetch_add(1, SeqCst);
                }
            }),
            on_abort: Box::new({
                let aborts = aborts.clone();
                move || {
                    aborts.fetch_add(1, SeqCst);
                    abort.notify_one();
                }
            }),
        };
        let (sender, receiver) = mpsc::channel(SIGNALS_MAX);
        let timeout = Duration::from_millis(timeout_ms);
        let server = tokio::spawn(serve_until(router, listener, hooks, timeout, receiver));
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let client = tokio::spawn(async move { http.get(&url).send().await.is_ok() });
        begun.notified().await;
        for _ in 0..signals {
            sender.send(()).await.unwrap();
        }
        let stopped = server.await.unwrap().unwrap();
        // A server that ended at once leaves its client hanging until the runtime goes.
        let answered = stopped != Stopped::AtOnce && client.await.unwrap();
        (stopped, answered, drains.load(SeqCst), aborts.load(SeqCst))
    }

    #[tokio::test]
    async fn stopping() {
        let check = async |request_ms, timeout_ms, signals, want| {
            let got = time::timeout(Duration::from_secs(20), stop(request_ms, timeout_ms, signals));
            assert_eq!(got.await.unwrap(), want, "{request_ms} ms, {timeout_ms} ms, {signals}");
        };
        check(100, 10_000, 1, (Stopped::Drained, true, 1, 0)).await;
        check(60_000, 100, 1, (Stopped::Aborted, true, 1, 1)).await;
        check(60_000, 0, 1, (Stopped::Aborted, true, 1, 1)).await;
        check(60_000, 60_000, 2, (Stopped::AtOnce, false, 1, 0)).await;
    }

    #[tokio::test]
    async fn a_taken_port_says_what_to_do() {
        let first = bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        let error = bind(first.local_addr().unwrap()).unwrap_err();
        assert!(format!("{error:#}").contains("--port"), "{error:#}");
    }
}
