//! attention_prefill: chunks of prompts, ragged.

use crate::{
    attention::{Heads, Sequence, Step},
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
        words(&starts),
        words(&lens),
        words(&step.tables),
        halves(&vec![POISON; (rows + 1) * heads.heads() * heads.dim]),
    ];
    let mut args: Vec<Arg> = (0..6).map(Arg::Buffer).collect();
    let sizes = [lens.len(), heads.q_stride(), step.table_stride, heads.kv_heads, heads.group];
    args.extend(sizes.map(|size| Arg::U32(size as u32)));
    args.extend([Arg::U32(heads.window as u32), Arg::F32(heads.scale)]);
    let tiles = rows * heads.group / ROWS + lens.len() + spare_tiles;
    let launch = Launch {
        kernel: format!("attention_prefill_{}_{}", heads.of.name(), heads.dim),
        grid: [heads.kv_heads as u32, tiles as u32, 1],
        threads: THREADS,
        shared_bytes: ((ROWS + RING_ROWS) * heads.dim * 2) as u32,
        args,
    };
    Ok(read_halves(&emulator.run(&buffers, &[launch])?[5]))
}

/// Sequences of (length, queries) against the reference.
fn check(emulator: &Emulator, heads: Heads, sequences: &[(usize, usize)]) {
    let what = format!("{heads:?}, {sequences:?}");
    let sequences: Vec<Sequence> =
        sequences.iter().map(|(len, queries)| Sequence { len: *len, queries: *queries }).collect();
    let seed = sequences.iter().map(|sequence| sequence.len + sequence.queries).sum::<usize>();
    let step = Step::new(heads, &sequences, &mut Random::new((seed + heads.group) as u64));
    let y = run(emulator, &step, seed % 3).expect(&what);
    let mut rows = y.chunks(heads.heads() * heads.dim).enumerate();
    for (index, sequence) in sequences.iter().enumerate() {
        for query in 0..sequence.queries {
            let (row, y) = rows.next().expect("a row for each");
            step.check(&what, row, index, query, y);
        }
    }
    let (_, spare) = rows.next().expect("the spare row");
    assert!(spare.iter().all(|y| *y == POISON), "{what}: a row too many");
}

#[test]
fn prefill_attends() {
    let emulator = Emulator::of("attention_prefill");
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
            let now = std::time::Instant::now();
            check(&emulator, heads(1, 1, 0), &[(1, 1)]);
            eprintln!("{:?}", now.elapsed());
            check(&emulator, heads(2, 3, 0), &[(70, 45), (0, 0), (33, 1), (16, 16)]);
            eprintln!("{:?}", now.elapsed());
        }
    }
}
