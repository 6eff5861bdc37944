// How a sequence's KV blocks are dealt out to the splits of decode attention.
//
// Chunks of blocks, at fixed positions, go to the splits in turn, the first one that the row sees to
// split 0. So the grid is that of a batch bucket, whatever the lengths, and what a row sums in which
// order depends on nothing beside it.
#pragma once

#include "attention.cuh"

struct Splits {
  // Tokens that the row sees: from `first_token`, up to `len`.
  uint32_t first_token, len;
  // Their blocks: from `begin`, up to `end`.
  uint32_t begin, end;
  // Blocks of a chunk.
  uint32_t chunk;
  uint32_t count;

  __device__ Splits(uint32_t len, uint32_t window, uint32_t chunk, uint32_t count)
      : first_token(window_start(len, window)),
        len(len),
        begin(first_token / BLOCK_TOKENS),
        end(div_up(len, BLOCK_TOKENS)),
        chunk(chunk),
        count(count) {}

  // Splits that have a chunk: those below this.
  __device__ uint32_t busy() const {
    return begin == end ? 0 : min_of(div_up(end, chunk) - begin / chunk, count);
  }

  // The block that a split's first chunk begins with; it may lie before `begin`.
  __device__ uint32_t first_block(uint32_t split) const { return (begin / chunk + split) * chunk; }
};
