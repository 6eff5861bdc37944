// The second half of a draw: the best of a row's parts or, with filters, of what they leave.
//
// Grid: (samples). Block: whole warps, 1024 threads for rows with filters. Those read their changed
// logits twice where at most 4096 tokens reach as far down as the first filter does, to 1/16, and up to
// 12 times, which is exact as well, where more do: flat rows with a large top-k or top-p.
#include "common.cuh"
#include "sample.cuh"
#include "select.cuh"

constexpr uint32_t SAMPLE_THREADS_MAX = 1024;

struct Sample {
  // Of `sample_scan`: [samples, parts] and [samples, stride].
  const uint64_t* best;
  const float* changed;
  // As `sample_scan` has them.
  const uint32_t* slots;
  const uint32_t* positions;
  const Seat* seats;
  // [slots, vocab]: gets the token if the seat has penalties.
  uint32_t* seen;
  // [samples]: the token.
  uint32_t* drawn;
  // [slots]: the token, for `embed`.
  uint32_t* sampled;
  uint32_t vocab;
  uint32_t stride;
  uint32_t parts;
};

struct Draw {
  Seat seat;
  uint32_t position;
  float top;
  uint32_t vocab;

  // Of the bins of distance from the best; what is below has no lower bin.
  __device__ uint32_t bin(float x) const {
    float at = (top - x) * BINS_PER_UNIT;
    return at < float(BINS - 1) ? uint32_t(at) : BINS - 1;
  }
  __device__ float min_p_bound() const { return top + seat.min_p_ln; }
  __device__ uint32_t word(uint32_t id) const {
    Words words = philox(position, id / QUAD, seat.key);
    uint32_t low = id % 2 ? words.word[1] : words.word[0];
    uint32_t high = id % 2 ? words.word[3] : words.word[2];
    return id % QUAD < 2 ? low : high;
  }
};

// Keeps the tokens that can pass all filters, and says whether they fit. `share` becomes the absolute
// weight that top-p wants, if it is the first filter.
__device__ inline bool keep(Scratch& scratch, const Draw& draw, const Row& row, Wanted& share) {
  uint32_t last = draw.bin(draw.min_p_bound());
  bool count = draw.seat.limits_count(draw.vocab);
  if (count || draw.seat.limits_mass()) {
    Weigh weigh = {draw.top, !count};
    clear(scratch, BINS);
    Tally tally = {scratch.histogram};
    row.each([&](float x, uint32_t) { tally.add(draw.bin(x), weigh.of(x)); });
    tally.flush();
    Found found = find(scratch, BINS, count ? Wanted{draw.seat.top_k, 0.0f} : share);
    if (!count) share.weight = found.wanted;
    last = found.bin;
  }
  if (threadIdx.x == 0) scratch.kept = 0;
  __syncthreads();
  row.each([&](float x, uint32_t id) {
    if (draw.bin(x) > last) return;
    uint32_t at = atomicAdd(&scratch.kept, 1u);
    if (at >= KEPT_MAX) return;
    scratch.values[at] = x;
    scratch.ids[at] = id;
  });
  __syncthreads();
  return scratch.kept <= KEPT_MAX;
}

// Top-k, top-p and min-p, then the best of what they leave with its noise.
template <typename Source>
__device__ uint64_t draw_from(Scratch& scratch, const Draw& draw, const Source& from, Wanted share) {
  uint32_t bound = 0;
  if (draw.seat.limits_count(draw.vocab)) {
    bound = bound_of(scratch, from, {draw.top, false}, {draw.seat.top_k, 0.0f}, bound);
  }
  if (draw.seat.limits_mass()) bound = bound_of(scratch, from, {draw.top, true}, share, bound);
  bound = larger(bound, order_of(draw.min_p_bound()));
  float most = -INFINITY;
  from.each([&](float x, uint32_t id) {
    if (order_of(x) >= bound) most = fmaxf(most, x + near_gumbel(draw.word(id)));
  });
  float least = within_reach(block_max(most, scratch.nears));
  uint64_t best = NOBODY;
  from.each([&](float x, uint32_t id) {
    if (order_of(x) < bound) return;
    uint32_t word = draw.word(id);
    if (x + near_gumbel(word) >= least) best = larger(best, pick_of(x + gumbel(word), id));
  });
  return block_max(best, scratch.picks);
}

__device__ inline void run(const Sample& op) {
  SHARED(Scratch, shared, 1);
  Scratch& scratch = shared[0];
  uint32_t sample = blockIdx.x, slot = op.slots[sample];
  if (slot == PAD_ROW) return;
  uint64_t best = NOBODY;
  for (uint32_t part = threadIdx.x; part < op.parts; part += blockDim.x) {
    best = larger(best, op.best[uint64_t(sample) * op.parts + part]);
  }
  best = block_max(best, scratch.picks);
  Draw draw = {op.seats[slot], op.positions[sample], value_of_pick(best), op.vocab};
  // Where the best is not finite, as of a row that does not compare, there are no shares.
  if (draw.seat.filters(op.vocab) && fabsf(draw.top) < INFINITY) {
    const float* changed = op.changed + uint64_t(sample) * op.stride;
    Row row = {reinterpret_cast<const Quad*>(changed), div_up(op.vocab, QUAD)};
    Wanted share = {0, draw.seat.top_p};
    if (keep(scratch, draw, row, share)) {
      best = draw_from(scratch, draw, Kept{scratch.values, scratch.ids, scratch.kept}, share);
    } else {
      best = draw_from(scratch, draw, row, share);
    }
  }
  if (threadIdx.x > 0) return;
  uint32_t token = id_of_pick(best);
  op.drawn[sample] = token;
  op.sampled[slot] = token;
  if (draw.seat.penalised()) op.seen[uint64_t(slot) * op.vocab + token]++;
}

ENTRY(sample, SAMPLE_THREADS_MAX, Sample)
