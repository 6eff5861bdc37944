//! logprobs_scan and logprobs against the CPU's `token_logprobs`.

use candela::sampling::token_logprobs;

use crate::{
    emulator::{Arg, Emulator, Launch},
    values::{Random, bytes_of, read_words, words},
};

const PAD: u32 = u32::MAX;
const TOKEN_FROM_DEVICE: u32 = u32::MAX;
const TOP_MAX: usize = 20;
/// Tokens of a thread of `logprobs_scan`.
const SCAN_TOKENS: usize = 16;
const POISON: u32 = 0x7fee_7fee;
/// Lies after a row's end, and would be the most probable.
const BEYOND: f32 = 3e38;
/// Slots, and what was drawn for each.
const SAMPLED: [u32; 3] = [5, 0, 1];

/// A row and a token, which may be that of a slot, and how many of the most probable ones.
#[derive(Clone, Copy)]
struct Wanted {
    row: u32,
    token: u32,
    slot: u32,
    top: u32,
}

fn near(what: &str, ours: u32, exact: f32) {
    let ours = f32::from_bits(ours);
    let both = ours.is_nan() && exact.is_nan() || ours == exact;
    let most = 1e-6 + exact.abs() * 3e-7;
    assert!(both || (ours - exact).abs() <= most, "{what}: {ours} for {exact}");
}

fn check(emulator: &Emulator, logits: &[Vec<f32>], wanted: &[Wanted], threads: [u32; 2]) {
    let vocab = logits[0].len();
    let stride = vocab.next_multiple_of(4);
    let parts = vocab.div_ceil(threads[0] as usize * SCAN_TOKENS);
    let mut rows = vec![BEYOND; logits.len() * stride];
    for (to, from) in rows.chunks_mut(stride).zip(logits) {
        to[..vocab].copy_from_slice(from);
    }
    let column = |of: fn(&Wanted) -> u32| words(&wanted.iter().map(of).collect::<Vec<_>>());
    let poison = |count: usize| words(&vec![POISON; wanted.len() * count]);
    let buffers = [
        bytes_of(&rows, f32::to_ne_bytes),
        column(|one| one.row),
        column(|one| one.top),
        poison(parts),
        poison(parts),
        poison(parts * TOP_MAX * 2),
        column(|one| one.token),
        column(|one| one.slot),
        words(&SAMPLED),
        poison(1),
        poison(TOP_MAX),
        poison(TOP_MAX),
    ];
    let sizes = [vocab, stride, parts].map(|size| Arg::U32(size as u32));
    let launch = |kernel: &str, grid, threads, buffers, sizes: &[Arg]| {
        let args = (0..buffers).map(Arg::Buffer).chain(sizes.iter().copied()).collect();
        Launch { kernel: kernel.into(), grid, threads, shared_bytes: 0, args }
    };
    let count = wanted.len() as u32;
    let scan = launch("logprobs_scan", [parts as u32, count, 1], threads[0], 6, &sizes[..2]);
    let last = launch("logprobs", [count, 1, 1], threads[1], 12, &sizes);
    let after = emulator.run(&buffers, &[scan, last]).expect("it runs");
    let [ours, ids, tops] = [9, 10, 11].map(|buffer| read_words(&after[buffer]));
    for (index, one) in wanted.iter().enumerate() {
        let what = format!("{vocab} tokens, {threads:?} threads, {index}");
        let places = index * TOP_MAX..(index + 1) * TOP_MAX;
        let (ids, tops) = (&ids[places.clone()], &tops[places]);
        if one.row == PAD {
            assert!(
                ours[index] == POISON && ids.iter().chain(tops).all(|x| *x == POISON),
                "{what}"
            );
            continue;
        }
        let from_device = one.token == TOKEN_FROM_DEVICE;
        let token = if from_device { SAMPLED[one.slot as usize] } else { one.token };
        let known = (token as usize) < vocab;
        let row = &logits[one.row as usize];
        let expected =
            token_logprobs(row, if known { token } else { 0 }, one.top.min(TOP_MAX as u32));
        near(&what, ours[index], if known { expected.logprob } else { f32::NAN });
        for (place, (id, logprob)) in expected.top.iter().enumerate() {
            assert_eq!(ids[place], *id, "{what}, place {place}");
            near(&what, tops[place], *logprob);
        }
        let beyond = ids.iter().chain(tops.iter()).enumerate();
        let mut beyond = beyond.filter(|(place, _)| place % TOP_MAX >= expected.top.len());
        assert!(beyond.all(|(_, x)| *x == POISON), "{what}: more than wanted is written");
    }
}

/// Mostly distinct, all of few values, with minus infinities, and with an outlier.
fn rows(vocab: usize) -> Vec<Vec<f32>> {
    let random = &mut Random::new(vocab as u64);
    let row = |kind: u32| {
        let mut row: Vec<f32> = (0..vocab)
            .map(|_| (f64::from(random.word()) / f64::from(1u32 << 28) - 4.0) as f32)
            .collect();
        for logit in &mut row {
            match kind {
                0 => {}
                1 => *logit = logit.round(),
                2 => *logit = if random.below(40) > 0 { f32::NEG_INFINITY } else { *logit },
                _ => *logit *= 0.01,
            }
        }
        let place = random.below(vocab as u32) as usize;
        row[place] = [row[place], -0.0, 1.0, 200.0][kind as usize];
        row
    };
    (0..4).map(row).collect()
}

fn wanted(vocab: usize) -> Vec<Wanted> {
    let last = vocab as u32 - 1;
    let mut all: Vec<Wanted> = [0, 1, 2, 5, 19, 20, 21]
        .into_iter()
        .flat_map(|top| (0..4).map(move |row| Wanted { row, token: last, slot: 9, top }))
        .collect();
    all.push(Wanted { row: PAD, token: 0, slot: 0, top: 3 });
    for slot in 0..3 {
        all.push(Wanted { row: slot, token: TOKEN_FROM_DEVICE, slot, top: 1 });
    }
    all.push(Wanted { row: 1, token: vocab as u32, slot: 0, top: 2 });
    all.push(Wanted { row: PAD, token: TOKEN_FROM_DEVICE, slot: PAD, top: 0 });
    all
}

#[test]
fn logprobs_are_those_of_the_cpu() {
    let emulator = Emulator::of("logprobs");
    for (vocab, threads) in
        [(1, [32, 32]), (7, [32, 64]), (257, [32, 32]), (2050, [64, 128]), (4096, [128, 32])]
    {
        check(&emulator, &rows(vocab), &wanted(vocab), threads);
    }
    // More parts than threads.
    let few =
        [(0, 3), (1, 20), (2, 20), (3, 1)].map(|(row, top)| Wanted { row, token: 9, slot: 0, top });
    check(&emulator, &rows(17_001), &few, [32, 32]);
    // Nothing is probable, or only one is.
    let one = |at: usize| (0..9).map(|i| if i == at { 1.0 } else { f32::NEG_INFINITY }).collect();
    let rows = [vec![f32::NEG_INFINITY; 9], one(0), one(8), vec![-1e30; 9]];
    check(&emulator, &rows, &wanted(9), [32, 32]);
}
