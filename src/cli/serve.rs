//! `candela serve` and `candela pull`.

use std::{net::IpAddr, path::PathBuf, process::ExitCode, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    admission::ApiKey,
    api::{AppState, ServedModel, router},
    clock::Clock,
    registry::{BarProgress, DEFAULT_MODEL, Registry, RegistryOptions, ResolvedModel},
    types::ModelId,
};

use super::assemble::{EngineSpec, assemble};

const BODY_BYTES_MAX: usize = 4 << 20;
const CHOICES_MAX: u32 = 16;

#[derive(Args)]
pub struct ModelArgs {
    /// A model known by name, a hub id `org/name`, a directory, or a .gguf file.
    #[arg(long, env = "CANDELA_MODEL", default_value = DEFAULT_MODEL)]
    model: String,
    /// Where fetched models are kept [default: ~/.cache/candela/models].
    #[arg(long, env = "CANDELA_CACHE_DIR")]
    cache_dir: Option<PathBuf>,
    /// Use only what is on this machine.
    #[arg(long, env = "CANDELA_OFFLINE")]
    offline: bool,
}

#[derive(Args)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The name clients ask for [default: the model's own].
    #[arg(long, env = "CANDELA_SERVED_MODEL_NAME")]
    served_model_name: Option<String>,
    #[arg(long, env = "CANDELA_HOST", default_value = "127.0.0.1")]
    host: IpAddr,
    #[arg(long, env = "CANDELA_PORT", default_value_t = 8000)]
    port: u16,
    /// Clients must send this key.
    #[arg(long, env = "CANDELA_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Serve other machines without a key.
    #[arg(long, env = "CANDELA_ALLOW_ANONYMOUS")]
    allow_anonymous: bool,
    /// Threads that compute [default: all].
    #[arg(long, env = "CANDELA_THREADS")]
    threads: Option<usize>,
    /// Longest prompt plus output in tokens [default: the model's].
    #[arg(long, env = "CANDELA_MAX_MODEL_LEN")]
    max_model_len: Option<usize>,
    /// MiB for the KV cache [default: a quarter of the memory that is free].
    #[arg(long, env = "CANDELA_KV_CACHE_MIB")]
    kv_cache_mib: Option<usize>,
    /// Sequences computed together.
    #[arg(long, env = "CANDELA_MAX_NUM_SEQS", default_value_t = 32)]
    max_num_seqs: usize,
    /// Tokens computed in one step.
    #[arg(long, env = "CANDELA_MAX_NUM_BATCHED_TOKENS", default_value_t = 256)]
    max_num_batched_tokens: usize,
    /// Requests that may wait; more are refused.
    #[arg(long, env = "CANDELA_MAX_WAITING_REQUESTS", default_value_t = 1024)]
    max_waiting_requests: usize,
    /// Seconds that running requests get to finish after SIGTERM.
    #[arg(long, env = "CANDELA_DRAIN_TIMEOUT", default_value_t = 30)]
    drain_timeout: u64,
}

/// Fetches a model.
pub fn pull(args: &ModelArgs) -> Result<ExitCode> {
    let resolved = resolve(args)?;
    println!("{} ({}) is on this machine and verified", resolved.id, resolved.revision);
    Ok(ExitCode::SUCCESS)
}

/// Serves until SIGTERM or SIGINT, or until the engine fails.
pub fn serve(args: &ServeArgs) -> Result<ExitCode> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).init();
    if !args.host.is_loopback() && args.api_key.is_none() && !args.allow_anonymous {
        bail!("{} is reachable by others: give --api-key, or --allow-anonymous", args.host);
    }
    if args.max_num_seqs == 0 || args.max_num_batched_tokens == 0 {
        bail!("--max-num-seqs and --max-num-batched-tokens must be at least 1");
    }
    let resolved = resolve(&args.model)?;
    let id = ModelId::new(args.served_model_name.as_deref().unwrap_or(&resolved.id));
    let clock = Clock::system();
    let model = assemble(&id, &resolved.source, &spec(args), clock.clone())
        .with_context(|| format!("loading {}", resolved.id))?;
    let engine = model.engine.handle.clone();
    let state = Arc::new(AppState {
        model: ServedModel {
            created_unix_s: clock.unix_s(),
            id,
            tokenizer: model.tokenizer,
            template: model.template,
            engine: engine.clone(),
            context_tokens_max: model.context_tokens_max,
        },
        clock,
        api_key: args.api_key.as_deref().map(ApiKey::new),
        choices_max: CHOICES_MAX.min(args.max_num_seqs as u32),
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(listen(args, state))?;
    // Connections still open hold aborted requests only.
    runtime.shutdown_timeout(Duration::from_secs(1));
    let failed = !engine.is_alive();
    engine.stop();
    let died = model.engine.thread.join().is_err();
    Ok(if failed || died { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn listen(args: &ServeArgs, state: Arc<AppState>) -> Result<()> {
    let address = (args.host, args.port);
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {}:{}; try another --port", args.host, args.port))?;
    let local = listener.local_addr()?;
    let name = state.model.id.clone();
    println!(
        "candela serves {name} on http://{local}\ntry it:\n  curl http://{local}/v1/chat/completions -H 'content-type: application/json' \\\n    -d '{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'"
    );
    let engine = state.model.engine.clone();
    let (started, drain) = tokio::sync::oneshot::channel::<()>();
    let waits = engine.clone();
    let server =
        axum::serve(listener, router(state, BODY_BYTES_MAX)).with_graceful_shutdown(async move {
            wait_for_end(&waits).await;
            waits.drain();
            // The receiver is gone only when the server is too.
            let _ = started.send(());
        });
    let timeout = Duration::from_secs(args.drain_timeout);
    tokio::select! {
        served = async { server.await } => served?,
        () = async {
            // An error means that the server ended by itself, which the other arm handles.
            let _ = drain.await;
            tokio::time::sleep(timeout).await;
            engine.abort_all();
            tokio::time::sleep(Duration::from_millis(500)).await;
        } => tracing::warn!("requests were aborted after the drain timeout"),
    }
    Ok(())
}

/// Until a signal asks to stop, or the engine has failed.
async fn wait_for_end(engine: &crate::engine::EngineHandle) {
    let (terminate, interrupt) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    let (Ok(mut terminate), Ok(mut interrupt)) = (terminate, interrupt) else {
        return tracing::error!("signals cannot be received");
    };
    let mut check = tokio::time::interval(Duration::from_millis(200));
    loop {
        tokio::select! {
            _ = terminate.recv() => return,
            _ = interrupt.recv() => return,
            _ = check.tick() => if !engine.is_alive() { return },
        }
    }
}

fn resolve(args: &ModelArgs) -> Result<ResolvedModel> {
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cache_dir = args.cache_dir.clone().unwrap_or_else(|| home.join(".cache/candela/models"));
    let registry = Registry::new(RegistryOptions {
        cache_dir,
        offline: args.offline,
        hf_token: std::env::var("HF_TOKEN").ok(),
        hf_endpoint: std::env::var("HF_ENDPOINT").ok(),
        ..RegistryOptions::default()
    })?;
    Ok(registry.resolve(&args.model, &BarProgress::default())?)
}

fn spec(args: &ServeArgs) -> EngineSpec {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    EngineSpec {
        threads: args.threads.unwrap_or(cores).max(1),
        context_tokens_max: args.max_model_len,
        kv_cache_bytes: args.kv_cache_mib.map_or_else(free_memory_quarter, |mib| mib << 20),
        step_tokens_max: args.max_num_batched_tokens,
        running_seqs_max: args.max_num_seqs,
        waiting_requests_max: args.max_waiting_requests,
        pipeline_depth: 1,
        stream_buffer_events_max: 256,
        client_stall_max: Duration::from_secs(30),
    }
}

/// A quarter of `MemAvailable`, or 1 GiB where the system does not tell.
fn free_memory_quarter() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<usize>().ok());
    kib.map_or(1 << 30, |kib| kib / 4 * 1024)
}
