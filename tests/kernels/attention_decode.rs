//! attention_decode and attention_combine: one query a sequence, in splits.

use crate::{
    attention::{Heads, Sequence, Step},
    emulator::{Arg, Emulator, Launch},
    values::{POISON, Random, Type, halves, read_halves, words},
};

const THREADS: u32 = 128;

struct Kernels {
    decode: Emulator,
    combine: Emulator,
}

impl Kernels {
    fn new() -> Self {
        Self {
            decode: Emulator::of("attention_decode"),
            combine: Emulator::of("attention_combine"),
        }
    }
}

/// How the work of a row is split.
#[derive(Clone, Copy)]
struct Split {
    splits: u32,
    chunk_blocks: u32,
}

/// y of all rows, and one more that nothing may write.
fn run(kernels: &Kernels, step: &Step, split: Split) -> Result<Vec<u16>, String> {
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

/// Rows of these lengths, 0 a padding row, against the reference.
fn check(kernels: &Kernels, heads: Heads, lens: &[usize], splits: u32, chunk_blocks: u32) {
    let what = format!("{heads:?}, {splits} splits of {chunk_blocks} blocks");
    let mut random = Random::new((lens.iter().sum::<usize>() + heads.group) as u64);
    let step = Step::new(heads, &rows_of(lens), &mut random);
    let y = run(kernels, &step, Split { splits, chunk_blocks }).expect(&what);
    for (row, y) in y.chunks(heads.heads() * heads.dim).enumerate() {
        match lens.get(row) {
            Some(0) => assert!(y.iter().all(|y| *y == 0), "{what}: padding row {row} is not zeros"),
            Some(_) => step.check(&what, row, row, 0, y),
            None => assert!(y.iter().all(|y| *y == POISON), "{what}: a row too many"),
        }
    }
}

#[test]
fn decodes_attend() {
    let kernels = Kernels::new();
    for of in Type::ALL {
        for dim in [64, 128] {
            let heads = |kv_heads, group, window| Heads {
                of,
                dim,
                kv_heads,
                group,
                window,
                scale: 1.0 / (dim as f32).sqrt(),
            };
            check(&kernels, heads(1, 1, 0), &[1], 1, 4);
            check(&kernels, heads(2, 4, 0), &[15, 16, 17, 0, 31, 32, 33], 2, 4);
        }
    }
}
