//! mma, ldmatrix and movmatrix of the emulator: the documented fragments multiply matrices.

use crate::{
    emulator::{Arg, Emulator, Launch},
    values::{Random, Type, bytes_of, halves, read_words, words},
};

/// `c[16, 8] = a[16, 16] b[16, 8]` by one warp: a by ldmatrix, b by its transposed form. `turned` is
/// the transpose of a's upper left quarter by movmatrix.
const SOURCE: &str = r#"
#include "common.cuh"
template <typename T>
struct Args { const T* a; const T* b; float* c; uint32_t* turned; };
template <typename T>
__device__ void run(const Args<T>& op) {
  SHARED(Pack<T>, a, 32);
  SHARED(Pack<T>, b, 16);
  cp_async_16(a + lane(), op.a + lane() * PACK, true);
  cp_async_16(b + lane() % 16, op.b + lane() % 16 * PACK, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t x[4], y[4];
  ldmatrix_x4(x, a + lane() % 16 * 2 + lane() / 16);
  ldmatrix_x4_transposed(y, b + lane() % 16);
  float c[4] = {};
  uint32_t two[2] = {y[0], y[1]};
  mma_16x8x16<T>(c, x, two);
  for (uint32_t i = 0; i < 4; i++) {
    op.c[(lane() / 4 + 8 * (i / 2)) * 8 + lane() % 4 * 2 + i % 2] = c[i];
  }
  op.turned[lane()] = transpose_8x8(x[0]);
}
ENTRY(test_bf16, 32, Args<bf16>)
ENTRY(test_f16, 32, Args<f16>)
"#;

#[test]
fn fragments_multiply_and_transpose() {
    let emulator = Emulator::build("matrix", SOURCE);
    for of in Type::ALL {
        let mut random = Random::new(5);
        let (a, b) = (random.elements(of, 16 * 16), random.elements(of, 16 * 8));
        let c = bytes_of(&[f32::NAN; 16 * 8], f32::to_ne_bytes);
        let buffers = [halves(&a), halves(&b), c, words(&[0; 32])];
        let args = (0..4).map(Arg::Buffer).collect();
        let kernel = format!("test_{}", of.name());
        let launch = Launch { kernel, grid: [1; 3], threads: 32, shared_bytes: 0, args };
        let after = emulator.run(&buffers, &[launch]).expect("it runs");
        for (index, bits) in read_words(&after[2]).into_iter().enumerate() {
            let (row, column) = (index / 8, index % 8);
            let terms = |k: usize| of.widen(a[row * 16 + k]) * of.widen(b[k * 8 + column]);
            let exact: f64 = (0..16).map(terms).sum();
            let size: f64 = (0..16).map(|k| terms(k).abs()).sum();
            let ours = f64::from(f32::from_bits(bits));
            assert!(
                (ours - exact).abs() <= size * 1e-6,
                "{of:?} {row}, {column}: {ours} for {exact}"
            );
        }
        for (lane, pair) in read_words(&after[3]).into_iter().enumerate() {
            let (row, column) = (lane / 4, lane % 4 * 2);
            let of_a = |row: usize, column: usize| u32::from(a[row * 16 + column]);
            assert_eq!(pair, of_a(column, row) | of_a(column + 1, row) << 16, "{of:?} {lane}");
        }
    }
}
