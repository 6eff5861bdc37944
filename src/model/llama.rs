//! The Llama-family forward, written once over in-place ops on one arena.

use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor};
use half::{f16, vec::HalfBitsVecExt};

use crate::ops::{
    Attention, AttentionTiles, BlockCopy, CpuPool, Embed, GatherRows, KvDtype, KvShape, KvWrite,
    Linear, LinearScratch, PackedWeight, RmsNorm, Rope, SiluMul, StepInputs, View, arena,
};

use super::{LayerWeights, ModelConfig, ModelError, ModelWeights};

/// What the workspace is sized for.
#[derive(Clone, Copy, Debug)]
pub struct RuntimeLimits {
    pub step_tokens_max: usize,
    pub logits_rows_max: usize,
    pub kv_blocks: usize,
    pub kv_dtype: KvDtype,
    /// Longest sequence; bounds the rope table.
    pub context_tokens_max: usize,
}

/// Where everything lies in the arena. `T` rows, unless said otherwise.
struct Workspace {
    hidden: View,
    normed: View,
    qkv: View,
    attended: View,
    projected: View,
    gate_up: View,
    activated: View,
    /// `[R, hidden]`, `[R, vocab]`.
    picked: View,
    logits: View,
}

/// A model with its KV cache and workspace.
pub struct Llama {
    config: ModelConfig,
    weights: ModelWeights,
    limits: RuntimeLimits,
    pool: Arc<CpuPool>,
    kv_shape: KvShape,
    kv: Tensor,
    arena: Tensor,
    views: Workspace,
    scratch: LinearScratch,
    rope_table: Vec<f32>,
}

impl Llama {
    pub fn new(
        config: ModelConfig,
        weights: ModelWeights,
        limits: RuntimeLimits,
        pool: Arc<CpuPool>,
    ) -> std::result::Result<Self, ModelError> {
        config.validate()?;
        let kv_shape = KvShape {
            layers: config.layers,
            blocks: limits.kv_blocks,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        };
        let (views, elements) = lay_out(&config, &limits);
        let k_max =
            config.hidden_size.max(config.intermediate_size).max(config.heads * config.head_dim);
        Ok(Self {
            kv: zeros(kv_shape.elements(), limits.kv_dtype)?,
            arena: Tensor::zeros(elements, DType::F32, &Device::Cpu)?,
            scratch: LinearScratch::new(limits.step_tokens_max.max(limits.logits_rows_max), k_max),
            rope_table: rope_table(&config, limits.context_tokens_max),
            config,
            weights,
            limits,
            pool,
            kv_shape,
            views,
        })
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The threads that the model computes on.
    pub fn pool(&self) -> &CpuPool {
        &self.pool
    }

    /// Bytes of K and V of one block over all layers.
    pub fn kv_bytes_per_block(config: &ModelConfig, dtype: KvDtype) -> usize {
        let shape = KvShape {
            layers: config.layers,
            blocks: 1,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
        };
        shape.elements() * DType::from(dtype).size_in_bytes()
    }

    /// Bytes of the activation arena.
    pub fn workspace_bytes(config: &ModelConfig, limits: &RuntimeLimits) -> usize {
        lay_out(config, limits).1 * size_of::<f32>()
    }

    /// Runs a step. Logits of `inputs.sample_rows` stay in the arena; `sampled` holds the last
    /// sampled token by slot.
    pub fn forward(&self, inputs: &StepInputs, sampled: &[u32]) -> Result<()> {
        let rows = inputs.tokens();
        if rows > self.limits.step_tokens_max
            || inputs.sample_rows.len() > self.limits.logits_rows_max
        {
            candle_core::bail!("a step of {rows} rows is larger than the workspace");
        }
        let (views, pool) = (&self.views, &*self.pool);
        if !inputs.block_copies.is_empty() {
            let copy = BlockCopy { shape: self.kv_shape, copies: &inputs.block_copies };
            self.kv.inplace_op1(&copy)?;
        }
        let tiles = AttentionTiles::new(inputs, self.config.heads / self.config.kv_heads);
        let table = &self.weights.embed;
        self.arena.inplace_op1(&Embed { table, inputs, sampled, y: views.hidden, pool })?;
        for (index, layer) in self.weights.layers.iter().enumerate() {
            // The feed-forward of the layer before is still to be added.
            let residual = (index > 0).then_some(views.projected);
            self.norm(residual, &layer.attn_norm, rows)?;
            self.attention(index, layer, inputs, &tiles)?;
            self.norm(Some(views.projected), &layer.ffn_norm, rows)?;
            self.feed_forward(layer, rows)?;
        }
        let residual = (!self.weights.layers.is_empty()).then_some(views.projected);
        self.norm(residual, &self.weights.final_norm, rows)?;
        let picked = GatherRows { x: views.normed, y: views.picked, rows: &inputs.sample_rows };
        self.arena.inplace_op1(&picked)?;
        let wanted = inputs.sample_rows.len();
        self.linear(&self.weights.lm_head, None, views.picked, views.logits, wanted)
    }

    /// Gives access to the logits of the last step, `[rows, vocab]`.
    pub fn with_logits<R>(&self, rows: usize, read: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        let access = LogitsAccess {
            range: self.views.logits.range(rows),
            read: std::cell::Cell::new(Some(read)),
            result: std::cell::Cell::new(None),
        };
        self.arena.inplace_op1(&access)?;
        access.result.take().ok_or_else(|| candle_core::Error::Msg("logits were not read".into()))
    }

    fn norm(&self, residual: Option<View>, weight: &[f32], rows: usize) -> Result<()> {
        self.arena.inplace_op1(&RmsNorm {
            residual,
            h: self.views.hidden,
            y: self.views.normed,
            rows,
            weight,
            eps: self.config.rms_norm_eps,
            pool: &self.pool,
        })
    }

    fn attention(
        &self,
        index: usize,
        layer: &LayerWeights,
        inputs: &StepInputs,
        tiles: &AttentionTiles,
    ) -> Result<()> {
        let (config, views, rows) = (&self.config, &self.views, inputs.tokens());
        self.linear(&layer.qkv, layer.qkv_bias.as_deref(), views.normed, views.qkv, rows)?;
        self.arena.inplace_op1(&Rope {
            qkv: views.qkv,
            positions: &inputs.positions,
            qk_heads: config.heads + config.kv_heads,
            heads: config.heads,
            head_dim: config.head_dim,
            table: &self.rope_table,
            norms: layer.q_norm.as_deref().zip(layer.k_norm.as_deref()),
            eps: config.rms_norm_eps,
            pool: &self.pool,
        })?;
        let write = KvWrite {
            shape: self.kv_shape,
            layer: index,
            qkv: views.qkv,
            heads: config.heads,
            inputs,
            pool: &self.pool,
        };
        self.kv.inplace_op2(&self.arena, &write)?;
        let attention = Attention {
            shape: self.kv_shape,
            layer: index,
            heads: config.heads,
            qkv: views.qkv,
            y: views.attended,
            window: config.layer_windows[index],
            inputs,
            tiles,
            pool: &self.pool,
        };
        self.arena.inplace_op2(&self.kv, &attention)?;
        self.linear(&layer.o, layer.o_bias.as_deref(), views.attended, views.projected, rows)
    }

    fn feed_forward(&self, layer: &LayerWeights, rows: usize) -> Result<()> {
        let views = &self.views;
        let bias = layer.gate_up_bias.as_deref();
        self.linear(&layer.gate_up, bias, views.normed, views.gate_up, rows)?;
        self.arena.inplace_op1(&SiluMul {
            gate_up: views.gate_up,
            y: views.activated,
            rows,
            pool: &self.pool,
        })?;
        let bias = layer.down_bias.as_deref();
        self.linear(&layer.down, bias, views.activated, views.projected, rows)
    }

    fn linear(
        &self,
        weight: &PackedWeight,
        bias: Option<&[f32]>,
        x: View,
        y: View,
        rows: usize,
    ) -> Result<()> {
        let (scratch, pool) = (&self.scratch, &*self.pool);
        self.arena.inplace_op1(&Linear { weight, bias, x, y, rows, scratch, pool })
    }
}

/// Lends the logits out of the arena.
struct LogitsAccess<F, R> {
    range: std::ops::Range<usize>,
    read: std::cell::Cell<Option<F>>,
    result: std::cell::Cell<Option<R>>,
}

impl<F: FnOnce(&mut [f32]) -> R, R> InplaceOp1 for LogitsAccess<F, R> {
    fn name(&self) -> &'static str {
        "logits"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let logits = &mut arena::f32_mut("logits", storage, layout)?[self.range.clone()];
        self.result.set(self.read.take().map(|read| read(logits)));
        Ok(())
    }
}

fn lay_out(config: &ModelConfig, limits: &RuntimeLimits) -> (Workspace, usize) {
    let mut used = 0;
    let mut view = |rows: usize, cols: usize| {
        let view = View { offset: used, cols };
        used += rows * cols;
        view
    };
    let (tokens, picked) = (limits.step_tokens_max, limits.logits_rows_max);
    let workspace = Workspace {
        hidden: view(tokens, config.hidden_size),
        normed: view(tokens, config.hidden_size),
        qkv: view(tokens, config.qkv_cols()),
        attended: view(tokens, config.heads * config.head_dim),
        projected: view(tokens, config.hidden_size),
        gate_up: view(tokens, 2 * config.intermediate_size),
        activated: view(tokens, config.intermediate_size),
        picked: view(picked, config.hidden_size),
        logits: view(picked, config.vocab_size),
    };
    (workspace, used)
}

/// Zeros of which a page takes memory only once it is written.
fn zeros(elements: usize, dtype: KvDtype) -> Result<Tensor> {
    match dtype {
        KvDtype::F32 => Tensor::from_vec(vec![0f32; elements], elements, &Device::Cpu),
        // Zeros of f16 would be written one by one.
        KvDtype::F16 => {
            let zeros = vec![0u16; elements].reinterpret_into::<f16>();
            Tensor::from_vec(zeros, elements, &Device::Cpu)
        }
    }
}

/// Cosines and sines of every position, `[positions, head_dim]`.
fn rope_table(config: &ModelConfig, positions: usize) -> Vec<f32> {
    let frequencies = config.rope_frequencies();
    let mut table = Vec::with_capacity(positions * config.head_dim);
    for position in 0..positions {
        let angles = frequencies.iter().map(|frequency| frequency * position as f64);
        table.extend(angles.clone().map(|angle| angle.cos() as f32));
        table.extend(angles.map(|angle| angle.sin() as f32));
    }
    table
}
