//! A model with made-up weights, and the steps that it is timed on.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use candela::{
    clock::Clock,
    engine::device::{
        CpuDevice, Device, DeviceStep, GpuDevice, GpuSpec, SampleSpec, SlotBegin,
        gpu::Graphs,
        gpus::{self, OpenGpu},
    },
    model::{
        Llama, ModelConfig, ModelError, RuntimeLimits,
        load::{Dummy, Part, WeightSource, assemble},
    },
    ops::{
        CpuPool, DenseType, KV_BLOCK_TOKENS, KvDtype, StepInputs, WeightPlace, gpu::Half,
        matrix::MatrixBuilder,
    },
    sampling::SamplingParams,
    types::SlotId,
};

const LLAMA_8B: &str = include_str!("llama-3.1-8b.json");
const TINY: &str = include_str!("tiny.json");

/// Rows that each begin after as many tokens.
pub struct Step {
    seqs: usize,
    first: usize,
    new: usize,
}

impl Step {
    /// `rows` sequences of `context` tokens, of which one is new.
    pub fn decode(rows: usize, context: usize) -> Self {
        Self { seqs: rows, first: context.max(1) - 1, new: 1 }
    }

    /// One prompt, from its beginning.
    pub fn prefill(tokens: usize) -> Self {
        Self { seqs: 1, first: 0, new: tokens }
    }

    pub fn tokens(&self) -> usize {
        self.seqs * self.new
    }

    /// Every weight but the embedding's, and the KV that the rows see, in 16 bits.
    pub fn floor_bytes(&self, config: &ModelConfig) -> usize {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let attention = config.qkv_cols() + config.heads * config.head_dim;
        let layer = hidden * (attention + 3 * inner);
        let kv = 2 * config.kv_heads * config.head_dim * (self.first + self.new) * self.seqs;
        Half::BYTES * (config.layers * (layer + kv) + hidden * config.vocab_size)
    }

    pub fn limits(&self) -> RuntimeLimits {
        let context = (self.first + self.new).next_multiple_of(KV_BLOCK_TOKENS);
        RuntimeLimits {
            step_tokens_max: self.tokens(),
            logits_rows_max: self.seqs,
            kv_blocks: self.seqs * context / KV_BLOCK_TOKENS,
            kv_dtype: KvDtype::F16,
            context_tokens_max: context,
        }
    }

    pub fn seats(&self) -> usize {
        self.seqs
    }

    /// What the device is asked; sequences take their seats in the first of these steps.
    pub fn asked(&self, begins: bool) -> DeviceStep {
        let blocks = self.limits().context_tokens_max / KV_BLOCK_TOKENS;
        let mut inputs =
            StepInputs { cu_seqlens_q: vec![0], block_table_stride: blocks, ..Default::default() };
        let mut step = DeviceStep::default();
        let greedy = SamplingParams { temperature: 0.0, ..Default::default() };
        for seq in 0..self.seqs {
            for position in self.first..self.first + self.new {
                inputs.token_ids.push(0);
                inputs.last_token_slot.push(seq as u32);
                inputs.positions.push(position as u32);
                inputs.slot_mapping.push((seq * blocks * KV_BLOCK_TOKENS + position) as i64);
                inputs.adapter_ids.push(0);
            }
            inputs.sample_rows.push(inputs.token_ids.len() as u32 - 1);
            inputs.cu_seqlens_q.push(inputs.token_ids.len() as u32);
            inputs.seq_lens.push((self.first + self.new) as u32);
            inputs.block_tables.extend((seq * blocks..(seq + 1) * blocks).map(|at| at as u32));
            let slot = SlotId(seq as u32);
            step.samples.push(SampleSpec {
                logits_row: seq as u32,
                slot,
                position: (self.first + self.new) as u32,
                banned: Vec::new(),
            });
            if begins {
                step.begins.push(SlotBegin {
                    slot,
                    params: greedy.clone(),
                    choice: 0,
                    prompt: Vec::new(),
                    output: Vec::new(),
                });
            }
        }
        step.inputs = inputs;
        step
    }
}

/// A GPU by its name, or none for the CPU.
pub fn open(device: &str) -> Result<Option<OpenGpu>> {
    match device.split_once(':') {
        None if device == "cpu" => Ok(None),
        Some(("cuda", number)) => {
            let number = number.parse().context("the number of a GPU")?;
            gpus::open(number).map(Some).map_err(anyhow::Error::msg)
        }
        _ => bail!("`{device}` is not cpu or cuda:N"),
    }
}

/// The shapes that a device is timed on.
pub fn config(device: &str) -> Result<ModelConfig> {
    let text = if device == "cpu" { TINY } else { LLAMA_8B };
    Ok(ModelConfig::from_hf_json(text)?)
}

/// The model on a device, with room for `step`.
pub fn device(device: &str, step: &Step) -> Result<Box<dyn Device>> {
    let (limits, config) = (step.limits(), config(device)?);
    let Some(open) = open(device)? else {
        let weights = assemble(&config, &Small, WeightPlace::Cpu)?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let model = Llama::new(config, weights, limits, Arc::new(CpuPool::new(threads)?))?;
        return Ok(Box::new(CpuDevice::new(model, step.seats(), Clock::system())));
    };
    let weights = assemble(&config, &Dummy, WeightPlace::Gpu(&*open.gpu, Half::Bf16))?;
    let spec = GpuSpec { limits, dtype: Half::Bf16, seats: step.seats(), graphs: Graphs::All };
    let gpu = open.gpu.clone();
    Ok(Box::new(GpuDevice::new(gpu, config, weights, spec, None, &|_, _| {})?))
}

/// Weights for the CPU, on which made-up ones need not be quick.
struct Small;

impl WeightSource for Small {
    fn matrix(
        &self,
        _: Option<usize>,
        _: Part,
        (n, k): (usize, usize),
        out: &mut MatrixBuilder<'_>,
    ) -> Result<(), ModelError> {
        let value = |at: usize| half::f16::from_f32((at * 7919 % 1013) as f32 / 1013.0 - 0.5);
        let bytes: Vec<u8> = (0..n * k).flat_map(|at| value(at).to_le_bytes()).collect();
        Ok(out.push_dense(n, DenseType::F16, &bytes)?)
    }

    fn vector(&self, _: Option<usize>, _: Part, len: usize) -> Result<Vec<f32>, ModelError> {
        Ok(vec![1.0; len])
    }
}
