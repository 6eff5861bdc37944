//! Every default and limit, by name.

/// The file that is read when none is named.
pub const FILE_NAME: &str = "candela.toml";
/// A configuration file larger than this is not one.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

pub const HOST: &str = "127.0.0.1";
pub const PORT: u16 = 8000;
pub const BODY_BYTES_MAX: u64 = 4 << 20;
pub const CLIENT_STALL_S_MAX: u64 = 30;
pub const DRAIN_TIMEOUT_S: u64 = 30;
pub const STREAM_BUFFER_EVENTS_MAX: u64 = 256;
pub const WAITING_REQUESTS_MAX: u64 = 1024;
/// A key shorter than this can be guessed.
pub const API_KEY_BYTES_MIN: usize = 8;

pub const STEP_TOKENS_MAX: usize = 512;
pub const RUNNING_SEQS_MAX: usize = 32;
pub const GPU_STEP_TOKENS_MAX: usize = 2048;
pub const GPU_RUNNING_SEQS_MAX: usize = 256;
pub const GPU_MEMORY_UTILIZATION: f64 = 0.90;
pub const PIPELINE_DEPTH: u64 = 2;
/// Share of the available memory that the KV cache takes unless told otherwise: the weights are
/// mapped by then, the rest is for activations and for the machine's other work.
pub const KV_CACHE_MEMORY_SHARE: f64 = 0.5;
/// The least a KV cache may be given; below it not even a short request fits.
pub const KV_CACHE_MEMORY_BYTES_MIN: u64 = 1 << 20;

pub const LEASE_OUTSTANDING_TOKENS_MAX: u64 = 256;

/// Present windows of budgets must not reach into rolled-up days, and a month is the longest.
pub const RETENTION_DAYS_LEAST: u64 = 35;
/// A hundred years.
pub const RETENTION_DAYS_LIMIT: u64 = 36_500;

pub const CHOICES_MAX: u64 = 16;
pub const LOGPROBS_TOP_MAX: u64 = 20;
/// OpenAI's own bound on `n`; also bounds what one request may occupy.
pub const CHOICES_LIMIT: u64 = 128;
/// OpenAI's own bound on `top_logprobs`.
pub const LOGPROBS_TOP_LIMIT: u64 = 20;
pub const THREADS_LIMIT: u64 = 1024;
/// A deadline further away than this is a mistake in the unit.
pub const SECONDS_LIMIT: u64 = 24 * 60 * 60;
/// Token and sequence counts are kept in 32 bits on the device.
pub const COUNT_LIMIT: u64 = 1 << 24;
pub const BODY_BYTES_LIMIT: u64 = 1 << 30;
