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
pub use load::{GgufFile, WeightFiles, load, load_dummy, load_to};

use crate::ops::{Matrix, Vector};

/// One transformer layer, fused as the forward wants it.
pub struct LayerWeights {
    pub attn_norm: Vector,
    /// Rows of q, then k, then v; q and k in rotate-half order.
    pub qkv: Matrix,
    pub qkv_bias: Option<Vector>,
    pub q_norm: Option<Vector>,
    pub k_norm: Option<Vector>,
    pub o: Matrix,
    pub o_bias: Option<Vector>,
    pub ffn_norm: Vector,
    /// Rows of gate, then up.
    pub gate_up: Matrix,
    pub gate_up_bias: Option<Vector>,
    pub down: Matrix,
    pub down_bias: Option<Vector>,
}

pub struct ModelWeights {
    pub embed: Arc<Matrix>,
    pub layers: Vec<LayerWeights>,
    pub final_norm: Vector,
    /// The embedding itself where they are tied.
    pub lm_head: Arc<Matrix>,
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
