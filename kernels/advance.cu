// Takes a batch of decodes from one step to the next without the host: one token more in each sequence.
//
// Grid: (whole batch / block). Block: whole warps. Idle rows (a length of 0) stay as they are.
#include "common.cuh"
#include "kv.cuh"

constexpr uint32_t THREADS_MAX = 256;

struct Advance {
  // [seqs]: tokens in the cache once the step has run.
  uint32_t* seq_lens;
  // [seqs]
  uint32_t* positions;
  // [seqs]: `block * 16 + offset`, or PAD_SLOT where the sequence has no block for its next token.
  int64_t* slots;
  // [seqs, stride]
  const uint32_t* block_tables;
  // [seqs]: blocks that each sequence has.
  const uint32_t* block_counts;
  uint32_t stride;
  uint32_t seqs;
};

__device__ inline void run(const Advance& op) {
  uint32_t seq = blockIdx.x * blockDim.x + threadIdx.x;
  if (seq >= op.seqs || op.seq_lens[seq] == 0) return;
  uint32_t position = op.seq_lens[seq], block = position / BLOCK_TOKENS;
  op.seq_lens[seq] = position + 1;
  op.positions[seq] = position;
  int64_t slot = PAD_SLOT;
  if (block < op.block_counts[seq]) {
    slot = int64_t(op.block_tables[uint64_t(seq) * op.stride + block]) * BLOCK_TOKENS;
    slot += position % BLOCK_TOKENS;
  }
  op.slots[seq] = slot;
}

ENTRY(advance, THREADS_MAX, Advance)
