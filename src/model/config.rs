//! What the forward needs to know of a model, from a `config.json` or GGUF metadata alike.

use serde_json::Value;

use super::ModelError;

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
    pub sliding_window: Option<usize>,
    pub tie_word_embeddings: bool,
    pub attention_bias: bool,
    pub qk_norm: bool,
    pub eos_token_ids: Vec<u32>,
    pub bos_token_id: Option<u32>,
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json`.
    pub fn from_hf_json(text: &str) -> Result<Self, ModelError> {
        let json: Value = serde_json::from_str(text)
            .map_err(|error| ModelError::Format(format!("config.json: {error}")))?;
        let family = family(&json)?;
        let hidden_size = size(&json, "hidden_size")?;
        let heads = size(&json, "num_attention_heads")?;
        let window = json.get("sliding_window").and_then(Value::as_u64).map(|w| w as usize);
        let uses_window = match family {
            Family::Mistral => true,
            Family::Llama => false,
            _ => flag(&json, "use_sliding_window", false),
        };
        let config = Self {
            family,
            vocab_size: size(&json, "vocab_size")?,
            hidden_size,
            intermediate_size: size(&json, "intermediate_size")?,
            layers: size(&json, "num_hidden_layers")?,
            heads,
            kv_heads: optional_size(&json, "num_key_value_heads").unwrap_or(heads),
            head_dim: optional_size(&json, "head_dim").unwrap_or(hidden_size / heads.max(1)),
            rms_norm_eps: json.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6) as f32,
            rope_theta: rope_theta(&json),
            rope_scaling: rope_scaling(&json)?,
            max_position: optional_size(&json, "max_position_embeddings").unwrap_or(2048),
            sliding_window: window.filter(|_| uses_window),
            tie_word_embeddings: flag(&json, "tie_word_embeddings", false),
            attention_bias: family == Family::Qwen2 || flag(&json, "attention_bias", false),
            qk_norm: family == Family::Qwen3,
            eos_token_ids: ids(json.get("eos_token_id")),
            bos_token_id: ids(json.get("bos_token_id")).first().copied(),
        };
        if flag(&json, "mlp_bias", false) {
            return Err(ModelError::Unsupported("mlp_bias".into()));
        }
        config.validate()?;
        Ok(config)
    }

    /// Sizes that belong together, and within what the kernels take.
    pub fn validate(&self) -> Result<(), ModelError> {
        let wrong = |what: String| Err(ModelError::Format(format!("model configuration: {what}")));
        let sizes = [self.vocab_size, self.hidden_size, self.intermediate_size, self.layers];
        if sizes.contains(&0) || self.heads == 0 || self.kv_heads == 0 || self.max_position == 0 {
            return wrong("a size is zero".into());
        }
        if !self.heads.is_multiple_of(self.kv_heads) || self.heads / self.kv_heads > 16 {
            return wrong(format!("{} heads over {} KV heads", self.heads, self.kv_heads));
        }
        if !self.head_dim.is_multiple_of(2) || self.head_dim == 0 || self.head_dim > 256 {
            return wrong(format!("head_dim {} is not even or above 256", self.head_dim));
        }
        if let RopeScaling::Factors(factors) = &self.rope_scaling
            && factors.len() != self.head_dim / 2
        {
            return wrong(format!("{} rope factors for head_dim {}", factors.len(), self.head_dim));
        }
        Ok(())
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

fn family(json: &Value) -> Result<Family, ModelError> {
    let name = json.pointer("/architectures/0").and_then(Value::as_str).unwrap_or("(none)");
    match name {
        "LlamaForCausalLM" => Ok(Family::Llama),
        "MistralForCausalLM" => Ok(Family::Mistral),
        "Qwen2ForCausalLM" => Ok(Family::Qwen2),
        "Qwen3ForCausalLM" => Ok(Family::Qwen3),
        other => Err(ModelError::Unsupported(format!("architecture {other}"))),
    }
}

fn rope_theta(json: &Value) -> f64 {
    json.get("rope_theta")
        .or_else(|| json.pointer("/rope_parameters/rope_theta"))
        .and_then(Value::as_f64)
        .unwrap_or(10_000.0)
}

fn rope_scaling(json: &Value) -> Result<RopeScaling, ModelError> {
    let scaling = [json.get("rope_scaling"), json.get("rope_parameters")]
        .into_iter()
        .flatten()
        .find(|value| !value.is_null());
    let Some(scaling) = scaling else { return Ok(RopeScaling::None) };
    let kind = scaling.get("rope_type").or_else(|| scaling.get("type")).and_then(Value::as_str);
    let number = |key: &str| {
        let value = scaling.get(key).and_then(Value::as_f64).filter(|value| *value > 0.0);
        value.ok_or_else(|| ModelError::Format(format!("config.json: rope scaling lacks {key}")))
    };
    match kind.unwrap_or("default") {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position: number("original_max_position_embeddings")?,
        }),
        other => Err(ModelError::Unsupported(format!("rope scaling {other}"))),
    }
}

fn optional_size(json: &Value, key: &str) -> Option<usize> {
    json.get(key).and_then(Value::as_u64).map(|value| value as usize)
}

fn size(json: &Value, key: &str) -> Result<usize, ModelError> {
    optional_size(json, key)
        .ok_or_else(|| ModelError::Format(format!("config.json lacks {key}, or it is no number")))
}

fn flag(json: &Value, key: &str, default: bool) -> bool {
    json.get(key).and_then(Value::as_bool).unwrap_or(default)
}

fn ids(value: Option<&Value>) -> Vec<u32> {
    match value {
        Some(Value::Array(list)) => {
            list.iter().filter_map(Value::as_u64).map(|id| id as u32).collect()
        }
        Some(value) => value.as_u64().map(|id| id as u32).into_iter().collect(),
        None => Vec::new(),
    }
}
