//! sample_begin, sample_scan and sample draw what the CPU's sampler draws.

use candela::{
    ops::CpuPool,
    sampling::{SampleRow, Sampler, SamplingParams, key_of, philox::philox4x32},
    types::{SlotId, TokenId},
};

use crate::{
    emulator::{Arg, Emulator, Launch, source},
    values::{Random, bytes_of, read_words, words},
};

const FILES: [&str; 3] = ["sample_begin", "sample_scan", "sample"];
const PAD: u32 = u32::MAX;
const IN_PROMPT: u32 = 1 << 31;
/// Tokens of a thread of `sample_scan`.
const SCAN_TOKENS: u32 = 16;
const POISON: u32 = 0x7fee_7fee;
/// Lies after a row's end, and would win.
const BEYOND: f32 = 3e38;

#[derive(Clone, Default)]
struct Begin {
    slot: u32,
    params: SamplingParams,
    choice: u32,
    prompt: Vec<TokenId>,
    output: Vec<TokenId>,
}

#[derive(Clone, Default)]
struct Row {
    logits_row: u32,
    /// PAD is a padding row.
    slot: u32,
    position: u32,
    banned: Vec<TokenId>,
}

/// Rounds, each of which seats sequences and then draws one step.
struct Case {
    name: String,
    vocab: usize,
    /// `[rows, vocab]`
    logits: Vec<f32>,
    slots: u32,
    rounds: Vec<(Vec<Begin>, Vec<Row>)>,
    /// Of `sample_scan` and of `sample`.
    threads: [u32; 2],
}

/// What a run leaves: tokens drawn in each round, the last of each slot, and `seen`.
#[derive(Debug, PartialEq)]
struct After {
    drawn: Vec<Vec<u32>>,
    sampled: Vec<u32>,
    seen: Vec<u32>,
}

fn penalised(params: &SamplingParams) -> bool {
    params.repetition_penalty != 1.0
        || params.presence_penalty != 0.0
        || params.frequency_penalty != 0.0
}

/// The lists of several owners in one, and where each begins and the last ends.
fn join<'a>(lists: impl Iterator<Item = &'a Vec<TokenId>>) -> [Vec<u8>; 2] {
    let (mut offsets, mut all) = (vec![0], Vec::new());
    for list in lists {
        all.extend(list);
        offsets.push(all.len() as u32);
    }
    [words(&offsets), words(&all)]
}

impl Case {
    fn stride(&self) -> usize {
        self.vocab.next_multiple_of(4)
    }

    /// What the CPU's sampler draws, and what the device should keep of it.
    fn expected(&self) -> After {
        let (pool, vocab) = (CpuPool::new(1).expect("threads"), self.vocab);
        let mut sampler = Sampler::new(self.slots as usize, vocab);
        let mut counts: Vec<Option<Vec<u32>>> = vec![None; self.slots as usize];
        let mut after = After {
            drawn: Vec::new(),
            sampled: vec![POISON; self.slots as usize],
            seen: vec![POISON; self.slots as usize * vocab],
        };
        for (begins, rows) in &self.rounds {
            for begin in begins.iter().filter(|begin| begin.slot != PAD) {
                let (slot, params) = (SlotId(begin.slot), &begin.params);
                sampler.begin(slot, params, begin.choice, &begin.prompt, &begin.output);
                let mut seen = vec![0; vocab];
                for token in begin.prompt.iter().filter(|token| (**token as usize) < vocab) {
                    seen[*token as usize] |= IN_PROMPT;
                }
                for token in begin.output.iter().filter(|token| (**token as usize) < vocab) {
                    seen[*token as usize] += 1;
                }
                counts[begin.slot as usize] = penalised(params).then_some(seen);
            }
            let real = rows.iter().filter(|row| row.slot != PAD);
            let asked: Vec<SampleRow<'_>> = real
                .map(|row| SampleRow {
                    logits_row: row.logits_row,
                    slot: SlotId(row.slot),
                    position: row.position,
                    banned: &row.banned,
                })
                .collect();
            let mut out = Vec::new();
            sampler.sample(&pool, &asked, &self.logits, &mut out);
            for one in &out {
                after.sampled[one.slot.0 as usize] = one.token;
                if let Some(seen) = &mut counts[one.slot.0 as usize] {
                    seen[one.token as usize] += 1;
                }
            }
            let mut out = out.into_iter();
            let token =
                |row: &Row| if row.slot == PAD { POISON } else { out.next().expect("one").token };
            after.drawn.push(rows.iter().map(token).collect());
            for (slot, seen) in counts.iter().enumerate() {
                if let Some(seen) = seen {
                    after.seen[slot * vocab..][..vocab].copy_from_slice(seen);
                }
            }
        }
        after
    }

    /// What the kernels draw. Each kind of output is poisoned first.
    fn run(&self, emulator: &Emulator) -> Result<After, String> {
        let (vocab, stride, slots) = (self.vocab, self.stride(), self.slots as usize);
        let parts = vocab.div_ceil((self.threads[0] * SCAN_TOKENS) as usize);
        let mut logits = vec![BEYOND; self.logits.len() / vocab * stride];
        for (to, from) in logits.chunks_mut(stride).zip(self.logits.chunks(vocab)) {
            to[..vocab].copy_from_slice(from);
        }
        let mut made = Made::default();
        let logits = made.buffer(bytes_of(&logits, f32::to_ne_bytes));
        let seats = made.buffer(words(&vec![POISON; slots * 12]));
        let seen = made.buffer(words(&vec![POISON; slots * vocab]));
        let sampled = made.buffer(words(&vec![POISON; slots]));
        let biases = self.biases();
        let bias_tokens: Vec<u32> = biases.iter().map(|bias| bias.0).collect();
        let bias_values: Vec<f32> = biases.iter().map(|bias| bias.1).collect();
        let bias_tokens = made.buffer(words(&bias_tokens));
        let bias_values = made.buffer(bytes_of(&bias_values, f32::to_ne_bytes));
        let [vocab, stride] = [vocab, stride].map(|size| Arg::U32(size as u32));
        let (mut drawn, mut first) = (Vec::new(), 0);
        for (begins, rows) in &self.rounds {
            let slots: Vec<u32> = begins.iter().map(|begin| begin.slot).collect();
            let params = begins.iter().flat_map(|begin| {
                let count = begin.params.logit_bias.len() as u32;
                first += count;
                seat(begin, first - count)
            });
            let mut args =
                vec![made.buffer(words(&slots)), made.buffer(words(&params.collect::<Vec<_>>()))];
            args.extend(
                join(begins.iter().map(|begin| &begin.prompt)).map(|list| made.buffer(list)),
            );
            args.extend(
                join(begins.iter().map(|begin| &begin.output)).map(|list| made.buffer(list)),
            );
            args.extend([seats, seen, vocab]);
            made.launch("sample_begin", [begins.len(), 1], 64, args);

            let column = |of: fn(&Row) -> u32| words(&rows.iter().map(of).collect::<Vec<_>>());
            let [logits_rows, slots, positions] =
                [column(|row| row.logits_row), column(|row| row.slot), column(|row| row.position)]
                    .map(|column| made.buffer(column));
            let bans = join(rows.iter().map(|row| &row.banned)).map(|list| made.buffer(list));
            let changed = made.buffer(words(&vec![POISON; rows.len() * self.stride()]));
            let best = made.buffer(words(&vec![POISON; rows.len() * parts * 2]));
            let args = vec![
                logits,
                logits_rows,
                slots,
                positions,
                bans[0],
                bans[1],
                seats,
                bias_tokens,
                bias_values,
                seen,
                changed,
                best,
                vocab,
                stride,
            ];
            made.launch("sample_scan", [parts, rows.len()], self.threads[0], args);
            let tokens = made.buffer(words(&vec![POISON; rows.len()]));
            let args = vec![
                best,
                changed,
                slots,
                positions,
                seats,
                seen,
                tokens,
                sampled,
                vocab,
                stride,
                Arg::U32(parts as u32),
            ];
            made.launch("sample", [rows.len(), 1], self.threads[1], args);
            drawn.push(tokens);
        }
        let after = emulator.run(&made.buffers, &made.launches)?;
        let read = |buffer: &Arg| match buffer {
            Arg::Buffer(index) => read_words(&after[*index as usize]),
            _ => Vec::new(),
        };
        Ok(After {
            drawn: drawn.iter().map(read).collect(),
            sampled: read(&sampled),
            seen: read(&seen),
        })
    }

    /// Of all seats in turn; each one's rise by token.
    fn biases(&self) -> Vec<(TokenId, f32)> {
        let begins = self.rounds.iter().flat_map(|round| &round.0);
        let sorted = begins.flat_map(|begin| {
            let mut biases = begin.params.logit_bias.to_vec();
            biases.sort_by_key(|bias| bias.0);
            biases
        });
        sorted.collect()
    }

    fn check(&self, emulator: &Emulator) {
        let (ours, expected) = (self.run(emulator).expect(&self.name), self.expected());
        for (round, (ours, expected)) in ours.drawn.iter().zip(&expected.drawn).enumerate() {
            assert_eq!(ours, expected, "{}, round {round}", self.name);
        }
        assert_eq!(ours.sampled, expected.sampled, "{}", self.name);
        assert!(ours.seen == expected.seen, "{}: what was seen differs", self.name);
    }
}

/// Buffers and launches of a request.
#[derive(Default)]
struct Made {
    buffers: Vec<Vec<u8>>,
    launches: Vec<Launch>,
}

impl Made {
    fn buffer(&mut self, bytes: Vec<u8>) -> Arg {
        self.buffers.push(bytes);
        Arg::Buffer(self.buffers.len() as u32 - 1)
    }

    fn launch(&mut self, kernel: &str, grid: [usize; 2], threads: u32, args: Vec<Arg>) {
        if grid[0] > 0 && grid[1] > 0 {
            let grid = [grid[0] as u32, grid[1] as u32, 1];
            self.launches.push(Launch {
                kernel: kernel.into(),
                grid,
                threads,
                shared_bytes: 0,
                args,
            });
        }
    }
}

/// `Seat` of `sample.cuh`.
fn seat(begin: &Begin, bias_first: u32) -> [u32; 12] {
    let params = &begin.params;
    let key = key_of(params.seed, begin.choice);
    [
        params.temperature.to_bits(),
        params.top_p.to_bits(),
        params.min_p.ln().to_bits(),
        params.presence_penalty.to_bits(),
        params.frequency_penalty.to_bits(),
        params.repetition_penalty.to_bits(),
        params.top_k,
        key[0],
        key[1],
        bias_first,
        params.logit_bias.len() as u32,
        POISON,
    ]
}

/// Kinds of rows: what a model gives, flat, tied, with minus infinities, with outliers.
fn logits(kind: u32, vocab: usize, random: &mut Random) -> Vec<f32> {
    let mut uniform = || f64::from(random.word()) / f64::from(1u32 << 31);
    let mut row: Vec<f32> =
        (0..vocab).map(|_| ((0..4).map(|_| uniform()).sum::<f64>() * 6.0 - 13.0) as f32).collect();
    for (at, logit) in row.iter_mut().enumerate() {
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
        let biases = [0, 1, 5, 200][random.below(4) as usize];
        let bias = |_| (random.below(vocab + 2), random.below(200) as f32 / 7.0 - 14.0);
        params.logit_bias = (0..biases).map(bias).collect();
    }
    params.seed = u64::from(random.word()) << 20;
    params
}

fn tokens(vocab: usize, count: u32, random: &mut Random) -> Vec<TokenId> {
    // Few of them, so that some repeat; and one that does not exist.
    let few = (vocab as u32).min(9);
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
        let begins = (0..seats).filter(|seat| round == 0 || (seat + round) % 4 == 0);
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
    for (name, right, wrong) in [
        (
            "bans_are_only_low",
            "tile[token - part.start] = -INFINITY",
            "tile[token - part.start] = -9.0f",
        ),
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
        let noticed =
            [random_case(257, 64, 4, [32, 64]), edge_case("small", &small_edges(), 6, [32, 32])]
                .iter()
                .any(|case| case.run(&emulator).expect("it runs") != case.expected());
        assert!(noticed, "{name}");
    }
}
