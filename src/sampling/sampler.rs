//! Draws tokens. What a seat draws depends on its logits, its parameters and its own past alone.

use std::{
    collections::{HashMap, HashSet},
    sync::{Mutex, OnceLock},
};

use crate::{
    ops::{
        CpuPool,
        logits::{argmax, largest, sum_exp},
    },
    types::{SlotId, TokenId},
};

use super::{SamplingParams, TokenLogprobs, philox::philox4x32};

/// Below this a temperature means greedy.
const TEMPERATURE_MIN: f32 = 1e-5;
/// Up to this many, the largest logits are found in one pass over them.
const LARGEST_MAX: usize = 256;
/// How far below the best the candidates for top-p are looked for, before all are taken.
const NUCLEUS_DEPTHS: [f32; 3] = [6.0, 12.0, f32::INFINITY];

/// A request to draw for one seat.
#[derive(Clone, Copy, Debug)]
pub struct SampleRow<'a> {
    /// Row of the logits; several samples may share one.
    pub logits_row: u32,
    pub slot: SlotId,
    /// Absolute position of the new token: the generator's counter.
    pub position: u32,
    /// Tokens that may not be drawn.
    pub banned: &'a [TokenId],
}

#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    pub slot: SlotId,
    pub token: TokenId,
    pub logprobs: Option<TokenLogprobs>,
}

/// State per seat, and scratch.
pub struct Sampler {
    vocab: usize,
    seats: Vec<Option<Seat>>,
    /// Rows of logits to work on, as many as threads have needed at once.
    scratch: Mutex<Vec<Vec<f32>>>,
}

struct Seat {
    params: SamplingParams,
    key: [u32; 2],
    prompt: HashSet<TokenId>,
    counts: HashMap<TokenId, u32>,
}

impl Sampler {
    pub fn new(slots: usize, vocab: usize) -> Self {
        Self { vocab, seats: (0..slots).map(|_| None).collect(), scratch: Mutex::default() }
    }

    /// A sequence takes a seat; `output` is what it drew before it was preempted.
    pub fn begin(
        &mut self,
        slot: SlotId,
        params: &SamplingParams,
        choice: u32,
        prompt: &[TokenId],
        output: &[TokenId],
    ) {
        let mut counts = HashMap::new();
        for token in output {
            *counts.entry(*token).or_insert(0) += 1;
        }
        let repeats = params.repetition_penalty != 1.0;
        self.seats[slot.0 as usize] = Some(Seat {
            params: params.clone(),
            key: key_of(params.seed, choice),
            prompt: if repeats { prompt.iter().copied().collect() } else { HashSet::new() },
            counts,
        });
    }

    pub fn end(&mut self, slot: SlotId) {
        self.seats[slot.0 as usize] = None;
    }

    /// Draws one token per row, of different seats. `logits` is `[rows, vocab]`.
    pub fn sample(
        &mut self,
        pool: &CpuPool,
        rows: &[SampleRow<'_>],
        logits: &[f32],
        out: &mut Vec<Sampled>,
    ) {
        let drawn: Vec<OnceLock<Sampled>> = rows.iter().map(|_| OnceLock::new()).collect();
        pool.each(rows.len(), 1, &|range| {
            for index in range {
                // A unit runs once, so that the place is empty.
                let _ = drawn[index].set(self.sample_row(&rows[index], logits));
            }
        });
        for one in drawn.into_iter().filter_map(OnceLock::into_inner) {
            if let Some(seat) = &mut self.seats[one.slot.0 as usize] {
                *seat.counts.entry(one.token).or_insert(0) += 1;
            }
            out.push(one);
        }
    }

    fn sample_row(&self, row: &SampleRow<'_>, logits: &[f32]) -> Sampled {
        let raw = &logits[row.logits_row as usize * self.vocab..][..self.vocab];
        let seat = self.seats[row.slot.0 as usize].as_ref();
        let seat = seat.unwrap_or_else(|| panic!("nobody sits in {:?}", row.slot));
        let token = if seat.takes_the_best(row) {
            argmax(raw)
        } else {
            let lock = || self.scratch.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            let mut changed = lock().pop().unwrap_or_default();
            changed.clear();
            changed.extend_from_slice(raw);
            let token = draw(seat, &mut changed, row);
            lock().push(changed);
            token
        };
        let logprobs = seat.params.logprobs.map(|top| token_logprobs(raw, token, top));
        Sampled { slot: row.slot, token, logprobs }
    }
}

impl Seat {
    /// Nothing changes the logits, and the largest one wins.
    fn takes_the_best(&self, row: &SampleRow<'_>) -> bool {
        let SamplingParams { temperature, logit_bias, .. } = &self.params;
        *temperature < TEMPERATURE_MIN
            && logit_bias.is_empty()
            && row.banned.is_empty()
            && self.params.repetition_penalty == 1.0
            && self.params.presence_penalty == 0.0
            && self.params.frequency_penalty == 0.0
    }
}

fn draw(seat: &Seat, logits: &mut [f32], row: &SampleRow<'_>) -> TokenId {
    let params = &seat.params;
    for (token, bias) in params.logit_bias.iter() {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit += bias;
        }
    }
    penalise(seat, logits);
    for token in row.banned {
        if let Some(logit) = logits.get_mut(*token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if params.temperature < TEMPERATURE_MIN {
        return argmax(logits);
    }
    let inverse = 1.0 / params.temperature;
    for logit in logits.iter_mut() {
        *logit *= inverse;
    }
    filter(params, logits);
    gumbel_argmax(seat.key, row.position, logits)
}

fn penalise(seat: &Seat, logits: &mut [f32]) {
    let params = &seat.params;
    if params.repetition_penalty != 1.0 {
        let seen =
            seat.prompt.iter().chain(seat.counts.keys().filter(|t| !seat.prompt.contains(t)));
        for token in seen {
            if let Some(logit) = logits.get_mut(*token as usize) {
                let penalty = params.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        for (token, count) in &seat.counts {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit -= params.presence_penalty + params.frequency_penalty * *count as f32;
            }
        }
    }
}

/// Top-k, then top-p, then min-p: what falls out becomes minus infinity.
fn filter(params: &SamplingParams, logits: &mut [f32]) {
    let k = params.top_k as usize;
    if k > 0 && k < logits.len() {
        let bound = kth_largest(logits, k);
        drop_below(logits, bound);
    }
    if params.top_p < 1.0
        && let Some(bound) = nucleus(logits, params.top_p)
    {
        drop_below(logits, bound);
    }
    if params.min_p > 0.0 {
        let top = logits[argmax(logits) as usize];
        drop_below(logits, top + params.min_p.ln());
    }
}

fn drop_below(logits: &mut [f32], bound: f32) {
    for logit in logits {
        if *logit < bound {
            *logit = f32::NEG_INFINITY;
        }
    }
}

fn kth_largest(logits: &[f32], k: usize) -> f32 {
    if k <= LARGEST_MAX {
        return largest(logits, k).last().map_or(f32::NEG_INFINITY, |(_, logit)| *logit);
    }
    let mut sorted = logits.to_vec();
    *sorted.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// The least logit of those that together have a share of `top_p`; none if rounding keeps all below.
fn nucleus(logits: &[f32], top_p: f32) -> Option<f32> {
    let top = logits[argmax(logits) as usize];
    if !top.is_finite() {
        return None;
    }
    let wanted = f64::from(top_p) * sum_exp(logits, top);
    // Few have most of the share, so sorting all is the last resort.
    NUCLEUS_DEPTHS.into_iter().find_map(|depth| {
        let mut near: Vec<f32> = logits.iter().copied().filter(|l| top - l <= depth).collect();
        near.sort_unstable_by(|a, b| b.total_cmp(a));
        let mut mass = 0.0;
        near.into_iter().find(|l| {
            mass += f64::from(l - top).exp();
            mass >= wanted
        })
    })
}

/// Samples from softmax(logits) as the argmax of logits plus Gumbel noise.
fn gumbel_argmax(key: [u32; 2], position: u32, logits: &[f32]) -> TokenId {
    // Noise lies in (-3.2, 23): a token further below the best than that cannot win.
    let hopeless = logits[argmax(logits) as usize] - 27.0;
    let mut best = (f32::NEG_INFINITY, argmax(logits));
    for (chunk, values) in logits.chunks(4).enumerate() {
        if !values.iter().any(|value| *value > hopeless) {
            continue;
        }
        let words = philox4x32([position, chunk as u32, 0, 0], key);
        for (lane, (value, word)) in values.iter().zip(words).enumerate() {
            let uniform = (f64::from(word) + 0.5) / 4_294_967_296.0;
            let noisy = value - (-uniform.ln()).ln() as f32;
            if noisy > best.0 {
                best = (noisy, (chunk * 4 + lane) as TokenId);
            }
        }
    }
    best.1
}

/// Log-softmax of raw logits for one token, with the `top` most probable ones, best first.
pub fn token_logprobs(logits: &[f32], token: TokenId, top: u32) -> TokenLogprobs {
    let best = logits[argmax(logits) as usize];
    let norm = f64::from(best) + sum_exp(logits, best).ln();
    let of = |logit: f32| (f64::from(logit) - norm) as f32;
    let top = largest(logits, top as usize).into_iter().map(|(id, logit)| (id, of(logit)));
    TokenLogprobs { token, logprob: of(logits[token as usize]), top: top.collect() }
}

/// The generator's key of a request's choice.
pub fn key_of(seed: u64, choice: u32) -> [u32; 2] {
    let key = split_mix(seed ^ split_mix(u64::from(choice)));
    [key as u32, (key >> 32) as u32]
}

/// A mixer of 64 bits (Steele et al., 2014).
fn split_mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(params: &SamplingParams, logits: &[f32], count: u32) -> Vec<u32> {
        let mut sampler = Sampler::new(2, logits.len());
        let pool = CpuPool::new(1).expect("threads");
        let slot = SlotId(1);
        let mut out = Vec::new();
        for seed in 0..count {
            sampler.begin(
                slot,
                &SamplingParams { seed: seed.into(), ..params.clone() },
                0,
                &[],
                &[],
            );
            let row = SampleRow { logits_row: 0, slot, position: 9, banned: &[] };
            sampler.sample(&pool, &[row], logits, &mut out);
        }
        out.into_iter().map(|drawn| drawn.token).collect()
    }

    #[test]
    fn draws_follow_the_distribution() {
        let probabilities = [0.5f32, 0.25, 0.125, 0.0625, 0.0625];
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let drawn = draws(&SamplingParams::default(), &logits, 20_000);
        for (token, p) in probabilities.iter().enumerate() {
            let share = drawn.iter().filter(|t| **t == token as u32).count() as f32 / 20_000.0;
            assert!((share - p).abs() < 0.015, "{token}: {share} for {p}");
        }
    }

    #[test]
    fn filters_keep_exactly_their_support() {
        let logits: Vec<f32> = [0.4f32, 0.3, 0.2, 0.1].iter().map(|p| p.ln()).collect();
        let base = SamplingParams::default();
        for (params, support) in [
            (SamplingParams { top_k: 2, ..base.clone() }, vec![0, 1]),
            (SamplingParams { top_p: 0.65, ..base.clone() }, vec![0, 1]),
            (SamplingParams { top_p: 0.75, ..base.clone() }, vec![0, 1, 2]),
            (SamplingParams { min_p: 0.45, ..base.clone() }, vec![0, 1, 2]),
            (SamplingParams { temperature: 0.0, ..base.clone() }, vec![0]),
            (SamplingParams { logit_bias: [(3, 100.0)].into(), ..base.clone() }, vec![3]),
        ] {
            let mut seen = draws(&params, &logits, 500);
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, support, "{params:?}");
        }
    }

    #[test]
    fn broken_logits_do_not_panic() {
        for logits in [[f32::NAN; 8], [f32::NEG_INFINITY; 8], [f32::INFINITY; 8]] {
            for temperature in [0.0, 1.0] {
                let params =
                    SamplingParams { temperature, top_p: 0.9, top_k: 3, ..Default::default() };
                assert!(draws(&params, &logits, 2).iter().all(|token| *token < 8));
            }
        }
    }
}
