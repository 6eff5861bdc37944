//! Settings as typed: one struct is the flags, the environment and the file, so that they agree.

use std::path::PathBuf;

use clap::{Args, builder::BoolishValueParser};
use serde::Deserialize;

use super::FilePrice;
use super::value::{
    ByteSize, Device, GpuDtype, IsaMax, KvCacheDtype, LoadFormat, LogFormat, Secret,
};

/// Declares the settings, once, with the rule that the first source that names one wins.
macro_rules! settings {
    ($($(#[$attr:meta])* $name:ident: $type:ty,)*) => {
        /// What the user said, each part of it optional. In `candela.toml` a key is the flag's name
        /// with underscores.
        #[derive(Args, Clone, Debug, Default, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct Settings {
            /// Configuration file [default: candela.toml in the working directory, where there is one]
            #[arg(long, env = "CANDELA_CONFIG", value_name = "FILE")]
            #[serde(skip)]
            pub config: Option<PathBuf>,
            $($(#[$attr])* pub $name: Option<$type>,)*
        }

        impl Settings {
            /// `self` where it says something, `other` elsewhere.
            pub fn or(self, other: Self) -> Self {
                Self {
                    config: self.config.or(other.config),
                    $($name: self.$name.or(other.$name),)*
                }
            }

            /// The keys a file may have.
            pub const KEYS: &[&str] = &[$(stringify!($name)),*];
        }
    };
}

settings! {
    /// Model to serve: a manifest id, a hub id (`org/name[@revision]`) or a path to a directory or
    /// .gguf file [default: smollm2-135m-instruct]
    #[arg(long, env = "CANDELA_MODEL")]
    model: String,
    /// Name that clients use for the model [default: the model's own]
    #[arg(long, env = "CANDELA_SERVED_MODEL_NAME", value_name = "NAME")]
    served_model_name: String,

    /// Where fetched models are kept [default: ~/.cache/candela/models]
    #[arg(long, env = "CANDELA_MODEL_DIR", value_name = "DIR", help_heading = "Models")]
    model_dir: PathBuf,
    /// Directory with more manifests (*.toml)
    #[arg(long, env = "CANDELA_MANIFESTS_DIR", value_name = "DIR", help_heading = "Models")]
    manifests_dir: PathBuf,
    /// Never use the network: serve only what is on disk
    #[arg(long, env = "CANDELA_OFFLINE", help_heading = "Models",
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    offline: bool,
    /// Token for gated models on the hub
    #[arg(long, env = "HF_TOKEN", hide_env_values = true, value_name = "TOKEN", help_heading = "Models")]
    hf_token: Secret,
    /// Another hub than huggingface.co
    #[arg(long, env = "HF_ENDPOINT", value_name = "URL", help_heading = "Models")]
    hf_endpoint: String,
    /// pip command that fetches package sources [default: the first one installed]
    #[arg(long, env = "CANDELA_PIP", value_name = "COMMAND", help_heading = "Models")]
    pip: String,

    /// Where the ledger is kept, in a SQLite file [default: ~/.local/share/candela]
    #[arg(long, env = "CANDELA_DATA_DIR", value_name = "DIR", help_heading = "Money")]
    data_dir: PathBuf,
    /// PostgreSQL instead, for several servers on one budget: postgres://user:password@host/database,
    /// over TLS with ?sslmode=verify-full&sslrootcert=FILE (better given in the environment: other
    /// users can see flags)
    #[arg(long, env = "CANDELA_LEDGER", hide_env_values = true, value_name = "URL", help_heading = "Money")]
    ledger: Secret,
    /// Output tokens of a sequence that may be delivered before they are on record: what a crash may
    /// cost [default: 256]
    #[arg(long, env = "CANDELA_LEASE_OUTSTANDING_TOKENS_MAX", value_name = "TOKENS", help_heading = "Money")]
    lease_outstanding_tokens_max: u64,

    /// Days that rows of ended requests are kept; older ones are rolled up into daily sums by tenant,
    /// key, model and user. At least 35, for budgets of a month [default: for ever]
    #[arg(long, env = "CANDELA_RETENTION_DAYS", value_name = "DAYS", help_heading = "Money")]
    retention_days: u64,

    /// Prices; `[[price]]` of the file alone
    #[arg(skip)]
    price: Vec<FilePrice>,

    /// Address to listen on; any but a loopback address needs --api-key [default: 127.0.0.1]
    #[arg(long, env = "CANDELA_HOST", value_name = "IP", help_heading = "Server")]
    host: String,
    /// Port to listen on; 0 takes a free one [default: 8000]
    #[arg(long, env = "CANDELA_PORT", help_heading = "Server")]
    port: u16,
    /// Key that clients must send (better given in the environment: other users can see flags)
    #[arg(long, env = "CANDELA_API_KEY", hide_env_values = true, value_name = "KEY", help_heading = "Server")]
    api_key: Secret,
    /// Let anyone who reaches a non-loopback address use the server without a key
    #[arg(long, env = "CANDELA_ALLOW_ANONYMOUS", help_heading = "Server",
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    allow_anonymous: bool,
    /// Largest request body, such as 4MiB [default: 4MiB]
    #[arg(long, env = "CANDELA_BODY_BYTES_MAX", value_name = "BYTES", help_heading = "Server")]
    body_bytes_max: ByteSize,
    /// Requests that may wait; one more is answered 429 [default: 1024]
    #[arg(long, env = "CANDELA_WAITING_REQUESTS_MAX", value_name = "N", help_heading = "Server")]
    waiting_requests_max: u64,
    /// Events kept for a client that reads slowly [default: 256]
    #[arg(long, env = "CANDELA_STREAM_BUFFER_EVENTS_MAX", value_name = "N", help_heading = "Server")]
    stream_buffer_events_max: u64,
    /// Seconds a client may leave its stream unread before it is dropped [default: 30]
    #[arg(long, env = "CANDELA_CLIENT_STALL_S_MAX", value_name = "S", help_heading = "Server")]
    client_stall_s_max: u64,
    /// Seconds that running requests get to finish at shutdown [default: 30]
    #[arg(long, env = "CANDELA_DRAIN_TIMEOUT", value_name = "S", help_heading = "Server")]
    drain_timeout: u64,

    /// Device: cpu, cuda:N, or auto for a GPU where there is one [default: auto]
    #[arg(long, env = "CANDELA_DEVICE", help_heading = "Engine")]
    device: Device,
    /// Share of a GPU's memory that may be used: what weights and workspace leave of it holds the KV
    /// cache [default: 0.90]
    #[arg(long, env = "CANDELA_GPU_MEMORY_UTILIZATION", value_name = "SHARE", help_heading = "Engine")]
    gpu_memory_utilization: f64,
    /// Element type of weights, activations and KV cache on a GPU: bf16 or f16 [default: bf16]
    #[arg(long, env = "CANDELA_DTYPE", value_name = "DTYPE", help_heading = "Engine")]
    dtype: GpuDtype,
    /// Run every step of a GPU kernel by kernel, and do not capture decode steps as graphs: slower,
    /// for finding faults
    #[arg(long, env = "CANDELA_NO_CUDA_GRAPHS", help_heading = "Engine",
        num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    no_cuda_graphs: bool,
    /// auto reads weights; dummy makes them up on the GPU for the shapes of a config.json, to time
    /// models whose weights nobody has [default: auto]
    #[arg(long, env = "CANDELA_LOAD_FORMAT", value_name = "FORMAT", help_heading = "Engine")]
    load_format: LoadFormat,
    /// CPU threads [default: every core this process may use]
    #[arg(long, env = "CANDELA_THREADS", value_name = "N", help_heading = "Engine")]
    threads: u64,
    /// Vector instructions to use at most, to compare: portable, avx2 or avx512 [default: the best that
    /// the processor has]
    #[arg(long, env = "CANDELA_ISA_MAX", value_name = "NAME", help_heading = "Engine")]
    isa_max: IsaMax,
    /// Take the device for the GPU of this UUID, whose energy is then attributed. For a device that
    /// does not say which GPU it is, and for tests
    #[arg(long, env = "CANDELA_METER_GPU_UUID", value_name = "UUID", hide = true)]
    meter_gpu_uuid: String,
    /// Longest prompt plus output in tokens [default: the model's own]
    #[arg(long, env = "CANDELA_MAX_MODEL_LEN", value_name = "TOKENS", help_heading = "Engine")]
    max_model_len: u64,
    /// Memory for the KV cache, such as 4GiB [default: half of what is available; on a GPU what
    /// --gpu-memory-utilization leaves]
    #[arg(long, env = "CANDELA_KV_CACHE_MEMORY", value_name = "BYTES", help_heading = "Engine")]
    kv_cache_memory: ByteSize,
    /// Element type of the KV cache on the CPU: f16, or f32 for twice the memory and the exactest
    /// logits [default: f16]
    #[arg(long, env = "CANDELA_KV_CACHE_DTYPE", value_name = "DTYPE", help_heading = "Engine")]
    kv_cache_dtype: KvCacheDtype,
    /// Tokens computed in one step, prefill and decode together [default: 512, on a GPU 2048]
    #[arg(long, env = "CANDELA_MAX_NUM_BATCHED_TOKENS", value_name = "TOKENS", help_heading = "Engine")]
    max_num_batched_tokens: u64,
    /// Sequences that run at once [default: 32, on a GPU 256]
    #[arg(long, env = "CANDELA_MAX_NUM_SEQS", value_name = "N", help_heading = "Engine")]
    max_num_seqs: u64,
    /// Steps in flight, 1 or 2 [default: 2]
    #[arg(long, env = "CANDELA_PIPELINE_DEPTH", value_name = "N", help_heading = "Engine")]
    pipeline_depth: u64,

    /// Largest output a request may ask for [default: what the context leaves]
    #[arg(long, env = "CANDELA_MAX_COMPLETION_TOKENS", value_name = "TOKENS", help_heading = "Requests")]
    max_completion_tokens: u64,
    /// Largest `n` of a request [default: 16]
    #[arg(long, env = "CANDELA_CHOICES_MAX", value_name = "N", help_heading = "Requests")]
    choices_max: u64,
    /// Largest `top_logprobs` of a request [default: 20]
    #[arg(long, env = "CANDELA_LOGPROBS_TOP_MAX", value_name = "N", help_heading = "Requests")]
    logprobs_top_max: u64,

    /// Log lines as text or json [default: text]
    #[arg(long, env = "CANDELA_LOG_FORMAT", value_name = "FORMAT", help_heading = "Logging")]
    log_format: LogFormat,
}
