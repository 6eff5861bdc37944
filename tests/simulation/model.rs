//! A device without a model. The token it draws is a hash of all that the KV cache holds for the
//! sequence, read through the block table, and of the choice: stale or foreign rows change the output.

use std::{collections::VecDeque, sync::OnceLock, time::Duration};

use candela::{
    clock::Clock,
    engine::{
        StopParams,
        device::{Device, DeviceError, DeviceOutcome, DeviceStep},
        output::ChoiceOutput,
    },
    ops::step_inputs::TOKEN_FROM_DEVICE,
    text::Tokenizer,
    types::{FinishReason, TokenId},
};
use rand::{RngExt, rngs::StdRng};

use super::common::tiny;

/// Tokens that are one printable character each.
pub const VOCABULARY: u32 = 94;
const FIRST_CHARACTER: u8 = b'!';
/// The end token; drawn in passing where a request ignores it.
pub const END: TokenId = 7;

pub fn tokenizer() -> Tokenizer {
    static ONE: OnceLock<Tokenizer> = OnceLock::new();
    let make = || Tokenizer::from_json(tiny::tokenizer().to_string().as_bytes(), None);
    ONE.get_or_init(|| make().expect("a tokenizer")).clone()
}

pub struct FakeModel {
    clock: Clock,
    random: StdRng,
    block_tokens: usize,
    kv: Vec<TokenId>,
    /// Choice in each seat, and the token last drawn there.
    seats: Vec<(u32, TokenId)>,
    done: VecDeque<DeviceOutcome>,
    /// Steps until one fails.
    fails_in: Option<u32>,
}

impl FakeModel {
    pub fn new(
        clock: Clock,
        random: StdRng,
        (blocks, block_tokens, seats): (usize, usize, usize),
        fails_in: Option<u32>,
    ) -> Self {
        Self {
            clock,
            random,
            block_tokens,
            kv: vec![0; blocks * block_tokens],
            seats: vec![(0, 0); seats],
            done: VecDeque::new(),
            fails_in,
        }
    }

    /// Hash of the tokens of sequence `index` up to `position`.
    fn context(&self, step: &DeviceStep, index: usize, position: usize) -> u64 {
        let stride = step.inputs.block_table_stride;
        let table = &step.inputs.block_tables[index * stride..][..stride];
        (0..=position).fold(EMPTY, |hash, at| {
            let block = table[at / self.block_tokens] as usize;
            extend(hash, self.kv[block * self.block_tokens + at % self.block_tokens])
        })
    }
}

impl Device for FakeModel {
    fn launch(&mut self, step: DeviceStep) -> Result<(), DeviceError> {
        self.fails_in = self.fails_in.map(|steps| steps.saturating_sub(1));
        if self.fails_in == Some(0) {
            return Err(DeviceError("the device fell off the bus".into()));
        }
        let inputs = &step.inputs;
        for (from, to) in &inputs.block_copies {
            let [from, to] = [from, to].map(|block| *block as usize * self.block_tokens);
            self.kv.copy_within(from..from + self.block_tokens, to);
        }
        for begin in &step.begins {
            self.seats[begin.slot.0 as usize] = (begin.choice, 0);
        }
        for (row, token) in inputs.token_ids.iter().enumerate() {
            let last = self.seats[inputs.last_token_slot[row] as usize].1;
            let token = if *token == TOKEN_FROM_DEVICE { last } else { *token };
            self.kv[inputs.slot_mapping[row] as usize] = token;
        }
        let mut sampled = Vec::new();
        for spec in &step.samples {
            let row = inputs.sample_rows[spec.logits_row as usize];
            let index = inputs.cu_seqlens_q.partition_point(|first| *first <= row) - 1;
            let position = inputs.positions[row as usize] as usize;
            assert_eq!(position + 1, spec.position as usize);
            let choice = self.seats[spec.slot.0 as usize].0;
            let token = draw(self.context(&step, index, position), choice, &spec.banned);
            sampled.push((spec.slot, token));
        }
        for (slot, token) in &sampled {
            self.seats[slot.0 as usize].1 = *token;
        }
        let device_ns = 500_000 + inputs.tokens() as u64 * self.random.random_range(20_000..90_000);
        let sampled = sampled.into_iter().map(|(_, token)| (token, None)).collect();
        self.done.push_back(DeviceOutcome { sampled, scores: Vec::new(), device_ns });
        Ok(())
    }

    fn collect(&mut self) -> Result<DeviceOutcome, DeviceError> {
        let outcome = self.done.pop_front().ok_or_else(|| DeviceError("nothing runs".into()))?;
        self.clock.advance(Duration::from_nanos(outcome.device_ns));
        Ok(outcome)
    }
}

const EMPTY: u64 = 0xCBF2_9CE4_8422_2325;

/// FNV-1a over whole tokens.
fn extend(hash: u64, token: TokenId) -> u64 {
    (hash ^ u64::from(token)).wrapping_mul(0x100_0000_01B3)
}

fn draw(context: u64, choice: u32, banned: &[TokenId]) -> TokenId {
    // The low bits of a product hang together; the high ones do not.
    let mixed = extend(context, 1_000 + choice).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let mut token = (mixed >> 33) as u32 % VOCABULARY;
    while banned.contains(&token) {
        token = (token + 1) % VOCABULARY;
    }
    token
}

/// What a choice comes to if nothing cuts it short.
#[derive(Debug)]
pub struct Alone {
    pub text: String,
    /// Every token there could be, as its character: whatever ends early is a beginning of it.
    pub raw: String,
    pub tokens: u32,
    pub reason: FinishReason,
}

/// The answer to a prompt by itself.
pub fn alone(prompt: &[TokenId], choice: u32, stop: &StopParams) -> Alone {
    let tokenizer = tokenizer();
    let mut output = ChoiceOutput::new(&tokenizer, prompt, stop.clone());
    let mut context = prompt.iter().fold(EMPTY, |hash, token| extend(hash, *token));
    let (mut text, mut raw, mut ended) = (String::new(), String::new(), None);
    for tokens in 1..=stop.max_tokens {
        let banned: &[TokenId] = if tokens <= stop.min_tokens { &[END] } else { &[] };
        let token = draw(context, choice, banned);
        context = extend(context, token);
        raw.push(char::from(FIRST_CHARACTER + token as u8));
        if ended.is_none() {
            let piece = output.push(token, None, token == END, false);
            text.push_str(&piece.text);
            ended = piece.finish.map(|reason| (tokens, reason));
        }
    }
    let (tokens, reason) = ended.expect("every output has a most tokens");
    Alone { text, raw, tokens, reason }
}
