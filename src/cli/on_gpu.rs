//! A model on a GPU: weights to it, and what memory is left for the KV cache.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::{
    config::{Config, Device, GpuDtype, LoadFormat},
    engine::device::{
        DeviceError, GpuDevice, GpuSpec,
        gpu::Graphs,
        gpus::{self, GpuFacts, OpenGpu},
    },
    model::{self, Llama, ModelConfig, ModelWeights, RuntimeLimits, WeightFiles},
    ops::{KV_BLOCK_TOKENS, KvDtype, WeightPlace, gpu::Half},
};

/// The GPU that a model is to run on, and how.
pub struct GpuChoice {
    pub open: OpenGpu,
    pub dtype: Half,
    pub graphs: bool,
    /// Of all memory of the GPU.
    pub memory_share: f64,
    /// In place of what that share leaves.
    pub kv_cache_bytes: Option<u64>,
    /// Weights are made up.
    pub dummy: bool,
}

/// Opens the GPU that the configuration asks for; none where it is to be the CPU.
pub fn choose(config: &Config) -> Result<Option<GpuChoice>> {
    let ordinal = match config.device {
        Device::Cpu => None,
        Device::Cuda(ordinal) => Some(ordinal),
        Device::Auto => found(gpus::count()),
    };
    let dummy = config.load_format == LoadFormat::Dummy;
    let Some(ordinal) = ordinal else {
        if dummy {
            bail!("load_format dummy makes weights up on a GPU: say --device cuda:N");
        }
        return Ok(None);
    };
    let open = gpus::open(ordinal).map_err(anyhow::Error::msg)?;
    let GpuFacts { name, free_bytes, total_bytes, .. } = &open.facts;
    tracing::info!(%name, uuid = %open.facts.uuid, free_bytes, total_bytes, "GPU");
    Ok(Some(GpuChoice {
        open,
        dtype: match config.gpu_dtype {
            GpuDtype::Bf16 => Half::Bf16,
            GpuDtype::F16 => Half::F16,
        },
        graphs: config.cuda_graphs,
        memory_share: config.gpu_memory_utilization,
        kv_cache_bytes: config.kv_cache_memory_bytes,
        dummy,
    }))
}

/// The first GPU, for `auto`. That there is none is no fault; why is worth a line where the build could
/// use one.
fn found(count: Result<usize, String>) -> Option<usize> {
    match count {
        Ok(0) => None,
        Ok(_) => Some(0),
        Err(why) => {
            if gpus::BUILT {
                tracing::info!(why, "no GPU is used");
            }
            None
        }
    }
}

/// Reads weights to the GPU.
pub fn load(files: &WeightFiles, choice: &GpuChoice) -> Result<(ModelConfig, ModelWeights)> {
    let place = WeightPlace::Gpu(&*choice.open.gpu, choice.dtype);
    let began = Instant::now();
    let loaded = match (files, choice.dummy) {
        (WeightFiles::SafeTensors { config, .. }, true) => model::load_dummy(config, place)?,
        (WeightFiles::Gguf(_), true) => {
            bail!("load_format dummy needs a directory with a config.json, not a GGUF file")
        }
        (_, false) => {
            let bar = bar("loading layers");
            let loaded = model::load_to(files, place, &|done, all| tell(&bar, done, all));
            bar.finish_and_clear();
            loaded?
        }
    };
    if matches!(files, WeightFiles::Gguf(_)) {
        tracing::info!(dtype = ?choice.dtype, "weights of the GGUF file are expanded on the GPU");
    }
    let (free, total) = choice.open.gpu.memory()?;
    let (used_bytes, seconds) = (total - free, began.elapsed().as_secs_f32());
    tracing::info!(used_bytes, seconds, "weights are on the GPU");
    Ok(loaded)
}

/// Blocks of KV that the GPU has room for beside everything else, which is made once to be measured:
/// workspace, sampler, and the largest graph, as large as each of the others at most.
pub fn kv_blocks(
    choice: &GpuChoice,
    model: (ModelConfig, ModelWeights),
    limits: RuntimeLimits,
    seats: usize,
) -> Result<(usize, (ModelConfig, ModelWeights))> {
    let (config, weights) = model;
    let block_bytes = Llama::kv_bytes_per_block(&config, KvDtype::F16) as u64;
    let probe = RuntimeLimits { kv_blocks: 1, ..limits };
    let graphs = if choice.graphs { Graphs::Largest } else { Graphs::None };
    let spec = GpuSpec { limits: probe, dtype: choice.dtype, seats, graphs };
    let gpu = choice.open.gpu.clone();
    let device = GpuDevice::new(gpu, config, weights, spec, None, &|_, _| {})
        .context("making room for the model's workspace on the GPU")?;
    let (free, total) = choice.open.gpu.memory()?;
    let graph_bytes = device.graph_bytes();
    let model = device.into_model();
    let room = Room { free, total, graph_bytes, share: choice.memory_share };
    let bytes = choice.kv_cache_bytes.map_or_else(|| room.kv_bytes(), |bytes| bytes.min(free));
    let blocks = (bytes / block_bytes) as usize;
    if blocks * KV_BLOCK_TOKENS < limits.context_tokens_max.min(2 * KV_BLOCK_TOKENS) {
        bail!(
            "the GPU has no room for a KV cache: {} of {} bytes are free beside weights and workspace, \
             and {} of them may be used. Raise --gpu-memory-utilization, lower --max-num-seqs or \
             --max-num-batched-tokens, or stop what else uses the GPU",
            free,
            total,
            bytes
        );
    }
    Ok((blocks, model))
}

/// Memory once everything but the KV cache is there.
struct Room {
    free: u64,
    total: u64,
    /// Of graphs that are still to be captured.
    graph_bytes: u64,
    share: f64,
}

impl Room {
    fn kv_bytes(&self) -> u64 {
        let used = self.total - self.free.min(self.total) + self.graph_bytes;
        ((self.total as f64 * self.share) as u64).saturating_sub(used)
    }
}

/// Makes the device, on the thread that is to use it.
pub fn make(
    choice: &GpuChoice,
    model: (ModelConfig, ModelWeights),
    limits: RuntimeLimits,
    seats: usize,
) -> Result<GpuDevice, DeviceError> {
    let bar = bar("capturing graphs");
    let captured = |done, all| tell(&bar, done, all);
    let graphs = if choice.graphs { Graphs::All } else { Graphs::None };
    let spec = GpuSpec { limits, dtype: choice.dtype, seats, graphs };
    let (gpu, uuid) = (choice.open.gpu.clone(), Some(choice.open.facts.uuid.clone()));
    let made = GpuDevice::new(gpu, model.0, model.1, spec, uuid, &captured);
    bar.finish_and_clear();
    made.map_err(|error| DeviceError(error.to_string()))
}

/// On standard error, where that is a terminal.
fn bar(what: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(0).with_message(what);
    if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}") {
        bar.set_style(style);
    }
    bar
}

fn tell(bar: &ProgressBar, done: usize, all: usize) {
    bar.set_length(all as u64);
    bar.set_position(done as u64);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_gets_what_the_share_leaves() {
        let gib = |count: u64| count << 30;
        for (free, graph, share, expected) in [
            (gib(60), 0, 1.0, gib(60)),
            (gib(60), 0, 0.75, gib(40)),
            (gib(60), gib(10), 0.75, gib(30)),
            (gib(20), 0, 0.75, 0),
            (gib(20), gib(1), 0.75, 0),
            (0, 0, 1.0, 0),
        ] {
            let room = Room { free, total: gib(80), graph_bytes: graph, share };
            assert_eq!(room.kv_bytes(), expected, "{free} {graph} {share}");
        }
    }

    #[test]
    fn auto_takes_a_gpu_where_there_is_one() {
        assert_eq!(found(Ok(0)), None);
        assert_eq!(found(Ok(2)), Some(0));
        assert_eq!(found(Err("no driver".into())), None);
    }
}
