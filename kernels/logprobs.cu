// Log-probabilities of a token and of the most probable ones, under the logits as the model gives them.
//
// Two kernels: `logprobs_scan` over parts of rows, grid (parts, wanted), parts of `blockDim.x * 16`
// tokens, then `logprobs`, grid (wanted), over what the parts left. Blocks: whole warps. Reads a wanted
// row once.
#include "common.cuh"
#include "sample.cuh"

constexpr uint32_t LOGPROBS_THREADS_MAX = 128;
constexpr uint32_t LOGPROBS_QUADS = 4;
constexpr uint32_t TOP_MAX = 20;
// `tokens` of a row whose token is `sampled[slots[wanted]]`.
constexpr uint32_t TOKEN_FROM_DEVICE = 0xffffffffu;

struct LogprobsScan {
  // [rows, stride]; see `sample.cuh`.
  const float* logits;
  // [wanted]; several may share a row, and PAD_ROW does nothing.
  const uint32_t* logits_rows;
  // [wanted]: how many of the most probable tokens, TOP_MAX at most.
  const uint32_t* tops;
  // [wanted, parts]: the largest logit, and the sum of e^(logit - largest).
  float* largest;
  float* sums;
  // [wanted, parts, TOP_MAX]: picks, best first, NOBODY where a part has no more.
  uint64_t* picks;
  uint32_t vocab;
  uint32_t stride;
};

__device__ inline void run(const LogprobsScan& op) {
  SHARED(float, partial, LOGPROBS_THREADS_MAX / WARP);
  // The rounds take turns, so that one barrier a round is enough.
  SHARED(uint64_t, turns, 2 * LOGPROBS_THREADS_MAX / WARP);
  uint32_t wanted = blockIdx.y, row = op.logits_rows[wanted];
  if (row == PAD_ROW) return;
  const float* logits = op.logits + uint64_t(row) * op.stride;
  uint32_t start = blockIdx.x * blockDim.x * LOGPROBS_QUADS * QUAD + threadIdx.x * QUAD;
  uint32_t step = blockDim.x * QUAD;
  float x[LOGPROBS_QUADS][QUAD], most = -INFINITY;
#pragma unroll
  for (uint32_t q = 0; q < LOGPROBS_QUADS; q++) {
    uint32_t at = start + q * step;
    Quad quad = {{-INFINITY, -INFINITY, -INFINITY, -INFINITY}};
    if (at < op.vocab) quad = *reinterpret_cast<const Quad*>(logits + at);
#pragma unroll
    for (uint32_t i = 0; i < QUAD; i++) {
      x[q][i] = at + i < op.vocab ? quad.value[i] : -INFINITY;
      most = fmaxf(most, x[q][i]);
    }
  }
  most = block_max(most, partial);
  float sum = 0.0f;
#pragma unroll
  for (uint32_t q = 0; q < LOGPROBS_QUADS; q++) {
#pragma unroll
    for (uint32_t i = 0; i < QUAD; i++) sum += x[q][i] == -INFINITY ? 0.0f : expf(x[q][i] - most);
  }
  __syncthreads();
  sum = block_sum(sum, partial);
  uint64_t part = uint64_t(wanted) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) {
    op.largest[part] = most;
    op.sums[part] = sum;
  }
  uint64_t last = ~NOBODY;
  for (uint32_t place = 0; place < op.tops[wanted] && place < TOP_MAX; place++) {
    uint64_t best = NOBODY;
#pragma unroll
    for (uint32_t q = 0; q < LOGPROBS_QUADS; q++) {
#pragma unroll
      for (uint32_t i = 0; i < QUAD; i++) {
        uint32_t id = start + q * step + i;
        uint64_t pick = id < op.vocab ? pick_of(x[q][i], id) : NOBODY;
        if (pick < last) best = larger(best, pick);
      }
    }
    last = block_max(best, turns + place % 2 * (LOGPROBS_THREADS_MAX / WARP));
    if (threadIdx.x == 0) op.picks[part * TOP_MAX + place] = last;
  }
}

struct Logprobs {
  // As `logprobs_scan` has them and left them.
  const float* logits;
  const uint32_t* logits_rows;
  const uint32_t* tops;
  const float* largest;
  const float* sums;
  const uint64_t* picks;
  // [wanted]: the token, or TOKEN_FROM_DEVICE.
  const uint32_t* tokens;
  // [wanted], read for TOKEN_FROM_DEVICE.
  const uint32_t* slots;
  // [slots]
  const uint32_t* sampled;
  // [wanted]; NaN for a token outside of the vocabulary.
  float* logprobs;
  // [wanted, TOP_MAX], best first, the lowest ids first among equals; only as many as are wanted and are
  // there are written.
  uint32_t* top_ids;
  float* top_logprobs;
  uint32_t vocab;
  uint32_t stride;
  uint32_t parts;
};

// The logarithm of the sum of e^logit, in every thread: of all parts, in the order of lanes.
__device__ inline double log_norm(const Logprobs& op, uint64_t first, float most) {
  double sum = 0.0;
  for (uint32_t part = lane(); part < op.parts; part += WARP) {
    sum += double(op.sums[first + part]) * exp(double(op.largest[first + part]) - double(most));
  }
#pragma unroll
  for (uint32_t step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
  return double(most) + log(sum);
}

__device__ inline void run(const Logprobs& op) {
  SHARED(float, partial, LOGPROBS_THREADS_MAX / WARP);
  SHARED(uint64_t, turns, 2 * LOGPROBS_THREADS_MAX / WARP);
  uint32_t wanted = blockIdx.x, row = op.logits_rows[wanted];
  if (row == PAD_ROW) return;
  uint64_t first = uint64_t(wanted) * op.parts;
  float most = -INFINITY;
  for (uint32_t part = threadIdx.x; part < op.parts; part += blockDim.x) {
    most = fmaxf(most, op.largest[first + part]);
  }
  most = block_max(most, partial);
  double norm = log_norm(op, first, most);
  if (threadIdx.x == 0) {
    uint32_t token = op.tokens[wanted];
    if (token == TOKEN_FROM_DEVICE) token = op.sampled[op.slots[wanted]];
    bool known = token < op.vocab;
    float logit = known ? op.logits[uint64_t(row) * op.stride + token] : NAN;
    op.logprobs[wanted] = float(double(logit) - norm);
  }
  uint64_t last = ~NOBODY;
  uint32_t top = op.tops[wanted];
  for (uint32_t place = 0; place < top && place < TOP_MAX; place++) {
    uint64_t best = NOBODY;
    for (uint32_t part = threadIdx.x; part < op.parts; part += blockDim.x) {
      // Best first: the first one below the last taken is the best of its part.
      const uint64_t* picks = op.picks + (first + part) * TOP_MAX;
      uint32_t at = 0;
      while (at < top && at < TOP_MAX && picks[at] >= last) at++;
      if (at < top && at < TOP_MAX) best = larger(best, picks[at]);
    }
    last = block_max(best, turns + place % 2 * (LOGPROBS_THREADS_MAX / WARP));
    if (last == NOBODY) return;
    if (threadIdx.x == 0) {
      op.top_ids[wanted * TOP_MAX + place] = id_of_pick(last);
      op.top_logprobs[wanted * TOP_MAX + place] = float(double(value_of_pick(last)) - norm);
    }
  }
}

ENTRY(logprobs_scan, LOGPROBS_THREADS_MAX, LogprobsScan)
ENTRY(logprobs, LOGPROBS_THREADS_MAX, Logprobs)
