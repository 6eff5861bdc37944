//! One file per op of the forward.

pub mod arena;
pub mod attention;
pub mod embed;
pub mod gather_rows;
pub mod kv_cache;
pub mod lanes;
pub mod linear;
pub mod logits;
pub mod pool;
pub mod rms_norm;
pub mod rope;
pub mod silu_mul;
pub mod simd;
pub mod step_inputs;
pub mod tile;
pub mod view;
pub mod weight;

pub use attention::{Attention, AttentionTiles};
pub use embed::Embed;
pub use gather_rows::GatherRows;
pub use kv_cache::{BlockCopy, KV_BLOCK_TOKENS, KvDtype, KvShape, KvWrite};
pub use linear::{Linear, LinearScratch};
pub use pool::CpuPool;
pub use rms_norm::RmsNorm;
pub use rope::Rope;
pub use silu_mul::SiluMul;
pub use simd::Isa;
pub use step_inputs::StepInputs;
pub use view::View;
pub use weight::{Bits, DenseType, PackedWeight, PackedWeightBuilder, QuantRow, QuantSpec};
