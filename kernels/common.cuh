// What every kernel stands on: storage types, 16-byte loads, reductions, and the entry macro. The
// same source compiles for a GPU (`device.cuh`) and as plain C++ for the tests (`emulate/`).
#pragma once

#include <stdint.h>

// 16-bit floats as they lie in memory; arithmetic is in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#ifdef __CUDACC__
#include "device.cuh"
#else
#include "emulate/emulate.h"
#endif

constexpr uint32_t WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;
// Elements of one 16-byte load.
constexpr uint32_t PACK = 8;
// `slot_mapping` of a padding row, and a padding entry of a list of rows.
constexpr int64_t PAD_SLOT = -1;
constexpr uint32_t PAD_ROW = 0xffffffffu;

// Eight elements that are loaded and stored at once; rows start at multiples of 16 bytes.
template <typename T>
struct alignas(16) Pack {
  T value[PACK];
};

template <typename T>
__device__ inline Pack<T> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T>*>(from);
}

template <typename T>
__device__ inline void store_pack(T* to, const Pack<T>& pack) {
  *reinterpret_cast<Pack<T>*>(to) = pack;
}

template <typename T>
__device__ inline void widen(const Pack<T>& pack, float (&to)[PACK]) {
#pragma unroll
  for (uint32_t i = 0; i < PACK; i++) to[i] = to_float(pack.value[i]);
}

template <typename T>
__device__ inline Pack<T> narrow(const float (&from)[PACK]) {
  Pack<T> pack;
#pragma unroll
  for (uint32_t i = 0; i < PACK; i++) pack.value[i] = from_float<T>(from[i]);
  return pack;
}

__device__ inline uint32_t lane() { return threadIdx.x % WARP; }
__device__ inline uint32_t warp() { return threadIdx.x / WARP; }

__device__ constexpr uint32_t div_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }
__device__ inline uint32_t min_of(uint32_t a, uint32_t b) { return a < b ? a : b; }

// The sum over groups of LANES neighbouring lanes, in each of them.
template <uint32_t LANES = WARP>
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (uint32_t step = LANES / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(ALL_LANES, value, step);
  }
  return value;
}

// The sum over a block of whole warps, in every thread. `partial` is shared memory for a float a
// warp, free to be written; it may be written again after the next barrier.
__device__ inline float block_sum(float value, float* partial) {
  value = warp_sum(value);
  if (lane() == 0) partial[warp()] = value;
  __syncthreads();
  value = lane() < blockDim.x / WARP ? partial[lane()] : 0.0f;
  return warp_sum(value);
}
