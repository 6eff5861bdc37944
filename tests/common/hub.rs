//! A model hub on a local port: what hf-hub asks of one repository, and what can go wrong with it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, State},
    http::{HeaderMap, Method, StatusCode, header},
    response::{IntoResponse, Response},
    routing::any,
};
use serde_json::json;
use sha2::{Digest, Sha256};

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Bytes of a body that are sent at once.
const CHUNK_BYTES: usize = 1000;
const FLUSH: std::time::Duration = std::time::Duration::from_millis(50);

/// What befalls the next transfer of a file.
#[derive(Clone, Debug)]
pub enum Fault {
    /// The connection breaks after so many bytes.
    Cut(usize),
    /// The body is sent with this status, and is no file.
    Status(u16),
    /// Other bytes come than the hub has announced.
    Instead(Vec<u8>),
    /// The whole file comes, whatever part was asked for.
    Whole,
    /// The announcement says that there is no such file.
    Absent,
}

/// Stopped when dropped.
pub struct Hub {
    pub url: String,
    shared: Arc<Shared>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    url: String,
    files: BTreeMap<String, Vec<u8>>,
    /// Without it, nothing is given out.
    token: Option<String>,
    faults: Mutex<VecDeque<(String, Fault)>>,
    requests: Mutex<Vec<String>>,
}

impl Hub {
    /// Serves `files` as the repository `org/name`, of one commit and one branch, `main`.
    pub fn start(files: BTreeMap<String, Vec<u8>>, token: Option<&str>) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("non-blocking");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let shared = Arc::new(Shared {
            url: url.clone(),
            files,
            token: token.map(str::to_owned),
            faults: Mutex::default(),
            requests: Mutex::default(),
        });
        let router = Router::new()
            .route("/api/models/org/name/revision/{revision}", any(info))
            .route("/api/models/org/name/tree/{revision}", any(tree))
            .route("/org/name/resolve/{revision}/{*file}", any(resolve))
            .route("/blobs/{*file}", any(blob))
            .with_state(shared.clone());
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                tokio::select! {
                    result = axum::serve(listener, router) => result.expect("serves"),
                    _ = stopped => {}
                }
            });
        });
        Self { url, shared, stop: Some(stop), thread: Some(thread) }
    }

    /// Faults of the next transfers of `file`, one each.
    pub fn fail(&self, file: &str, faults: &[Fault]) {
        let faults = faults.iter().map(|fault| (file.to_owned(), fault.clone()));
        self.shared.faults.lock().expect("no panic").extend(faults);
    }

    /// Requests since the last call: method, path, range, and whether the token came with it.
    pub fn take_requests(&self) -> Vec<String> {
        assert!(self.shared.faults.lock().expect("no panic").is_empty(), "a fault did not happen");
        std::mem::take(&mut *self.shared.requests.lock().expect("no panic"))
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            thread.join().expect("no panic");
        }
    }
}

impl Shared {
    /// Notes the request; a response where it must go no further.
    fn enter(&self, method: &Method, path: &str, headers: &HeaderMap) -> Option<Response> {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let range = text(header::RANGE).map(|range| format!(" {range}")).unwrap_or_default();
        let token = text(header::AUTHORIZATION).and_then(|key| key.strip_prefix("Bearer "));
        let with =
            if token.is_some() && token == self.token.as_deref() { " with token" } else { "" };
        let line = format!("{method} {path}{range}{with}");
        self.requests.lock().expect("no panic").push(line);
        let is_refused = self.token.is_some() && token != self.token.as_deref();
        let said = [("x-error-code", "GatedRepo"), ("x-error-message", "Access is restricted.")];
        is_refused.then(|| (StatusCode::UNAUTHORIZED, said).into_response())
    }

    fn fault(&self, file: &str, is_announcement: bool) -> Option<Fault> {
        let mut faults = self.faults.lock().expect("no panic");
        let fits = |(name, fault): &(String, Fault)| {
            name == file && is_announcement == matches!(fault, Fault::Absent)
        };
        let at = faults.iter().position(fits)?;
        faults.remove(at).map(|(_, fault)| fault)
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Large files lie elsewhere, named by their SHA-256; small ones by a hash of Git's.
fn is_large(file: &str) -> bool {
    file.ends_with(".safetensors") || file.ends_with(".gguf")
}

async fn info(
    State(hub): State<Arc<Shared>>,
    method: Method,
    Path(revision): Path<String>,
    headers: HeaderMap,
) -> Response {
    if let Some(refusal) = hub.enter(&method, &format!("info {revision}"), &headers) {
        return refusal;
    }
    if ![COMMIT, "main"].contains(&revision.as_str()) {
        return (StatusCode::NOT_FOUND, [("x-error-code", "RevisionNotFound")]).into_response();
    }
    let siblings = hub.files.keys().map(|file| json!({"rfilename": file})).collect::<Vec<_>>();
    Json(json!({"id": "org/name", "sha": COMMIT, "siblings": siblings})).into_response()
}

async fn tree(
    State(hub): State<Arc<Shared>>,
    method: Method,
    Path(revision): Path<String>,
    headers: HeaderMap,
) -> Response {
    if let Some(refusal) = hub.enter(&method, &format!("tree {revision}"), &headers) {
        return refusal;
    }
    let entry = |(file, bytes): (&String, &Vec<u8>)| {
        let sha256 = sha256(bytes);
        let mut entry =
            json!({"type": "file", "oid": sha256[..40], "size": bytes.len(), "path": file});
        if is_large(file) {
            entry["lfs"] = json!({"oid": sha256, "size": bytes.len(), "pointerSize": 134});
        }
        entry
    };
    Json(hub.files.iter().map(entry).collect::<Vec<_>>()).into_response()
}

async fn resolve(
    State(hub): State<Arc<Shared>>,
    method: Method,
    Path((_, file)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Some(refusal) = hub.enter(&method, &file, &headers) {
        return refusal;
    }
    let is_absent = method == Method::HEAD && hub.fault(&file, true).is_some();
    let Some(bytes) = hub.files.get(&file).filter(|_| !is_absent) else {
        return (StatusCode::NOT_FOUND, [("x-repo-commit", COMMIT)]).into_response();
    };
    if is_large(&file) {
        let named = [
            (header::LOCATION.as_str(), format!("{}/blobs/{file}", hub.url)),
            ("x-repo-commit", COMMIT.to_owned()),
            ("x-linked-etag", format!("\"{}\"", sha256(bytes))),
            ("x-linked-size", bytes.len().to_string()),
            (header::ETAG.as_str(), format!("\"{}\"", &sha256(bytes)[..40])),
        ];
        return (StatusCode::FOUND, named).into_response();
    }
    let named = [("x-repo-commit", COMMIT), ("etag", &format!("\"{}\"", &sha256(bytes)[..40]))];
    (named, send(&hub, &method, &file, bytes, &headers)).into_response()
}

async fn blob(
    State(hub): State<Arc<Shared>>,
    method: Method,
    Path(file): Path<String>,
    headers: HeaderMap,
) -> Response {
    match hub.files.get(&file) {
        Some(bytes) => {
            hub.enter(&method, &format!("blob {file}"), &headers);
            send(&hub, &method, &file, bytes, &headers)
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}

fn send(hub: &Shared, method: &Method, file: &str, bytes: &[u8], headers: &HeaderMap) -> Response {
    let fault = if method == Method::GET { hub.fault(file, false) } else { None };
    let range = headers.get(header::RANGE).and_then(|range| {
        let (from, to) = range.to_str().ok()?.strip_prefix("bytes=")?.split_once('-')?;
        Some(from.parse().ok()?..to.parse::<usize>().ok()? + 1)
    });
    let (mut status, mut part) = match range {
        Some(range) if !matches!(fault, Some(Fault::Whole)) => {
            (StatusCode::PARTIAL_CONTENT, bytes[range].to_vec())
        }
        _ => (StatusCode::OK, bytes.to_vec()),
    };
    let mut cut = usize::MAX;
    match fault {
        Some(Fault::Cut(after)) => cut = after,
        Some(Fault::Instead(other)) => part = other,
        Some(Fault::Status(code)) => {
            status = StatusCode::from_u16(code).expect("a status");
            part = b"Access denied".to_vec();
        }
        _ => {}
    }
    let length = part.len();
    let chunks = futures_util::stream::unfold(0, move |sent| {
        let chunk = part[sent.min(part.len())..].chunks(CHUNK_BYTES).next().map(<[u8]>::to_vec);
        async move {
            let chunk = chunk?;
            let end = sent + chunk.len();
            if end > cut {
                // What came before is on its way by now.
                tokio::time::sleep(FLUSH).await;
                return Some((Err(std::io::Error::other("the cable is cut")), end));
            }
            Some((Ok(Bytes::from(chunk)), end))
        }
    });
    let body = Body::from_stream(chunks);
    let length = [(header::CONTENT_LENGTH, length.to_string())];
    (status, length, if method == Method::HEAD { Body::empty() } else { body }).into_response()
}
