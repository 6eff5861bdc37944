// Puts the splits of `attention_decode` together, in rows where more than one had something to do.
//
// Grid: (heads, rows). Block: 128 threads, in teams that take splits in turn. Reads `DIM + 2` floats for
// each busy split, and writes DIM elements.
#include "splits.cuh"

constexpr uint32_t THREADS = 128;

template <typename T, uint32_t DIM>
struct AttentionCombine {
  // [rows, heads, splits, DIM]
  const float* partial;
  // [rows, heads, splits, 2]: the largest score, and the sum of weights.
  const float* stats;
  // [rows]
  const uint32_t* seq_lens;
  // [rows, heads * DIM]
  T* y;
  // As `attention_decode` had them; its grid had `splits`.
  uint32_t splits;
  uint32_t chunk_blocks;
  uint32_t window;
  float scale;
};

template <typename T, uint32_t DIM>
__device__ void run(const AttentionCombine<T, DIM>& op) {
  constexpr uint32_t TEAM = DIM / PACK, TEAMS = THREADS / TEAM;
  SHARED(float, sums, TEAMS * DIM);
  Splits splits(op.seq_lens[blockIdx.y], op.window, op.chunk_blocks, op.splits);
  uint32_t busy = splits.busy();
  if (busy <= 1) return;
  float scale_log2 = op.scale * LOG2_E;
  uint64_t head = uint64_t(blockIdx.y) * gridDim.x + blockIdx.x;
  const float* partial = op.partial + head * op.splits * DIM;
  const float* stats = op.stats + head * op.splits * 2;
  float largest = NOTHING_SEEN, sum = 0.0f;
  for (uint32_t split = lane(); split < busy; split += WARP) largest = fmaxf(largest, stats[split * 2]);
#pragma unroll
  for (uint32_t step = WARP / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, step));
  }
  for (uint32_t split = lane(); split < busy; split += WARP) {
    sum += shrink(stats[split * 2], largest, scale_log2) * stats[split * 2 + 1];
  }
  sum = warp_sum(sum);
  uint32_t team = threadIdx.x / TEAM, at = threadIdx.x % TEAM * PACK;
  float o[PACK] = {};
#pragma unroll 4
  for (uint32_t split = team; split < busy; split += TEAMS) {
    float by = shrink(stats[split * 2], largest, scale_log2);
    Pack<float> part = load_pack(partial + uint64_t(split) * DIM + at);
#pragma unroll
    for (uint32_t i = 0; i < PACK; i++) o[i] += by * part.value[i];
  }
#pragma unroll
  for (uint32_t i = 0; i < PACK; i++) sums[team * DIM + at + i] = o[i];
  __syncthreads();
  if (team > 0) return;
#pragma unroll
  for (uint32_t i = 1; i < TEAMS; i++) {
#pragma unroll
    for (uint32_t j = 0; j < PACK; j++) o[j] += sums[i * DIM + at + j];
  }
#pragma unroll
  for (uint32_t i = 0; i < PACK; i++) o[i] *= 1.0f / sum;
  store_pack(op.y + head * DIM + at, narrow<T>(o));
}

#define ATTENTION_COMBINE(TYPE, DIM) \
  ENTRY(attention_combine_##TYPE##_##DIM, THREADS, AttentionCombine<TYPE, DIM>)
ATTENTION_COMBINE(bf16, 64)
ATTENTION_COMBINE(bf16, 128)
ATTENTION_COMBINE(f16, 64)
ATTENTION_COMBINE(f16, 128)
