//! Log-probabilities of tokens on a GPU: of those just drawn, and of a prompt's.

use candle_core::{Result, bail};

use super::{GpuSampler, PAD, SCAN_THREADS, TOP_MAX, parts};
use crate::{
    ops::{
        Packet,
        gpu::{Args, Gpu, Launch, Work},
    },
    types::TokenId,
};

/// A token that was only just drawn: the last one of its slot.
const TOKEN_FROM_DEVICE: u32 = u32::MAX;

/// The log-probability of a token is wanted, with `top` alternatives.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub logits_row: u32,
    pub of: WantedToken,
    pub top: u32,
}

#[derive(Clone, Copy, Debug)]
pub enum WantedToken {
    /// What a draw of this step gives.
    Drawn {
        draw: usize,
        slot: u32,
    },
    Given(TokenId),
}

impl GpuSampler {
    /// Tells the GPU which log-probabilities are wanted; [`GpuSampler::score`] finds them.
    pub fn pack_wanted(&self, wanted: &[Wanted], packet: &mut Packet) -> Result<()> {
        let at = &self.memory;
        if wanted.len() > self.limits.wanted() {
            bail!("{} log-probabilities in one step", wanted.len());
        }
        packet.words(at.wanted_rows.address, wanted.iter().map(|one| one.logits_row));
        let split = |one: &Wanted| match one.of {
            WantedToken::Drawn { slot, .. } => (TOKEN_FROM_DEVICE, slot),
            WantedToken::Given(token) => (token, PAD),
        };
        packet.words(at.wanted_slots.address, wanted.iter().map(|one| split(one).1));
        let tops = wanted.iter().map(|one| one.top.min(TOP_MAX as u32));
        packet.words(at.wanted_tops.address, tops);
        packet.words(at.wanted_tokens.address, wanted.iter().map(|one| split(one).0));
        Ok(())
    }

    /// Finds the log-probabilities of `count` tokens, after the draws.
    pub fn score(&self, gpu: &dyn Gpu, count: usize) -> Result<()> {
        let (at, parts) = (&self.memory, parts(self.vocab));
        // What the first kernel has and leaves, the second one reads.
        let scanned = Args::default()
            .address(self.logits)
            .address(at.wanted_rows.address)
            .address(at.wanted_tops.address)
            .address(at.largest.address)
            .address(at.sums.address)
            .address(at.picks.address);
        gpu.launch(&Launch {
            kernel: "logprobs_scan",
            grid: [parts as u32, count as u32, 1],
            threads: SCAN_THREADS,
            shared_bytes: 0,
            args: scanned.u32(self.vocab).u32(self.stride),
            work: Work { bytes: (count * self.vocab * 4) as u64, flops: 0 },
        })?;
        gpu.launch(&Launch {
            kernel: "logprobs",
            grid: [count as u32, 1, 1],
            threads: SCAN_THREADS,
            shared_bytes: 0,
            args: scanned
                .address(at.wanted_tokens.address)
                .address(at.wanted_slots.address)
                .address(self.sampled)
                .address(self.place(0))
                .address(self.place(1))
                .address(self.place(1 + TOP_MAX))
                .u32(self.vocab)
                .u32(self.stride)
                .u32(parts),
            work: Work::default(),
        })
    }

    /// Where `words` of each wanted token lie before, behind the drawn tokens.
    fn place(&self, words: usize) -> u64 {
        let before = self.limits.samples + words * self.limits.wanted();
        self.memory.results.address + (before * 4) as u64
    }
}
