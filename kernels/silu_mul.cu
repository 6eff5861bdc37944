// SwiGLU's gate: `y = silu(gate) * up`.
//
// Grid: (parts of a row, rows). Block: whole warps. Reads 2 and writes 1 element for each of y.
#include "common.cuh"

constexpr uint32_t THREADS_MAX = 256;

template <typename T>
struct SiluMul {
  // [rows, 2 * size]: gate, then up.
  const T* gate_up;
  // [rows, size]
  T* y;
  // A multiple of 8.
  uint32_t size;
};

template <typename T>
__device__ void run(const SiluMul<T>& op) {
  const T* from = op.gate_up + uint64_t(blockIdx.y) * 2 * op.size;
  T* y = op.y + uint64_t(blockIdx.y) * op.size;
  uint32_t step = gridDim.x * blockDim.x * PACK;
  for (uint32_t at = (blockIdx.x * blockDim.x + threadIdx.x) * PACK; at < op.size; at += step) {
    float gate[PACK], up[PACK];
    widen(load_pack(from + at), gate);
    widen(load_pack(from + op.size + at), up);
#pragma unroll
    for (uint32_t i = 0; i < PACK; i++) up[i] *= gate[i] / (1.0f + __expf(-gate[i]));
    store_pack(y + at, narrow<T>(up));
  }
}

ENTRY(silu_mul_bf16, THREADS_MAX, SiluMul<bf16>)
ENTRY(silu_mul_f16, THREADS_MAX, SiluMul<f16>)
