// What the sampling kernels share: seats, logits in an order of integers, Philox and Gumbel noise.
//
// Logits are f32, which the product with the LM head gives at no cost: bf16's 8 bits would tie where the
// f32 logits of the CPU do not, and leave two digits of a logprob. Their rows are `stride` apart, a
// multiple of 4, so that every row starts at 16 bytes; what lies from `vocab` on is never looked at.
//
// Tokens are those of `sampling/sampler.rs` for the same seeds but for where a device's arithmetic cannot
// agree: the sum of top-p differs by about 1e-6 of it, so that a share that close to `top_p` may fall on
// either side; and noisy f32 scores may differ in their last bit where the f64 logarithms of two
// libraries do. All else rounds alike, which asks for no -use_fast_math.
#pragma once

// Elements of one load, and the words that Philox gives for one counter.
constexpr uint32_t QUAD = 4;
struct alignas(16) Quad {
  float value[QUAD];
};
// A temperature below it is greedy.
constexpr float TEMPERATURE_MIN = 1e-5f;

// A seat's parameters, from its `SamplingParams`.
struct alignas(16) Seat {
  float temperature;
  float top_p;
  // ln(min_p), minus infinity if off: of the host, so that both take the same logarithm.
  float min_p_ln;
  float presence_penalty;
  float frequency_penalty;
  float repetition_penalty;
  uint32_t top_k;
  // The generator's key: of seed and choice.
  uint32_t key[2];
  // Its entries of the bias lists, which rise by token. A token's entries are added in order.
  uint32_t bias_first;
  uint32_t bias_count;

  __device__ bool greedy() const { return temperature < TEMPERATURE_MIN; }
  __device__ bool penalised() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f;
  }
  __device__ bool limits_count(uint32_t vocab) const { return top_k > 0 && top_k < vocab; }
  __device__ bool limits_mass() const { return top_p < 1.0f; }
  __device__ bool filters(uint32_t vocab) const {
    bool all = !limits_count(vocab) && !limits_mass() && min_p_ln == -INFINITY;
    return !greedy() && !all;
  }
};

// `seen` of a token: whether the prompt has it, and how often the output does.
constexpr uint32_t IN_PROMPT = 0x80000000u;

// Larger floats give larger integers. Both zeros give one, and NaN gives the least, 0.
__device__ inline uint32_t order_of(float x) {
  uint32_t bits = __float_as_uint(x);
  if (x != x) return 0;
  if (x == 0.0f) return 0x80000000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ inline float value_of(uint32_t order) {
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

// The larger of two picks has the larger value or, of equal ones, the lower id. NaN is NOBODY.
constexpr uint64_t NOBODY = 0;
__device__ inline uint64_t pick_of(float x, uint32_t id) {
  return x != x ? NOBODY : uint64_t(order_of(x)) << 32 | uint32_t(~id);
}
__device__ inline float value_of_pick(uint64_t pick) { return value_of(uint32_t(pick >> 32)); }
// Token 0 where nothing compares, as on the CPU.
__device__ inline uint32_t id_of_pick(uint64_t pick) { return pick == NOBODY ? 0 : ~uint32_t(pick); }

template <typename T>
__device__ inline T larger(T a, T b) {
  return a > b ? a : b;
}

// The largest over a block of whole warps, in every thread. `partial` is shared memory for a T a warp,
// free to be written; it may be written again after the next barrier.
template <typename T>
__device__ inline T block_max(T value, T* partial) {
#pragma unroll
  for (uint32_t step = WARP / 2; step > 0; step /= 2) {
    value = larger(value, __shfl_xor_sync(ALL_LANES, value, step));
  }
  if (lane() == 0) partial[warp()] = value;
  __syncthreads();
  if (lane() < blockDim.x / WARP) value = partial[lane()];
#pragma unroll
  for (uint32_t step = WARP / 2; step > 0; step /= 2) {
    value = larger(value, __shfl_xor_sync(ALL_LANES, value, step));
  }
  return value;
}

struct Words {
  uint32_t word[QUAD];
};

// Philox4x32-10 (Salmon et al., 2011), with the counter and key of `sampling/sampler.rs`: the words of
// tokens `4 quad .. 4 quad + 4` at a position.
__device__ inline Words philox(uint32_t position, uint32_t quad, const uint32_t (&of)[2]) {
  uint32_t c[4] = {position, quad, 0, 0}, key[2] = {of[0], of[1]};
#pragma unroll
  for (uint32_t round = 0; round < 10; round++) {
    uint64_t a = uint64_t(c[0]) * 0xd2511f53u, b = uint64_t(c[2]) * 0xcd9e8d57u;
    c[0] = uint32_t(b >> 32) ^ c[1] ^ key[0];
    c[1] = uint32_t(b);
    c[2] = uint32_t(a >> 32) ^ c[3] ^ key[1];
    c[3] = uint32_t(a);
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// Gumbel noise of a word, as the CPU takes it: logarithms in f64, their result in f32.
__device__ inline float gumbel(uint32_t word) {
  double uniform = (double(word) + 0.5) / 4294967296.0;
  return -float(log(-log(uniform)));
}

// The same to NOISE_ERROR, without f64, which most GPUs have little of. Most tokens are far from
// winning, and only those whose score is near the best need the exact noise.
constexpr float NOISE_ERROR = 5e-5f;
__device__ inline float near_gumbel(uint32_t word) {
  constexpr float UNIT = 1.0f / 4294967296.0f;
  float rate = word >> 31 ? -log1pf(-(float(~word) + 0.5f) * UNIT) : -__logf((float(word) + 0.5f) * UNIT);
  return -__logf(rate);
}

// What a near score must reach to be among those that may be the best. Both scores round once, so
// they differ by a unit of the larger one on top of the noise's error.
__device__ inline float within_reach(float best) {
  bool finite = fabsf(best) < INFINITY;
  return finite ? best - (2.0f * NOISE_ERROR + fabsf(best) * 1e-6f) : best;
}
