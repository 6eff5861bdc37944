// The product of few rows with a matrix: `y = x W^T + bias`, for 1 to 8 rows of x.
//
// Grid: (n / 4, rounded up). Block: whole warps. A block takes four rows of W, each thread every
// `blockDim.x`th 16 bytes of them; the floor is W's `n * k * 2` bytes, read once. x is read from the
// first-level cache, which W passes by. A row of y is the same bits whatever the other rows of x are and
// however many, for a given number of threads: all rows are summed in one order.
#include "common.cuh"

constexpr uint32_t THREADS_MAX = 256;
// Rows of W of a block.
constexpr uint32_t ROWS = 4;

template <typename T>
struct Gemv {
  // [m, k]
  const T* x;
  // [n, k]
  const T* weight;
  // [n], or null.
  const T* bias;
  // [m, stride]; one of both is null.
  T* y;
  float* y_f32;
  uint32_t n;
  // A multiple of 8.
  uint32_t k;
  // n or more.
  uint32_t stride;
};

// Sums each of four values over a warp: lanes 8 r .. 8 r + 8 get the sum of value r. The order of sums
// is that of `warp_sum`, in half the shuffles.
__device__ inline float sum_four(const float (&value)[ROWS]) {
  bool upper = lane() & 16, odd = lane() & 8;
  float a = upper ? value[2] : value[0], b = upper ? value[3] : value[1];
  a += __shfl_xor_sync(ALL_LANES, upper ? value[0] : value[2], 16);
  b += __shfl_xor_sync(ALL_LANES, upper ? value[1] : value[3], 16);
  float sum = odd ? b : a;
  sum += __shfl_xor_sync(ALL_LANES, odd ? a : b, 8);
  return warp_sum<8>(sum);
}

// M: rows of x. A thread has UNROLL * ROWS loads of W under way.
template <typename T, uint32_t M, uint32_t UNROLL>
__device__ void multiply(const Gemv<T>& op) {
  SHARED(float, partial, (THREADS_MAX / WARP) * M * ROWS);
  uint32_t first = blockIdx.x * ROWS, packs = op.k / PACK;
  const T* rows[ROWS];
#pragma unroll
  for (uint32_t r = 0; r < ROWS; r++) {
    // Rows after the last are read as the last, and not written.
    uint32_t row = first + r < op.n ? first + r : op.n - 1;
    rows[r] = op.weight + uint64_t(row) * op.k;
  }
  float sums[M][ROWS] = {};
  for (uint32_t at = threadIdx.x; at < packs; at += blockDim.x * UNROLL) {
    Pack<T> weight[UNROLL][ROWS];
#pragma unroll
    for (uint32_t u = 0; u < UNROLL; u++) {
      uint32_t pack = at + u * blockDim.x;
      if (pack >= packs) continue;
#pragma unroll
      for (uint32_t r = 0; r < ROWS; r++) weight[u][r] = load_once<Pack<T>>(rows[r] + pack * PACK);
    }
#pragma unroll
    for (uint32_t u = 0; u < UNROLL; u++) {
      uint32_t pack = at + u * blockDim.x;
      if (pack >= packs) continue;
      float w[ROWS][PACK];
#pragma unroll
      for (uint32_t r = 0; r < ROWS; r++) widen(weight[u][r], w[r]);
#pragma unroll
      for (uint32_t m = 0; m < M; m++) {
        float x[PACK];
        widen(load_pack(op.x + uint64_t(m) * op.k + pack * PACK), x);
#pragma unroll
        for (uint32_t i = 0; i < PACK; i++) {
#pragma unroll
          for (uint32_t r = 0; r < ROWS; r++) sums[m][r] = fmaf(x[i], w[r][i], sums[m][r]);
        }
      }
    }
  }
#pragma unroll
  for (uint32_t m = 0; m < M; m++) {
    float sum = sum_four(sums[m]);
    if (lane() % 8 == 0) partial[(warp() * M + m) * ROWS + lane() / 8] = sum;
  }
  __syncthreads();
  uint32_t m = threadIdx.x / ROWS, row = first + threadIdx.x % ROWS;
  if (m >= M || row >= op.n) return;
  float sum = 0.0f;
  for (uint32_t w = 0; w < blockDim.x / WARP; w++) sum += partial[w * M * ROWS + threadIdx.x];
  if (op.bias) sum += to_float(op.bias[row]);
  uint64_t to = uint64_t(m) * op.stride + row;
  if (op.y_f32) {
    op.y_f32[to] = sum;
  } else {
    op.y[to] = from_float<T>(sum);
  }
}

template <uint32_t M, typename T>
struct GemvOf : Gemv<T> {};

// More rows leave fewer registers for loads.
template <uint32_t M, typename T>
__device__ void run(const GemvOf<M, T>& op) {
  multiply<T, M, (M <= 4 ? 2 : 1)>(op);
}

#define CANDELA_GEMV(M)                                  \
  ENTRY(gemv_##M##_bf16, THREADS_MAX, GemvOf<M, bf16>)   \
  ENTRY(gemv_##M##_f16, THREADS_MAX, GemvOf<M, f16>)
CANDELA_GEMV(1)
CANDELA_GEMV(2)
CANDELA_GEMV(3)
CANDELA_GEMV(4)
CANDELA_GEMV(5)
CANDELA_GEMV(6)
CANDELA_GEMV(7)
CANDELA_GEMV(8)
