//! What the machine can do at most, measured, and lines that relate an op to it.

use std::{hint::black_box, time::Instant};

use candela::{
    cli::assemble::isa_max,
    ops::{CpuPool, Isa, simd},
};

/// Repetitions; the best of them counts, since what disturbs a machine only ever slows it down.
const ROUNDS: usize = 15;
const STREAM_BYTES: usize = 256 << 20;
const FMA_ROUNDS: usize = 1 << 20;
/// Independent chains of products: enough to hide the latency of any processor.
const CHAINS: usize = 12;

pub struct Limits {
    pub gflops: f64,
    pub gbytes: f64,
}

/// Applies `CANDELA_ISA_MAX` and measures.
pub fn measure(pool: &CpuPool) -> Limits {
    if let Ok(name) = std::env::var("CANDELA_ISA_MAX") {
        simd::limit(isa_max(name.parse().expect("CANDELA_ISA_MAX")));
    }
    let threads = pool.threads();
    let seconds = best_seconds(|| {
        pool.each(threads, 1, &|_| {
            black_box(multiply(simd::isa()));
        })
    });
    let gflops = (threads * FMA_ROUNDS * CHAINS * 16 * 2) as f64 / seconds / 1e9;
    let data = vec![1u64; STREAM_BYTES / 8];
    let part = data.len() / 64;
    let seconds = best_seconds(|| {
        pool.each(64, 1, &|parts| {
            for index in parts {
                black_box(
                    data[index * part..][..part].iter().fold(0, |sum: u64, x| sum.wrapping_add(*x)),
                );
            }
        })
    });
    let limits = Limits { gflops, gbytes: STREAM_BYTES as f64 / seconds / 1e9 };
    println!(
        "{{\"isa\":\"{:?}\",\"threads\":{threads},\"limit_gflops\":{:.1},\"limit_gbytes\":{:.1}}}",
        simd::isa(),
        limits.gflops,
        limits.gbytes
    );
    limits
}

pub fn best_seconds(mut work: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(time).fold(f64::INFINITY, f64::min)
}

/// One line: rates of `flops` operations and `bytes` read in `seconds`, and their share of the limit.
pub fn print(name: &str, limits: &Limits, seconds: f64, flops: f64, bytes: f64) {
    let (gflops, gbytes) = (flops / seconds / 1e9, bytes / seconds / 1e9);
    println!(
        "{{\"op\":\"{name}\",\"us\":{:.1},\"gflops\":{gflops:.1},\"gflops_percent\":{:.0},\
         \"gbytes\":{gbytes:.1},\"gbytes_percent\":{:.0}}}",
        seconds * 1e6,
        gflops / limits.gflops * 100.0,
        gbytes / limits.gbytes * 100.0
    );
}

fn multiply(isa: Isa) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512vl,fma")]
        fn wide() -> f32 {
            multiply_body()
        }
        #[target_feature(enable = "avx2,fma")]
        fn middle() -> f32 {
            multiply_body()
        }
        match isa {
            // SAFETY: `isa` says that the machine has these instructions.
            Isa::Avx512Vnni => return unsafe { wide() },
            // SAFETY: as above.
            Isa::Avx2 => return unsafe { middle() },
            Isa::Portable => {}
        }
    }
    let _ = isa;
    multiply_body()
}

#[inline(always)]
fn multiply_body() -> f32 {
    let mut sums = [[1f32; 16]; CHAINS];
    let (a, b) = (black_box(0.999f32), black_box(0.001f32));
    for _ in 0..FMA_ROUNDS {
        for sums in &mut sums {
            for sum in sums {
                *sum = sum.mul_add(a, b);
            }
        }
    }
    sums.iter().flatten().sum()
}
