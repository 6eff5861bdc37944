// The bound of top-k and top-p, exactly and without sorting: the logit down to which the weights of all
// that are not below it first reach what is wanted. For top-k all weigh 1; for top-p a logit weighs its
// share, in whole numbers, so that sums are the same in every order.
#pragma once

// Bins by distance from the best, of 1 / BINS_PER_UNIT; the last has everything from 32 on.
constexpr uint32_t BINS = 512;
constexpr float BINS_PER_UNIT = 16.0f;
// Values of one digit of an order.
constexpr uint32_t DIGIT_BITS = 8;
constexpr uint32_t DIGITS = 1 << DIGIT_BITS;
// Loads of a thread that are under way at once.
constexpr uint32_t IN_FLIGHT = 2;
// Logits that are kept in shared memory.
constexpr uint32_t KEPT_MAX = 4096;
// The weight of the best logit. A vocabulary of 2^19 at most sums to less than 2^64.
constexpr float SHARE_ONE = 17592186044416.0f;

// What to look for: an absolute weight, or a share of all that there is.
struct Wanted {
  uint64_t weight;
  float share;
};

struct Found {
  uint32_t bin;
  // What was wanted of all bins, and what of it is wanted of this one.
  uint64_t wanted;
  uint64_t left;
};

struct Scratch {
  uint64_t histogram[BINS];
  uint64_t picks[WARP];
  float nears[WARP];
  Found found;
  uint32_t kept;
  float values[KEPT_MAX];
  uint32_t ids[KEPT_MAX];
};

struct Weigh {
  float top;
  bool shares;
  __device__ uint64_t of(float x) const {
    if (!shares) return 1;
    return x > -INFINITY ? uint64_t(expf(x - top) * SHARE_ONE) : 0;
  }
};

// Adds to a histogram what a thread finds, at once for neighbours of one bin.
struct Tally {
  uint64_t* histogram;
  uint32_t bin = 0;
  uint64_t weight = 0;

  __device__ void add(uint32_t to, uint64_t more) {
    if (to != bin) flush();
    bin = to;
    weight += more;
  }
  __device__ void flush() {
    if (weight > 0) {
      atomicAdd(reinterpret_cast<unsigned long long*>(histogram + bin), (unsigned long long)(weight));
    }
    weight = 0;
  }
};

// All tokens of a row.
struct Row {
  const Quad* quads;
  uint32_t count;

  template <typename F>
  __device__ void each(F f) const {
    for (uint32_t first = threadIdx.x; first < count; first += blockDim.x * IN_FLIGHT) {
      Quad loaded[IN_FLIGHT];
#pragma unroll
      for (uint32_t u = 0; u < IN_FLIGHT; u++) {
        uint32_t at = first + u * blockDim.x;
        if (at < count) loaded[u] = quads[at];
      }
#pragma unroll
      for (uint32_t u = 0; u < IN_FLIGHT; u++) {
        uint32_t at = first + u * blockDim.x;
        if (at >= count) break;
#pragma unroll
        for (uint32_t i = 0; i < QUAD; i++) f(loaded[u].value[i], at * QUAD + i);
      }
    }
  }
};

// The tokens that were kept, in any order.
struct Kept {
  const float* values;
  const uint32_t* ids;
  uint32_t count;

  template <typename F>
  __device__ void each(F f) const {
    for (uint32_t at = threadIdx.x; at < count; at += blockDim.x) f(values[at], ids[at]);
  }
};

__device__ inline void clear(Scratch& scratch, uint32_t bins) {
  for (uint32_t at = threadIdx.x; at < bins; at += blockDim.x) scratch.histogram[at] = 0;
  __syncthreads();
}

// The first bin with which the sum from bin 0 on reaches what is wanted, which is not more than all.
__device__ inline Found find(Scratch& scratch, uint32_t bins, Wanted what) {
  __syncthreads();
  if (warp() == 0) {
    uint32_t each = bins / WARP, first = lane() * each;
    uint64_t own = 0;
    for (uint32_t i = 0; i < each; i++) own += scratch.histogram[first + i];
    // Of the lanes below this one, and of all that are in step with it so far.
    uint64_t before = 0, all = own;
    for (uint32_t step = 1; step < WARP; step *= 2) {
      uint64_t other = __shfl_xor_sync(ALL_LANES, all, step);
      if (lane() & step) before += other;
      all += other;
    }
    uint64_t wanted = what.weight;
    if (wanted == 0) wanted = larger(uint64_t(ceil(double(what.share) * double(all))), uint64_t(1));
    if (before < wanted && wanted <= before + own) {
      Found found = {first, wanted, wanted - before};
      while (found.left > scratch.histogram[found.bin]) found.left -= scratch.histogram[found.bin++];
      scratch.found = found;
    }
  }
  __syncthreads();
  return scratch.found;
}

// The order of the bound among logits whose order is not below `least`.
template <typename Source>
__device__ uint32_t bound_of(Scratch& scratch, const Source& from, Weigh weigh, Wanted wanted,
                             uint32_t least) {
  uint32_t bound = 0;
  for (uint32_t shift = 32; shift > 0;) {
    uint32_t known = shift;
    shift -= DIGIT_BITS;
    clear(scratch, DIGITS);
    Tally tally = {scratch.histogram};
    from.each([&](float x, uint32_t) {
      uint32_t order = order_of(x);
      if (order < least || uint64_t(order ^ bound) >> known != 0) return;
      // The highest digit is in the first bin.
      tally.add(DIGITS - 1 - (order >> shift) % DIGITS, weigh.of(x));
    });
    tally.flush();
    Found found = find(scratch, DIGITS, wanted);
    bound |= (DIGITS - 1 - found.bin) << shift;
    wanted.weight = found.left;
  }
  return bound;
}
