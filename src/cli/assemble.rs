//! From files on disk to a running engine.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};

use super::on_gpu::{self, GpuChoice};
use crate::{
    clock::Clock,
    config::{IsaMax, KvCacheDtype},
    engine::{
        self, EngineOptions, EngineThread,
        device::{CpuDevice, DeviceError},
    },
    model::{self, GgufFile, Llama, ModelConfig, RuntimeLimits, WeightFiles},
    ops::{CpuPool, Isa, KV_BLOCK_TOKENS, KvDtype},
    registry::ModelSource,
    scheduler::Limits,
    text::{ChatTemplate, GgufVocab, Tokenizer},
    types::{ModelId, TokenId},
};

/// What an engine is built with; all of it comes from the configuration.
#[derive(Clone)]
pub struct EngineSpec {
    /// The GPU that it runs on, or the CPU.
    pub gpu: Option<Arc<GpuChoice>>,
    pub threads: usize,
    pub context_tokens_max: Option<usize>,
    pub kv_cache_bytes: usize,
    pub kv_dtype: KvDtype,
    pub step_tokens_max: usize,
    pub running_seqs_max: usize,
    pub waiting_requests_max: usize,
    pub pipeline_depth: usize,
    pub stream_buffer_events_max: usize,
    pub client_stall_max: Duration,
    pub calibration: Duration,
    pub metered: bool,
}

/// A loaded model and its engine.
pub struct Assembled {
    pub tokenizer: Tokenizer,
    pub template: Option<ChatTemplate>,
    pub engine: EngineThread,
    pub context_tokens_max: usize,
}

/// The setting as the kernels call it.
pub fn kv_dtype(setting: KvCacheDtype) -> KvDtype {
    match setting {
        KvCacheDtype::F16 => KvDtype::F16,
        KvCacheDtype::F32 => KvDtype::F32,
    }
}

/// The setting as the kernels call it.
pub fn isa_max(setting: IsaMax) -> Isa {
    match setting {
        IsaMax::Portable => Isa::Portable,
        IsaMax::Avx2 => Isa::Avx2,
        IsaMax::Avx512 => Isa::Avx512Vnni,
    }
}

/// Loads a model and starts its engine.
pub fn assemble(
    id: &ModelId,
    source: &ModelSource,
    spec: &EngineSpec,
    clock: Clock,
) -> Result<Assembled> {
    let (files, tokenizer, template) = match source {
        ModelSource::Gguf { path } => gguf_text(path)?,
        ModelSource::Dir { config, tokenizer, tokenizer_config, chat_template, shards, .. } => {
            let files = WeightFiles::SafeTensors { config: config.clone(), shards: shards.clone() };
            let (tokenizer, template) =
                dir_text(tokenizer, tokenizer_config.as_deref(), chat_template.as_deref())?;
            (files, tokenizer, template)
        }
    };
    let (mut config, weights) = match &spec.gpu {
        Some(choice) => on_gpu::load(&files, choice)?,
        None => model::load(&files)?,
    };
    if let ModelSource::Dir { generation_config: Some(path), .. } = source {
        config.eos_token_ids.extend(generation_end_tokens(path)?);
    }
    if tokenizer.vocab_size() > config.vocab_size {
        bail!(
            "the tokenizer has {} tokens, the model {}",
            tokenizer.vocab_size(),
            config.vocab_size
        );
    }
    let block_bytes = Llama::kv_bytes_per_block(&config, spec.kv_dtype);
    let wanted = spec.context_tokens_max.unwrap_or(config.max_position).min(config.max_position);
    let logits_rows_max = spec.running_seqs_max.max(64).min(spec.step_tokens_max.max(1));
    let runtime = RuntimeLimits {
        step_tokens_max: spec.step_tokens_max,
        logits_rows_max,
        kv_blocks: spec.kv_cache_bytes / block_bytes,
        kv_dtype: spec.kv_dtype,
        context_tokens_max: wanted,
    };
    let model = (config, weights);
    let (kv_blocks, (config, weights)) = match &spec.gpu {
        Some(choice) => on_gpu::kv_blocks(choice, model, runtime, spec.running_seqs_max)?,
        None => (runtime.kv_blocks, model),
    };
    let context_tokens_max = wanted.min(kv_blocks * KV_BLOCK_TOKENS);
    if context_tokens_max < 2 * KV_BLOCK_TOKENS {
        bail!("{} bytes of KV cache are too few; raise --kv-cache-memory", spec.kv_cache_bytes);
    }
    // More blocks than all seats can fill would never be used.
    let kv_blocks =
        kv_blocks.min(context_tokens_max.div_ceil(KV_BLOCK_TOKENS) * spec.running_seqs_max);
    tracing::info!(
        model = %id, kv_blocks, kv_bytes = kv_blocks * block_bytes, context_tokens_max, "KV cache"
    );
    let limits = Limits {
        step_tokens_max: spec.step_tokens_max,
        running_seqs_max: spec.running_seqs_max,
        logits_rows_max,
        block_tokens: KV_BLOCK_TOKENS,
    };
    let options = EngineOptions {
        model: id.clone(),
        limits,
        kv_blocks,
        context_tokens_max,
        waiting_requests_max: spec.waiting_requests_max,
        pipeline_depth: spec.pipeline_depth,
        stream_buffer_events_max: spec.stream_buffer_events_max,
        client_stall_max: spec.client_stall_max,
        calibration: spec.calibration,
        metered: spec.metered,
        eos_token_ids: config.eos_token_ids.clone(),
        sliding_window: config.window(),
    };
    let runtime = RuntimeLimits { kv_blocks, context_tokens_max, ..runtime };
    let (threads, seats, device_clock) = (spec.threads, spec.running_seqs_max, clock.clone());
    let engine = match spec.gpu.clone() {
        Some(choice) => {
            let make = move || on_gpu::make(&choice, (config, weights), runtime, seats);
            engine::start(options, tokenizer.clone(), clock, make)?
        }
        None => {
            let make = move || make_device(config, weights, runtime, threads, seats, device_clock);
            engine::start(options, tokenizer.clone(), clock, make)?
        }
    };
    Ok(Assembled { tokenizer, template, engine, context_tokens_max })
}

fn make_device(
    config: ModelConfig,
    weights: model::ModelWeights,
    limits: RuntimeLimits,
    threads: usize,
    seats: usize,
    clock: Clock,
) -> Result<CpuDevice, DeviceError> {
    let pool = CpuPool::new(threads).map_err(|error| DeviceError(error.to_string()))?;
    let model = Llama::new(config, weights, limits, Arc::new(pool))
        .map_err(|error| DeviceError(error.to_string()))?;
    Ok(CpuDevice::new(model, seats, clock))
}

fn gguf_text(path: &Path) -> Result<(WeightFiles, Tokenizer, Option<ChatTemplate>)> {
    let file = GgufFile::open(path)?;
    let header = &file.header;
    let text = |key: &str| header.get_str(key).unwrap_or_default().to_owned();
    let strings = |key: &str| -> Vec<String> {
        header.get_str_array(key).unwrap_or_default().into_iter().map(str::to_owned).collect()
    };
    let bos = header.get_u32("tokenizer.ggml.bos_token_id");
    let vocab = GgufVocab {
        model: text("tokenizer.ggml.model"),
        pre: text("tokenizer.ggml.pre"),
        tokens: strings("tokenizer.ggml.tokens"),
        merges: strings("tokenizer.ggml.merges"),
        scores: header.get_f32_array("tokenizer.ggml.scores").unwrap_or_default(),
        token_types: header.get_i32_array("tokenizer.ggml.token_type").unwrap_or_default(),
        bos,
        add_bos: header.get_bool("tokenizer.ggml.add_bos_token"),
        add_space_prefix: header.get_bool("tokenizer.ggml.add_space_prefix"),
    };
    let tokenizer = Tokenizer::from_gguf(&vocab)?;
    let literal = |id: Option<u32>| id.map(|id| tokenizer.token_text(id));
    let (bos, eos) = (literal(bos), literal(header.get_u32("tokenizer.ggml.eos_token_id")));
    let template = header
        .get_str("tokenizer.chat_template")
        .map(|source| ChatTemplate::new(source, bos.as_deref(), eos.as_deref()))
        .transpose()?;
    Ok((WeightFiles::Gguf(path.to_owned()), tokenizer, template))
}

/// End tokens of a `generation_config.json`: chat models name some that `config.json` does not.
fn generation_end_tokens(path: &Path) -> Result<Vec<TokenId>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let json: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
    let ids = match json.get("eos_token_id") {
        Some(serde_json::Value::Array(list)) => list.clone(),
        Some(one) => vec![one.clone()],
        None => Vec::new(),
    };
    Ok(ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect())
}

fn dir_text(
    tokenizer: &Path,
    config: Option<&Path>,
    template: Option<&Path>,
) -> Result<(Tokenizer, Option<ChatTemplate>)> {
    let read = |path: &Path| {
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
    };
    let config: serde_json::Value = match config {
        Some(path) => serde_json::from_str(&read(path)?)
            .with_context(|| format!("parsing {}", path.display()))?,
        None => serde_json::Value::Null,
    };
    let token = |key: &str| {
        let value = config.get(key)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    };
    let (bos, eos) = (token("bos_token"), token("eos_token"));
    let json = read(tokenizer)?;
    let mut tokenizer = Tokenizer::from_json(json.as_bytes(), None)?;
    if config.get("add_bos_token").and_then(serde_json::Value::as_bool) == Some(true)
        && let Some(id) = bos.as_deref().and_then(|bos| tokenizer.special_id(bos))
    {
        tokenizer = Tokenizer::from_json(json.as_bytes(), Some(id))?;
    }
    let source = match template {
        Some(path) => Some(read(path)?),
        None => config.get("chat_template").and_then(|t| t.as_str()).map(str::to_owned),
    };
    let template = source
        .map(|source| ChatTemplate::new(&source, bos.as_deref(), eos.as_deref()))
        .transpose()?;
    Ok((tokenizer, template))
}
