//! Kernels that take a row at a time: embed, rms_norm, silu_mul, gather_rows.

use crate::{
    emulator::{Arg, Emulator, Launch},
    values::{POISON, Random, Type, halves, read_halves, words},
};

const PAD_ROW: u32 = u32::MAX;
const TOKEN_FROM_DEVICE: u32 = u32::MAX;

fn launch(kernel: &str, of: Type, grid: [u32; 3], threads: u32, args: Vec<Arg>) -> Launch {
    Launch { kernel: format!("{kernel}_{}", of.name()), grid, threads, shared_bytes: 0, args }
}

#[test]
fn embed_takes_rows_of_the_table() {
    let emulator = Emulator::of("embed");
    let check = |of: Type, ids: &[u32], slots: &[u32], hidden: usize| {
        let (vocab, sampled) = (11, [3u32, 10, 0]);
        let table = Random::new(hidden as u64).elements(of, vocab * hidden);
        let y = vec![POISON; ids.len() * hidden];
        let buffers =
            [halves(&table), words(ids), words(slots), words(&sampled), halves(&y)].to_vec();
        let mut args: Vec<Arg> = (0..5).map(Arg::Buffer).collect();
        args.extend([Arg::U32(vocab as u32), Arg::U32(hidden as u32)]);
        let launch = launch("embed", of, [ids.len() as u32, 1, 1], 64, args);
        let after = emulator.run(&buffers, &[launch]).expect("it runs");
        let y = read_halves(&after[4]);
        for (row, (id, slot)) in ids.iter().zip(slots).enumerate() {
            let id = if *id == TOKEN_FROM_DEVICE { sampled[*slot as usize] } else { *id } as usize;
            let y = &y[row * hidden..][..hidden];
            if id < vocab {
                assert_eq!(y, &table[id * hidden..][..hidden], "row {row}");
            } else {
                assert!(y.iter().all(|y| of.widen(*y).is_nan()), "row {row} has no token");
            }
        }
    };
    for of in Type::ALL {
        check(of, &[0], &[0], 8);
        check(of, &[10, TOKEN_FROM_DEVICE, 4, TOKEN_FROM_DEVICE], &[9, 1, 9, 2], 576);
        check(of, &[11, 5, u32::MAX - 1], &[0; 3], 1032);
        check(of, &[7; 65], &[0; 65], 64);
    }
}

#[test]
fn rms_norm_adds_then_normalises() {
    let emulator = Emulator::of("rms_norm");
    let check = |of: Type, rows: usize, cols: usize, threads: u32, residual: bool| {
        let what = format!("{of:?} [{rows}, {cols}], {threads} threads, residual {residual}");
        let mut random = Random::new((rows * cols) as u64);
        // A row more than the grid has, which must stay as it is.
        let h = random.elements(of, (rows + 1) * cols);
        let x = random.elements(of, rows * cols);
        let weight = random.elements(of, cols);
        let y = vec![POISON; (rows + 1) * cols];
        let buffers = [halves(&h), halves(&x), halves(&weight), halves(&y)].to_vec();
        let mut args = [0, 1, 2, 3].map(Arg::Buffer).to_vec();
        if !residual {
            args[1] = Arg::Null;
        }
        args.extend([Arg::U32(cols as u32), Arg::F32(1e-5)]);
        let launch = launch("rms_norm", of, [rows as u32, 1, 1], threads, args);
        let after = emulator.run(&buffers, &[launch]).expect(&what);
        let (new_h, y) = (read_halves(&after[0]), read_halves(&after[3]));
        let mut exact = Vec::new();
        for row in 0..rows {
            let sum = |index: usize| {
                let h = of.widen(h[index]);
                of.widen(of.round(if residual { h + of.widen(x[index]) } else { h }))
            };
            let sums: Vec<f64> = (row * cols..(row + 1) * cols).map(sum).collect();
            let mean = sums.iter().map(|h| h * h).sum::<f64>() / cols as f64;
            let scale = 1.0 / (mean + 1e-5f32 as f64).sqrt();
            exact.extend(sums.iter().zip(&weight).map(|(h, w)| h * scale * of.widen(*w)));
            let kept: Vec<f64> = new_h[row * cols..][..cols].iter().map(|h| of.widen(*h)).collect();
            assert_eq!(kept, sums, "{what}, row {row}");
        }
        of.assert_near(&what, &y[..rows * cols], &exact);
        assert_eq!(new_h[rows * cols..], h[rows * cols..], "{what}");
        assert!(y[rows * cols..].iter().all(|y| *y == POISON), "{what}");
    };
    for of in Type::ALL {
        for residual in [false, true] {
            check(of, 1, 8, 32, residual);
            check(of, 3, 576, 64, residual);
            check(of, 65, 64, 32, residual);
            check(of, 2, 4096, 512, residual);
            check(of, 1, 4104, 288, residual);
            check(of, 1, 16384, 1024, residual);
        }
    }
}

#[test]
fn silu_mul_gates() {
    let emulator = Emulator::of("silu_mul");
    let check = |of: Type, rows: usize, size: usize, parts: u32| {
        let mut random = Random::new(size as u64);
        let gate_up = random.elements(of, rows * 2 * size);
        let y = vec![POISON; (rows + 1) * size];
        let args = vec![Arg::Buffer(0), Arg::Buffer(1), Arg::U32(size as u32)];
        let launch = launch("silu_mul", of, [parts, rows as u32, 1], 64, args);
        let after = emulator.run(&[halves(&gate_up), halves(&y)], &[launch]).expect("it runs");
        let y = read_halves(&after[1]);
        let exact = |index: usize| {
            let (row, column) = (index / size, index % size);
            let gate = of.widen(gate_up[row * 2 * size + column]);
            gate / (1.0 + (-gate).exp()) * of.widen(gate_up[(row * 2 + 1) * size + column])
        };
        let exact: Vec<f64> = (0..rows * size).map(exact).collect();
        of.assert_near(&format!("{of:?} [{rows}, {size}]"), &y[..rows * size], &exact);
        assert!(y[rows * size..].iter().all(|y| *y == POISON));
    };
    for of in Type::ALL {
        check(of, 1, 8, 1);
        check(of, 3, 1536, 2);
        check(of, 65, 72, 1);
        check(of, 2, 1544, 9);
    }
}

#[test]
fn gather_rows_leaves_pads() {
    let emulator = Emulator::of("gather_rows");
    let check = |of: Type, wanted: &[u32], rows: usize, cols: usize| {
        let x = Random::new(cols as u64).elements(of, rows * cols);
        let y = vec![POISON; wanted.len() * cols];
        let mut args: Vec<Arg> = (0..3).map(Arg::Buffer).collect();
        args.push(Arg::U32(cols as u32));
        let launch = launch("gather_rows", of, [wanted.len() as u32, 1, 1], 32, args);
        let buffers = [halves(&x), words(wanted), halves(&y)];
        let after = emulator.run(&buffers, &[launch]).expect("it runs");
        for (y, row) in read_halves(&after[2]).chunks(cols).zip(wanted) {
            if *row == PAD_ROW {
                assert!(y.iter().all(|y| *y == POISON), "a pad is written");
            } else {
                assert_eq!(y, &x[*row as usize * cols..][..cols], "row {row}");
            }
        }
    };
    for of in Type::ALL {
        check(of, &[0], 1, 8);
        check(of, &[4, PAD_ROW, 0, 2, PAD_ROW], 5, 576);
        check(of, &(0..65).rev().collect::<Vec<_>>(), 65, 264);
    }
}
