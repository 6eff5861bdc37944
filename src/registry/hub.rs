//! Hub source: single files of a manifest, or the whole of a model named `org/name`.

use std::{future::Future, path::PathBuf};

use futures_util::StreamExt;
use hf_hub::HFClient;

use super::{RegistryOptions, sink::Sink};

/// What a model directory needs; the rest of a repository stays where it is.
const WANTED: [&str; 7] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "model*.safetensors",
    "model.safetensors.index.json",
];
const ATTEMPTS: usize = 2;

/// Streams one file into `sink`; a failure comes back as the reason to show.
pub(super) fn fetch_file(
    options: &RegistryOptions,
    (org, name): (&str, &str),
    file: &str,
    revision: &str,
    sink: &mut Sink<'_>,
) -> Result<(), String> {
    let client = client(options)?;
    block_on(async move {
        let repo = client.model(org, name);
        let request = repo.download_file_stream().filename(file).revision(revision).send();
        let (_, mut stream) = request.await.map_err(|e| chain(&e))?;
        while let Some(chunk) = stream.next().await {
            sink.write(&chunk.map_err(|e| chain(&e))?)?;
        }
        Ok(())
    })
}

/// Downloads a model into the hub cache and gives its directory, named by the commit.
pub(super) fn fetch_snapshot(
    options: &RegistryOptions,
    (org, name): (&str, &str),
    revision: Option<&str>,
    offline: bool,
) -> Result<PathBuf, String> {
    let client = client(options)?;
    block_on(async move {
        let repo = client.model(org, name);
        repo.snapshot_download()
            .maybe_revision(revision)
            .allow_patterns(WANTED.map(String::from).to_vec())
            .local_files_only(offline)
            .send()
            .await
            .map_err(|e| chain(&e))
    })
}

fn client(options: &RegistryOptions) -> Result<HFClient, String> {
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
    builder.build().map_err(|e| chain(&e))
}

/// Runs a future on a thread of its own: a caller may itself be inside a runtime, where blocking
/// on another one panics.
fn block_on<T: Send>(future: impl Future<Output = Result<T, String>> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            builder.enable_all().build().map_err(|e| e.to_string())?.block_on(future)
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// The error with its causes; the outermost alone seldom says why.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}
