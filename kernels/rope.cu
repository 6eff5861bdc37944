// What happens between the projection of q, k, v and attention, in one pass: the optional RMSNorm of
// each head of q and k (Qwen3), rotary embedding, and the write of k and v to the paged cache.
//
// Grid: (rows, parts of a row). Block: whole warps. Pairs are `(i, i + head_dim / 2)`. q is rotated in
// place; k and v of the row stay as they are, since attention reads them from the cache.
#include "common.cuh"
#include "kv.cuh"

constexpr uint32_t THREADS_MAX = 256;

template <typename T, uint32_t DIM>
struct Rope {
  // [rows, (heads + 2 kv_heads) * DIM]: q, k, v.
  T* qkv;
  // One layer of the cache.
  T* cache;
  // [positions, DIM]: cosines, then sines.
  const float* table;
  // [rows]
  const uint32_t* positions;
  // [rows]: `block * 16 + offset`, or PAD_SLOT, which writes nothing to the cache.
  const int64_t* slots;
  // [DIM] each, or null.
  const T* q_norm;
  const T* k_norm;
  uint32_t heads;
  uint32_t kv_heads;
  float eps;
};

// A head is handled by DIM / 16 lanes, each with 8 elements of its first half and their partners.
template <uint32_t DIM>
constexpr uint32_t HEAD_LANES = DIM / (2 * PACK);

template <typename T, uint32_t DIM>
__device__ void normalise(float (&a)[PACK], float (&b)[PACK], const T* weight, uint32_t at, float eps) {
  float squares = 0.0f, w[PACK];
#pragma unroll
  for (uint32_t i = 0; i < PACK; i++) squares += a[i] * a[i] + b[i] * b[i];
  float scale = rsqrtf(warp_sum<HEAD_LANES<DIM>>(squares) / float(DIM) + eps);
  widen(load_pack(weight + at), w);
#pragma unroll
  for (uint32_t i = 0; i < PACK; i++) a[i] *= scale * w[i];
  widen(load_pack(weight + DIM / 2 + at), w);
#pragma unroll
  for (uint32_t i = 0; i < PACK; i++) b[i] *= scale * w[i];
}

__device__ inline void rotate(float (&a)[PACK], float (&b)[PACK], const float* cos, const float* sin) {
#pragma unroll
  for (uint32_t i = 0; i < PACK; i++) {
    float x = a[i], y = b[i];
    a[i] = x * cos[i] - y * sin[i];
    b[i] = y * cos[i] + x * sin[i];
  }
}

template <typename T, uint32_t DIM>
__device__ void run(const Rope<T, DIM>& op) {
  uint32_t row = blockIdx.x, all_heads = op.heads + 2 * op.kv_heads;
  T* qkv = op.qkv + uint64_t(row) * all_heads * DIM;
  const float* angles = op.table + uint64_t(op.positions[row]) * DIM;
  int64_t slot = op.slots[row];
  KvLayout<DIM> kv{op.kv_heads};
  uint32_t at = threadIdx.x % HEAD_LANES<DIM> * PACK;
  uint32_t step = gridDim.y * blockDim.x / HEAD_LANES<DIM>;
  // Whole warps go round together, as the norm is a sum over lanes.
  uint32_t rounds = div_up(all_heads, step);
  uint32_t head = (blockIdx.y * blockDim.x + threadIdx.x) / HEAD_LANES<DIM>;
  for (uint32_t round = 0; round < rounds; round++, head += step) {
    bool here = head < all_heads, is_q = head < op.heads, is_v = head >= op.heads + op.kv_heads;
    float a[PACK] = {}, b[PACK] = {};
    if (here) {
      widen(load_pack(qkv + head * DIM + at), a);
      widen(load_pack(qkv + head * DIM + DIM / 2 + at), b);
    }
    if (op.q_norm) {
      float x[PACK], y[PACK];
#pragma unroll
      for (uint32_t i = 0; i < PACK; i++) x[i] = a[i], y[i] = b[i];
      normalise<T, DIM>(x, y, is_q ? op.q_norm : op.k_norm, at, op.eps);
#pragma unroll
      for (uint32_t i = 0; i < PACK; i++) a[i] = is_v ? a[i] : x[i], b[i] = is_v ? b[i] : y[i];
    }
    if (!here || (!is_q && slot == PAD_SLOT)) continue;
    if (!is_v) rotate(a, b, angles + at, angles + DIM / 2 + at);
    T* to = qkv + head * DIM;
    if (!is_q) {
      uint64_t block = uint64_t(slot) / BLOCK_TOKENS, token = uint64_t(slot) % BLOCK_TOKENS;
      to = op.cache + kv.k(uint32_t(block), head - op.heads) + token * DIM;
    }
    store_pack(to + at, narrow<T>(a));
    store_pack(to + DIM / 2 + at, narrow<T>(b));
  }
}

#define ROPE(TYPE, DIM) ENTRY(rope_##TYPE##_##DIM, THREADS_MAX, Rope<TYPE, DIM>)
ROPE(bf16, 64)
ROPE(bf16, 128)
ROPE(f16, 64)
ROPE(f16, 128)
