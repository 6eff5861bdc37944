// What decode and prefill share: tiles of K and V in shared memory, and the softmax as it goes along.
#pragma once

#include "common.cuh"
#include "kv.cuh"

constexpr float LOG2_E = 1.44269504f;
// The largest score before any was seen. It is finite, so that a row that sees nothing of a tile needs
// no case of its own: a masked score of -infinity weighs 0 against it, and it weighs 0 against others.
constexpr float NOTHING_SEEN = -3.402823466e38f;

// Weights of the softmax are at most 2^this, a factor that leaves with the division by their sum. In
// bf16 it keeps sums of a million values of any size finite; in f16 it keeps small weights from
// being subnormal.
template <typename T>
constexpr float WEIGHT_EXPONENT = 0.0f;
template <>
constexpr float WEIGHT_EXPONENT<bf16> = -20.0f;
template <>
constexpr float WEIGHT_EXPONENT<f16> = 15.0f;

// Scores are differences before they are scaled: of large ones nothing is lost, and none is above 0.
template <typename T>
__device__ inline float weight_of(float score, float largest, float scale_log2) {
  return exp2_fast((score - largest) * scale_log2 + WEIGHT_EXPONENT<T>);
}

// What sums so far are worth once a larger score was seen.
__device__ inline float shrink(float before, float after, float scale_log2) {
  return exp2_fast((before - after) * scale_log2);
}

// The first of `len` tokens that the last of them sees; a window of 0 is none.
__device__ inline uint32_t window_start(uint32_t len, uint32_t window) {
  return window != 0 && len > window ? len - window : 0;
}

// Where pack `pack` of row `row` lies in a tile [rows, DIM]: at one place in eight rows that follow
// each other, packs are in different banks, as ldmatrix reads them.
template <uint32_t DIM>
__device__ inline uint32_t swizzled(uint32_t row, uint32_t pack) {
  return row * (DIM / PACK) + (pack ^ (row % PACK));
}
