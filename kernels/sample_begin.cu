// Sequences take seats: parameters, and what the penalties know of prompt and output.
//
// Grid: (begins). Block: whole warps. Writes `vocab` words for a seat with penalties, nothing but its
// parameters for the others, whose `seen` is never read.
#include "common.cuh"
#include "sample.cuh"

constexpr uint32_t BEGIN_THREADS_MAX = 1024;

struct SampleBegin {
  // [begins]; PAD_ROW does nothing.
  const uint32_t* slots;
  // [begins]
  const Seat* params;
  // Of begin i: `offsets[i] .. offsets[i + 1]` of the tokens, which may repeat.
  const uint32_t* prompt_offsets;
  const uint32_t* prompt;
  const uint32_t* output_offsets;
  const uint32_t* output;
  // [slots]
  Seat* seats;
  // [slots, vocab]: see IN_PROMPT.
  uint32_t* seen;
  uint32_t vocab;
};

__device__ inline void run(const SampleBegin& op) {
  uint32_t begin = blockIdx.x, slot = op.slots[begin];
  if (slot == PAD_ROW) return;
  Seat seat = op.params[begin];
  if (threadIdx.x == 0) op.seats[slot] = seat;
  if (!seat.penalised()) return;
  uint32_t* seen = op.seen + uint64_t(slot) * op.vocab;
  for (uint32_t at = threadIdx.x; at < op.vocab; at += blockDim.x) seen[at] = 0;
  __syncthreads();
  for (uint32_t at = op.prompt_offsets[begin] + threadIdx.x; at < op.prompt_offsets[begin + 1];
       at += blockDim.x) {
    if (op.prompt[at] < op.vocab) atomicOr(&seen[op.prompt[at]], IN_PROMPT);
  }
  for (uint32_t at = op.output_offsets[begin] + threadIdx.x; at < op.output_offsets[begin + 1];
       at += blockDim.x) {
    if (op.output[at] < op.vocab) atomicAdd(&seen[op.output[at]], 1u);
  }
}

ENTRY(sample_begin, BEGIN_THREADS_MAX, SampleBegin)
