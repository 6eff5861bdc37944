//! sample_begin, sample_scan and sample draw what the CPU's sampler draws.

use candela::{
    sampling::{SamplingParams, key_of, philox::philox4x32},
    types::TokenId,
};

use crate::{
    draws::{After, Begin, Case, FILES, PAD, Row},
    emulator::{Arg, Emulator, Launch, source},
    values::{Random, read_words, words},
};

/// Kinds of rows: what a model gives, flat, tied, with minus infinities, with outliers.
fn logits(kind: u32, vocab: usize, random: &mut Random) -> Vec<f32> {
    let mut uniform = || f64::from(random.word()) / f64::from(1u32 << 31);
    let mut row: Vec<f32> =
        (0..vocab).map(|_| ((0..4).map(|_| uniform()).sum::<f64>() * 6.0 - 13.0) as f32).collect();
    for (at, logit) in row.iter_mut().enumerate() {
        // Those that prompts, outputs and bans name may win.
        *logit += if at < FEW as usize { 8.0 } else { 0.0 };
        match kind {
            0 => *logit += if at % 53 == 7 { 9.0 } else { 0.0 },
            1 => *logit *= 0.05,
            2 => *logit = (*logit * 0.5).round() / 2.0,
            3 => *logit = if at % 3 == 0 { f32::NEG_INFINITY } else { *logit },
            _ => *logit *= [1.0, 1.0, 1.0, 1e4][random.below(4) as usize],
        }
    }
    row
}

const KINDS: u32 = 5;
/// Tokens that prompts, outputs and bans name.
const FEW: u32 = 9;

/// Every parameter is off in about half of the draws.
fn params(vocab: usize, random: &mut Random) -> SamplingParams {
    let mut pick = |some: &[f32]| some[random.below(some.len() as u32) as usize];
    let mut params = SamplingParams {
        temperature: pick(&[0.0, 9e-6, 2e-5, 0.3, 0.7, 1.0, 1.0, 1.3, 2.0]),
        top_p: pick(&[1.0, 1.0, 1.0, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999_999]),
        min_p: pick(&[0.0, 0.0, 0.0, 1e-5, 0.05, 0.5, 1.0]),
        presence_penalty: pick(&[0.0, 0.0, 0.0, 2.0, -1.5]),
        frequency_penalty: pick(&[0.0, 0.0, 0.0, 0.7, -0.3]),
        repetition_penalty: pick(&[1.0, 1.0, 1.0, 1.3, 0.6]),
        ..SamplingParams::default()
    };
    let vocab = vocab as u32;
    params.top_k = [0, 0, 0, 1, 2, 40, 300, vocab - 1, vocab, vocab + 5][random.below(10) as usize];
    if random.below(3) == 0 {
        let biases = [0, 1, 5, 100][random.below(4) as usize];
        // Every other one is at the edge of a part, or of the vocabulary.
        let edges = [0, 511, 512, 2047, 2048, vocab - 1, vocab, vocab + 1];
        let mut bias = |index: usize| {
            let token =
                if index.is_multiple_of(2) { random.below(vocab) } else { edges[index / 2 % 8] };
            (token, random.below(200) as f32 / 7.0 - 14.0)
        };
        params.logit_bias = (0..biases).map(&mut bias).collect();
    }
    params.seed = u64::from(random.word()) << 20;
    params
}

fn tokens(vocab: usize, count: u32, random: &mut Random) -> Vec<TokenId> {
    // Some repeat, and one does not exist.
    let few = FEW.min(vocab as u32);
    let mut all: Vec<TokenId> = (0..count).map(|_| random.below(few)).collect();
    all.push(vocab as TokenId);
    all
}

/// `seats` sequences that draw in several rounds; some leave their seats to others in between.
fn random_case(vocab: usize, seats: u32, rounds: u32, threads: [u32; 2]) -> Case {
    let random = &mut Random::new(vocab as u64 * 31 + u64::from(seats));
    let rows = seats.min(KINDS * 2);
    let logits = (0..rows).flat_map(|row| logits(row % KINDS, vocab, random)).collect();
    let round = |round: u32| {
        let begins = (0..seats).filter(|seat| round == 0 || (seat + round).is_multiple_of(4));
        let mut begins: Vec<Begin> = begins
            .map(|slot| Begin {
                slot,
                params: params(vocab, random),
                choice: random.below(3),
                prompt: tokens(vocab, random.below(5), random),
                output: tokens(vocab, random.below(5), random),
            })
            .collect();
        begins.insert(0, Begin { slot: PAD, ..Begin::default() });
        // Not in the order of slots, and with padding in between and at the end.
        let mut draws: Vec<Row> = (0..seats)
            .map(|seat| Row {
                logits_row: random.below(rows),
                slot: (seat * 5 + 3) % seats,
                position: 100 + round + random.below(3),
                banned: tokens(vocab, [0, 0, 4][random.below(3) as usize], random),
            })
            .collect();
        for row in draws.iter_mut().filter(|row| row.banned.len() == 1) {
            row.banned.clear();
        }
        draws.insert(1, Row { slot: PAD, ..Row::default() });
        draws.push(Row { slot: PAD, logits_row: PAD, ..Row::default() });
        (begins, draws)
    };
    let rounds = (0..rounds).map(round).collect();
    Case { name: format!("{seats} of {vocab}"), vocab, logits, slots: seats, rounds, threads }
}

#[test]
fn tokens_are_those_of_the_cpu() {
    let emulator = Emulator::of_all(&FILES);
    random_case(1, 6, 2, [32, 64]).check(&emulator);
    random_case(2, 16, 2, [32, 32]).check(&emulator);
    random_case(7, 64, 4, [32, 64]).check(&emulator);
    random_case(257, 64, 4, [32, 64]).check(&emulator);
    random_case(1030, 96, 3, [32, 96]).check(&emulator);
    random_case(4096, 48, 2, [128, 256]).check(&emulator);
    random_case(49_152, 11, 1, [128, 1024]).check(&emulator);
}

/// A draw of a seat of its own.
struct Edge {
    logits: Vec<f32>,
    params: SamplingParams,
    banned: Vec<TokenId>,
}

/// Each edge of a vocabulary with many seeds, as one case.
fn edge_case(name: &str, edges: &[Edge], seeds: u32, threads: [u32; 2]) -> Case {
    let (mut begins, mut rows) = (Vec::new(), Vec::new());
    for (logits_row, edge) in edges.iter().enumerate() {
        for seed in 0..seeds {
            let slot = rows.len() as u32;
            let params =
                SamplingParams { seed: edge.params.seed + u64::from(seed), ..edge.params.clone() };
            begins.push(Begin { slot, params, ..Begin::default() });
            let (logits_row, banned) = (logits_row as u32, edge.banned.clone());
            rows.push(Row { logits_row, slot, position: seed % 3, banned });
        }
    }
    let logits = edges.iter().flat_map(|edge| edge.logits.clone()).collect();
    let (vocab, slots) = (edges[0].logits.len(), rows.len() as u32);
    Case { name: name.into(), vocab, logits, slots, rounds: vec![(begins, rows)], threads }
}

const INF: f32 = f32::INFINITY;

fn small_edges() -> Vec<Edge> {
    let plain = SamplingParams::default();
    let greedy = SamplingParams { temperature: 0.0, ..plain.clone() };
    let ties = vec![1.0, 3.0, 3.0, 2.0, 3.0, 3.0];
    let zeros = vec![-0.0, -1.0, 0.0, -0.0, 0.0, -2.0];
    let falling: Vec<f32> = (0..6).map(|at| -(at as f32)).collect();
    let mut edges = Vec::new();
    let mut edge = |logits: &[f32], params: SamplingParams, banned: &[TokenId]| {
        edges.push(Edge { logits: logits.to_vec(), params, banned: banned.to_vec() });
    };
    for params in [&plain, &greedy] {
        edge(&ties, params.clone(), &[0, 1, 2, 3, 5]);
        edge(&ties, params.clone(), &[0, 1, 2, 3, 4, 5]);
        edge(&ties, params.clone(), &[1, 1, 6, 7, u32::MAX]);
        edge(&zeros, params.clone(), &[0]);
        edge(&[-INF; 6], params.clone(), &[]);
        edge(&[f32::NAN; 6], params.clone(), &[6, 7]);
        edge(&[f32::NAN, -INF, f32::NAN, 1.0, 1.0, f32::NAN], params.clone(), &[]);
        edge(&[1.0, INF, 3.0, INF, -INF, 0.0], params.clone(), &[]);
        edge(&[3e38, -3e38, 3e38, 1.0, -3e38, 2.0], params.clone(), &[]);
        // Whether biases of one token are summed in their order shows in the last bits.
        for biases in [
            &[(4, 0.5), (0, -1.0), (4, 1e8), (4, -1e8), (9, 5.0), (1, 0.25)][..],
            &[(4, 1e8), (4, -1e8), (2, f32::INFINITY)],
            &[(4, 1e8), (1, 2.5), (4, -1e8), (4, 6.0)],
            &[(4, 1.0), (1, 6.5), (4, 2.0), (4, 3.0)],
        ] {
            edge(&ties, SamplingParams { logit_bias: biases.into(), ..params.clone() }, &[2]);
        }
    }
    for top_k in [1, 2, 4, 5, 6, 7, u32::MAX] {
        let params = SamplingParams { top_k, ..plain.clone() };
        edge(&ties, params.clone(), &[]);
        edge(&zeros, params.clone(), &[]);
        edge(&ties, SamplingParams { top_p: 0.5, min_p: 0.9, ..params }, &[4]);
    }
    // Shares of equal logits are exact: a half of four of them is two, and that keeps all four.
    for top_p in [1e-6, 0.25, 0.5, 0.75, 0.999_999_9] {
        let params = SamplingParams { top_p, ..plain.clone() };
        edge(&ties, params.clone(), &[]);
        edge(&[2.0; 6], params.clone(), &[0, 3]);
        edge(&falling, params.clone(), &[]);
        edge(&[3e38, -3e38, 3e38, 1.0, -3e38, 2.0], params.clone(), &[]);
        edge(
            &[1.0, INF, 3.0, INF, -INF, 0.0],
            SamplingParams { top_k: 3, min_p: 0.2, ..params },
            &[],
        );
    }
    for min_p in [1e-30, 0.1, 0.367, 0.368, 1.0] {
        let params = SamplingParams { min_p, ..plain.clone() };
        edge(&ties, params.clone(), &[]);
        edge(&falling, params.clone(), &[]);
        edge(&[-INF, -INF, 1.0, -INF, -INF, -INF], params.clone(), &[]);
        edge(&falling, SamplingParams { temperature: 2e-5, ..params }, &[]);
    }
    edges
}

/// Filters whose bound is too far down, or leaves too much, for what is kept at once.
fn deep_edges() -> Vec<Edge> {
    let random = &mut Random::new(3);
    let vocab = 9001;
    let flat = |at: usize| (at * 7919 % vocab) as f32 / vocab as f32;
    let flat: Vec<f32> = (0..vocab).map(flat).collect();
    let mut steep = logits(0, vocab, random);
    steep[5000] = 60.0;
    let tied = vec![0.25; vocab];
    let mut edges = Vec::new();
    for logits in [&flat, &steep, &tied] {
        for params in [
            SamplingParams { top_k: 6000, ..Default::default() },
            SamplingParams { top_k: 50, temperature: 1.7, ..Default::default() },
            SamplingParams { top_p: 0.95, ..Default::default() },
            SamplingParams { top_p: 0.3, temperature: 1e5, ..Default::default() },
            SamplingParams { min_p: 0.4, ..Default::default() },
            SamplingParams { min_p: 1e-20, ..Default::default() },
            SamplingParams { top_k: 7000, top_p: 0.8, min_p: 0.5, ..Default::default() },
        ] {
            edges.push(Edge { logits: logits.clone(), params, banned: vec![7, 8999] });
        }
    }
    edges
}

/// Two tokens whose noisy logits are the same or next to each other, so that logarithms which are only
/// near decide wrongly. With and without a filter.
fn close_edges() -> Vec<Edge> {
    let mut edges = Vec::new();
    for seed in 0..120u64 {
        let key = key_of(seed, 0);
        let noise = |token: usize| {
            let word = philox4x32([0, (token / 4) as u32, 0, 0], key)[token % 4];
            let uniform = (f64::from(word) + 0.5) / 4_294_967_296.0;
            (-uniform.ln()).ln() as f32
        };
        let (one, other) = (seed as usize % 5, 5 + seed as usize % 3);
        let mut logits = vec![-INF; 8];
        logits[one] = 10.0;
        logits[other] = 10.0 - noise(one) + noise(other);
        logits[other] = match seed % 3 {
            0 => logits[other],
            1 => logits[other].next_up(),
            _ => logits[other].next_down(),
        };
        let top_k = if seed % 2 == 0 { 0 } else { 3 };
        let params = SamplingParams { seed, top_k, ..Default::default() };
        edges.push(Edge { logits, params, banned: Vec::new() });
    }
    edges
}

#[test]
fn edges_are_those_of_the_cpu() {
    let emulator = Emulator::of_all(&FILES);
    edge_case("small", &small_edges(), 6, [32, 32]).check(&emulator);
    edge_case("close", &close_edges(), 1, [32, 32]).check(&emulator);
    edge_case("deep", &deep_edges(), 1, [128, 512]).check(&emulator);
}

/// Mistakes in the kernels that the cases must notice.
#[test]
fn what_is_broken_is_noticed() {
    let whole = source(&FILES);
    let cases =
        [random_case(257, 64, 4, [32, 64]), edge_case("small", &small_edges(), 6, [32, 32])];
    let expected: Vec<After> = cases.iter().map(Case::expected).collect();
    for (name, right, wrong) in [
        ("seat_is_not_cleared", "seen[at] = 0", "seen[at] &= IN_PROMPT"),
        (
            "one_more_is_kept",
            "draw.seat.top_k, 0.0f}, bound)",
            "draw.seat.top_k + 1, 0.0f}, bound)",
        ),
        (
            "share_of_the_kept",
            "keep(scratch, draw, row, share)) {",
            "keep(scratch, draw, row, share)) {\nshare.weight = 0;",
        ),
    ] {
        assert!(whole.contains(right), "{name}: the kernels have no `{right}`");
        let emulator = Emulator::build(name, &whole.replace(right, wrong));
        let wrong = cases
            .iter()
            .zip(&expected)
            .any(|(case, right)| case.run(&emulator).expect("it runs") != *right);
        assert!(wrong, "{name}");
    }
}

/// The noise without f64 is as near as the bound says, for words of all sizes.
#[test]
fn near_noise_is_near() {
    let kernel = "#include \"common.cuh\"\n#include \"sample.cuh\"\n
        struct Args { const uint32_t* words; float* near; float* exact; uint32_t count; };
        __device__ inline void run(const Args& op) {
          for (uint32_t i = threadIdx.x; i < op.count; i += blockDim.x) {
            op.near[i] = near_gumbel(op.words[i]);
            op.exact[i] = gumbel(op.words[i]);
          }
        }
        ENTRY(test, 32, Args)\n";
    let around = (0..32).flat_map(|bit| [1u32 << bit, (1 << bit) - 1, (1 << bit) + 1]);
    let mut all: Vec<u32> = around.flat_map(|word| [word, !word]).collect();
    let random = &mut Random::new(11);
    all.extend((0..20_000).map(|_| random.word() << 1 ^ random.word()));
    let zeros = words(&vec![0; all.len()]);
    let mut args: Vec<Arg> = (0..3).map(Arg::Buffer).collect();
    args.push(Arg::U32(all.len() as u32));
    let launch = Launch { kernel: "test".into(), grid: [1; 3], threads: 32, shared_bytes: 0, args };
    let emulator = Emulator::build("near_noise", kernel);
    let after = emulator.run(&[words(&all), zeros.clone(), zeros], &[launch]).expect("it runs");
    let [near, exact] = [1, 2].map(|buffer| read_words(&after[buffer]));
    for ((word, near), exact) in all.iter().zip(near).zip(exact) {
        let [near, exact] = [near, exact].map(f32::from_bits);
        let uniform = (f64::from(*word) + 0.5) / 4_294_967_296.0;
        assert_eq!(exact, -(-uniform.ln()).ln() as f32, "{word:08x}");
        assert!((near - exact).abs() < 1.5e-5, "{word:08x}: {near} for {exact}");
    }
}
