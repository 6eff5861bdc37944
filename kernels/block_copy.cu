// Copies whole blocks of the KV cache in all layers, in the order of the list: a thread copies the same
// bytes of every pair, so a block that is written by one pair and read by the next is right.
//
// Grid: (parts of a block, layers). Block: whole warps. Reads and writes 16 bytes a thread and pair.
#include "common.cuh"

constexpr uint32_t THREADS_MAX = 256;

struct BlockCopy {
  // [layers, blocks, block_bytes]
  unsigned char* cache;
  // [count]: from, to.
  const uint32_t* pairs;
  uint64_t blocks;
  // A multiple of 16.
  uint32_t block_bytes;
  uint32_t count;
};

__device__ inline void run(const BlockCopy& op) {
  unsigned char* layer = op.cache + blockIdx.y * op.blocks * op.block_bytes;
  uint32_t step = gridDim.x * blockDim.x * 16;
  for (uint32_t at = (blockIdx.x * blockDim.x + threadIdx.x) * 16; at < op.block_bytes; at += step) {
    for (uint32_t pair = 0; pair < op.count; pair++) {
      uint64_t from = op.pairs[2 * pair], to = op.pairs[2 * pair + 1];
      auto* source = reinterpret_cast<const uint4*>(layer + from * op.block_bytes + at);
      *reinterpret_cast<uint4*>(layer + to * op.block_bytes + at) = *source;
    }
  }
}

ENTRY(block_copy, THREADS_MAX, BlockCopy)
