//! The Llama-family forward, written once over in-place ops on one arena.

use std::sync::Arc;

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, bail};
use half::{f16, vec::HalfBitsVecExt};

use crate::ops::{
    Attention, AttentionTiles, BlockCopy, CpuPool, Embed, GatherRows, GpuPlace, KvDtype, KvShape,
    KvWrite, Linear, Matrix, Place, Region, RmsNorm, Rope, SiluMul, StepInputs, Vector, View,
    WeightPlace, arena, gpu::PACK, region::GpuOp1,
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

/// Elements of a GPU's arena that a logit takes: 16 bits against 32.
const LOGIT_ELEMENTS: usize = 2;

/// Views begin at multiples of so many elements: on a GPU 256 bytes, which is what cuBLASLt takes operands
/// to be aligned to unless it is told otherwise.
const VIEW_ELEMENTS: usize = 128;

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
    place: Place,
    kv_shape: KvShape,
    kv: Region,
    arena: Region,
    views: Workspace,
    rope_table: Vector,
}

impl Llama {
    /// On the CPU.
    pub fn new(
        config: ModelConfig,
        weights: ModelWeights,
        limits: RuntimeLimits,
        pool: Arc<CpuPool>,
    ) -> std::result::Result<Self, ModelError> {
        config.validate()?;
        let k_max =
            config.hidden_size.max(config.intermediate_size).max(config.heads * config.head_dim);
        let rows_max = limits.step_tokens_max.max(limits.logits_rows_max);
        let (views, elements) = lay_out(&config, &limits, 1);
        let kv_shape = kv_shape(&config, limits.kv_blocks);
        Ok(Self {
            kv: Region::Tensor(zeros(kv_shape.elements(), limits.kv_dtype)?),
            arena: Region::Tensor(Tensor::zeros(elements, DType::F32, &Device::Cpu)?),
            rope_table: Vector::Host(rope_table(&config, limits.context_tokens_max)),
            place: Place::on_cpu(pool, rows_max, k_max),
            config,
            weights,
            limits,
            kv_shape,
            views,
        })
    }

    /// On a GPU, with weights that are there. Its cache has the type of the weights, whatever
    /// `limits` says.
    pub fn on_gpu(
        config: ModelConfig,
        weights: ModelWeights,
        limits: RuntimeLimits,
        place: GpuPlace,
    ) -> std::result::Result<Self, ModelError> {
        config.validate()?;
        fits_gpu(&config)?;
        let (views, elements) = lay_out(&config, &limits, LOGIT_ELEMENTS);
        let kv_shape = kv_shape(&config, limits.kv_blocks);
        let table = rope_table(&config, limits.context_tokens_max);
        Ok(Self {
            kv: place.gpu.region(kv_shape.elements(), place.dtype)?,
            arena: place.gpu.region(elements, place.dtype)?,
            rope_table: WeightPlace::Gpu(&*place.gpu, place.dtype).wide_vector(table)?,
            place: Place::Gpu(place),
            config,
            weights,
            limits,
            kv_shape,
            views,
        })
    }

    pub fn into_parts(self) -> (ModelConfig, ModelWeights) {
        (self.config, self.weights)
    }

    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The threads that a model on the CPU computes on.
    pub fn pool(&self) -> Result<&CpuPool> {
        self.place.pool()
    }

    /// Where a model on a GPU has its logits, `[logits_rows_max, stride]` of f32, and the stride.
    pub fn gpu_logits(&self) -> Result<(u64, usize)> {
        Ok((self.views.logits.address(self.arena.address()?), self.views.logits.cols))
    }

    /// Bytes of K and V of one block over all layers.
    pub fn kv_bytes_per_block(config: &ModelConfig, dtype: KvDtype) -> usize {
        kv_shape(config, 1).elements() * DType::from(dtype).size_in_bytes()
    }

    /// Bytes of the activation arena on the CPU.
    pub fn workspace_bytes(config: &ModelConfig, limits: &RuntimeLimits) -> usize {
        lay_out(config, limits, 1).1 * size_of::<f32>()
    }

    /// Runs a step, whose metadata a GPU has in its buffers already. Logits of `inputs.sample_rows`
    /// stay in the arena; `sampled` holds the last sampled token by slot, and a GPU has its own.
    pub fn forward(&self, inputs: &StepInputs, sampled: &[u32]) -> Result<()> {
        let rows = inputs.tokens();
        if rows > self.limits.step_tokens_max
            || inputs.sample_rows.len() > self.limits.logits_rows_max
        {
            candle_core::bail!("a step of {rows} rows is larger than the workspace");
        }
        let (views, place) = (&self.views, &self.place);
        if !inputs.block_copies.is_empty() {
            let copy = BlockCopy { shape: self.kv_shape, copies: &inputs.block_copies, place };
            self.kv.apply(&copy)?;
        }
        if rows == 0 {
            return Ok(());
        }
        let tiles = match place {
            Place::Cpu(_) => AttentionTiles::new(inputs, self.config.heads / self.config.kv_heads),
            Place::Gpu(_) => AttentionTiles::default(),
        };
        let table = &self.weights.embed;
        self.arena.apply(&Embed { table, inputs, sampled, y: views.hidden, place })?;
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
        let picked = &inputs.sample_rows;
        self.arena.apply(&GatherRows { x: views.normed, y: views.picked, rows: picked, place })?;
        self.arena.apply(&Linear {
            weight: &self.weights.lm_head,
            bias: None,
            x: views.picked,
            y: views.logits,
            rows: picked.len(),
            wide: true,
            place,
        })
    }

    /// Gives access to the logits of the last step, `[rows, vocab]`.
    pub fn with_logits<R>(&self, rows: usize, read: impl FnOnce(&mut [f32]) -> R) -> Result<R> {
        let access = LogitsAccess {
            range: self.views.logits.range(rows),
            read: std::cell::Cell::new(Some(read)),
            result: std::cell::Cell::new(None),
        };
        self.arena.apply(&access)?;
        access.result.take().ok_or_else(|| candle_core::Error::Msg("logits were not read".into()))
    }

    fn norm(&self, residual: Option<View>, weight: &Vector, rows: usize) -> Result<()> {
        self.arena.apply(&RmsNorm {
            residual,
            h: self.views.hidden,
            y: self.views.normed,
            rows,
            weight,
            eps: self.config.rms_norm_eps,
            place: &self.place,
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
        self.linear(&layer.qkv, layer.qkv_bias.as_ref(), views.normed, views.qkv, rows)?;
        let rope = Rope {
            qkv: views.qkv,
            positions: &inputs.positions,
            qk_heads: config.heads + config.kv_heads,
            heads: config.heads,
            head_dim: config.head_dim,
            table: &self.rope_table,
            norms: layer.q_norm.as_ref().zip(layer.k_norm.as_ref()),
            eps: config.rms_norm_eps,
            place: &self.place,
        };
        self.arena.apply(&rope)?;
        let write = KvWrite {
            shape: self.kv_shape,
            layer: index,
            qkv: views.qkv,
            heads: config.heads,
            inputs,
            rope: &rope,
            place: &self.place,
        };
        self.kv.apply_with(&self.arena, &write)?;
        let attention = Attention {
            shape: self.kv_shape,
            layer: index,
            heads: config.heads,
            qkv: views.qkv,
            y: views.attended,
            window: config.layer_windows[index],
            inputs,
            tiles,
            place: &self.place,
        };
        self.arena.apply_with(&self.kv, &attention)?;
        self.linear(&layer.o, layer.o_bias.as_ref(), views.attended, views.projected, rows)
    }

    fn feed_forward(&self, layer: &LayerWeights, rows: usize) -> Result<()> {
        let views = &self.views;
        let bias = layer.gate_up_bias.as_ref();
        self.linear(&layer.gate_up, bias, views.normed, views.gate_up, rows)?;
        self.arena.apply(&SiluMul {
            gate_up: views.gate_up,
            y: views.activated,
            rows,
            place: &self.place,
        })?;
        let bias = layer.down_bias.as_ref();
        self.linear(&layer.down, bias, views.activated, views.projected, rows)
    }

    fn linear(
        &self,
        weight: &Matrix,
        bias: Option<&Vector>,
        x: View,
        y: View,
        rows: usize,
    ) -> Result<()> {
        let place = &self.place;
        self.arena.apply(&Linear { weight, bias, x, y, rows, wide: false, place })
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

impl<F: FnOnce(&mut [f32]) -> R, R> GpuOp1 for LogitsAccess<F, R> {
    fn gpu_fwd(&self, _: u64) -> Result<()> {
        bail!("logits on a GPU are read there")
    }
}

fn kv_shape(config: &ModelConfig, blocks: usize) -> KvShape {
    let ModelConfig { layers, kv_heads, head_dim, .. } = *config;
    KvShape { layers, blocks, kv_heads, head_dim }
}

/// Sizes that the GPU's kernels take.
fn fits_gpu(config: &ModelConfig) -> std::result::Result<(), ModelError> {
    let no = |what: String| Err(ModelError::Unsupported(format!("{what} on a GPU")));
    if !matches!(config.head_dim, 64 | 128) {
        return no(format!("head_dim {} (64 and 128 are)", config.head_dim));
    }
    let rows = [config.hidden_size, config.intermediate_size];
    if let Some(size) = rows.into_iter().find(|size| !size.is_multiple_of(PACK)) {
        return no(format!("a size of {size}, which is no multiple of {PACK},"));
    }
    Ok(())
}

/// `logit_elements`: elements of the arena that a logit takes.
fn lay_out(
    config: &ModelConfig,
    limits: &RuntimeLimits,
    logit_elements: usize,
) -> (Workspace, usize) {
    let mut used: usize = 0;
    let mut view = |rows: usize, cols: usize, elements: usize| {
        let view = View { offset: used, cols };
        used = (used + rows * cols * elements).next_multiple_of(VIEW_ELEMENTS);
        view
    };
    let (tokens, picked) = (limits.step_tokens_max, limits.logits_rows_max);
    let logit_cols = match logit_elements {
        1 => config.vocab_size,
        _ => config.vocab_size.next_multiple_of(PACK),
    };
    let workspace = Workspace {
        hidden: view(tokens, config.hidden_size, 1),
        normed: view(tokens, config.hidden_size, 1),
        qkv: view(tokens, config.qkv_cols(), 1),
        attended: view(tokens, config.heads * config.head_dim, 1),
        projected: view(tokens, config.hidden_size, 1),
        gate_up: view(tokens, 2 * config.intermediate_size, 1),
        activated: view(tokens, config.intermediate_size, 1),
        picked: view(picked, config.hidden_size, 1),
        logits: view(picked, logit_cols, logit_elements),
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
