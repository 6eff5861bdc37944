//! Kernels about the paged cache: rope with the write of K and V, block_copy, advance.

use crate::{
    emulator::{Arg, Emulator, Launch},
    values::{POISON, Random, Type, bytes_of, halves, read_halves, read_words, words},
};

const BLOCK_TOKENS: usize = 16;
const PAD_SLOT: i64 = -1;
const POSITIONS: usize = 70;
const BLOCKS: usize = 9;
const EPS: f32 = 1e-6;

struct RopeCase {
    of: Type,
    dim: usize,
    heads: usize,
    kv_heads: usize,
    slots: Vec<i64>,
    norm: bool,
    parts: u32,
}

/// RMSNorm of one head.
fn normalised(x: &[f64], weight: &[f64]) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + f64::from(EPS)).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x * scale * weight).collect()
}

fn rotated(x: &[f64], angles: &[f32]) -> Vec<f64> {
    let half = x.len() / 2;
    let turn = |index: usize| {
        let (cos, sin) = (f64::from(angles[index % half]), f64::from(angles[half + index % half]));
        if index < half {
            x[index] * cos - x[index + half] * sin
        } else {
            x[index] * cos + x[index - half] * sin
        }
    };
    (0..x.len()).map(turn).collect()
}

impl RopeCase {
    fn check(&self, emulator: &Emulator) {
        let (of, dim, rows) = (self.of, self.dim, self.slots.len());
        let all = self.heads + 2 * self.kv_heads;
        let mut random = Random::new((rows * all * dim) as u64);
        let qkv = random.elements(of, rows * all * dim);
        let norms = [random.elements(of, dim), random.elements(of, dim)];
        let positions: Vec<u32> = (0..rows).map(|_| random.below(POSITIONS as u32)).collect();
        let angle = |at: usize| {
            let angle = (at / dim) as f64 * 0.9f64.powi((at % dim % (dim / 2)) as i32);
            (if at % dim < dim / 2 { angle.cos() } else { angle.sin() }) as f32
        };
        let table: Vec<f32> = (0..POSITIONS * dim).map(angle).collect();
        let cache = vec![POISON; BLOCKS * 2 * self.kv_heads * BLOCK_TOKENS * dim];
        let buffers = [
            halves(&qkv),
            halves(&cache),
            bytes_of(&table, f32::to_ne_bytes),
            words(&positions),
            bytes_of(&self.slots, i64::to_ne_bytes),
            halves(&norms[0]),
            halves(&norms[1]),
        ];
        let mut args: Vec<Arg> = (0..7).map(Arg::Buffer).collect();
        if !self.norm {
            args[5..].fill(Arg::Null);
        }
        args.extend([Arg::U32(self.heads as u32), Arg::U32(self.kv_heads as u32), Arg::F32(EPS)]);
        let kernel = format!("rope_{}_{dim}", of.name());
        let launch = Launch {
            kernel,
            grid: [rows as u32, self.parts, 1],
            threads: 64,
            shared_bytes: 0,
            args,
        };
        let after = emulator.run(&buffers, &[launch]).expect("it runs");
        let (new_qkv, mut new_cache) = (read_halves(&after[0]), read_halves(&after[1]));
        for (row, (slot, position)) in self.slots.iter().zip(&positions).enumerate() {
            for head in 0..all {
                let what = format!("{of:?} {dim}, row {row}, head {head}");
                let from = (row * all + head) * dim..(row * all + head + 1) * dim;
                let mut x: Vec<f64> = qkv[from.clone()].iter().map(|x| of.widen(*x)).collect();
                if head < self.heads + self.kv_heads {
                    if self.norm {
                        let norm = &norms[usize::from(head >= self.heads)];
                        let norm: Vec<f64> = norm.iter().map(|w| of.widen(*w)).collect();
                        x = normalised(&x, &norm);
                    }
                    x = rotated(&x, &table[*position as usize * dim..][..dim]);
                }
                if head < self.heads {
                    near(of, &what, &new_qkv[from], &x);
                    continue;
                }
                assert_eq!(new_qkv[from.clone()], qkv[from], "{what} is only read");
                if *slot == PAD_SLOT {
                    continue;
                }
                let (block, token) = (*slot as usize / BLOCK_TOKENS, *slot as usize % BLOCK_TOKENS);
                let place = (block * 2 * self.kv_heads + head - self.heads) * BLOCK_TOKENS + token;
                let written = &mut new_cache[place * dim..][..dim];
                near(of, &what, written, &x);
                written.fill(POISON);
            }
        }
        assert!(new_cache.iter().all(|x| *x == POISON), "something else was written");
    }
}

/// A rotation cancels, so that its error is relative to what it rotates.
fn near(of: Type, what: &str, ours: &[u16], exact: &[f64]) {
    let largest = exact.iter().fold(0f64, |most, x| most.max(x.abs()));
    for (ours, exact) in ours.iter().zip(exact) {
        let most = exact.abs() * (of.rounding() + 1e-5) + largest * 1e-5;
        assert!((of.widen(*ours) - exact).abs() <= most, "{what}: {} for {exact}", of.widen(*ours));
    }
}

#[test]
fn rope_rotates_and_writes_the_cache() {
    let emulator = Emulator::of("rope");
    for of in Type::ALL {
        for dim in [64, 128] {
            for norm in [false, true] {
                let check = |heads: usize, kv_heads: usize, slots: Vec<i64>, parts: u32| {
                    RopeCase { of, dim, heads, kv_heads, slots, norm, parts }.check(&emulator);
                };
                check(1, 1, vec![0], 1);
                check(9, 3, vec![15, 16, PAD_SLOT, 143, 17], 1);
                check(8, 1, vec![PAD_SLOT], 1);
                check(7, 7, (0..65).map(|row| 142 - 2 * row).collect(), 2);
            }
        }
    }
}

#[test]
fn blocks_are_copied_in_order_in_all_layers() {
    let emulator = Emulator::of("block_copy");
    let check = |pairs: &[(u32, u32)], block_bytes: usize, parts: u32| {
        let layers = 3;
        let mut random = Random::new(block_bytes as u64);
        let before: Vec<u8> =
            (0..layers * BLOCKS * block_bytes).map(|_| random.word() as u8).collect();
        let mut expected = before.clone();
        for (from, to) in pairs {
            for layer in 0..layers {
                let at = |block: u32| (layer * BLOCKS + block as usize) * block_bytes;
                expected.copy_within(at(*from)..at(*from) + block_bytes, at(*to));
            }
        }
        let flat: Vec<u32> = pairs.iter().flat_map(|(from, to)| [*from, *to]).collect();
        let args = vec![
            Arg::Buffer(0),
            Arg::Buffer(1),
            Arg::U64(BLOCKS as u64),
            Arg::U32(block_bytes as u32),
            Arg::U32(pairs.len() as u32),
        ];
        let grid = [parts, layers as u32, 1];
        let launch =
            Launch { kernel: "block_copy".into(), grid, threads: 32, shared_bytes: 0, args };
        let after = emulator.run(&[before, words(&flat)], &[launch]).expect("it runs");
        assert!(after[0] == expected, "{pairs:?} of {block_bytes} bytes");
    };
    check(&[], 4096, 1);
    check(&[(0, 8)], 16, 1);
    check(&[(1, 2), (2, 3), (1, 4), (8, 1)], 4096, 3);
    check(&[(5, 5), (7, 0)], 2064, 2);
}

#[test]
fn decodes_advance_on_the_device() {
    let emulator = Emulator::of("advance");
    let check = |lens: &[u32], stride: usize| {
        let seqs = lens.len();
        let mut random = Random::new(seqs as u64);
        let tables: Vec<u32> = (0..seqs * stride).map(|_| random.below(1000)).collect();
        let counts: Vec<u32> = (0..seqs).map(|_| random.below(stride as u32 + 1)).collect();
        let slots = vec![-77i64; seqs];
        let buffers = [
            words(lens),
            words(&vec![9999; seqs]),
            bytes_of(&slots, i64::to_ne_bytes),
            words(&tables),
            words(&counts),
        ];
        let mut args: Vec<Arg> = (0..5).map(Arg::Buffer).collect();
        args.extend([Arg::U32(stride as u32), Arg::U32(seqs as u32)]);
        let grid = [seqs.div_ceil(32) as u32, 1, 1];
        let launch = Launch { kernel: "advance".into(), grid, threads: 32, shared_bytes: 0, args };
        let after = emulator.run(&buffers, &[launch]).expect("it runs");
        let (new_lens, positions) = (read_words(&after[0]), read_words(&after[1]));
        let slots = after[2].as_chunks::<8>().0.iter().map(|eight| i64::from_ne_bytes(*eight));
        for (seq, slot) in slots.enumerate() {
            let (len, block) = (lens[seq], lens[seq] as usize / BLOCK_TOKENS);
            let expected = if len == 0 {
                (0, 9999, -77)
            } else if block < counts[seq] as usize {
                let first = i64::from(tables[seq * stride + block]) * BLOCK_TOKENS as i64;
                (len + 1, len, first + i64::from(len) % BLOCK_TOKENS as i64)
            } else {
                (len + 1, len, PAD_SLOT)
            };
            assert_eq!(
                (new_lens[seq], positions[seq], slot),
                expected,
                "sequence {seq} of {lens:?}"
            );
        }
    };
    check(&[1], 1);
    check(&[0], 1);
    check(&[15, 16, 17, 0, 31, 32, 47], 3);
    check(&(0..65).collect::<Vec<_>>(), 5);
}
