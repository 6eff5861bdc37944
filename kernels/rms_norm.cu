// Residual add and RMSNorm: `h += x`, then `y = h / rms(h) * weight`.
//
// Grid: (rows). Block: whole warps, `cols / 16` threads or more. Reads h, x and writes h, y once each.
#include "common.cuh"

constexpr uint32_t THREADS_MAX = 1024;
// Packs of a row that a thread keeps in registers: rows of up to 16384 elements.
constexpr uint32_t PACKS = 2;

template <typename T>
struct RmsNorm {
  // [rows, cols]; the sum is rounded to T before the norm sees it.
  T* h;
  // [rows, cols], or null.
  const T* residual;
  // [cols]
  const T* weight;
  // [rows, cols]
  T* y;
  // A multiple of 8.
  uint32_t cols;
  float eps;
};

template <typename T>
__device__ void run(const RmsNorm<T>& op) {
  SHARED(float, partial, THREADS_MAX / WARP);
  uint64_t first = uint64_t(blockIdx.x) * op.cols;
  float x[PACKS][PACK];
  float squares = 0.0f;
#pragma unroll
  for (uint32_t i = 0; i < PACKS; i++) {
    uint32_t at = (threadIdx.x + i * blockDim.x) * PACK;
    if (at >= op.cols) continue;
    Pack<T> h = load_pack(op.h + first + at);
    widen(h, x[i]);
    if (op.residual) {
      float residual[PACK];
      widen(load_pack(op.residual + first + at), residual);
#pragma unroll
      for (uint32_t j = 0; j < PACK; j++) x[i][j] += residual[j];
      h = narrow<T>(x[i]);
      store_pack(op.h + first + at, h);
      widen(h, x[i]);
    }
#pragma unroll
    for (uint32_t j = 0; j < PACK; j++) squares += x[i][j] * x[i][j];
  }
  float scale = rsqrtf(block_sum(squares, partial) / float(op.cols) + op.eps);
#pragma unroll
  for (uint32_t i = 0; i < PACKS; i++) {
    uint32_t at = (threadIdx.x + i * blockDim.x) * PACK;
    if (at >= op.cols) continue;
    float weight[PACK];
    widen(load_pack(op.weight + at), weight);
#pragma unroll
    for (uint32_t j = 0; j < PACK; j++) x[i][j] *= scale * weight[j];
    store_pack(op.y + first + at, narrow<T>(x[i]));
  }
}

ENTRY(rms_norm_bf16, THREADS_MAX, RmsNorm<bf16>)
ENTRY(rms_norm_f16, THREADS_MAX, RmsNorm<f16>)
