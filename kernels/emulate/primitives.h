// The primitives of `device.cuh` and the CUDA functions that kernels use, on the CPU. Fragment layouts
// are those of PTX ISA, "Matrix fragments for mma.m16n8k16", "ldmatrix" and "movmatrix".
#pragma once

namespace emulate {
typedef void (*Body)(const void*);
struct Entry {
  Entry(const char* name, uint32_t args_bytes, uint32_t threads_max, Body body);
};

// Poison of shared memory: a NaN in every float type.
constexpr int SHARED_POISON = 0xff;

template <typename T>
inline void poison_once_a_block(T* array, size_t bytes, uint64_t& seen) {
  if (seen != world.block) memset(static_cast<void*>(array), SHARED_POISON, bytes);
  seen = world.block;
}
}  // namespace emulate

#define ENTRY(NAME, THREADS, ...)                                              \
  static emulate::Entry NAME##_entry(#NAME, sizeof(__VA_ARGS__), THREADS,      \
                                     [](const void* args) {                    \
                                       run(*static_cast<const __VA_ARGS__*>(args)); \
                                     });
#define SHARED(TYPE, NAME, COUNT)      \
  static TYPE NAME[COUNT];             \
  static uint64_t NAME##_seen;         \
  emulate::poison_once_a_block(NAME, sizeof(NAME), NAME##_seen)
#define DYNAMIC_SHARED(NAME) unsigned char* NAME = emulate::world.dynamic_shared
#define __syncthreads() emulate::wait_for_block(__LINE__)

inline float __uint_as_float(uint32_t bits) {
  float to;
  memcpy(&to, &bits, sizeof to);
  return to;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t to;
  memcpy(&to, &x, sizeof to);
  return to;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float exp2_fast(float x) {
  float to = exp2f(x);
  return to < 0x1p-126f ? 0.0f : to;
}

inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
// As far off as CUDA's documentation lets it be, in either direction.
inline float __logf(float x) {
  float y = logf(x), off = x >= 0.5f && x <= 2.0f ? 3.5e-7f : fabsf(y) * 3.5e-7f;
  return __float_as_uint(x) & 1 ? y + off : y - off;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) {
  uint32_t exponent = x.bits >> 10 & 31, mantissa = x.bits & 1023;
  float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
               : exponent     ? ldexpf(float(1024 + mantissa), int(exponent) - 25)
                              : ldexpf(float(mantissa), -24);
  return x.bits >> 15 ? -size : size;
}

template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
// What is finite stays finite, as on the GPU.
template <>
inline f16 from_float<f16>(float x) {
  if (x != x) return {0x7fff};
  uint16_t sign = x < 0 || (x == 0 && std::signbit(x)) ? 0x8000 : 0;
  float size = fminf(fabsf(x), 65504.0f);
  int exponent = 0;
  frexpf(size, &exponent);
  // Spacing of f16 around it; nearbyint rounds ties to even.
  int unit = size == 0 || exponent < -13 ? -24 : exponent - 11;
  uint32_t count = static_cast<uint32_t>(nearbyintf(ldexpf(size, -unit)));
  uint32_t bits = unit == -24 ? count : count + (uint32_t(unit + 24) << 10);
  return {static_cast<uint16_t>(sign | (bits > 0x7bff ? 0x7bff : bits))};
}

template <typename T>
inline uint32_t narrow_pair(float low, float high) {
  return uint32_t(from_float<T>(low).bits) | uint32_t(from_float<T>(high).bits) << 16;
}

// 16 bytes that are read once.
template <typename P>
inline P load_once(const void* from) {
  static_assert(sizeof(P) == 16, "one 16-byte load");
  return *static_cast<const P*>(from);
}

// Threads hand over at collectives alone, so nothing comes in between.
template <typename V>
inline V atomicAdd(V* to, V value) {
  V before = *to;
  *to += value;
  return before;
}
template <typename V>
inline V atomicOr(V* to, V value) {
  V before = *to;
  *to |= value;
  return before;
}

template <typename V>
struct Shuffle {
  V value;
  uint32_t argument;
};

template <typename V>
inline V __shfl_xor_sync(uint32_t mask, V value, uint32_t step) {
  using In = Shuffle<V>;
  return emulate::collect<In, V>("shfl_xor", mask, {value, step}, [](uint32_t mask, auto in, auto out) {
    for (uint32_t lane = 0; lane < emulate::LANES; lane++) {
      if (!(mask >> lane & 1)) continue;
      uint32_t source = lane ^ in[lane]->argument;
      if (source >= emulate::LANES || !in[source]) emulate::fail("shfl_xor from lane %u", source);
      *out[lane] = in[source]->value;
    }
  });
}

inline uint32_t __ballot_sync(uint32_t mask, bool vote) {
  return emulate::collect<bool, uint32_t>("ballot", mask, vote, [](uint32_t mask, auto in, auto out) {
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < emulate::LANES; lane++) {
      if (mask >> lane & 1) votes |= uint32_t(*in[lane]) << lane;
    }
    for (uint32_t lane = 0; lane < emulate::LANES; lane++) {
      if (mask >> lane & 1) *out[lane] = votes;
    }
  });
}
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  emulate::collect<bool, bool>("syncwarp", mask, true, [](uint32_t mask, auto in, auto out) {
    for (uint32_t lane = 0; lane < emulate::LANES; lane++) {
      if (mask >> lane & 1) *out[lane] = *in[lane];
    }
  });
}

#include "matrix.h"

inline void cp_async_16(void* to, const void* from, bool wanted) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) emulate::fail("cp.async to %p", to);
  if (wanted && reinterpret_cast<uintptr_t>(from) % 16 != 0) emulate::fail("cp.async from %p", from);
  if (emulate::world.backwards) {
    emulate::land({{to, wanted ? from : nullptr}});
    return;
  }
  emulate::world.current->open.push_back({to, wanted ? from : nullptr});
}
inline void cp_async_commit() {
  emulate::Fiber& self = *emulate::world.current;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}
// In one of the two orders a copy lands here and no earlier, in the other one where it is asked for.
template <int LEFT>
inline void cp_async_wait() {
  emulate::Fiber& self = *emulate::world.current;
  while (self.groups.size() > size_t(LEFT)) {
    emulate::land(self.groups.front());
    self.groups.erase(self.groups.begin());
  }
}

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
