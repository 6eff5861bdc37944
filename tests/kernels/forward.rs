//! The whole forward on an emulated GPU against the same forward on the CPU: prefill in chunks, decode,
//! both in one step, padded batches and copied blocks, of every family.

use std::sync::Arc;

use candela::{
    model::{
        Biases, Family, Llama, ModelConfig, ModelError, RopeScaling, RuntimeLimits,
        load::{Part, WeightSource, assemble},
    },
    ops::{
        CpuPool, GpuPlace, Inbox, KV_BLOCK_TOKENS, KvDtype, Packet, Splits, StepInputs,
        WeightPlace,
        gpu::{Half, StepBuffers, StepLimits},
        matrix::MatrixBuilder,
        step_inputs::{PAD_SLOT, TOKEN_FROM_DEVICE},
    },
};
use rand::{RngExt, SeedableRng, rngs::StdRng};

use crate::gpu::{EmulatedGpu, read};

const STEP_TOKENS: usize = 96;
const SEQS: usize = 8;
const BLOCKS: usize = 40;
const SEQ_BLOCKS: usize = 9;
const SLOTS: usize = 8;
/// Products of more rows run as the library's.
const GEMV_ROWS: usize = 2;

/// Random weights, as bf16 or f16 has them, so that both devices start from the same values.
pub struct Random {
    pub seed: u64,
    pub dtype: Half,
}

impl Random {
    fn values(&self, layer: Option<usize>, part: Part, count: usize, size: f32) -> Vec<f32> {
        let name: u64 = part.hf.bytes().fold(7, |sum, byte| sum * 31 % 1_000_003 + u64::from(byte));
        let layer = layer.map_or(0, |layer| layer as u64 + 1);
        let mut random = StdRng::seed_from_u64(self.seed ^ name << 20 ^ layer << 52);
        let value = |_| {
            let value = random.random_range(-size..size);
            // A few are far out, as in trained models.
            let value = if random.random_range(0..200) == 0 { value * 6.0 } else { value };
            self.dtype.value(self.dtype.bits(value))
        };
        (0..count).map(value).collect()
    }
}

impl WeightSource for Random {
    fn matrix(
        &self,
        layer: Option<usize>,
        part: Part,
        (n, k): (usize, usize),
        out: &mut MatrixBuilder<'_>,
    ) -> Result<(), ModelError> {
        let values = self.values(layer, part, n * k, (3.0 / k as f32).sqrt());
        let bytes = values.iter().flat_map(|value| self.dtype.bits(*value).to_le_bytes());
        Ok(out.push_dense(n, self.dtype.dense(), &bytes.collect::<Vec<u8>>())?)
    }

    fn vector(&self, layer: Option<usize>, part: Part, len: usize) -> Result<Vec<f32>, ModelError> {
        let around = if part.hf.ends_with("norm.weight") { 1.0 } else { 0.0 };
        let round = |value: f32| self.dtype.value(self.dtype.bits(value + around));
        Ok(self.values(layer, part, len, 0.2).into_iter().map(round).collect())
    }
}

pub fn config(family: Family) -> ModelConfig {
    ModelConfig {
        family,
        vocab_size: 211,
        hidden_size: 120,
        intermediate_size: 200,
        layers: 2,
        heads: 6,
        kv_heads: 2,
        head_dim: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        max_position: SEQ_BLOCKS * KV_BLOCK_TOKENS,
        layer_windows: vec![None; 2],
        tie_word_embeddings: true,
        biases: Biases::default(),
        qk_norm: false,
        eos_token_ids: Vec::new(),
        bos_token_id: None,
    }
}

/// The same model twice.
struct Pair {
    config: ModelConfig,
    cpu: Llama,
    gpu: Llama,
    device: Arc<EmulatedGpu>,
    step: StepBuffers,
    inbox: Inbox,
    /// Physical blocks of each sequence.
    tables: Vec<Vec<u32>>,
    random: StdRng,
}

impl Pair {
    fn new(config: ModelConfig, dtype: Half, multiprocessors: usize) -> Self {
        let device = Arc::new(EmulatedGpu::new(multiprocessors, GEMV_ROWS));
        let weights = Random { seed: 5, dtype };
        let limits = RuntimeLimits {
            step_tokens_max: STEP_TOKENS,
            logits_rows_max: STEP_TOKENS,
            kv_blocks: BLOCKS,
            kv_dtype: KvDtype::F32,
            context_tokens_max: SEQ_BLOCKS * KV_BLOCK_TOKENS,
        };
        let on_cpu = assemble(&config, &weights, WeightPlace::Cpu).expect("fits");
        let pool = Arc::new(CpuPool::new(1).expect("threads"));
        let cpu = Llama::new(config.clone(), on_cpu, limits, pool).expect("fits");
        let on_gpu = assemble(&config, &weights, WeightPlace::Gpu(&*device, dtype)).expect("fits");
        let step = StepLimits {
            tokens: STEP_TOKENS,
            seqs: SEQS,
            logits_rows: STEP_TOKENS,
            blocks_per_seq: SEQ_BLOCKS,
            block_copies: 4,
            slots: SLOTS,
        };
        let step = StepBuffers::new(&*device, step).expect("fits");
        let ModelConfig { heads, kv_heads, head_dim, .. } = config;
        let splits = Splits::new(&*device, SEQS, kv_heads, heads, head_dim).expect("fits");
        let place = GpuPlace { gpu: device.clone(), dtype, step: step.clone(), splits };
        let gpu = Llama::on_gpu(config.clone(), on_gpu, limits, place).expect("fits");
        let mut random = StdRng::seed_from_u64(11);
        let mut blocks: Vec<u32> = (0..BLOCKS as u32).collect();
        for at in (1..BLOCKS).rev() {
            blocks.swap(at, random.random_range(0..=at));
        }
        let tables = blocks.chunks_exact(SEQ_BLOCKS).map(<[u32]>::to_vec).collect();
        let inbox = Inbox::new(&*device, step.packet_words_max() + SLOTS).expect("fits");
        Self { config, cpu, gpu, device, step, inbox, tables, random }
    }

    /// `(sequence, first position, tokens)` of each, and rows of padding after them.
    fn inputs(&mut self, parts: &[(usize, usize, usize)], pads: usize) -> StepInputs {
        let mut inputs = StepInputs {
            cu_seqlens_q: vec![0],
            block_table_stride: SEQ_BLOCKS,
            ..StepInputs::default()
        };
        for &(seq, first, new) in parts {
            for position in first..first + new {
                let known = new > 1 || seq.is_multiple_of(2);
                let token = self.random.random_range(0..self.config.vocab_size as u32);
                inputs.token_ids.push(if known { token } else { TOKEN_FROM_DEVICE });
                inputs.last_token_slot.push(seq as u32);
                inputs.positions.push(position as u32);
                let block = i64::from(self.tables[seq][position / KV_BLOCK_TOKENS]);
                let offset = (position % KV_BLOCK_TOKENS) as i64;
                inputs.slot_mapping.push(block * KV_BLOCK_TOKENS as i64 + offset);
                if (position + 1 == first + new) || position % 7 == 0 {
                    inputs.sample_rows.push(inputs.token_ids.len() as u32 - 1);
                }
            }
            inputs.cu_seqlens_q.push(inputs.token_ids.len() as u32);
            inputs.seq_lens.push((first + new) as u32);
            inputs.block_tables.extend(&self.tables[seq]);
        }
        for _ in 0..pads {
            inputs.token_ids.push(0);
            inputs.last_token_slot.push(0);
            inputs.positions.push(0);
            inputs.slot_mapping.push(PAD_SLOT);
            inputs.cu_seqlens_q.push(inputs.token_ids.len() as u32);
            inputs.seq_lens.push(0);
            inputs.block_tables.extend([0; SEQ_BLOCKS]);
        }
        inputs
    }

    fn on_gpu(&self, inputs: &StepInputs, sampled: &[u32; SLOTS]) -> Vec<f32> {
        let device = &*self.device;
        let mut packet = Packet::default();
        packet.words(self.step.sampled, *sampled);
        self.step.pack(inputs, &mut packet).expect("fits");
        packet.send(device, &self.inbox).expect("fits");
        self.gpu.forward(inputs, &[]).expect("runs");
        let (at, stride) = self.gpu.gpu_logits().expect("on a GPU");
        let row = |row: usize| {
            let bytes = read(at + (row * stride * 4) as u64, self.config.vocab_size * 4);
            let (words, _) = bytes.as_chunks::<4>();
            words.iter().map(|word| f32::from_ne_bytes(*word)).collect::<Vec<f32>>()
        };
        (0..inputs.sample_rows.len()).flat_map(row).collect()
    }

    /// Runs a step on both, and tells the logits of the GPU.
    fn step(&mut self, parts: &[(usize, usize, usize)], error_max: f64, what: &str) -> Vec<f32> {
        let inputs = self.inputs(parts, 0);
        let sampled = std::array::from_fn(|slot| (slot * 31 % self.config.vocab_size) as u32);
        let ours = self.on_gpu(&inputs, &sampled);
        self.cpu.forward(&inputs, &sampled).expect("runs");
        let rows = inputs.sample_rows.len();
        let expected = self.cpu.with_logits(rows, |logits| logits.to_vec()).expect("logits");
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let size = square(&mut expected.iter().map(|x| f64::from(*x)));
        let differences = expected.iter().zip(&ours).map(|(a, b)| f64::from(*a) - f64::from(*b));
        let error = (square(&mut differences.into_iter()) / size).sqrt();
        assert!(error <= error_max, "{what} {parts:?}: relative error {error:.5}");
        ours
    }
}

/// Root mean square of the error over that of the logits. Values between ops have 8 bits in bf16 and 11
/// in f16; measured here are 0.0097 to 0.0109 in bf16, and 0.0010 to 0.0022 in f16.
fn error_max(dtype: Half) -> f64 {
    match dtype {
        Half::Bf16 => 0.02,
        Half::F16 => 0.0025,
    }
}

fn check(what: &str, config: ModelConfig, dtype: Half, multiprocessors: usize) {
    let mut pair = Pair::new(config, dtype, multiprocessors);
    let most = error_max(dtype);
    // Chunks that end within and at blocks, sequences of one token, all in one step and mixed.
    pair.step(&[(0, 0, 37), (1, 0, 1), (2, 0, 16)], most, what);
    pair.step(&[(0, 37, 43), (1, 1, 1), (3, 0, 5)], most, what);
    pair.step(&[(0, 80, 1), (1, 2, 1), (2, 16, 1), (3, 5, 1)], most, what);
    pair.step(&[(2, 17, 70), (0, 81, 1)], most, what);
    pair.step(&[(3, 6, 1), (0, 82, 1), (2, 87, 1)], most, what);
    pair.step(&[(2, 88, 1)], most, what);
}

#[test]
fn every_family_is_what_it_is_on_the_cpu() {
    let llama = config(Family::Llama);
    let windows = vec![Some(21), None];
    for (what, config, dtype, multiprocessors) in [
        ("llama", llama.clone(), Half::Bf16, 8),
        ("llama f16, one split", llama.clone(), Half::F16, 0),
        (
            "llama 3 scaling, heads of 128, a group of 1",
            ModelConfig {
                heads: 2,
                head_dim: 128,
                tie_word_embeddings: false,
                rope_scaling: RopeScaling::Llama3 {
                    factor: 8.0,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position: 32.0,
                },
                ..llama.clone()
            },
            Half::F16,
            8,
        ),
        (
            "mistral with a window",
            ModelConfig { layer_windows: windows, ..config(Family::Mistral) },
            Half::F16,
            8,
        ),
        (
            "qwen2 with biases, a group of 8",
            ModelConfig {
                heads: 8,
                kv_heads: 1,
                biases: Biases { qkv: true, o: true, mlp: true },
                ..config(Family::Qwen2)
            },
            Half::F16,
            8,
        ),
        ("qwen3 with norms", ModelConfig { qk_norm: true, ..config(Family::Qwen3) }, Half::F16, 8),
    ] {
        check(what, config, dtype, multiprocessors);
    }
}

/// A decode in a batch that is padded to a bucket is what it is alone, to the bit: the products here are
/// one row at a time, and attention has as many splits.
#[test]
fn padding_changes_nothing() {
    let mut pair = Pair::new(config(Family::Llama), Half::Bf16, 0);
    pair.step(&[(0, 0, 40), (1, 0, 20)], 0.02, "prefill");
    let bare = pair.inputs(&[(0, 40, 1), (1, 20, 1)], 0);
    let mut padded = pair.inputs(&[(0, 40, 1), (1, 20, 1)], 5);
    padded.token_ids[..2].copy_from_slice(&bare.token_ids);
    let sampled = [3; SLOTS];
    let (alone, beside) = (pair.on_gpu(&bare, &sampled), pair.on_gpu(&padded, &sampled));
    assert!(alone.iter().all(|logit| logit.is_finite()));
    assert_eq!(alone, beside);
}

/// A forked sequence goes on from a copy of a block as from the block itself.
#[test]
fn a_copied_block_is_what_it_was() {
    let mut pair = Pair::new(config(Family::Llama), Half::F16, 8);
    pair.step(&[(0, 0, 20)], 0.0025, "prefill");
    let inputs = pair.inputs(&[(0, 20, 1)], 0);
    let before = pair.on_gpu(&inputs, &[0; SLOTS]);
    let (from, to) = (pair.tables[0][1], pair.tables[2][0]);
    pair.tables[0][1] = to;
    let mut forked = pair.inputs(&[(0, 20, 1)], 0);
    forked.token_ids.clone_from(&inputs.token_ids);
    forked.block_copies = vec![(from, to)];
    assert_eq!(pair.on_gpu(&forked, &[0; SLOTS]), before);
}

#[test]
fn what_a_gpu_does_not_take_is_said() {
    let refused = |config: ModelConfig| {
        let device = Arc::new(EmulatedGpu::new(1, 0));
        let weights = Random { seed: 1, dtype: Half::Bf16 };
        let weights = assemble(&config, &weights, WeightPlace::Gpu(&*device, Half::Bf16));
        let weights = match weights {
            Ok(weights) => weights,
            Err(error) => return error.to_string(),
        };
        let step = StepLimits {
            tokens: 8,
            seqs: 1,
            logits_rows: 1,
            blocks_per_seq: 1,
            block_copies: 1,
            slots: 1,
        };
        let step = StepBuffers::new(&*device, step).expect("fits");
        let splits = Splits::new(&*device, 1, 1, 1, 64).expect("fits");
        let place = GpuPlace { gpu: device, dtype: Half::Bf16, step, splits };
        let limits = RuntimeLimits {
            step_tokens_max: 8,
            logits_rows_max: 1,
            kv_blocks: 1,
            kv_dtype: KvDtype::F32,
            context_tokens_max: 16,
        };
        match Llama::on_gpu(config, weights, limits, place) {
            Ok(_) => panic!("it was taken"),
            Err(error) => error.to_string(),
        }
    };
    let llama = config(Family::Llama);
    let told = refused(ModelConfig { head_dim: 80, ..llama.clone() });
    assert!(told.contains("head_dim 80") && told.contains("64 and 128"), "{told}");
    let told = refused(ModelConfig { hidden_size: 124, ..llama });
    assert!(told.contains("rows of 124") && told.contains("multiples of 8"), "{told}");
}
