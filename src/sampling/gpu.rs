//! Draws tokens on a GPU, as [`Sampler`](super::Sampler) does on the CPU: logits stay there, and ids and
//! log-probabilities come back.

mod score;
mod seat;

use candle_core::{Result, bail};

use super::{LOGIT_BIAS_MAX, TokenLogprobs};
use crate::{
    ops::{
        Packet,
        gpu::{Args, Buffer, Gpu, Launch, Work},
    },
    types::TokenId,
};
pub use score::{Wanted, WantedToken};
pub use seat::Begin;
use seat::{BEGINS_MAX, SEAT_WORDS};

/// A slot, or a row, that is not one.
pub const PAD: u32 = u32::MAX;
/// Alternatives that are reported, at most.
pub const TOP_MAX: usize = 20;
/// Threads of the kernels, and tokens of a thread.
const SCAN_THREADS: u32 = 128;
const SCAN_TOKENS: usize = 16;
const SAMPLE_THREADS: u32 = 1024;

/// How much a sampler is asked for at once.
#[derive(Clone, Copy, Debug)]
pub struct SampleLimits {
    pub slots: usize,
    /// Tokens drawn in a step.
    pub samples: usize,
    /// Prompt tokens scored in a step.
    pub scores: usize,
    /// Tokens of the longest sequence.
    pub context_tokens: usize,
    /// Tokens that one draw may not give.
    pub banned: usize,
}

/// A draw, or none where `slot` is [`PAD`].
pub struct Draw<'a> {
    pub logits_row: u32,
    pub slot: u32,
    pub position: u32,
    pub banned: &'a [TokenId],
}

/// Seats on a GPU, with room for what is drawn.
pub struct GpuSampler {
    limits: SampleLimits,
    vocab: usize,
    /// Where logits are, and words from a row to the next.
    logits: u64,
    stride: usize,
    /// `[slots]`, the last token of each.
    sampled: u64,
    memory: Memory,
}

struct Memory {
    seats: Buffer,
    seen: Buffer,
    bias_tokens: Buffer,
    bias_values: Buffer,
    /// Of those that begin.
    begins: Buffer,
    params: Buffer,
    prompt_offsets: Buffer,
    prompt: Buffer,
    output_offsets: Buffer,
    output: Buffer,
    /// Of draws.
    rows: Buffer,
    slots: Buffer,
    positions: Buffer,
    banned_offsets: Buffer,
    banned: Buffer,
    changed: Buffer,
    best: Buffer,
    /// Of log-probabilities.
    wanted_rows: Buffer,
    wanted_tops: Buffer,
    wanted_tokens: Buffer,
    wanted_slots: Buffer,
    largest: Buffer,
    sums: Buffer,
    picks: Buffer,
    /// Tokens, then log-probabilities, ids of alternatives and theirs.
    results: Buffer,
}

impl GpuSampler {
    pub fn new(
        gpu: &dyn Gpu,
        limits: SampleLimits,
        vocab: usize,
        (logits, stride): (u64, usize),
        sampled: u64,
    ) -> Result<Self> {
        let SampleLimits { slots, samples, context_tokens, banned, .. } = limits;
        let wanted = limits.wanted();
        let parts = parts(vocab);
        let words = |count: usize| gpu.allocate(count.max(1) * 4);
        let memory = Memory {
            seats: words(slots * SEAT_WORDS)?,
            seen: words(slots * vocab)?,
            bias_tokens: words(slots * LOGIT_BIAS_MAX)?,
            bias_values: words(slots * LOGIT_BIAS_MAX)?,
            begins: words(BEGINS_MAX)?,
            params: words(BEGINS_MAX * SEAT_WORDS)?,
            prompt_offsets: words(BEGINS_MAX + 1)?,
            prompt: words(context_tokens)?,
            output_offsets: words(BEGINS_MAX + 1)?,
            output: words(context_tokens)?,
            rows: words(samples)?,
            slots: words(samples)?,
            positions: words(samples)?,
            banned_offsets: words(samples + 1)?,
            banned: words(samples * banned)?,
            changed: words(samples * stride)?,
            best: words(samples * parts * 2)?,
            wanted_rows: words(wanted)?,
            wanted_tops: words(wanted)?,
            wanted_tokens: words(wanted)?,
            wanted_slots: words(wanted)?,
            largest: words(wanted * parts)?,
            sums: words(wanted * parts)?,
            picks: words(wanted * parts * TOP_MAX * 2)?,
            results: words(samples + wanted * (1 + 2 * TOP_MAX))?,
        };
        Ok(Self { limits, vocab, logits, stride, sampled, memory })
    }

    /// Words that a step adds to its packet at most.
    pub fn packet_words_max(&self) -> usize {
        let SampleLimits { samples, context_tokens, banned, .. } = self.limits;
        let begins = BEGINS_MAX * (3 + SEAT_WORDS + 2 * LOGIT_BIAS_MAX) + 2 + 2 * context_tokens;
        let draws = samples * (4 + banned) + 1 + 4 * self.limits.wanted();
        begins.max(draws)
    }

    /// Tells the GPU what is to be drawn; [`GpuSampler::draw`] draws it.
    pub fn pack_draws(&self, draws: &[Draw<'_>], packet: &mut Packet) -> Result<()> {
        let (at, limits) = (&self.memory, &self.limits);
        let banned = draws.iter().map(|draw| draw.banned.len()).sum::<usize>();
        if draws.len() > limits.samples || banned > limits.samples * limits.banned {
            bail!("{} draws with {banned} banned tokens in one step", draws.len());
        }
        packet.words(at.rows.address, draws.iter().map(|draw| draw.logits_row));
        packet.words(at.slots.address, draws.iter().map(|draw| draw.slot));
        packet.words(at.positions.address, draws.iter().map(|draw| draw.position));
        let lists = || draws.iter().map(|draw| draw.banned);
        packet.words(at.banned_offsets.address, offsets(lists()));
        packet.words(at.banned.address, lists().flatten().copied());
        Ok(())
    }

    /// Draws `count` tokens: what was packed, and pads. The same launches for the same count.
    pub fn draw(&self, gpu: &dyn Gpu, count: usize) -> Result<()> {
        let (at, parts) = (&self.memory, parts(self.vocab));
        gpu.launch(&Launch {
            kernel: "sample_scan",
            grid: [parts as u32, count as u32, 1],
            threads: SCAN_THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(self.logits)
                .address(at.rows.address)
                .address(at.slots.address)
                .address(at.positions.address)
                .address(at.banned_offsets.address)
                .address(at.banned.address)
                .address(at.seats.address)
                .address(at.bias_tokens.address)
                .address(at.bias_values.address)
                .address(at.seen.address)
                .address(at.changed.address)
                .address(at.best.address)
                .u32(self.vocab)
                .u32(self.stride),
            work: Work { bytes: (count * self.vocab * 4) as u64, flops: 0 },
        })?;
        gpu.launch(&Launch {
            kernel: "sample",
            grid: [count as u32, 1, 1],
            threads: SAMPLE_THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(at.best.address)
                .address(at.changed.address)
                .address(at.slots.address)
                .address(at.positions.address)
                .address(at.seats.address)
                .address(at.seen.address)
                .address(at.results.address)
                .address(self.sampled)
                .u32(self.vocab)
                .u32(self.stride)
                .u32(parts),
            work: Work::default(),
        })
    }

    /// Where results are, and how many bytes of them there are.
    pub fn results(&self, draws: usize, wanted: usize) -> (u64, usize) {
        let words = match wanted {
            0 => draws,
            _ => self.limits.samples + self.limits.wanted() * (1 + 2 * TOP_MAX),
        };
        (self.memory.results.address, words * 4)
    }

    /// The tokens drawn and the log-probabilities wanted, out of the bytes of [`GpuSampler::results`].
    pub fn read(
        &self,
        bytes: &[u8],
        draws: usize,
        wanted: &[Wanted],
    ) -> Result<(Vec<TokenId>, Vec<TokenLogprobs>)> {
        let (words, _) = bytes.as_chunks::<4>();
        let word = |at: usize| words.get(at).map_or(0, |word| u32::from_ne_bytes(*word));
        let tokens: Vec<TokenId> = (0..draws).map(word).collect();
        if let Some(wrong) = tokens.iter().find(|token| **token as usize >= self.vocab) {
            bail!("the GPU drew token {wrong} of {}", self.vocab);
        }
        let (first, each) = (self.limits.samples, self.limits.wanted());
        let found = wanted.iter().enumerate().map(|(index, one)| {
            let top = one.top.min(TOP_MAX as u32) as usize;
            let top = (0..top.min(self.vocab)).map(|place| {
                let at = first + each + index * TOP_MAX + place;
                (word(at), f32::from_bits(word(at + each * TOP_MAX)))
            });
            TokenLogprobs {
                token: match one.of {
                    WantedToken::Drawn { draw, .. } => tokens.get(draw).copied().unwrap_or(0),
                    WantedToken::Given(token) => token,
                },
                logprob: f32::from_bits(word(first + index)),
                top: top.collect(),
            }
        });
        let found = found.collect();
        Ok((tokens, found))
    }
}

impl SampleLimits {
    fn wanted(&self) -> usize {
        self.samples + self.scores
    }
}

/// Parts of a row of logits that blocks of threads take.
fn parts(vocab: usize) -> usize {
    vocab.div_ceil(SCAN_THREADS as usize * SCAN_TOKENS)
}

/// Where each list begins, and where the last ends.
fn offsets<'a>(lists: impl Iterator<Item = &'a [TokenId]>) -> impl Iterator<Item = u32> {
    let mut end = 0;
    std::iter::once(0).chain(lists.map(move |list| {
        end += list.len() as u32;
        end
    }))
}
