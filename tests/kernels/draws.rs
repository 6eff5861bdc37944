//! Rounds of draws: what the kernels make of them, and what the CPU's sampler does.

use candela::{
    ops::CpuPool,
    sampling::{SampleRow, Sampler, SamplingParams, key_of},
    types::{SlotId, TokenId},
};

use crate::{
    emulator::{Arg, Emulator, Launch},
    values::{bytes_of, read_words, words},
};

/// The kernels' files, in the order of a step.
pub const FILES: [&str; 3] = ["sample_begin", "sample_scan", "sample"];
/// The slot of a padding row.
pub const PAD: u32 = u32::MAX;
const IN_PROMPT: u32 = 1 << 31;
/// Tokens of a thread of `sample_scan`.
const SCAN_TOKENS: u32 = 16;
const POISON: u32 = 0x7fee_7fee;
/// Lies after a row's end, and would win.
const BEYOND: f32 = 3e38;

#[derive(Clone, Default)]
pub struct Begin {
    pub slot: u32,
    pub params: SamplingParams,
    pub choice: u32,
    pub prompt: Vec<TokenId>,
    pub output: Vec<TokenId>,
}

#[derive(Clone, Default)]
pub struct Row {
    pub logits_row: u32,
    pub slot: u32,
    pub position: u32,
    pub banned: Vec<TokenId>,
}

/// Rounds, each of which seats sequences and then draws one step.
pub struct Case {
    pub name: String,
    pub vocab: usize,
    /// `[rows, vocab]`
    pub logits: Vec<f32>,
    pub slots: u32,
    pub rounds: Vec<(Vec<Begin>, Vec<Row>)>,
    /// Of a block of `sample_scan` and of `sample`.
    pub threads: [u32; 2],
}

/// What a run leaves: tokens drawn in each round, the last of each slot, and `seen`.
#[derive(PartialEq)]
pub struct After {
    drawn: Vec<Vec<u32>>,
    sampled: Vec<u32>,
    seen: Vec<u32>,
}

impl Case {
    pub fn check(&self, emulator: &Emulator) {
        let (ours, expected) = (self.run(emulator).expect(&self.name), self.expected());
        for (round, (ours, expected)) in ours.drawn.iter().zip(&expected.drawn).enumerate() {
            assert_eq!(ours, expected, "{}, round {round}", self.name);
        }
        assert_eq!(ours.sampled, expected.sampled, "{}", self.name);
        assert!(ours.seen == expected.seen, "{}: what was seen differs", self.name);
    }

    /// What the CPU's sampler draws, and what a device keeps of it; poison where nothing is written.
    pub fn expected(&self) -> After {
        let (pool, vocab, slots) =
            (CpuPool::new(1).expect("threads"), self.vocab, self.slots as usize);
        let mut sampler = Sampler::new(slots, vocab);
        let mut penalised = vec![false; slots];
        let (sampled, seen) = (vec![POISON; slots], vec![POISON; slots * vocab]);
        let mut after = After { drawn: Vec::new(), sampled, seen };
        for (begins, rows) in &self.rounds {
            for begin in begins.iter().filter(|begin| begin.slot != PAD) {
                let (slot, params) = (SlotId(begin.slot), &begin.params);
                sampler.begin(slot, params, begin.choice, &begin.prompt, &begin.output);
                penalised[begin.slot as usize] = begin.penalised();
                if begin.penalised() {
                    after.seen[begin.slot as usize * vocab..][..vocab]
                        .copy_from_slice(&begin.seen(vocab));
                }
            }
            let asked = rows.iter().filter(|row| row.slot != PAD).map(|row| SampleRow {
                logits_row: row.logits_row,
                slot: SlotId(row.slot),
                position: row.position,
                banned: &row.banned,
            });
            let mut out = Vec::new();
            sampler.sample(&pool, &asked.collect::<Vec<_>>(), &self.logits, &mut out);
            for one in &out {
                let (slot, token) = (one.slot.0 as usize, one.token as usize);
                after.sampled[slot] = one.token;
                after.seen[slot * vocab + token] += u32::from(penalised[slot]);
            }
            let mut drawn = vec![POISON; rows.len()];
            let real = drawn.iter_mut().zip(rows).filter(|(_, row)| row.slot != PAD);
            real.zip(&out).for_each(|((token, _), one)| *token = one.token);
            after.drawn.push(drawn);
        }
        after
    }

    /// What the kernels draw. All that they write is poisoned first.
    pub fn run(&self, emulator: &Emulator) -> Result<After, String> {
        let (vocab, stride, slots) = (self.vocab, self.stride(), self.slots as usize);
        let mut rows = vec![BEYOND; self.logits.len() / vocab * stride];
        for (to, from) in rows.chunks_mut(stride).zip(self.logits.chunks(vocab)) {
            to[..vocab].copy_from_slice(from);
        }
        let mut made = Made::default();
        let biases = self.biases();
        let values: Vec<f32> = biases.iter().map(|bias| bias.1).collect();
        let shared = Shared {
            logits: made.buffer(bytes_of(&rows, f32::to_ne_bytes)),
            seats: made.poisoned(slots * 12),
            seen: made.poisoned(slots * vocab),
            sampled: made.poisoned(slots),
            bias_tokens: made.words(biases.iter().map(|bias| bias.0)),
            bias_values: made.buffer(bytes_of(&values, f32::to_ne_bytes)),
        };
        let (mut drawn, mut bias_first) = (Vec::new(), 0);
        for (begins, rows) in &self.rounds {
            self.begin(&mut made, &shared, begins, &mut bias_first);
            drawn.push(self.draw(&mut made, &shared, rows));
        }
        let after = emulator.run(&made.buffers, &made.launches)?;
        let read = |buffer: &Arg| match buffer {
            Arg::Buffer(index) => read_words(&after[*index as usize]),
            _ => unreachable!("outputs are buffers"),
        };
        let (sampled, seen) = (read(&shared.sampled), read(&shared.seen));
        Ok(After { drawn: drawn.iter().map(read).collect(), sampled, seen })
    }

    fn stride(&self) -> usize {
        self.vocab.next_multiple_of(4)
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

    fn begin(&self, made: &mut Made, shared: &Shared, begins: &[Begin], bias_first: &mut u32) {
        let params = begins.iter().flat_map(|begin| {
            let first = *bias_first;
            *bias_first += begin.params.logit_bias.len() as u32;
            begin.seat(first)
        });
        let params = made.words(params);
        let slots = made.words(begins.iter().map(|begin| begin.slot));
        let [prompt_offsets, prompt] = made.lists(begins.iter().map(|begin| &begin.prompt));
        let [output_offsets, output] = made.lists(begins.iter().map(|begin| &begin.output));
        let lists = [prompt_offsets, prompt, output_offsets, output];
        let mut args = [&[slots, params][..], &lists, &[shared.seats, shared.seen]].concat();
        args.push(Arg::U32(self.vocab as u32));
        made.launch("sample_begin", [begins.len(), 1], 64, args);
    }

    /// Launches a step, and says where its tokens come.
    fn draw(&self, made: &mut Made, shared: &Shared, rows: &[Row]) -> Arg {
        let parts = self.vocab.div_ceil((self.threads[0] * SCAN_TOKENS) as usize);
        let sizes = [self.vocab, self.stride(), parts].map(|size| Arg::U32(size as u32));
        let logits_rows = made.words(rows.iter().map(|row| row.logits_row));
        let slots = made.words(rows.iter().map(|row| row.slot));
        let positions = made.words(rows.iter().map(|row| row.position));
        let [banned_offsets, banned] = made.lists(rows.iter().map(|row| &row.banned));
        let changed = made.poisoned(rows.len() * self.stride());
        let best = made.poisoned(rows.len() * parts * 2);
        let drawn = made.poisoned(rows.len());
        let Shared { logits, seats, seen, sampled, bias_tokens, bias_values } = *shared;
        let of_rows = [logits, logits_rows, slots, positions, banned_offsets, banned];
        let of_seats = [seats, bias_tokens, bias_values, seen];
        let args = [&of_rows[..], &of_seats, &[changed, best], &sizes[..2]].concat();
        made.launch("sample_scan", [parts, rows.len()], self.threads[0], args);
        let args = [best, changed, slots, positions, seats, seen, drawn, sampled];
        made.launch("sample", [rows.len(), 1], self.threads[1], [&args[..], &sizes].concat());
        drawn
    }
}

impl Begin {
    fn penalised(&self) -> bool {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } =
            self.params;
        repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0
    }

    /// Words of prompt and output; tokens that do not exist leave none.
    fn seen(&self, vocab: usize) -> Vec<u32> {
        let mut seen = vec![0; vocab];
        for token in &self.prompt {
            seen.get_mut(*token as usize).into_iter().for_each(|seen| *seen |= IN_PROMPT);
        }
        for token in &self.output {
            seen.get_mut(*token as usize).into_iter().for_each(|seen| *seen += 1);
        }
        seen
    }

    /// `Seat` of `sample.cuh`.
    fn seat(&self, bias_first: u32) -> [u32; 12] {
        let params = &self.params;
        let key = key_of(params.seed, self.choice);
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
}

/// Buffers of all rounds.
struct Shared {
    logits: Arg,
    seats: Arg,
    seen: Arg,
    sampled: Arg,
    bias_tokens: Arg,
    bias_values: Arg,
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

    fn words(&mut self, values: impl Iterator<Item = u32>) -> Arg {
        self.buffer(words(&values.collect::<Vec<_>>()))
    }

    fn poisoned(&mut self, count: usize) -> Arg {
        self.words((0..count).map(|_| POISON))
    }

    /// Where each of several lists begins and the last ends, and all of them in one.
    fn lists<'a>(&mut self, lists: impl Iterator<Item = &'a Vec<TokenId>>) -> [Arg; 2] {
        let (mut offsets, mut all) = (vec![0], Vec::new());
        for list in lists {
            all.extend(list);
            offsets.push(all.len() as u32);
        }
        [offsets, all].map(|list| self.buffer(words(&list)))
    }

    fn launch(&mut self, kernel: &str, grid: [usize; 2], threads: u32, args: Vec<Arg>) {
        let grid = [grid[0] as u32, grid[1] as u32, 1];
        self.launches.push(Launch { kernel: kernel.into(), grid, threads, shared_bytes: 0, args });
    }
}
