//! Model files to weights, and the one forward.

pub mod config;
pub mod gguf;
mod gguf_blocks;
mod gguf_value;
pub mod hf_config;
pub mod llama;
pub mod load;
pub mod safetensors;
pub mod weights;

use std::sync::Arc;

pub use config::{Biases, Family, ModelConfig, RopeScaling};
pub use llama::{Llama, RuntimeLimits};
pub use load::{GgufFile, WeightFiles, load};

use crate::ops::PackedWeight;

/// One transformer layer, fused as the forward wants it.
pub struct LayerWeights {
    pub attn_norm: Vec<f32>,
    /// Rows of q, then k, then v; q and k in rotate-half order.
    pub qkv: PackedWeight,
    pub qkv_bias: Option<Vec<f32>>,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub o: PackedWeight,
    pub o_bias: Option<Vec<f32>>,
    pub ffn_norm: Vec<f32>,
    /// Rows of gate, then up.
    pub gate_up: PackedWeight,
    pub gate_up_bias: Option<Vec<f32>>,
    pub down: PackedWeight,
    pub down_bias: Option<Vec<f32>>,
}

pub struct ModelWeights {
    pub embed: Arc<PackedWeight>,
    pub layers: Vec<LayerWeights>,
    pub final_norm: Vec<f32>,
    /// The embedding itself where they are tied.
    pub lm_head: Arc<PackedWeight>,
}

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error("{path}: {source}")]
    Io { path: String, source: std::io::Error },
    #[error("{0}")]
    Format(String),
    #[error("{0} is not supported")]
    Unsupported(String),
    #[error(transparent)]
    Compute(#[from] candle_core::Error),
}
