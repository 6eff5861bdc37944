//! Logits to tokens.

pub mod params;

pub use params::{SamplingParams, TokenLogprobs};
