// Picks the rows whose logits are wanted.
//
// Grid: (wanted rows). Block: whole warps.
#include "common.cuh"

constexpr uint32_t THREADS_MAX = 256;

template <typename T>
struct GatherRows {
  // [rows, cols]
  const T* x;
  // [wanted]; PAD_ROW writes nothing.
  const uint32_t* rows;
  // [wanted, cols]
  T* y;
  // A multiple of 8.
  uint32_t cols;
};

template <typename T>
__device__ void run(const GatherRows<T>& op) {
  uint32_t row = op.rows[blockIdx.x];
  if (row == PAD_ROW) return;
  const T* from = op.x + uint64_t(row) * op.cols;
  T* to = op.y + uint64_t(blockIdx.x) * op.cols;
  for (uint32_t at = threadIdx.x * PACK; at < op.cols; at += blockDim.x * PACK) {
    store_pack(to + at, load_pack(from + at));
  }
}

ENTRY(gather_rows_bf16, THREADS_MAX, GatherRows<bf16>)
ENTRY(gather_rows_f16, THREADS_MAX, GatherRows<f16>)
