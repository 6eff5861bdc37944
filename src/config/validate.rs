//! Settings as typed to a configuration that holds together.

use std::{net::IpAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use super::{
    Batch, ByteSize, Config, ConfigError, Device, GpuDtype, KvCacheDtype, LedgerPlace, LoadFormat,
    LogFormat, Settings, Sources, limits::*,
};

pub fn config(settings: Settings, file: Option<PathBuf>) -> Result<Config, ConfigError> {
    let (sources, ledger) = (sources(&settings)?, ledger(&settings)?);
    let host = host(settings.host.as_deref().unwrap_or(HOST))?;
    let allow_anonymous = settings.allow_anonymous.unwrap_or(false);
    if let Some(key) = &settings.api_key {
        let bytes = key.reveal().len();
        if bytes < API_KEY_BYTES_MIN || key.reveal().contains(|c: char| !c.is_ascii_graphic()) {
            let message = format!(
                "must have at least {API_KEY_BYTES_MIN} characters, printable ASCII without blanks"
            );
            return Err(ConfigError::Value { setting: "api_key", message });
        }
    }
    if !host.is_loopback() && settings.api_key.is_none() && !allow_anonymous {
        return Err(ConfigError::OpenToAll { host });
    }
    let body = settings.body_bytes_max.map(|size| size.0);
    let kv = settings.kv_cache_memory.map(|size| size.0);
    let kv = optional("kv_cache_memory", kv, KV_CACHE_MEMORY_BYTES_MIN..=u64::MAX)?;
    let config = Config {
        file,
        model: not_empty("model", settings.model)?,
        served_model_name: not_empty("served_model_name", settings.served_model_name)?,
        sources,
        ledger,
        lease_outstanding_tokens_max: count(
            "lease_outstanding_tokens_max",
            settings.lease_outstanding_tokens_max,
            LEASE_OUTSTANDING_TOKENS_MAX,
            1..=COUNT_LIMIT,
        )?,
        retention: optional(
            "retention_days",
            settings.retention_days,
            RETENTION_DAYS_LEAST..=RETENTION_DAYS_LIMIT,
        )?
        .map(|days| Duration::from_secs(days * 24 * 60 * 60)),
        prices: settings.price.unwrap_or_default(),
        host,
        port: settings.port.unwrap_or(PORT),
        api_key: settings.api_key,
        allow_anonymous,
        body_bytes_max: count("body_bytes_max", body, BODY_BYTES_MAX, 1024..=BODY_BYTES_LIMIT)?,
        client_stall_max: seconds(
            "client_stall_s_max",
            settings.client_stall_s_max,
            CLIENT_STALL_S_MAX,
            1,
        )?,
        drain_timeout: seconds("drain_timeout", settings.drain_timeout, DRAIN_TIMEOUT_S, 0)?,
        stream_buffer_events_max: count(
            "stream_buffer_events_max",
            settings.stream_buffer_events_max,
            STREAM_BUFFER_EVENTS_MAX,
            1..=COUNT_LIMIT,
        )?,
        waiting_requests_max: count(
            "waiting_requests_max",
            settings.waiting_requests_max,
            WAITING_REQUESTS_MAX,
            1..=COUNT_LIMIT,
        )?,
        device: settings.device.unwrap_or(Device::Auto),
        gpu_memory_utilization: share(
            "gpu_memory_utilization",
            settings.gpu_memory_utilization,
            GPU_MEMORY_UTILIZATION,
        )?,
        gpu_dtype: settings.dtype.unwrap_or(GpuDtype::Bf16),
        cuda_graphs: !settings.no_cuda_graphs.unwrap_or(false),
        load_format: settings.load_format.unwrap_or(LoadFormat::Auto),
        meter_gpu_uuid: not_empty("meter_gpu_uuid", settings.meter_gpu_uuid)?,
        threads: optional_count("threads", settings.threads, 1..=THREADS_LIMIT)?,
        context_tokens_max: optional_count(
            "max_model_len",
            settings.max_model_len,
            1..=COUNT_LIMIT,
        )?,
        kv_cache_memory_bytes: kv,
        kv_cache_dtype: settings.kv_cache_dtype.unwrap_or(KvCacheDtype::F16),
        isa_max: settings.isa_max,
        batch: Batch {
            step_tokens_max: optional_count(
                "max_num_batched_tokens",
                settings.max_num_batched_tokens,
                1..=COUNT_LIMIT,
            )?,
            running_seqs_max: optional_count(
                "max_num_seqs",
                settings.max_num_seqs,
                1..=COUNT_LIMIT,
            )?,
        },
        pipeline_depth: count("pipeline_depth", settings.pipeline_depth, PIPELINE_DEPTH, 1..=2)?,
        max_completion_tokens_max: optional_count(
            "max_completion_tokens",
            settings.max_completion_tokens,
            1..=COUNT_LIMIT,
        )?,
        choices_max: count("choices_max", settings.choices_max, CHOICES_MAX, 1..=CHOICES_LIMIT)?,
        logprobs_top_max: count(
            "logprobs_top_max",
            settings.logprobs_top_max,
            LOGPROBS_TOP_MAX,
            0..=LOGPROBS_TOP_LIMIT,
        )?,
        log_format: settings.log_format.unwrap_or(LogFormat::Text),
    };
    let (step_tokens, seqs) = config.batch.on(false);
    if step_tokens < seqs {
        // Each running sequence needs one token of every step, or decode starves.
        let message = format!(
            "{step_tokens} is less than max_num_seqs ({seqs}): raise the one or lower the other"
        );
        return Err(ConfigError::Value { setting: "max_num_batched_tokens", message });
    }
    Ok(config)
}

pub fn sources(settings: &Settings) -> Result<Sources, ConfigError> {
    let model_dir = match &settings.model_dir {
        Some(dir) => dir.clone(),
        None => default_model_dir().ok_or_else(|| ConfigError::Value {
            setting: "model_dir",
            message: "neither HOME nor XDG_CACHE_HOME is set: name a directory".to_string(),
        })?,
    };
    Ok(Sources {
        model_dir,
        manifests_dir: settings.manifests_dir.clone(),
        offline: settings.offline.unwrap_or(false),
        hf_token: settings.hf_token.clone().filter(|token| !token.reveal().is_empty()),
        hf_endpoint: settings.hf_endpoint.clone().filter(|url| !url.is_empty()),
        pip: settings.pip.clone().unwrap_or_default(),
    })
}

/// `$XDG_CACHE_HOME/candela/models`, else `~/.cache/candela/models`.
fn default_model_dir() -> Option<PathBuf> {
    Some(user_dir("XDG_CACHE_HOME", ".cache")?.join("candela/models"))
}

/// A base directory of the user (XDG Base Directory: a relative value is to be ignored).
fn user_dir(variable: &str, below_home: &str) -> Option<PathBuf> {
    let absolute =
        |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(variable).or_else(|| Some(absolute("HOME")?.join(below_home)))
}

pub fn ledger(settings: &Settings) -> Result<LedgerPlace, ConfigError> {
    if let Some(url) = &settings.ledger {
        let schemes = ["postgres://", "postgresql://"];
        if !schemes.iter().any(|scheme| url.reveal().starts_with(scheme)) {
            let message = "must be a URL such as postgres://user:password@host/database; for a \
                 SQLite file leave it out and set data_dir";
            return Err(ConfigError::Value { setting: "ledger", message: message.to_string() });
        }
        return Ok(LedgerPlace::Postgres(url.clone()));
    }
    let default = || Some(user_dir("XDG_DATA_HOME", ".local/share")?.join("candela"));
    let dir = settings.data_dir.clone().or_else(default).ok_or_else(|| ConfigError::Value {
        setting: "data_dir",
        message: "neither HOME nor XDG_DATA_HOME is set: name a directory".to_string(),
    })?;
    Ok(LedgerPlace::Directory(dir))
}

fn host(text: &str) -> Result<IpAddr, ConfigError> {
    let text = if text == "localhost" { HOST } else { text };
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    bare.parse().map_err(|_| ConfigError::Value {
        setting: "host",
        message: format!(
            "`{text}` is no IP address: write 127.0.0.1, ::1, 0.0.0.0 or one of this machine"
        ),
    })
}

fn not_empty(setting: &'static str, text: Option<String>) -> Result<Option<String>, ConfigError> {
    match text {
        Some(text) if text.trim().is_empty() => Err(ConfigError::Value {
            setting,
            message: "is empty: leave it out or name one".to_string(),
        }),
        other => Ok(other),
    }
}

fn seconds(
    setting: &'static str,
    given: Option<u64>,
    default: u64,
    least: u64,
) -> Result<Duration, ConfigError> {
    let value = optional(setting, given, least..=SECONDS_LIMIT)?;
    Ok(Duration::from_secs(value.unwrap_or(default)))
}

fn count(
    setting: &'static str,
    given: Option<u64>,
    default: u64,
    range: RangeInclusive<u64>,
) -> Result<usize, ConfigError> {
    Ok(optional(setting, given, range)?.unwrap_or(default) as usize)
}

fn optional_count(
    setting: &'static str,
    given: Option<u64>,
    range: RangeInclusive<u64>,
) -> Result<Option<usize>, ConfigError> {
    Ok(optional(setting, given, range)?.map(|value| value as usize))
}

fn optional(
    setting: &'static str,
    given: Option<u64>,
    range: RangeInclusive<u64>,
) -> Result<Option<u64>, ConfigError> {
    match given {
        Some(value) if !range.contains(&value) => {
            let message = match *range.end() {
                u64::MAX => format!("{value} is too little: at least {}", ByteSize(*range.start())),
                end => format!("{value} is out of range: {} to {end}", range.start()),
            };
            Err(ConfigError::Value { setting, message })
        }
        other => Ok(other),
    }
}

/// A share of a whole, above 0 and up to 1.
fn share(setting: &'static str, value: Option<f64>, default: f64) -> Result<f64, ConfigError> {
    let value = value.unwrap_or(default);
    if value > 0.0 && value <= 1.0 {
        return Ok(value);
    }
    let message = format!("{value} is not above 0 and up to 1, as 0.90 is");
    Err(ConfigError::Value { setting, message })
}
