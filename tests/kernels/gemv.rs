//! gemv against sums in f64.

use crate::{
    emulator::{Arg, Emulator, Launch, source},
    values::{POISON, Random, Type, bytes_of, halves, read_halves, read_words},
};

struct Case {
    of: Type,
    /// Rows of x, columns of y, and what is summed over.
    m: usize,
    n: usize,
    k: usize,
    bias: bool,
    threads: u32,
}

struct Operands {
    x: Vec<u16>,
    weight: Vec<u16>,
    bias: Vec<u16>,
}

impl Case {
    /// The same for every m, so that rows of several products can be compared.
    fn operands(&self) -> Operands {
        let mut random = Random::new((self.n * 7 + self.k) as u64);
        Operands {
            x: random.elements(self.of, 8 * self.k),
            weight: random.elements(self.of, self.n * self.k),
            bias: random.elements(self.of, self.n),
        }
    }

    /// Rows of x from `first` on; `y` is `[m, stride]`, of bits of f32 or of T.
    fn run(&self, emulator: &Emulator, first: usize, wide: bool) -> Vec<u32> {
        let (Operands { x, weight, bias }, stride) = (self.operands(), self.n + 3);
        let poison = f32::from_bits(u32::from(POISON) << 16 | 1);
        let y = match wide {
            true => bytes_of(&vec![poison; self.m * stride], f32::to_ne_bytes),
            false => halves(&vec![POISON; self.m * stride]),
        };
        let x = &x[first * self.k..][..self.m * self.k];
        let buffers = [halves(x), halves(&weight), halves(&bias), y];
        let mut args = vec![Arg::Buffer(0), Arg::Buffer(1), Arg::Null, Arg::Null, Arg::Null];
        if self.bias {
            args[2] = Arg::Buffer(2);
        }
        args[if wide { 4 } else { 3 }] = Arg::Buffer(3);
        args.extend([self.n, self.k, stride].map(|size| Arg::U32(size as u32)));
        let kernel = format!("gemv_{}_{}", self.m, self.of.name());
        let grid = [self.n.div_ceil(4) as u32, 1, 1];
        let launch = Launch { kernel, grid, threads: self.threads, shared_bytes: 0, args };
        let after = emulator.run(&buffers, &[launch]).expect("it runs");
        let all = match wide {
            true => read_words(&after[3]),
            false => read_halves(&after[3]).into_iter().map(u32::from).collect(),
        };
        let poison = if wide { poison.to_bits() } else { u32::from(POISON) };
        let beyond = all.iter().enumerate().filter(|(at, _)| at % stride >= self.n);
        for (at, bits) in beyond {
            assert_eq!(*bits, poison, "{at} lies between rows of {self}");
        }
        all.chunks(stride).flat_map(|row| row[..self.n].to_vec()).collect()
    }

    /// Whether a result is the exact one but for what sums of f32 lose.
    fn is_near(&self, wide: bool, ours: &[u32]) -> Result<(), String> {
        let Operands { x, weight, bias } = self.operands();
        for (at, bits) in ours.iter().enumerate() {
            let (m, n) = (at / self.n, at % self.n);
            let (mut exact, mut size) = (0.0, 0.0);
            for k in 0..self.k {
                let term = self.of.widen(x[m * self.k + k]) * self.of.widen(weight[n * self.k + k]);
                exact += term;
                size += term.abs();
            }
            exact += if self.bias { self.of.widen(bias[n]) } else { 0.0 };
            // A term goes through its share of a thread's sums, and those of warps.
            let sums = self.k as f64 / f64::from(self.threads) + 24.0;
            let mut most = sums * size * f64::from(f32::EPSILON) / 2.0 + 1e-30;
            let ours = match wide {
                true => f64::from(f32::from_bits(*bits)),
                false => self.of.widen(*bits as u16),
            };
            most += if wide { 0.0 } else { exact.abs() * self.of.rounding() };
            if (ours - exact).abs().is_nan() || (ours - exact).abs() > most {
                return Err(format!("{self}, row {m}, column {n}: {ours} for {exact}"));
            }
        }
        Ok(())
    }

    fn check(&self, emulator: &Emulator) {
        for wide in [false, true] {
            let ours = self.run(emulator, 0, wide);
            self.is_near(wide, &ours).unwrap_or_else(|wrong| panic!("{wrong}"));
        }
    }
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { of, m, n, k, bias, threads } = self;
        write!(f, "{of:?} m {m}, n {n}, k {k}, bias {bias}, {threads} threads")
    }
}

#[test]
fn products_are_exact_but_for_f32() {
    let emulator = Emulator::of("gemv");
    for of in Type::ALL {
        for m in 1..=8 {
            let case = |n, k, bias, threads| Case { of, m, n, k, bias, threads };
            case(1, 8, m % 2 == 0, 32).check(&emulator);
            case(7, 1032, true, 64).check(&emulator);
            case(33, 576, false, 128).check(&emulator);
        }
        Case { of, m: 1, n: 5, k: 14336, bias: false, threads: 256 }.check(&emulator);
        Case { of, m: 8, n: 6, k: 4104, bias: true, threads: 256 }.check(&emulator);
    }
}

#[test]
fn a_row_does_not_depend_on_the_others() {
    let emulator = Emulator::of("gemv");
    for of in Type::ALL {
        let case = |m| Case { of, m, n: 9, k: 2056, bias: true, threads: 64 };
        let alone: Vec<Vec<u32>> = (0..8).map(|row| case(1).run(&emulator, row, true)).collect();
        for m in 2..=8 {
            for first in [0, 8 - m] {
                let together = case(m).run(&emulator, first, true);
                assert_eq!(together, alone[first..][..m].concat(), "{of:?}, {m} from {first}");
            }
        }
    }
}

#[test]
fn what_is_broken_is_noticed() {
    let lines = source(&["gemv"]);
    // The one kernel that the case runs.
    let other = |line: &&str| line.starts_with("CANDELA_GEMV(") && *line != "CANDELA_GEMV(2)";
    let whole = lines.lines().filter(|line| !other(line)).collect::<Vec<_>>().join("\n");
    for (name, right, wrong) in [
        ("gemv_a_load_less", "pack >= packs", "pack + 1 >= packs"),
        ("gemv_a_warp_less", "w < blockDim.x / WARP", "w + 1 < blockDim.x / WARP"),
    ] {
        assert!(whole.contains(right), "{name}: the kernel has no `{right}`");
        let emulator = Emulator::build(name, &whole.replace(right, wrong));
        let case = Case { of: Type::Bf16, m: 2, n: 7, k: 1032, bias: true, threads: 64 };
        let ours = case.run(&emulator, 0, true);
        assert!(case.is_near(true, &ours).is_err(), "{name}");
    }
}
