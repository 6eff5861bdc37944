//! Where the ops of a model run.

use std::sync::Arc;

use candle_core::{Result, bail};

use super::{
    CpuPool, LinearScratch,
    gpu::{Buffer, Gpu, Half, StepBuffers},
};

/// KV blocks that a split of decode attention takes at a time.
const CHUNK_BLOCKS: usize = 8;
/// Blocks of a kernel that keep a multiprocessor busy with loads, and most splits of a sequence.
const BLOCKS_A_MULTIPROCESSOR: usize = 4;
const SPLITS_MAX: usize = 64;

/// The CPU, or a GPU.
pub enum Place {
    Cpu(CpuPlace),
    Gpu(GpuPlace),
}

/// Threads, and room for quantised activations.
pub struct CpuPlace {
    pub pool: Arc<CpuPool>,
    pub scratch: LinearScratch,
}

/// A GPU, the type of everything on it, and where a step's metadata lies.
pub struct GpuPlace {
    pub gpu: Arc<dyn Gpu>,
    pub dtype: Half,
    pub step: StepBuffers,
    pub splits: Splits,
}

/// How decode attention divides a sequence's KV among blocks of threads, and where the parts meet.
pub struct Splits {
    busy_blocks: usize,
    partial: Buffer,
    stats: Buffer,
}

impl Splits {
    /// For up to `rows` sequences of a model.
    pub fn new(
        gpu: &dyn Gpu,
        rows: usize,
        kv_heads: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<Self> {
        let busy_blocks = gpu.multiprocessors() * BLOCKS_A_MULTIPROCESSOR;
        let most = (1..=rows).map(|rows| rows * splits(busy_blocks, rows * kv_heads)).max();
        let places = most.unwrap_or(0) * heads;
        Ok(Self {
            busy_blocks,
            partial: gpu.allocate(places * head_dim * size_of::<f32>())?,
            stats: gpu.allocate(places * 2 * size_of::<f32>())?,
        })
    }

    /// Splits of each sequence where there are `units` of rows and KV heads: enough to keep the GPU busy.
    pub fn count(&self, units: usize) -> usize {
        splits(self.busy_blocks, units)
    }

    pub fn chunk_blocks(&self) -> usize {
        CHUNK_BLOCKS
    }

    pub fn partial(&self) -> u64 {
        self.partial.address
    }

    pub fn stats(&self) -> u64 {
        self.stats.address
    }
}

fn splits(busy_blocks: usize, units: usize) -> usize {
    busy_blocks.div_ceil(units.max(1)).clamp(1, SPLITS_MAX)
}

impl Place {
    /// The CPU, with room for `rows_max` rows of `k_max` inputs to a product.
    pub fn on_cpu(pool: Arc<CpuPool>, rows_max: usize, k_max: usize) -> Self {
        Self::Cpu(CpuPlace { pool, scratch: LinearScratch::new(rows_max, k_max) })
    }

    pub fn cpu(&self) -> Result<&CpuPlace> {
        match self {
            Self::Cpu(cpu) => Ok(cpu),
            Self::Gpu(_) => bail!("an op of a model on a GPU was asked to run on the CPU"),
        }
    }

    pub fn pool(&self) -> Result<&CpuPool> {
        self.cpu().map(|cpu| &*cpu.pool)
    }

    pub fn gpu(&self) -> Result<&GpuPlace> {
        match self {
            Self::Gpu(gpu) => Ok(gpu),
            Self::Cpu(_) => bail!("an op of a model on the CPU was asked to run on a GPU"),
        }
    }
}
