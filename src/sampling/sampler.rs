//! Draws tokens. What a seat draws depends on its logits, its parameters and its own past alone.

use std::collections::{HashMap, HashSet};

use crate::types::{SlotId, TokenId};

use super::{SamplingParams, TokenLogprobs, philox::philox4x32};

/// Below this a temperature means greedy.
const TEMPERATURE_MIN: f32 = 1e-5;

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
    logits: Vec<f32>,
}

struct Seat {
    params: SamplingParams,
    key: [u32; 2],
    prompt: HashSet<TokenId>,
    counts: HashMap<TokenId, u32>,
}

impl Sampler {
    pub fn new(slots: usize, vocab: usize) -> Self {
        Self { vocab, seats: (0..slots).map(|_| None).collect(), logits: vec![0.0; vocab] }
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
        let key = split_mix(params.seed ^ split_mix(u64::from(choice)));
        let mut counts = HashMap::new();
        for token in output {
            *counts.entry(*token).or_insert(0) += 1;
        }
        let repeats = params.repetition_penalty != 1.0;
        self.seats[slot.0 as usize] = Some(Seat {
            params: params.clone(),
            key: [key as u32, (key >> 32) as u32],
            prompt: if repeats { prompt.iter().copied().collect() } else { HashSet::new() },
            counts,
        });
    }

    pub fn end(&mut self, slot: SlotId) {
        self.seats[slot.0 as usize] = None;
    }

    /// Draws one token per row. `logits` is `[rows, vocab]` and stays as it is.
    pub fn sample(&mut self, rows: &[SampleRow<'_>], logits: &[f32], out: &mut Vec<Sampled>) {
        for row in rows {
            let from = row.logits_row as usize * self.vocab;
            let raw = &logits[from..from + self.vocab];
            let seat = self.seats[row.slot.0 as usize].as_mut();
            let seat = seat.unwrap_or_else(|| panic!("nobody sits in {:?}", row.slot));
            self.logits.copy_from_slice(raw);
            let token = draw(seat, &mut self.logits, row);
            *seat.counts.entry(token).or_insert(0) += 1;
            let logprobs = seat.params.logprobs.map(|top| token_logprobs(raw, token, top));
            out.push(Sampled { slot: row.slot, token, logprobs });
        }
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
    let by_logit = |a: &f32, b: &f32| b.total_cmp(a);
    let k = params.top_k as usize;
    if k > 0 && k < logits.len() {
        let mut sorted = logits.to_vec();
        let (_, bound, _) = sorted.select_nth_unstable_by(k - 1, by_logit);
        let bound = *bound;
        drop_below(logits, bound);
    }
    if params.top_p < 1.0 {
        let mut sorted: Vec<f32> = logits.iter().copied().filter(|l| l.is_finite()).collect();
        sorted.sort_unstable_by(by_logit);
        let Some(&top) = sorted.first() else { return };
        let total: f64 = sorted.iter().map(|l| f64::from(l - top).exp()).sum();
        let mut mass = 0.0;
        let kept = sorted.iter().find(|l| {
            mass += f64::from(**l - top).exp();
            mass >= f64::from(params.top_p) * total
        });
        if let Some(&bound) = kept {
            drop_below(logits, bound);
        }
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

/// The largest logit; the lowest id among equals, and 0 when nothing compares.
fn argmax(logits: &[f32]) -> TokenId {
    let mut best = f32::NEG_INFINITY;
    for &logit in logits {
        best = if logit > best { logit } else { best };
    }
    logits.iter().position(|logit| *logit == best).unwrap_or(0) as TokenId
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
    let total: f64 = logits.iter().map(|logit| f64::from(logit - best).exp()).sum();
    let norm = f64::from(best) + total.ln();
    let of = |token: TokenId| (f64::from(logits[token as usize]) - norm) as f32;
    let mut ids: Vec<TokenId> = (0..logits.len() as TokenId).collect();
    let order = |a: &TokenId, b: &TokenId| {
        logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
    };
    let count = (top as usize).min(ids.len());
    if count > 0 {
        ids.select_nth_unstable_by(count - 1, order);
    }
    ids.truncate(count);
    ids.sort_unstable_by(order);
    TokenLogprobs {
        token,
        logprob: of(token),
        top: ids.into_iter().map(|id| (id, of(id))).collect(),
    }
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
            sampler.sample(&[row], logits, &mut out);
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
