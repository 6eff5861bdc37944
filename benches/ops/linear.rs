//! Products with quantised weights alone, against the limits of the machine, one JSON line each. An
//! operation on integers counts as one on floats: with 16-bit activations a register holds twice as
//! many, so that more than 100 % is possible. Bytes are those of the weights.

#[path = "limits.rs"]
mod limits;

use std::sync::Arc;

use candela::ops::{
    Bits, CpuPool, DenseType, Linear, Matrix, PackedWeight, Place, QuantSpec, View,
};
use candle_core::{Device, Tensor};

/// The largest product of SmolLM2-135M's layers.
const N: usize = 3072;
const K: usize = 576;
const ROWS_MAX: usize = 512;

fn quantised(spec: QuantSpec) -> PackedWeight {
    let mut builder = PackedWeight::builder(K);
    builder
        .push_quant(N, spec, &mut |row, out| {
            for (index, q) in out.q.iter_mut().enumerate() {
                *q = (row * 7 + index * 5) as u8 & if spec.bits == Bits::Four { 15 } else { 255 };
            }
            out.scale.fill(0.01);
            out.min.fill(-0.05);
        })
        .expect("packs");
    builder.build()
}

fn dense(dtype: DenseType) -> PackedWeight {
    let mut builder = PackedWeight::builder(K);
    builder.push_dense(N, dtype, &vec![0x11; N * K * dtype.bytes()]).expect("packs");
    builder.build()
}

fn check(name: &str, place: &Place, limits: &limits::Limits, weight: &Matrix, rows: usize) {
    let arena = Tensor::randn(0f32, 1f32, rows * (K + N), &Device::Cpu).expect("values");
    let op = Linear {
        weight,
        bias: None,
        x: View { offset: 0, cols: K },
        y: View { offset: rows * K, cols: N },
        rows,
        wide: false,
        place,
    };
    let seconds = limits::best_seconds(|| arena.inplace_op1(&op).expect("runs"));
    let flops = (2 * rows * N * K) as f64;
    let name = format!("linear {name} {rows} rows");
    limits::print(&name, limits, seconds, flops, weight.bytes() as f64);
}

fn main() {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let pool = Arc::new(CpuPool::new(threads).expect("threads"));
    let limits = limits::measure(&pool);
    let place = Place::on_cpu(pool, ROWS_MAX, K);
    let spec =
        |bits, group, zero, has_min| QuantSpec { bits, group, zero, has_min, half_scales: true };
    for (name, weight) in [
        ("4 bits with minimum", quantised(spec(Bits::Four, 32, 0, true))),
        ("4 bits", quantised(spec(Bits::Four, 32, 8, false))),
        ("8 bits", quantised(spec(Bits::Eight, 32, 128, false))),
        ("8 bits, scale per 16", quantised(spec(Bits::Eight, 16, 128, false))),
        ("f16", dense(DenseType::F16)),
        ("f32", dense(DenseType::F32)),
    ] {
        let weight = Matrix::Host(weight);
        for rows in [1, 2, 4, 8, 32, ROWS_MAX] {
            check(name, &place, &limits, &weight, rows);
        }
    }
}
