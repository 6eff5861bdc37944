// The first half of a draw, over parts of a row: what changes logits, and the best of each part.
//
// Grid: (parts, samples), parts of `blockDim.x * 16` tokens. Block: whole warps. Reads a row's logits
// once. A row without filters (top-k, top-p, min-p) has its noise here and leaves a pick a part; one with
// filters writes its changed logits for `sample.cu`. Penalties read a word a token besides.
#include "common.cuh"
#include "sample.cuh"

constexpr uint32_t SCAN_THREADS_MAX = 128;
// Quads of a thread, all loaded before the first is used.
constexpr uint32_t QUADS = 4;

struct SampleScan {
  // [rows, stride]
  const float* logits;
  // [samples] each. Several samples may share a row of logits, none a slot; slot PAD_ROW does nothing.
  const uint32_t* logits_rows;
  const uint32_t* slots;
  // Of the new token, which is the length of the sequence so far.
  const uint32_t* positions;
  // Tokens that sample i may not draw: `offsets[i] .. offsets[i + 1]` of them.
  const uint32_t* banned_offsets;
  const uint32_t* banned;
  // [slots]
  const Seat* seats;
  // See `Seat`.
  const uint32_t* bias_tokens;
  const float* bias_values;
  // [slots, vocab]: see IN_PROMPT.
  const uint32_t* seen;
  // [samples, stride]: tempered logits of rows with filters; NaN from `vocab` to the end of its quad.
  float* changed;
  // [samples, parts]: best noisy logit, or best changed logit of greedy rows and of those with filters.
  uint64_t* best;
  uint32_t vocab;
  uint32_t stride;
};

// The logits of a thread; quad q holds the tokens from `first(q)` on.
struct Part {
  uint32_t start;
  float x[QUADS][QUAD];

  __device__ uint32_t place(uint32_t q) const { return q * blockDim.x + threadIdx.x; }
  __device__ uint32_t first(uint32_t q) const { return start + place(q) * QUAD; }

  __device__ void load(const SampleScan& op, const float* row) {
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
      uint32_t at = first(q);
      Quad quad = {{NAN, NAN, NAN, NAN}};
      if (at < op.vocab) quad = *reinterpret_cast<const Quad*>(row + at);
#pragma unroll
      for (uint32_t i = 0; i < QUAD; i++) x[q][i] = at + i < op.vocab ? quad.value[i] : NAN;
    }
  }

  __device__ void put(Quad* tile) const {
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
#pragma unroll
      for (uint32_t i = 0; i < QUAD; i++) tile[place(q)].value[i] = x[q][i];
    }
  }
  __device__ void take(const Quad* tile) {
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
#pragma unroll
      for (uint32_t i = 0; i < QUAD; i++) x[q][i] = tile[place(q)].value[i];
    }
  }
};

// Adds the biases of the tokens `start .. start + tokens`. The thread with a token's first entry adds all.
__device__ inline void add_bias(const SampleScan& op, const Seat& seat, uint32_t start, uint32_t tokens,
                                float* tile) {
  const uint32_t* of = op.bias_tokens + seat.bias_first;
  const float* values = op.bias_values + seat.bias_first;
  uint32_t low = 0, high = seat.bias_count;
  while (low < high) {
    uint32_t middle = (low + high) / 2;
    if (of[middle] < start) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  for (uint32_t i = low + threadIdx.x; i < seat.bias_count && of[i] - start < tokens; i += blockDim.x) {
    if (i > 0 && of[i - 1] == of[i]) continue;
    float logit = tile[of[i] - start];
    for (uint32_t j = i; j < seat.bias_count && of[j] == of[i]; j++) logit += values[j];
    tile[of[i] - start] = logit;
  }
}

// Products and sums round one by one, as on the CPU.
__device__ inline float penalise(const Seat& seat, uint32_t seen, float logit) {
  if (seen == 0) return logit;
  float repeated = logit > 0.0f ? logit / seat.repetition_penalty
                                : __fmul_rn(logit, seat.repetition_penalty);
  uint32_t count = seen & ~IN_PROMPT;
  if (count == 0) return repeated;
  return repeated - __fadd_rn(seat.presence_penalty, __fmul_rn(seat.frequency_penalty, float(count)));
}

// Bias, penalties and bans, in the CPU's order.
__device__ inline void change(const SampleScan& op, const Seat& seat, Part& part) {
  SHARED(Quad, quads, SCAN_THREADS_MAX * QUADS);
  float* tile = &quads[0].value[0];
  uint32_t sample = blockIdx.y, tokens = blockDim.x * QUADS * QUAD;
  part.put(quads);
  __syncthreads();
  add_bias(op, seat, part.start, tokens, tile);
  __syncthreads();
  if (seat.penalised()) {
    part.take(quads);
    const uint32_t* seen = op.seen + uint64_t(op.slots[sample]) * op.vocab;
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
#pragma unroll
      for (uint32_t i = 0; i < QUAD; i++) {
        uint32_t token = part.first(q) + i;
        if (token < op.vocab) part.x[q][i] = penalise(seat, seen[token], part.x[q][i]);
      }
    }
    part.put(quads);
    __syncthreads();
  }
  for (uint32_t i = op.banned_offsets[sample] + threadIdx.x; i < op.banned_offsets[sample + 1];
       i += blockDim.x) {
    uint32_t token = op.banned[i];
    if (token < op.vocab && token - part.start < tokens) tile[token - part.start] = -INFINITY;
  }
  __syncthreads();
  part.take(quads);
}

__device__ inline uint64_t best_of(const Part& part) {
  uint64_t best = NOBODY;
#pragma unroll
  for (uint32_t q = 0; q < QUADS; q++) {
#pragma unroll
    for (uint32_t i = 0; i < QUAD; i++) best = larger(best, pick_of(part.x[q][i], part.first(q) + i));
  }
  return best;
}

// The best of logits plus noise among a block's tokens, in the thread that has it.
__device__ inline uint64_t best_noisy(const Seat& seat, uint32_t position, const Part& part) {
  SHARED(float, partial, SCAN_THREADS_MAX / WARP);
  Words words[QUADS];
  float near[QUADS][QUAD], most = -INFINITY;
#pragma unroll
  for (uint32_t q = 0; q < QUADS; q++) {
    words[q] = philox(position, part.first(q) / QUAD, seat.key);
#pragma unroll
    for (uint32_t i = 0; i < QUAD; i++) {
      near[q][i] = part.x[q][i] + near_gumbel(words[q].word[i]);
      most = fmaxf(most, near[q][i]);
    }
  }
  float least = within_reach(block_max(most, partial));
  uint64_t best = NOBODY;
#pragma unroll
  for (uint32_t q = 0; q < QUADS; q++) {
#pragma unroll
    for (uint32_t i = 0; i < QUAD; i++) {
      if (!(near[q][i] >= least)) continue;
      best = larger(best, pick_of(part.x[q][i] + gumbel(words[q].word[i]), part.first(q) + i));
    }
  }
  return best;
}

__device__ inline void run(const SampleScan& op) {
  SHARED(uint64_t, partial, SCAN_THREADS_MAX / WARP);
  uint32_t sample = blockIdx.y, slot = op.slots[sample];
  if (slot == PAD_ROW) return;
  Seat seat = op.seats[slot];
  Part part;
  part.start = blockIdx.x * blockDim.x * QUADS * QUAD;
  part.load(op, op.logits + uint64_t(op.logits_rows[sample]) * op.stride);
  bool bans = op.banned_offsets[sample] < op.banned_offsets[sample + 1];
  if (seat.bias_count > 0 || seat.penalised() || bans) change(op, seat, part);
  uint64_t best = NOBODY;
  if (seat.greedy()) {
    best = best_of(part);
  } else {
    float inverse = 1.0f / seat.temperature;
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
#pragma unroll
      for (uint32_t i = 0; i < QUAD; i++) part.x[q][i] = __fmul_rn(part.x[q][i], inverse);
    }
    if (seat.filters(op.vocab)) {
      best = best_of(part);
      Quad* changed = reinterpret_cast<Quad*>(op.changed + uint64_t(sample) * op.stride + part.start);
#pragma unroll
      for (uint32_t q = 0; q < QUADS; q++) {
        if (part.first(q) >= op.vocab) continue;
        Quad quad;
#pragma unroll
        for (uint32_t i = 0; i < QUAD; i++) quad.value[i] = part.x[q][i];
        changed[part.place(q)] = quad;
      }
    } else {
      best = best_noisy(seat, op.positions[sample], part);
    }
  }
  best = block_max(best, partial);
  if (threadIdx.x == 0) op.best[uint64_t(sample) * gridDim.x + blockIdx.x] = best;
}

ENTRY(sample_scan, SCAN_THREADS_MAX, SampleScan)
