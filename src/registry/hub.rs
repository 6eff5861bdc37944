//! Hub source: the client, and single files of a manifest.

use std::{future::Future, time::Duration};

use futures_util::StreamExt;
use hf_hub::{HFClient, HFError, HFRepository, repository::RepoTypeModel};

use super::{RegistryOptions, sink::Sink};

/// Times a request is repeated that got no answer.
const ATTEMPTS: usize = 2;
/// Times a transfer is begun or continued.
pub(super) const TRANSFERS_MAX: usize = 4;
/// A hub that sends nothing for so long is given up.
pub(super) const STALL_MAX: Duration = Duration::from_secs(60);

pub(super) type Repo = HFRepository<RepoTypeModel>;

/// Streams one file into `sink`; a failure comes back as the reason to show. A broken transfer goes
/// on where it stopped; that both parts are of one file is for the manifest's checksum to say.
pub(super) fn fetch_file(
    options: &RegistryOptions,
    (org, name): (&str, &str),
    file: &str,
    revision: &str,
    sink: &mut Sink<'_>,
) -> Result<(), String> {
    let repo = client(options)?.model(org, name);
    block_on(async move {
        let mut broken = String::new();
        for _ in 0..TRANSFERS_MAX {
            match transfer(&repo, file, revision, sink).await? {
                Transfer::Whole => return Ok(()),
                Transfer::Broken(reason) => broken = reason,
            }
        }
        let (done, all) = (sink.done_bytes(), sink.stated_bytes());
        Err(format!("the connection broke after {done} of {all} bytes: {broken}"))
    })
}

enum Transfer {
    Whole,
    /// It may go on.
    Broken(String),
}

async fn transfer(
    repo: &Repo,
    file: &str,
    revision: &str,
    sink: &mut Sink<'_>,
) -> Result<Transfer, String> {
    let (from, size) = (sink.done_bytes(), sink.stated_bytes());
    let request = repo.download_file_stream().filename(file).revision(revision);
    let request = request.maybe_range((from > 0).then_some(from..size)).send();
    let answer = tokio::time::timeout(STALL_MAX, request).await.map_err(|_| stalled(STALL_MAX))?;
    let (length, mut stream) = answer.map_err(|error| reason(&error))?;
    // A server that knows no ranges sends the file from its start.
    let mut known = if length == Some(size) { from } else { 0 };
    loop {
        let chunk = match tokio::time::timeout(STALL_MAX, stream.next()).await {
            Ok(Some(Ok(chunk))) => chunk,
            Ok(Some(Err(error))) => return Ok(Transfer::Broken(reason(&error))),
            Ok(None) => break,
            Err(_) => return Ok(Transfer::Broken(stalled(STALL_MAX))),
        };
        let skipped = known.min(chunk.len() as u64);
        known -= skipped;
        sink.write(&chunk[skipped as usize..])?;
    }
    Ok(match sink.done_bytes() < size {
        true => Transfer::Broken("it ended early".to_owned()),
        false => Transfer::Whole,
    })
}

pub(super) fn stalled(limit: Duration) -> String {
    format!("nothing came for {} s", limit.as_secs())
}

pub(super) fn client(options: &RegistryOptions) -> Result<HFClient, String> {
    let mut builder = HFClient::builder()
        .cache_dir(options.cache_dir.join("hub"))
        .retry_max_attempts(ATTEMPTS)
        .user_agent(concat!("candela/", env!("CARGO_PKG_VERSION")));
    if let Some(token) = &options.hf_token {
        builder = builder.token(token);
    }
    if let Some(endpoint) = &options.hf_endpoint {
        builder = builder.endpoint(endpoint);
    }
    builder.build().map_err(|e| reason(&e))
}

/// Runs a future on a thread of its own: a caller may itself be inside a runtime, where blocking
/// on another one panics.
pub(super) fn block_on<T: Send>(
    future: impl Future<Output = Result<T, String>> + Send,
) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_all().build().map_err(|e| e.to_string())?;
            let result = runtime.block_on(future);
            // Waits for no thread that a transfer given up has left behind.
            runtime.shutdown_background();
            result
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The error with its causes, as the outermost alone seldom says why; and what to do.
pub(super) fn reason(error: &HFError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    let is_refusal = match error {
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => true,
        HFError::Http { context } => matches!(context.status.as_u16(), 401 | 403),
        _ => false,
    };
    if is_refusal {
        text += "; set HF_TOKEN to a token that may read it";
    }
    text
}
