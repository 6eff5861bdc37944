//! `candela serve`.

use std::{io::Write, net::SocketAddr, process::ExitCode, sync::Arc, time::Duration};

use anyhow::Context;

use super::{
    assemble::{Assembled, EngineSpec, assemble, isa_max, kv_dtype},
    gpus, logging, machine,
    net::{self, DrainHooks, Stopped},
    on_gpu, open_ledger, pull,
    reload::{hangups, reload},
};
use crate::{
    admission::{Anonymous, Door},
    api::{AppState, ServedModel, router},
    clock::Clock,
    config::{Config, LoadFormat, Settings},
    engine::EngineHandle,
    ops::{KvDtype, simd},
    price::Prices,
    registry::{BarProgress, DEFAULT_MODEL, Registry, RegistryOptions},
    telemetry::Metrics,
    types::ModelId,
};

/// How long steps are timed at start.
const CALIBRATION: Duration = Duration::from_secs(1);
/// How often the server looks whether its engine still runs.
const ENGINE_CHECK: Duration = Duration::from_millis(200);

/// Serves until SIGTERM or SIGINT, or until the engine fails.
pub fn serve(settings: Settings) -> anyhow::Result<ExitCode> {
    let config = Config::load(settings.clone())?;
    logging::init(config.log_format)?;
    if let Some(file) = &config.file {
        tracing::info!(file = %file.display(), "configuration read");
    }
    if let Some(most) = config.isa_max {
        let isa = simd::limit(isa_max(most));
        tracing::info!(?isa, "vector instructions are limited");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("cannot start the async runtime")?;
    let listener = {
        let _entered = runtime.enter();
        // First, so that a taken port is known before a model is fetched and loaded.
        net::bind(SocketAddr::new(config.host, config.port))?
    };
    let clock = Clock::system();
    let Loaded { id, model, prices, choices_max } = load(&config, clock.clone())?;
    let ledger = open_ledger::open(&config, &id, prices)?;
    let books = ledger.thread.ledger.clone();
    let engine = model.engine.handle.clone();
    let (thread, keeper) = (model.engine.thread, model.engine.keeper);
    gpus::note_energy(&model.engine.books, books.clone());
    let gpu_uuid = model.engine.gpu_uuid.or(config.meter_gpu_uuid.clone());
    let monitor = gpus::watch(clock.clone(), model.engine.books.clone(), gpu_uuid.clone())?;
    let model_name = id.clone();
    let state = AppState {
        model: ServedModel {
            created_unix_s: clock.unix_s(),
            id,
            tokenizer: model.tokenizer,
            template: model.template,
            engine: engine.clone(),
            context_tokens_max: model.context_tokens_max,
        },
        door: Door::new(books.clone(), clock.clone(), anonymous(&config)),
        ledger: books.clone(),
        books: model.engine.books,
        gpus: monitor.feed(),
        gpu_uuid,
        reader: ledger.reader.clone(),
        clock,
        choices_max: choices_max as u32,
        logprobs_top_max: config.logprobs_top_max as u32,
        completion_tokens_max: config
            .max_completion_tokens_max
            .map_or(u32::MAX, |max| u32::try_from(max).unwrap_or(u32::MAX)),
        metrics: Arc::new(Metrics::new(model_name.as_str())?),
    };
    // Without a file there is nothing to read again, and a closed terminal ends the server.
    if config.file.is_some() {
        let _entered = runtime.enter();
        tokio::spawn(reload(hangups()?, settings, books.clone()));
    }
    let stopped = runtime.block_on(listen(&config, listener, state))?;
    if stopped == Stopped::AtOnce {
        std::process::exit(1);
    }
    engine.stop();
    let died = thread.join().is_err();
    drop(monitor);
    // Tells the ledger what energy it still knows.
    let died = keeper.join().is_err() || died;
    // After the engine, whose last requests are settled by it.
    books.stop();
    let died = ledger.thread.thread.join().is_err() || died;
    Ok(if died { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn anonymous(config: &Config) -> Anonymous {
    match (config.allow_anonymous, config.host.is_loopback(), &config.api_key) {
        (true, _, None) => Anonymous::Always,
        (_, true, None) => Anonymous::UntilFirstKey,
        _ => Anonymous::Never,
    }
}

/// A model whose engine runs.
struct Loaded {
    id: ModelId,
    model: Assembled,
    prices: Option<Prices>,
    /// Choices that a request may have.
    choices_max: usize,
}

fn load(config: &Config, clock: Clock) -> anyhow::Result<Loaded> {
    // Before a model is fetched, which may take long.
    let gpu = on_gpu::choose(config)?.map(Arc::new);
    let without_weights = config.load_format == LoadFormat::Dummy;
    let options = pull::registry_options(&config.sources);
    let registry = Registry::new(RegistryOptions { without_weights, ..options })?;
    let wanted = config.model.as_deref().unwrap_or(DEFAULT_MODEL);
    let resolved = registry.resolve(wanted, &BarProgress::default())?;
    let id = ModelId::new(config.served_model_name.as_deref().unwrap_or(&resolved.id));
    let (step_tokens_max, running_seqs_max) = config.batch.on(gpu.is_some());
    let kv_cache_bytes = match gpu {
        // What is left of its memory, once the rest is there.
        Some(_) => 0,
        None => machine::kv_cache_memory_bytes(config.kv_cache_memory_bytes)?,
    };
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let spec = EngineSpec {
        threads: config.threads.unwrap_or(cores),
        context_tokens_max: config.context_tokens_max,
        kv_cache_bytes: kv_cache_bytes as usize,
        // On a GPU it is of 16 bits, like everything.
        kv_dtype: if gpu.is_some() { KvDtype::F16 } else { kv_dtype(config.kv_cache_dtype) },
        step_tokens_max,
        running_seqs_max,
        waiting_requests_max: config.waiting_requests_max,
        pipeline_depth: config.pipeline_depth,
        stream_buffer_events_max: config.stream_buffer_events_max,
        client_stall_max: config.client_stall_max,
        calibration: CALIBRATION,
        metered: true,
        gpu,
    };
    let model = assemble(&id, &resolved.source, &spec, clock)
        .with_context(|| format!("loading {wanted}"))?;
    let choices_max = config.choices_max.min(running_seqs_max);
    Ok(Loaded { id, model, prices: resolved.prices, choices_max })
}

async fn listen(
    config: &Config,
    listener: tokio::net::TcpListener,
    state: AppState,
) -> anyhow::Result<Stopped> {
    let (address, name) = (listener.local_addr()?, state.model.id.clone());
    // A reader that went away, as in `candela serve | head -1`, is no reason to stop.
    let _ = writeln!(
        std::io::stdout(),
        "candela serves {name} on http://{address}\ntry it:\n  \
         curl http://{address}/v1/chat/completions -H 'content-type: application/json' \\\n    \
         -d '{{\"model\": \"{name}\", \"messages\": [{{\"role\": \"user\", \"content\": \"Hello!\"}}]}}'"
    );
    let engine = state.model.engine.clone();
    tokio::spawn(exit_with(engine.clone()));
    let draining = engine.clone();
    let hooks = DrainHooks {
        on_drain: Box::new(move || draining.drain()),
        on_abort: Box::new(move || engine.abort_all()),
    };
    let router = router(Arc::new(state), config.body_bytes_max);
    net::serve_http(router, listener, hooks, config.drain_timeout).await
}

/// Ends the process when the engine has failed; clients get a second to read their error.
async fn exit_with(engine: EngineHandle) {
    while engine.is_alive() {
        tokio::time::sleep(ENGINE_CHECK).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    std::process::exit(1);
}
