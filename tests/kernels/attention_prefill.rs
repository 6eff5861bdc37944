//! attention_prefill: chunks of prompts, ragged.

use crate::{
    attention::{Heads, Sequence, Step, broken, check_large_scores, large_scores, large_values},
    attention_decode::{self, Kernels, Split},
    emulator::{Arg, Emulator, Launch},
    values::{POISON, Random, Type, halves, read_halves, words},
};

const THREADS: u32 = 128;
/// Queries of a tile.
const ROWS: usize = 128;
/// Elements of K or V in a tile's ring, in rows.
const RING_ROWS: usize = 3 * 64;

/// y of all rows, and one more that nothing may write.
fn run(emulator: &Emulator, step: &Step, spare_tiles: usize) -> Result<Vec<u16>, String> {
    run_from(emulator, step, 0, spare_tiles)
}

/// Without the sequences before `first`, whose rows another kernel would take.
fn run_from(
    emulator: &Emulator,
    step: &Step,
    first: usize,
    spare_tiles: usize,
) -> Result<Vec<u16>, String> {
    let heads = step.heads;
    let mut starts = vec![0];
    for sequence in &step.sequences {
        starts.push(starts[starts.len() - 1] + sequence.queries as u32);
    }
    let rows = starts[starts.len() - 1] as usize;
    let lens: Vec<u32> = step.sequences.iter().map(|sequence| sequence.len as u32).collect();
    let buffers = [
        halves(&step.q),
        halves(&step.cache),
        words(&starts[first..]),
        words(&lens[first..]),
        words(&step.tables[first * step.table_stride..]),
        halves(&vec![POISON; (rows + 1) * heads.heads() * heads.dim]),
    ];
    let mut args: Vec<Arg> = (0..6).map(Arg::Buffer).collect();
    let seqs = lens.len() - first;
    let sizes = [seqs, heads.q_stride(), step.table_stride, heads.kv_heads, heads.group];
    args.extend(sizes.map(|size| Arg::U32(size as u32)));
    args.extend([Arg::U32(heads.window as u32), Arg::F32(heads.scale)]);
    let tiles = rows * heads.group / ROWS + seqs + spare_tiles;
    let launch = Launch {
        kernel: format!("attention_prefill_{}_{}", heads.of.name(), heads.dim),
        grid: [heads.kv_heads as u32, tiles as u32, 1],
        threads: THREADS,
        shared_bytes: ((ROWS + RING_ROWS) * heads.dim * 2) as u32,
        args,
    };
    Ok(read_halves(&emulator.run(&buffers, &[launch])?[5]))
}

fn heads(of: Type, dim: usize, kv_heads: usize, group: usize, window: usize) -> Heads {
    Heads { of, dim, kv_heads, group, window, scale: 1.0 / (dim as f32).sqrt() }
}

/// Sequences of (length, queries).
fn sequences(of: &[(usize, usize)]) -> Vec<Sequence> {
    of.iter().map(|(len, queries)| Sequence { len: *len, queries: *queries }).collect()
}

/// Sequences of (length, queries) against the reference.
fn check(emulator: &Emulator, heads: Heads, of: &[(usize, usize)]) {
    let what = format!("{heads:?}, {of:?}");
    let seed = of.iter().map(|(len, queries)| len + queries).sum::<usize>();
    let step = Step::new(heads, &sequences(of), &mut Random::new((seed + heads.group) as u64));
    step.check(&run(emulator, &step, seed % 3).expect(&what)).expect(&what);
}

#[test]
fn prefill_attends() {
    let emulator = Emulator::of("attention_prefill");
    for of in Type::ALL {
        for dim in [64, 128] {
            let heads = |kv_heads, group| heads(of, dim, kv_heads, group, 0);
            check(&emulator, heads(1, 1), &[(1, 1)]);
            check(&emulator, heads(2, 3), &[(70, 45), (0, 0), (33, 1), (16, 16), (40, 0)]);
            check(&emulator, heads(1, 1), &[(200, 200)]);
            check(&emulator, heads(1, 4), &[(150, 33), (17, 15), (300, 3)]);
        }
    }
    let small = |group| heads(Type::Bf16, 64, 1, group, 0);
    for group in 1..=8 {
        check(&emulator, small(group), &[(group, 1), (62 + group, 40), (31 * group, 7)]);
    }
    check(&emulator, small(2), &[(0, 0)]);
    check(&emulator, small(2), &[(0, 0), (65, 64), (0, 0), (0, 0)]);
    let many: Vec<(usize, usize)> =
        (0..65).map(|at| (at * 37 % 83, (at * 37 % 83).min(at % 4))).collect();
    check(&emulator, small(5), &many);
    for edge in [15, 16, 17, 63, 64, 65, 127, 128, 129] {
        check(&emulator, small(1), &[(edge, edge), (edge + 1, 1)]);
    }
}

#[test]
fn prefill_attends_within_a_window() {
    let emulator = Emulator::of("attention_prefill");
    for (of, dim) in [(Type::Bf16, 128), (Type::F16, 64)] {
        for window in [1, 7, 16, 17, 64, 65, 1000] {
            check(&emulator, heads(of, dim, 1, 3, window), &[(131, 50), (66, 1), (80, 16)]);
        }
        check(&emulator, heads(of, dim, 1, 1, 90), &[(300, 140)]);
    }
}

/// Bit for bit: a prompt at once, in chunks of any size, beside others, token by token.
#[test]
fn a_row_does_not_depend_on_chunks() {
    let emulator = Emulator::of("attention_prefill");
    for window in [0, 50] {
        let heads = heads(Type::Bf16, 64, 1, 2, window);
        let whole = Step::new(heads, &sequences(&[(150, 150), (90, 9)]), &mut Random::new(6));
        let at_once = run(&emulator, &whole, 0).expect("it runs");
        let elements = heads.heads() * heads.dim;
        let mut ends = vec![37, 38, 64, 129, 150];
        for queries in std::iter::once(37).chain([1, 26, 65, 21]) {
            let len = ends.remove(0);
            let chunk = [(1, Sequence { len: 90, queries: 9 }), (0, Sequence { len, queries })];
            let y = run(&emulator, &whole.part(&chunk), 1).expect("it runs");
            let (first, count) = ((len - queries) * elements, queries * elements);
            assert!(y[9 * elements..][..count] == at_once[first..][..count], "up to {len}");
            assert!(y[..9 * elements] == at_once[150 * elements..][..9 * elements]);
        }
    }
}

/// The rows of decodes come first in a step, and are not prefill's.
#[test]
fn rows_in_front_are_left_alone() {
    let emulator = Emulator::of("attention_prefill");
    let heads = heads(Type::Bf16, 64, 1, 7, 0);
    let of = [[(9, 1); 40].as_slice(), &[(60, 30), (20, 20)]].concat();
    let step = Step::new(heads, &sequences(&of), &mut Random::new(2));
    let y = run_from(&emulator, &step, 40, 0).expect("it runs");
    let (before, ours) = y.split_at(40 * heads.heads() * heads.dim);
    assert!(before.iter().all(|y| *y == POISON));
    let chunks = step.part(&[(40, step.sequences[40]), (41, step.sequences[41])]);
    chunks.check(ours).expect("within bounds");
}

/// Both within the bound of the same reference.
#[test]
fn rows_of_one_token_agree_with_decode() {
    let (emulator, kernels) = (Emulator::of("attention_prefill"), Kernels::new());
    for of in Type::ALL {
        for (dim, window) in [(64, 0), (128, 100)] {
            let lens = [(1, 1), (64, 1), (200, 1), (333, 1)];
            let step =
                Step::new(heads(of, dim, 2, 4, window), &sequences(&lens), &mut Random::new(8));
            let prefill = run(&emulator, &step, 0).expect("it runs");
            let split = Split { splits: 2, chunk_blocks: 4 };
            let decode = attention_decode::run(&kernels, &step, split).expect("it runs");
            step.check(&prefill).expect("prefill");
            step.check(&decode).expect("decode");
        }
    }
}

#[test]
fn large_scores_and_values_are_exact_and_finite() {
    let emulator = Emulator::of("attention_prefill");
    for of in Type::ALL {
        for dim in [64, 128] {
            let step = large_scores(heads(of, dim, 1, 4, 20), &sequences(&[(61, 40), (16, 16)]));
            check_large_scores(&step, &run(&emulator, &step, 0).expect("it runs"));
            let step = large_values(heads(of, dim, 1, 4, 0), &sequences(&[(150, 20)]));
            step.check(&run(&emulator, &step, 0).expect("it runs")).expect("within bounds");
        }
    }
}

#[test]
fn what_is_broken_is_noticed() {
    let check = |from: &str, to: &str| {
        let emulator = broken("attention_prefill", from, to);
        let of = sequences(&[(150, 70), (0, 0), (33, 30)]);
        let step = Step::new(heads(Type::Bf16, 64, 2, 3, 100), &of, &mut Random::new(1));
        let y = run(&emulator, &step, 0);
        assert!(y.and_then(|y| step.check(&y)).is_err(), "{to} in place of {from}");
    };
    check("cp_async_wait<SLOTS - 2>()", "cp_async_wait<SLOTS - 1>()");
    check("position >= begin() && position < end();", "position >= begin();");
    check("at < begin || at >= end", "at < begin || at > end");
    check("if (__ballot_sync(ALL_LANES, larger) == 0) return;", "return;");
    check("o[part][i][j] *= by[part][j / 2]", "o[part][i][j] *= by[part][0]");
    check("__syncthreads();\n    return ring", "return ring");
}
