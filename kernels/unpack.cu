// Puts what came to the device in one copy into its places: metadata of a step, and what is drawn in it.
//
// Grid: (parts, segments). Block: whole warps. Reads and writes each word once.
#include "common.cuh"

constexpr uint32_t THREADS_MAX = 256;

struct Segment {
  uint32_t* to;
  // Of its first word, in the packet.
  uint32_t from;
  uint32_t words;
  // Words of a row, and from one row to the next where it goes.
  uint32_t row;
  uint32_t stride;
};

struct Unpack {
  // Begins with its segments.
  const uint32_t* packet;
};

__device__ inline void run(const Unpack& op) {
  Segment segment = reinterpret_cast<const Segment*>(op.packet)[blockIdx.y];
  for (uint32_t at = blockIdx.x * blockDim.x + threadIdx.x; at < segment.words; at += gridDim.x * blockDim.x) {
    uint64_t to = uint64_t(at / segment.row) * segment.stride + at % segment.row;
    segment.to[to] = op.packet[segment.from + at];
  }
}

ENTRY(unpack, THREADS_MAX, Unpack)
