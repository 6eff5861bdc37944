//! What a request asks of the sampler.

use std::sync::Arc;

use crate::types::TokenId;

/// Tokens that one request may have a bias for: each seat of a GPU keeps as many.
pub const LOGIT_BIAS_MAX: usize = 1024;

/// Validated sampling parameters of one request. `Default` is plain sampling at temperature 1.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 means greedy.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 is off.
    pub top_p: f32,
    /// 0 is off.
    pub top_k: u32,
    /// Minimum probability relative to the most probable token, in [0, 1]; 0 is off.
    pub min_p: f32,
    /// Subtracted once from the logit of every token that the output already holds.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of single tokens, up to [`LOGIT_BIAS_MAX`] of them.
    pub logit_bias: Arc<[(TokenId, f32)]>,
    /// The generator's key, with the choice index; drawn at random by the caller if not given.
    pub seed: u64,
    /// How many alternatives to report beside the chosen token; `None` reports no logprobs.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Arc::from([]),
            seed: 0,
            logprobs: None,
        }
    }
}

/// Log-probability of one token at one position under the model itself (before penalties, bias and
/// temperature), with the most probable alternatives, best first.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    pub token: TokenId,
    pub logprob: f32,
    pub top: Vec<(TokenId, f32)>,
}
