// Fills memory with values that look random, for weights that nobody has: shapes alone set speeds.
//
// Grid: any. Block: whole warps. Writes each element once; the same seed gives the same values.
#include "common.cuh"

constexpr uint32_t THREADS_MAX = 256;

template <typename T>
struct Fill {
  // [count]
  T* to;
  // A multiple of 8.
  uint64_t count;
  uint32_t seed;
  // Values lie within this of 0, evenly.
  float size;
};

// A mixer of 32 bits (Wellons, "hash prospector", lowbias32).
__device__ inline uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

template <typename T>
__device__ void run(const Fill<T>& op) {
  uint64_t step = uint64_t(gridDim.x) * blockDim.x * PACK;
  for (uint64_t at = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) * PACK; at < op.count; at += step) {
    // Of elements that are 2^32 apart the upper half tells the values apart.
    uint32_t seed = mix(op.seed ^ uint32_t(at >> 32));
    float values[PACK];
#pragma unroll
    for (uint32_t i = 0; i < PACK; i++) {
      uint32_t word = mix(seed ^ (uint32_t(at) + i));
      values[i] = (float(word) * (2.0f / 4294967296.0f) - 1.0f) * op.size;
    }
    store_pack(op.to + at, narrow<T>(values));
  }
}

ENTRY(fill_bf16, THREADS_MAX, Fill<bf16>)
ENTRY(fill_f16, THREADS_MAX, Fill<f16>)
