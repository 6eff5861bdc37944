// Where K and V of a block lie in one layer of the paged cache.
//
// Per block: K as [kv_heads, 16, head_dim], then V the same, as a token's row of a head is what loads
// and matrix fragments take whole. (On the CPU K is [kv_heads, head_dim, 16], for its registers'
// lanes.) Offsets of layers, blocks and heads are those of `KvShape`.
#pragma once

constexpr uint32_t BLOCK_TOKENS = 16;

template <uint32_t DIM>
struct KvLayout {
  uint32_t kv_heads;

  // Element of the first dimension of token 0 of a head.
  __device__ uint64_t k(uint32_t block, uint32_t head) const {
    return (uint64_t(block) * 2 * kv_heads + head) * BLOCK_TOKENS * DIM;
  }
  __device__ uint64_t v(uint32_t block, uint32_t head) const { return k(block, kv_heads + head); }
};
