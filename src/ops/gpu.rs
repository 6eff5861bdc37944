//! What an op asks of a GPU: plain data, planned by the op, so that a test can print a step, add up its
//! bytes, and run it on a GPU that is emulated. Nothing here needs CUDA.

use std::{any::Any, sync::Arc};

use candle_core::{Result, bail};

use super::{DenseType, Packet, Region, StepInputs};

/// Threads of most kernels' blocks.
pub const THREADS: u32 = 256;
/// Elements that a thread loads at once: rows on a GPU are multiples of it.
pub const PACK: usize = 8;
/// Bytes of the largest kernel argument.
const ARGS_BYTES_MAX: usize = 192;

/// Memory of a GPU, by its address, for as long as this lives.
#[derive(Clone)]
pub struct Buffer {
    pub address: u64,
    pub bytes: usize,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Buffer {
    pub fn new(address: u64, bytes: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { address, bytes, _owner: owner }
    }
}

/// Element type of weights, activations and KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    Bf16,
    F16,
}

impl Half {
    pub const BYTES: usize = 2;

    /// Rounds to nearest, ties to even; in f16 what is finite stays finite.
    pub fn bits(self, value: f32) -> u16 {
        match self {
            Self::Bf16 => half::bf16::from_f32(value).to_bits(),
            Self::F16 => {
                let most = half::f16::MAX.to_f32();
                let bounded = if value.is_finite() { value.clamp(-most, most) } else { value };
                half::f16::from_f32(bounded).to_bits()
            }
        }
    }

    pub fn value(self, bits: u16) -> f32 {
        match self {
            Self::Bf16 => half::bf16::from_bits(bits).to_f32(),
            Self::F16 => half::f16::from_bits(bits).to_f32(),
        }
    }

    pub fn dense(self) -> DenseType {
        match self {
            Self::Bf16 => DenseType::Bf16,
            Self::F16 => DenseType::F16,
        }
    }
}

/// The argument of a kernel: one struct, laid out as C does.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(16))]
pub struct Args {
    bytes: [u8; ARGS_BYTES_MAX],
    len: usize,
    align: usize,
}

impl Default for Args {
    fn default() -> Self {
        Self { bytes: [0; ARGS_BYTES_MAX], len: 0, align: 1 }
    }
}

impl Args {
    fn push<const N: usize>(mut self, value: [u8; N]) -> Self {
        let at = self.len.next_multiple_of(N);
        self.bytes[at..at + N].copy_from_slice(&value);
        (self.len, self.align) = (at + N, self.align.max(N));
        self
    }

    pub fn address(self, value: u64) -> Self {
        self.push(value.to_ne_bytes())
    }

    pub fn u64(self, value: u64) -> Self {
        self.push(value.to_ne_bytes())
    }

    pub fn u32(self, value: usize) -> Self {
        self.push((value as u32).to_ne_bytes())
    }

    pub fn f32(self, value: f32) -> Self {
        self.push(value.to_ne_bytes())
    }

    /// The whole struct, with the padding at its end.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len.next_multiple_of(self.align)]
    }
}

/// One kernel of `kernels/` on a grid of blocks.
#[derive(Clone, Debug)]
pub struct Launch {
    pub kernel: &'static str,
    pub grid: [u32; 3],
    pub threads: u32,
    /// Of dynamic shared memory.
    pub shared_bytes: u32,
    pub args: Args,
    pub work: Work,
}

/// The name of a kernel that there is for both types, or for both types and both sizes of a head.
macro_rules! kernel {
    ($name:literal, $dtype:expr) => {
        match $dtype {
            $crate::ops::gpu::Half::Bf16 => concat!($name, "_bf16"),
            $crate::ops::gpu::Half::F16 => concat!($name, "_f16"),
        }
    };
    ($name:literal, $dtype:expr, $head_dim:expr) => {
        match ($dtype, $head_dim) {
            ($crate::ops::gpu::Half::Bf16, 64) => concat!($name, "_bf16_64"),
            ($crate::ops::gpu::Half::Bf16, 128) => concat!($name, "_bf16_128"),
            ($crate::ops::gpu::Half::F16, 64) => concat!($name, "_f16_64"),
            ($crate::ops::gpu::Half::F16, 128) => concat!($name, "_f16_128"),
            (_, dim) => candle_core::bail!("no {} for heads of {dim}", $name),
        }
    };
}
pub(crate) use kernel;

/// What must cross the memory bus and be computed, whatever the kernel: the floor of its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    pub bytes: u64,
    pub flops: u64,
}

impl Work {
    /// Elements of 16 bits, read or written.
    pub fn elements(count: usize) -> Self {
        Self { bytes: (count * Half::BYTES) as u64, flops: 0 }
    }
}

/// `y[m, n] = x[m, k] w[n, k]ᵀ (+ bias[n])`, all row-major, sums in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matmul {
    pub x: u64,
    pub w: u64,
    pub bias: Option<u64>,
    pub y: u64,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub dtype: Half,
    /// y is f32, for logits.
    pub wide: bool,
    /// Elements from a row of y to the next, `n` or more.
    pub y_stride: usize,
}

impl Matmul {
    pub fn work(&self) -> Work {
        let (m, n, k) = (self.m as u64, self.n as u64, self.k as u64);
        let out = if self.wide { 4 } else { Half::BYTES as u64 };
        let bias = if self.bias.is_some() { n * Half::BYTES as u64 } else { 0 };
        Work {
            bytes: (n * k + m * k) * Half::BYTES as u64 + m * n * out + bias,
            flops: 2 * m * n * k,
        }
    }
}

/// A GPU. Everything happens in the order it is asked for, and may not have happened on return.
pub trait Gpu: Send + Sync {
    fn allocate(&self, bytes: usize) -> Result<Buffer>;
    /// Zeroed memory for ops.
    fn region(&self, elements: usize, dtype: Half) -> Result<Region>;
    /// Bytes that are free now, and all there are.
    fn memory(&self) -> Result<(u64, u64)>;
    /// Copies to `to`, which lies within one allocation.
    fn upload(&self, to: u64, bytes: &[u8]) -> Result<()>;
    fn multiprocessors(&self) -> usize;
    /// Rows up to which a product is read through by our own kernel, not by the vendor's library.
    fn gemv_rows_max(&self) -> usize;
    fn launch(&self, launch: &Launch) -> Result<()>;
    fn matmul(&self, matmul: &Matmul) -> Result<()>;
    /// A step begins: its time counts from here.
    fn begin(&self) -> Result<()>;
    /// A step ends: its time counts to here. What `from` holds then is copied to the host.
    fn end(&self, from: u64, bytes: usize) -> Result<Box<dyn Pending>>;
    /// Keeps what `work` launches, which nothing else of this GPU may interleave with, and does not run
    /// it. Nothing in it may allocate or upload.
    fn capture(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Box<dyn Graph>>;
}

/// A step that may not have ended.
pub trait Pending {
    /// What was to be copied, and the nanoseconds that the device had the step.
    fn wait(self: Box<Self>) -> Result<(Vec<u8>, u64)>;
}

/// Launches that were captured, with their arguments as they were.
pub trait Graph {
    fn replay(&self) -> Result<()>;
}

/// Where the metadata of a step lies, `tokens_max` rows and `seqs_max` sequences: always at the same
/// addresses, so that a captured step reads what the next one wrote.
#[derive(Clone)]
pub struct StepBuffers {
    _memory: Buffer,
    limits: StepLimits,
    /// Blocks in a row of `block_tables`.
    pub stride: usize,
    pub token_ids: u64,
    pub last_token_slot: u64,
    pub positions: u64,
    pub slot_mapping: u64,
    pub cu_seqlens_q: u64,
    pub seq_lens: u64,
    pub block_tables: u64,
    pub sample_rows: u64,
    pub block_copies: u64,
    /// `[slots]`: the token last drawn in each seat.
    pub sampled: u64,
}

/// The largest step.
#[derive(Clone, Copy, Debug)]
pub struct StepLimits {
    pub tokens: usize,
    pub seqs: usize,
    pub logits_rows: usize,
    pub blocks_per_seq: usize,
    pub block_copies: usize,
    pub slots: usize,
}

impl StepBuffers {
    pub fn new(gpu: &dyn Gpu, limits: StepLimits) -> Result<Self> {
        let mut bytes = 0;
        let mut place = |count: usize, size: usize| {
            let at = bytes;
            // A new array starts on a boundary that any load takes.
            bytes = (bytes + count * size).next_multiple_of(256);
            at as u64
        };
        let token_ids = place(limits.tokens, 4);
        let last_token_slot = place(limits.tokens, 4);
        let positions = place(limits.tokens, 4);
        let slot_mapping = place(limits.tokens, 8);
        let cu_seqlens_q = place(limits.seqs + 1, 4);
        let seq_lens = place(limits.seqs, 4);
        let block_tables = place(limits.seqs * limits.blocks_per_seq, 4);
        let sample_rows = place(limits.logits_rows, 4);
        let block_copies = place(limits.block_copies, 8);
        let sampled = place(limits.slots, 4);
        let memory = gpu.allocate(bytes)?;
        let base = memory.address;
        Ok(Self {
            _memory: memory,
            limits,
            stride: limits.blocks_per_seq,
            token_ids: base + token_ids,
            last_token_slot: base + last_token_slot,
            positions: base + positions,
            slot_mapping: base + slot_mapping,
            cu_seqlens_q: base + cu_seqlens_q,
            seq_lens: base + seq_lens,
            block_tables: base + block_tables,
            sample_rows: base + sample_rows,
            block_copies: base + block_copies,
            sampled: base + sampled,
        })
    }

    /// Words of the largest step's metadata.
    pub fn packet_words_max(&self) -> usize {
        let StepLimits { tokens, seqs, logits_rows, blocks_per_seq, block_copies, .. } =
            self.limits;
        5 * tokens + seqs * (2 + blocks_per_seq) + 1 + logits_rows + 2 * block_copies
    }

    /// Puts the metadata of a step in a packet.
    pub fn pack(&self, inputs: &StepInputs, packet: &mut Packet) -> Result<()> {
        let StepLimits { tokens, seqs, logits_rows, blocks_per_seq, block_copies, .. } =
            self.limits;
        if inputs.tokens() > tokens
            || inputs.seqs() > seqs
            || inputs.sample_rows.len() > logits_rows
            || inputs.block_table_stride > blocks_per_seq
            || inputs.block_copies.len() > block_copies
        {
            bail!(
                "a step of {} rows and {} sequences is larger than its buffers",
                inputs.tokens(),
                inputs.seqs()
            );
        }
        packet.words(self.token_ids, inputs.token_ids.iter().copied());
        packet.words(self.last_token_slot, inputs.last_token_slot.iter().copied());
        packet.words(self.positions, inputs.positions.iter().copied());
        packet.longs(self.slot_mapping, inputs.slot_mapping.iter().copied());
        packet.words(self.cu_seqlens_q, inputs.cu_seqlens_q.iter().copied());
        packet.words(self.seq_lens, inputs.seq_lens.iter().copied());
        packet.words(self.sample_rows, inputs.sample_rows.iter().copied());
        packet.words(self.block_copies, inputs.block_copies.iter().flat_map(|(a, b)| [*a, *b]));
        let (tables, row) = (inputs.block_tables.iter().copied(), inputs.block_table_stride);
        packet.rows(self.block_tables, tables, row.max(1), self.stride);
        Ok(())
    }
}
