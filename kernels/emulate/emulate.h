// Runs a `.cu` on the CPU: its blocks one after the other, the threads of a block as fibers that hand
// over at barriers and warp-collective functions. Built by `tests/kernels` with AddressSanitizer.
//
// It finds wrong indexing, out-of-range access, unwritten outputs, barriers that threads or lanes do
// not reach together, and results that depend on the order of threads or on when an asynchronous copy
// lands: every request runs twice, in opposite orders. It finds no other races, and says nothing of
// speed.
#pragma once

#include <cmath>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __forceinline__ inline
#define __restrict__

namespace emulate {
struct Dim {
  uint32_t x, y, z;
};
}  // namespace emulate

// Those of the thread that runs.
static emulate::Dim threadIdx, blockIdx, blockDim, gridDim;

#include "fibers.h"
#include "primitives.h"
#include "driver.h"
