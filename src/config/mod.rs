//! Typed configuration: flags, then `CANDELA_*` variables, then `candela.toml`, then the defaults here.

mod file;
mod limits;
mod price;
mod settings;
mod validate;
mod value;

use std::{net::IpAddr, path::PathBuf, time::Duration};

pub use limits::*;
pub use price::FilePrice;
pub use settings::Settings;
pub use value::{
    ByteSize, ConfigError, Device, GpuDtype, IsaMax, KvCacheDtype, LoadFormat, LogFormat, Secret,
};

/// Where models come from and where they are kept.
#[derive(Clone, Debug)]
pub struct Sources {
    /// Model files that were fetched and verified.
    pub model_dir: PathBuf,
    /// More manifests (`*.toml`).
    pub manifests_dir: Option<PathBuf>,
    /// Never use the network.
    pub offline: bool,
    pub hf_token: Option<Secret>,
    pub hf_endpoint: Option<String>,
    /// The pip command line; empty picks the first that is installed.
    pub pip: String,
}

/// Where the ledger is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LedgerPlace {
    /// A SQLite file in a directory.
    Directory(PathBuf),
    /// A PostgreSQL database, by its URL, which may hold a password.
    Postgres(Secret),
}

impl LedgerPlace {
    /// As [`Config::load`] for a command that serves nothing: other settings are not judged.
    pub fn load(settings: Settings) -> Result<Self, ConfigError> {
        let (merged, _) = file::merge(settings)?;
        validate::ledger(&merged)
    }
}

/// Everything `candela serve` can be told, checked. A part receives the values it needs, never this.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file that was read, if any.
    pub file: Option<PathBuf>,
    /// Manifest id, hub id or path; none means the default model.
    pub model: Option<String>,
    pub served_model_name: Option<String>,
    pub sources: Sources,

    pub ledger: LedgerPlace,
    pub lease_outstanding_tokens_max: usize,
    /// How long ended requests are kept before they are rolled up; none means for ever.
    pub retention: Option<Duration>,
    /// Set into the price book at the start and at SIGHUP.
    pub prices: Vec<FilePrice>,

    pub host: IpAddr,
    pub port: u16,
    pub api_key: Option<Secret>,
    pub allow_anonymous: bool,
    pub body_bytes_max: usize,
    pub client_stall_max: Duration,
    pub drain_timeout: Duration,
    pub stream_buffer_events_max: usize,
    pub waiting_requests_max: usize,

    pub device: Device,
    pub gpu_memory_utilization: f64,
    pub gpu_dtype: GpuDtype,
    pub cuda_graphs: bool,
    pub load_format: LoadFormat,
    /// Which GPU the device is, where it does not say so itself.
    pub meter_gpu_uuid: Option<String>,
    /// Threads of the CPU device; none means every core this process may use.
    pub threads: Option<usize>,
    /// Longest prompt plus output; none means what the model was trained for.
    pub context_tokens_max: Option<usize>,
    /// None means [`KV_CACHE_MEMORY_SHARE`] of the memory available at start.
    pub kv_cache_memory_bytes: Option<u64>,
    pub kv_cache_dtype: KvCacheDtype,
    pub isa_max: Option<IsaMax>,
    pub batch: Batch,
    /// Steps in flight: 1 or 2.
    pub pipeline_depth: usize,

    /// Largest output a request may ask for; none means what the context leaves.
    pub max_completion_tokens_max: Option<usize>,
    pub choices_max: usize,
    pub logprobs_top_max: usize,

    pub log_format: LogFormat,
}

/// How much runs at once; what was not said depends on the device.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch {
    pub step_tokens_max: Option<usize>,
    pub running_seqs_max: Option<usize>,
}

impl Batch {
    /// Tokens of a step and sequences at once, on the CPU or on a GPU. A default gives way to what was
    /// said, as each running sequence needs a token of every step.
    pub fn on(self, gpu: bool) -> (usize, usize) {
        let (tokens, seqs) = match gpu {
            false => (limits::STEP_TOKENS_MAX, limits::RUNNING_SEQS_MAX),
            true => (limits::GPU_STEP_TOKENS_MAX, limits::GPU_RUNNING_SEQS_MAX),
        };
        let tokens = self.step_tokens_max.unwrap_or(tokens.max(self.running_seqs_max.unwrap_or(0)));
        (tokens, self.running_seqs_max.unwrap_or(seqs.min(tokens)))
    }
}

impl Config {
    /// Reads the file the settings name, or `candela.toml` where it exists, under `settings` (flags
    /// and environment).
    ///
    /// # Errors
    /// Names the line and key of a mistake in the file, or the setting that is out of range.
    pub fn load(settings: Settings) -> Result<Self, ConfigError> {
        let (merged, file) = file::merge(settings)?;
        validate::config(merged, file)
    }
}

impl Sources {
    /// As [`Config::load`] for a command that serves nothing: other settings are not judged.
    pub fn load(settings: Settings) -> Result<Self, ConfigError> {
        let (merged, _) = file::merge(settings)?;
        validate::sources(&merged)
    }
}
