//! What the forward needs to know of a model, from a `config.json` or GGUF metadata alike.

use super::ModelError;

/// Beyond any model; products of sizes stay far inside of 64 bits.
const SIZE_MAX: usize = 1 << 24;
const LAYERS_MAX: usize = 1 << 12;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Llama,
    Mistral,
    Qwen2,
    Qwen3,
}

/// How rope frequencies are stretched for contexts beyond the trained one.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f64,
    },
    /// Llama 3.1.
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position: f64,
    },
    /// Divisors of each frequency, as GGUF stores them.
    Factors(Vec<f32>),
}

/// Which projections have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    pub qkv: bool,
    pub o: bool,
    /// Gate, up and down.
    pub mlp: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub max_position: usize,
    /// How many positions back each layer sees, itself included; `None` is all.
    pub layer_windows: Vec<Option<usize>>,
    pub tie_word_embeddings: bool,
    pub biases: Biases,
    pub qk_norm: bool,
    pub eos_token_ids: Vec<u32>,
    pub bos_token_id: Option<u32>,
}

impl ModelConfig {
    /// Sizes that belong together, and within what the kernels take.
    pub fn validate(&self) -> Result<(), ModelError> {
        let wrong = |what: String| Err(ModelError::Format(format!("model configuration: {what}")));
        let sizes = [self.vocab_size, self.hidden_size, self.intermediate_size, self.layers];
        for size in sizes.into_iter().chain([self.heads, self.kv_heads, self.max_position]) {
            if size == 0 || size > SIZE_MAX {
                return wrong(format!("a size is {size}, not within 1 and {SIZE_MAX}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) || self.heads / self.kv_heads > 16 {
            return wrong(format!("{} heads over {} KV heads", self.heads, self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim == 0 || self.head_dim > 256 {
            return wrong(format!("head_dim {} is not even or above 256", self.head_dim));
        }
        if self.layer_windows.len() != self.layers || self.layer_windows.contains(&Some(0)) {
            return wrong(format!("windows {:?} of {} layers", self.layer_windows, self.layers));
        }
        if let RopeScaling::Llama3 { low_freq_factor, high_freq_factor, .. } = &self.rope_scaling
            && low_freq_factor >= high_freq_factor
        {
            return wrong(format!("low_freq_factor {low_freq_factor}, high {high_freq_factor}"));
        }
        if let RopeScaling::Factors(factors) = &self.rope_scaling
            && factors.len() != self.head_dim / 2
        {
            return wrong(format!("{} rope factors for head_dim {}", factors.len(), self.head_dim));
        }
        Ok(())
    }

    /// How far back attention sees at most; `None` where any layer sees everything.
    pub fn window(&self) -> Option<usize> {
        let windows: Option<Vec<usize>> = self.layer_windows.iter().copied().collect();
        windows?.into_iter().max()
    }

    /// Columns of the fused q, k, v.
    pub fn qkv_cols(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Radians per position of each rotated pair.
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let half = self.head_dim / 2;
        let base = (0..half).map(|i| self.rope_theta.powf(-(i as f64) / half as f64));
        match &self.rope_scaling {
            RopeScaling::None => base.collect(),
            RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
            RopeScaling::Factors(divisors) => {
                base.zip(divisors).map(|(f, divisor)| f / f64::from(*divisor)).collect()
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position: original,
            } => base
                .map(|f| {
                    let turns = original * f / std::f64::consts::TAU;
                    if turns < *low {
                        f / factor
                    } else if turns > *high {
                        f
                    } else {
                        let smooth = (turns - low) / (high - low);
                        (1.0 - smooth) * f / factor + smooth * f
                    }
                })
                .collect(),
        }
    }
}

/// A count of layers that something may be allocated for.
pub(super) fn checked_layers(layers: usize) -> Result<usize, ModelError> {
    let wrong = || ModelError::Format(format!("model configuration: {layers} layers"));
    (layers <= LAYERS_MAX).then_some(layers).ok_or_else(wrong)
}
