//! Reductions over one row of logits, with the same result on every instruction set.

use super::arena::{exp, versions};

/// Lanes of the reductions, and values looked at in one go by the searches.
const LANES: usize = 16;
const CHUNK: usize = 64;

/// The largest logit; the lowest id among equals, and 0 when nothing compares.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = f32::NEG_INFINITY;
    max(logits, &mut best);
    let mut at = logits.len();
    first_at_least(logits, 0, best, &mut at);
    if at < logits.len() { at as u32 } else { 0 }
}

/// The sum of `e^(logit - top)`; logits are not above `top`.
pub fn sum_exp(logits: &[f32], top: f32) -> f64 {
    let mut sum = 0.0;
    add_exp(logits, top, &mut sum);
    sum
}

/// The `count` largest logits, best first, the lowest ids first among equals.
pub fn largest(logits: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    let mut at = 0;
    while at < logits.len() && count > 0 {
        if best.len() == count {
            // Nothing up to the next value above the last of ours can change anything.
            let least = best[count - 1].1.next_up();
            let from = at;
            first_at_least(logits, from, least, &mut at);
            if at >= logits.len() {
                break;
            }
        }
        let place = best.partition_point(|(_, value)| *value >= logits[at]);
        best.insert(place, (at as u32, logits[at]));
        best.truncate(count);
        at += 1;
    }
    best
}

versions! { fn max(logits: &[f32], best: &mut f32) = max_body }
versions! { fn add_exp(logits: &[f32], top: f32, sum: &mut f64) = add_exp_body }
versions! {
    /// Index of the first logit from `from` on that is not below `least`; the length if there is none.
    fn first_at_least(logits: &[f32], from: usize, least: f32, at: &mut usize) = first_at_least_body
}

#[inline(always)]
fn max_body(logits: &[f32], best: &mut f32) {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [*best; LANES];
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = if logit > lane { *logit } else { *lane };
        }
    }
    for logit in lanes.iter().chain(rest) {
        *best = if logit > best { *logit } else { *best };
    }
}

#[inline(always)]
fn add_exp_body(logits: &[f32], top: f32, sum: &mut f64) {
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [0f64; LANES];
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(exp(logit - top));
        }
    }
    for logit in rest {
        *sum += f64::from(exp(logit - top));
    }
    for lane in lanes {
        *sum += lane;
    }
}

#[inline(always)]
fn first_at_least_body(logits: &[f32], from: usize, least: f32, at: &mut usize) {
    let (mut first, end) = (from, logits.len());
    while first < end {
        let chunk = &logits[first..end.min(first + CHUNK)];
        // All of a chunk without a branch, so that it is a few instructions.
        let mut found = false;
        for logit in chunk {
            found |= *logit >= least;
        }
        if found && let Some(index) = chunk.iter().position(|logit| *logit >= least) {
            *at = first + index;
            return;
        }
        first += chunk.len();
    }
    *at = end;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values with many ties, and some that do not compare.
    fn row(len: usize, seed: u64) -> Vec<f32> {
        let draw = |index: usize| {
            let z = (seed + index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            match z >> 60 {
                0 => f32::NEG_INFINITY,
                _ => ((z >> 32) % 97) as f32 / 8.0 - 6.0,
            }
        };
        (0..len).map(draw).collect()
    }

    #[test]
    fn reductions_are_those_of_a_plain_loop() {
        for len in [1, 2, 15, 16, 17, 63, 64, 65, 1000] {
            for seed in 0..20 {
                let logits = row(len, seed);
                let mut order: Vec<u32> = (0..len as u32).collect();
                order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
                assert_eq!(argmax(&logits), order[0], "{len} {seed}");
                for count in [0, 1, 2, 5, 64, len] {
                    let ids: Vec<u32> = largest(&logits, count).iter().map(|one| one.0).collect();
                    assert_eq!(ids, order[..count.min(len)], "{len} {seed} {count}");
                }
                let top = logits[order[0] as usize].max(-6.0);
                let exact: f64 = logits.iter().map(|x| f64::from(x - top).exp()).sum();
                let sum = sum_exp(&logits, top);
                assert!((sum - exact).abs() <= 3e-7 * exact, "{len} {seed}: {sum} for {exact}");
            }
        }
    }

    #[test]
    fn what_does_not_compare_is_nobody() {
        for (logits, expected) in [
            (vec![], 0),
            (vec![f32::NAN; 20], 0),
            (vec![f32::NEG_INFINITY; 20], 0),
            ([vec![f32::NAN; 20], vec![-1.0, f32::NAN, 3.0, 3.0]].concat(), 22),
            (vec![1.0, f32::INFINITY, f32::INFINITY], 1),
        ] {
            assert_eq!(argmax(&logits), expected, "{logits:?}");
            assert!(largest(&logits, 3).len() <= 3);
        }
    }
}
