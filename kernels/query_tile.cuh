// Which queries a block of prefill attention takes.
//
// A tile is ROWS queries of one sequence: all heads of the group of a row, then those of the next row, so
// that they share K and V. Tiles have places that follow from `cu_seqlens_q` alone, and a block finds its
// sequence by halving: the host makes no list, and a grid of `rows * group / ROWS + seqs` places, rounded
// down, holds any division of the rows among the sequences, as a captured graph needs it. What is left
// over, at most one place a sequence, ends at once.
#pragma once

#include "attention.cuh"

// Queries of a tile.
constexpr uint32_t ROWS = 128;
// Tokens of a tile of KV.
constexpr uint32_t KEYS = 64;

// A tile of the grid: queries of one sequence, from `first` of `queries` on. It lies in shared memory, as
// registers are what this kernel has least of.
struct Tile {
  uint32_t seq, first_row, first, queries;
  // Positions of the sequence's first row, and of the first and the last query of the tile.
  uint32_t start, from, to;

  __device__ bool is_empty() const { return first >= queries; }
  // Whether all of its queries see all of KEYS tokens from `key` on.
  __device__ bool sees_all(uint32_t key, uint32_t window) const {
    return key + KEYS <= from + 1 && key >= window_start(to + 1, window);
  }
};

// The place of a sequence's first tile. The next sequence's is further by as many as this one has tiles,
// or one more.
template <typename Op>
__device__ uint32_t place_of(const Op& op, uint32_t seq) {
  return op.cu_seqlens_q[seq] * op.group / ROWS + seq;
}

// The last sequence whose first tile is not after `place`.
template <typename Op>
__device__ Tile find_tile(const Op& op, uint32_t place) {
  uint32_t seq = 0;
  for (uint32_t end = op.seqs; end - seq > 1;) {
    uint32_t middle = (seq + end) / 2;
    if (place_of(op, middle) <= place) {
      seq = middle;
    } else {
      end = middle;
    }
  }
  Tile tile;
  tile.seq = seq;
  tile.first_row = op.cu_seqlens_q[seq];
  uint32_t rows = op.cu_seqlens_q[seq + 1] - tile.first_row;
  tile.queries = rows * op.group;
  tile.first = (place - place_of(op, seq)) * ROWS;
  tile.start = op.seq_lens[seq] - rows;
  tile.from = tile.start + tile.first / op.group;
  tile.to = tile.start + (min_of(tile.first + ROWS, tile.queries) - 1) / op.group;
  return tile;
}

// Where a query's elements are in a tensor whose rows have `stride` elements.
template <uint32_t DIM, typename Op>
__device__ uint64_t query_at(const Op& op, const Tile& tile, uint32_t query, uint32_t stride) {
  uint64_t row = tile.first_row + query / op.group;
  return row * stride + (blockIdx.x * op.group + query % op.group) * DIM;
}
