//! Sequences that take seats on a GPU: parameters, and what penalties know of prompt and output.

use candle_core::{Result, bail};

use super::{GpuSampler, SAMPLE_THREADS, offsets};
use crate::{
    ops::{
        Inbox, Packet,
        gpu::{Args, Gpu, Launch, Work},
    },
    sampling::{LOGIT_BIAS_MAX, SamplingParams, sampler::key_of},
    types::TokenId,
};

/// Sequences that take seats in one launch.
pub(super) const BEGINS_MAX: usize = 8;
/// Words of a seat's parameters: as `Seat` of `kernels/sample.cuh` has them.
pub(super) const SEAT_WORDS: usize = 12;

/// A sequence takes a seat.
pub struct Begin<'a> {
    pub slot: u32,
    pub params: &'a SamplingParams,
    pub choice: u32,
    pub prompt: &'a [TokenId],
    pub output: &'a [TokenId],
}

impl GpuSampler {
    /// Sequences take their seats.
    pub fn seat(&self, gpu: &dyn Gpu, inbox: &Inbox, begins: &[Begin<'_>]) -> Result<()> {
        let (mut packet, mut begins) = (Packet::default(), begins);
        while !begins.is_empty() {
            let mut tokens = 0;
            let fits = begins.iter().take(BEGINS_MAX).take_while(|begin| {
                tokens += kept(begin).0.len() + kept(begin).1.len();
                tokens <= self.limits.context_tokens
            });
            let (some, rest) = begins.split_at(fits.count());
            if some.is_empty() {
                bail!("a sequence of {tokens} tokens is longer than the context");
            }
            packet.clear();
            self.pack_begins(some, &mut packet)?;
            packet.send(gpu, inbox)?;
            self.begin(gpu, some.len())?;
            begins = rest;
        }
        Ok(())
    }

    fn pack_begins(&self, begins: &[Begin<'_>], packet: &mut Packet) -> Result<()> {
        let at = &self.memory;
        for begin in begins {
            let bias = sorted_bias(begin.params);
            if bias.len() > LOGIT_BIAS_MAX {
                bail!("a logit bias of {} tokens; {LOGIT_BIAS_MAX} are possible", bias.len());
            }
            let first = (begin.slot as usize * LOGIT_BIAS_MAX * 4) as u64;
            let tokens = bias.iter().map(|(token, _)| *token);
            packet.words(at.bias_tokens.address + first, tokens);
            let values = bias.iter().map(|(_, value)| value.to_bits());
            packet.words(at.bias_values.address + first, values);
        }
        packet.words(at.begins.address, begins.iter().map(|begin| begin.slot));
        packet.words(at.params.address, begins.iter().flat_map(seat_words));
        let prompts = || begins.iter().map(|begin| kept(begin).0);
        packet.words(at.prompt_offsets.address, offsets(prompts()));
        packet.words(at.prompt.address, prompts().flatten().copied());
        let outputs = || begins.iter().map(|begin| kept(begin).1);
        packet.words(at.output_offsets.address, offsets(outputs()));
        packet.words(at.output.address, outputs().flatten().copied());
        Ok(())
    }

    fn begin(&self, gpu: &dyn Gpu, begins: usize) -> Result<()> {
        let at = &self.memory;
        gpu.launch(&Launch {
            kernel: "sample_begin",
            grid: [begins as u32, 1, 1],
            threads: SAMPLE_THREADS,
            shared_bytes: 0,
            args: Args::default()
                .address(at.begins.address)
                .address(at.params.address)
                .address(at.prompt_offsets.address)
                .address(at.prompt.address)
                .address(at.output_offsets.address)
                .address(at.output.address)
                .address(at.seats.address)
                .address(at.seen.address)
                .u32(self.vocab),
            work: Work::default(),
        })
    }
}

/// Prompt and output, as far as penalties look at them.
fn kept<'a>(begin: &Begin<'a>) -> (&'a [TokenId], &'a [TokenId]) {
    let params = begin.params;
    let repeats = params.repetition_penalty != 1.0;
    let counts = repeats || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0;
    (if repeats { begin.prompt } else { &[] }, if counts { begin.output } else { &[] })
}

/// By token; what one token has several entries for keeps their order.
fn sorted_bias(params: &SamplingParams) -> Vec<(TokenId, f32)> {
    let mut bias = params.logit_bias.to_vec();
    bias.sort_by_key(|(token, _)| *token);
    bias
}

fn seat_words(begin: &Begin<'_>) -> [u32; SEAT_WORDS] {
    let params = begin.params;
    let key = key_of(params.seed, begin.choice);
    let min_p_ln = if params.min_p > 0.0 { params.min_p.ln() } else { f32::NEG_INFINITY };
    [
        params.temperature.to_bits(),
        params.top_p.to_bits(),
        min_p_ln.to_bits(),
        params.presence_penalty.to_bits(),
        params.frequency_penalty.to_bits(),
        params.repetition_penalty.to_bits(),
        params.top_k,
        key[0],
        key[1],
        begin.slot * LOGIT_BIAS_MAX as u32,
        params.logit_bias.len() as u32,
        0,
    ]
}
