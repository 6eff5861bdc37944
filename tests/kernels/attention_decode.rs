//! attention_decode and attention_combine: one query a sequence, in splits.

use crate::{
    attention::{Heads, Sequence, Step, broken, check_large_scores, large_scores, large_values},
    emulator::{Arg, Emulator, Launch},
    values::{POISON, Random, Type, halves, read_halves, words},
};

const THREADS: u32 = 128;

pub struct Kernels {
    decode: Emulator,
    combine: Emulator,
}

impl Kernels {
    pub fn new() -> Self {
        Self {
            decode: Emulator::of("attention_decode"),
            combine: Emulator::of("attention_combine"),
        }
    }
}

/// How the work of a row is split.
#[derive(Clone, Copy)]
pub struct Split {
    pub splits: u32,
    pub chunk_blocks: u32,
}

/// y of all rows, and one more that nothing may write.
pub fn run(kernels: &Kernels, step: &Step, split: Split) -> Result<Vec<u16>, String> {
    let (heads, rows) = (step.heads, step.sequences.len());
    let name = |kernel: &str| format!("{kernel}_{}_{}", heads.of.name(), heads.dim);
    let lens: Vec<u32> = step.sequences.iter().map(|sequence| sequence.len as u32).collect();
    let places = rows * heads.heads() * split.splits as usize;
    let poison = words(&vec![f32::NAN.to_bits(); places * heads.dim]);
    let buffers = [
        halves(&step.q),
        halves(&step.cache),
        words(&lens),
        words(&step.tables),
        halves(&vec![POISON; (rows + 1) * heads.heads() * heads.dim]),
        poison.clone(),
        poison[..places * 8].to_vec(),
    ];
    let mut args: Vec<Arg> = (0..7).map(Arg::Buffer).collect();
    let sizes = [heads.q_stride(), step.table_stride, heads.kv_heads, heads.group];
    args.extend(sizes.map(|size| Arg::U32(size as u32)));
    let [chunk, window] = [split.chunk_blocks, heads.window as u32].map(Arg::U32);
    args.extend([chunk, window, Arg::F32(heads.scale)]);
    let grid = [heads.kv_heads as u32, rows as u32, split.splits];
    let kernel = name("attention_decode");
    let launch = Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args };
    let after = kernels.decode.run(&buffers, &[launch])?;
    let mut args = [5, 6, 2, 4].map(Arg::Buffer).to_vec();
    args.extend([Arg::U32(split.splits), chunk, window, Arg::F32(heads.scale)]);
    let kernel = name("attention_combine");
    let grid = [heads.heads() as u32, rows as u32, 1];
    let launch = Launch { kernel, grid, threads: THREADS, shared_bytes: 0, args };
    let after = kernels.combine.run(&after, &[launch])?;
    Ok(read_halves(&after[4]))
}

fn rows_of(lens: &[usize]) -> Vec<Sequence> {
    lens.iter().map(|len| Sequence { len: *len, queries: 1 }).collect()
}

fn heads(of: Type, dim: usize, kv_heads: usize, group: usize, window: usize) -> Heads {
    Heads { of, dim, kv_heads, group, window, scale: 1.0 / (dim as f32).sqrt() }
}

/// Rows of these lengths, 0 a padding row, against the reference.
fn check(kernels: &Kernels, heads: Heads, lens: &[usize], splits: u32, chunk_blocks: u32) {
    let what = format!("{heads:?}, {lens:?}, {splits} splits of {chunk_blocks} blocks");
    let mut random = Random::new((lens.iter().sum::<usize>() + heads.group) as u64);
    let step = Step::new(heads, &rows_of(lens), &mut random);
    let y = run(kernels, &step, Split { splits, chunk_blocks }).expect(&what);
    step.check(&y).expect(&what);
}

const EDGES: [usize; 14] = [1, 2, 15, 16, 17, 0, 31, 32, 33, 47, 63, 64, 65, 100];

#[test]
fn decodes_attend() {
    let kernels = Kernels::new();
    for of in Type::ALL {
        for dim in [64, 128] {
            let heads = |kv_heads, group, window| heads(of, dim, kv_heads, group, window);
            check(&kernels, heads(1, 1, 0), &[1], 1, 4);
            check(&kernels, heads(1, 1, 0), &[0], 3, 4);
            check(&kernels, heads(2, 3, 0), &EDGES, 1, 4);
            check(&kernels, heads(2, 8, 0), &EDGES, 2, 4);
            check(&kernels, heads(1, 7, 0), &[777, 5, 448, 449], 3, 4);
            check(&kernels, heads(1, 4, 0), &[1030], 70, 4);
            check(&kernels, heads(1, 2, 0), &[600, 129], 2, 8);
        }
    }
    let small = |group, window| heads(Type::Bf16, 64, 1, group, window);
    for group in 1..=8 {
        check(&kernels, small(group, 0), &[3 * group + 60, 5, 71 * group], 2, 4);
    }
    let many: Vec<usize> = (0..65).map(|row| row * 37 % 83).collect();
    check(&kernels, small(5, 0), &many, 2, 4);
    check(&kernels, small(6, 9), &many, 2, 4);
}

#[test]
fn decodes_attend_within_a_window() {
    let kernels = Kernels::new();
    for (of, dim) in [(Type::Bf16, 128), (Type::F16, 64)] {
        for (window, splits) in
            [(1, 1), (1, 5), (7, 2), (15, 1), (16, 3), (17, 2), (32, 1), (64, 2)]
        {
            check(&kernels, heads(of, dim, 1, 3, window), &EDGES, splits, 4);
        }
        check(&kernels, heads(of, dim, 1, 4, 300), &[1001, 299, 300, 301, 640], 3, 4);
        check(&kernels, heads(of, dim, 1, 4, 5000), &[401], 4, 8);
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let kernels = Kernels::new();
    let lens = [300, 1, 0, 64, 65, 299, 150];
    let split = Split { splits: 2, chunk_blocks: 4 };
    for window in [0, 100] {
        let heads = heads(Type::Bf16, 64, 2, 3, window);
        let step = Step::new(heads, &rows_of(&lens), &mut Random::new(9));
        let together = run(&kernels, &step, split).expect("it runs");
        let elements = heads.heads() * heads.dim;
        for (row, sequence) in step.sequences.iter().enumerate() {
            let alone = run(&kernels, &step.part(&[(row, *sequence)]), split).expect("it runs");
            assert!(alone[..elements] == together[row * elements..][..elements], "row {row}");
        }
    }
}

#[test]
fn large_scores_and_values_are_exact_and_finite() {
    let kernels = Kernels::new();
    let split = Split { splits: 2, chunk_blocks: 4 };
    for of in Type::ALL {
        for dim in [64, 128] {
            let rows = rows_of(&[1, 16, 40, 61]);
            for splits in [1, 2] {
                let step = large_scores(heads(of, dim, 1, 4, 20), &rows);
                let split = Split { splits, chunk_blocks: 4 };
                check_large_scores(&step, &run(&kernels, &step, split).expect("it runs"));
            }
            let step = large_values(heads(of, dim, 1, 4, 0), &rows_of(&[1, 70, 500]));
            step.check(&run(&kernels, &step, split).expect("it runs")).expect("within bounds");
        }
    }
}

#[test]
fn what_is_broken_is_noticed() {
    let check = |name: &str, from: &str, to: &str| {
        let mut kernels = Kernels::new();
        match name {
            "attention_decode" => kernels.decode = broken(name, from, to),
            _ => kernels.combine = broken(name, from, to),
        }
        let heads = heads(Type::Bf16, 64, 2, 3, 340);
        let step = Step::new(heads, &rows_of(&[400, 17, 0, 70]), &mut Random::new(1));
        let y = run(&kernels, &step, Split { splits: 3, chunk_blocks: 4 });
        assert!(y.and_then(|y| step.check(&y)).is_err(), "{name} with {to} in place of {from}");
    };
    let decode = "attention_decode";
    check(decode, "cp_async_wait<SLOTS<DIM> - 2>()", "cp_async_wait<SLOTS<DIM> - 1>()");
    check(decode, "position < splits.len;", "true;");
    check(decode, "|| at >= seen.len)", "|| at > seen.len)");
    check(decode, "o[i][j] *= by[j % 2]", "o[i][j] *= by[0]");
    check(decode, "found.put(attention);\n  __syncthreads();", "found.put(attention);");
    check("attention_combine", "split = team; split < busy;", "split = team; split < op.splits;");
}
