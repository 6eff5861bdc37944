//! One sequence as the scheduler sees it: few counters, the rest derived.

use std::sync::Arc;

use crate::{
    cache::BlockKey,
    types::{BlockId, SeqId, SlotId, TokenId},
};

/// Place in the waiting set: arrival of the request, then the choice. The order of the tuple is
/// the policy.
pub type WaitKey = (u64, u32);

/// What a new request brings. Its first choice computes the prompt, the others share it.
#[derive(Clone, Debug)]
pub struct SeqSpec {
    /// One per choice, at least one.
    pub choices: Vec<SeqId>,
    pub prompt: Arc<[TokenId]>,
    /// Output tokens per choice; 0 computes the prompt only.
    pub max_tokens: usize,
    /// Logits of all prompt rows are wanted.
    pub score_prompt: bool,
    /// Parent of the first block's key.
    pub root: BlockKey,
}

/// `computed <= known + in flight`; what lies between is the work left.
#[derive(Debug)]
pub struct Sequence {
    pub id: SeqId,
    pub key: WaitKey,
    /// Prompt, then the output the host knows.
    pub tokens: Vec<TokenId>,
    pub prompt_len: usize,
    pub max_tokens: usize,
    /// Tokens whose K and V are computed, launched steps included.
    pub computed: usize,
    /// Drawn in launched steps and not yet known to the host: at most the pipeline depth.
    pub in_flight: usize,
    pub blocks: Vec<BlockId>,
    pub slot: Option<SlotId>,
    /// Siblings that will share the prompt once it is computed.
    pub unforked: Vec<SeqId>,
    /// The highest position ever computed, to tell work done twice.
    pub computed_max: usize,
    /// Prompt rows still to be scored start here; `None` scores nothing.
    pub score_from: Option<usize>,
    pub(super) root: BlockKey,
    pub(super) keyed_blocks: usize,
}

impl Sequence {
    /// Tokens that exist, on the host or in flight.
    pub fn len(&self) -> usize {
        self.tokens.len() + self.in_flight
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Output tokens drawn so far, in flight included.
    pub fn drawn(&self) -> usize {
        self.len() - self.prompt_len
    }

    /// Tokens that exist but have no K and V yet.
    pub fn uncomputed(&self) -> usize {
        self.len() - self.computed
    }

    /// One token short of complete: the next row draws a token.
    pub fn is_decode(&self) -> bool {
        self.uncomputed() == 1 && self.computed >= self.prompt_len
    }

    /// Everything it may draw is drawn, or will be known at the next commit.
    pub fn is_drawn_out(&self) -> bool {
        self.drawn() >= self.max_tokens && self.computed >= self.prompt_len
    }

    /// Output tokens known to the host.
    pub fn output(&self) -> &[TokenId] {
        &self.tokens[self.prompt_len..]
    }
}
