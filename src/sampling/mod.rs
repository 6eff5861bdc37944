//! Logits to tokens.

pub mod gpu;
pub mod params;
pub mod philox;
pub mod sampler;

pub use params::{LOGIT_BIAS_MAX, SamplingParams, TokenLogprobs};
pub use sampler::{SampleRow, Sampled, Sampler, key_of, token_logprobs};
