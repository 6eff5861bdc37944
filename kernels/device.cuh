// The primitives of `common.cuh` on a GPU (compute capability 8.0 and up). `emulate/primitives.h` has
// the same on the CPU. Fragment layouts are those of PTX ISA, "Matrix fragments for mma.m16n8k16".
#pragma once

// Kernels take one struct by value, so that its fields are described once, with their shapes.
#define ENTRY(NAME, THREADS, ...)                                      \
  extern "C" __global__ void __launch_bounds__(THREADS)                \
      NAME(const __grid_constant__ __VA_ARGS__ args) {                 \
    run(args);                                                         \
  }
#define SHARED(TYPE, NAME, COUNT) __shared__ TYPE NAME[COUNT]
// More than 48 KiB; the launcher says how much.
#define DYNAMIC_SHARED(NAME) extern __shared__ __align__(16) unsigned char NAME[]

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ inline float to_float(f16 x) {
  float to;
  asm("cvt.f32.f16 %0, %1;" : "=f"(to) : "h"(x.bits));
  return to;
}

// What is finite stays finite in f16, whose largest value activations can pass.
__device__ inline float in_range_of_f16(float x) {
  return x > 65504.0f ? 65504.0f : (x < -65504.0f ? -65504.0f : x);
}

// Rounds to nearest, ties to even.
template <typename T>
__device__ T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
  bf16 to;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
  return to;
}
template <>
__device__ inline f16 from_float<f16>(float x) {
  f16 to;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(in_range_of_f16(x)));
  return to;
}

// Both rounded, `low` in the low half; for values within the range of T.
template <typename T>
__device__ uint32_t narrow_pair(float low, float high);
template <>
__device__ inline uint32_t narrow_pair<bf16>(float low, float high) {
  uint32_t to;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(to) : "f"(high), "f"(low));
  return to;
}
template <>
__device__ inline uint32_t narrow_pair<f16>(float low, float high) {
  uint32_t to;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(to) : "f"(high), "f"(low));
  return to;
}

// 2^x within 2^-22; 0 for -infinity and where the result would be subnormal.
__device__ inline float exp2_fast(float x) {
  float to;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(to) : "f"(x));
  return to;
}

// 16 bytes that are read once: they pass the first-level cache by, which keeps what is read again.
template <typename P>
__device__ inline P load_once(const void* from) {
  static_assert(sizeof(P) == 16, "one 16-byte load");
  uint4 to;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w)
               : "l"(from));
  return *reinterpret_cast<P*>(&to);
}

// c[16, 8] += a[16, 16] b[16, 8], a by rows, b by columns.
template <typename T>
__device__ void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#define CANDELA_MMA(TYPE)                                                                      \
  template <>                                                                                  \
  __device__ inline void mma_16x8x16<TYPE>(float (&c)[4], const uint32_t (&a)[4],              \
                                           const uint32_t (&b)[2]) {                           \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." #TYPE "." #TYPE ".f32 "              \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));          \
  }
CANDELA_MMA(bf16)
CANDELA_MMA(f16)

// Four 8x8 matrices of 16-bit elements from shared memory: lane 8 i + r gives the address of row r of
// matrix i, 16-byte aligned.
__device__ inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at)
               : "memory");
}
__device__ inline void ldmatrix_x4_transposed(uint32_t (&to)[4], const void* row) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(at)
               : "memory");
}

// The transpose of an 8x8 matrix of 16-bit elements that lies across a warp.
__device__ inline uint32_t transpose_8x8(uint32_t from) {
  uint32_t to;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(from));
  return to;
}

// Copies 16 bytes into shared memory in the background, or zeros if not `wanted`.
__device__ inline void cp_async_16(void* to, const void* from, bool wanted) {
  uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(at), "l"(from), "r"(wanted ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most LEFT of this thread's groups are under way.
template <int LEFT>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}
