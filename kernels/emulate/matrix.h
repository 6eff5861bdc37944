// mma.m16n8k16, ldmatrix and movmatrix as functions of a warp.
#pragma once

struct Fragments {
  uint32_t a[4];
  uint32_t b[2];
  float c[4];
};
struct Accumulator {
  float c[4];
};
struct Registers {
  uint32_t r[4];
};

// The low and the high half of a register.
template <typename T>
inline float half_of(uint32_t pair, uint32_t high) {
  return to_float(T{static_cast<uint16_t>(pair >> (16 * high))});
}

template <typename T>
inline void mma_compute(uint32_t, const Fragments* const* in, Accumulator* const* out) {
  float a[16][16], b[16][8];
  for (uint32_t lane = 0; lane < emulate::LANES; lane++) {
    uint32_t group = lane / 4, quad = lane % 4;
    for (uint32_t i = 0; i < 2; i++) {
      for (uint32_t r = 0; r < 4; r++) {
        a[group + 8 * (r % 2)][quad * 2 + i + 8 * (r / 2)] = half_of<T>(in[lane]->a[r], i);
      }
      for (uint32_t r = 0; r < 2; r++) {
        b[quad * 2 + i + 8 * r][group] = half_of<T>(in[lane]->b[r], i);
      }
    }
  }
  for (uint32_t lane = 0; lane < emulate::LANES; lane++) {
    uint32_t group = lane / 4, quad = lane % 4;
    for (uint32_t r = 0; r < 4; r++) {
      uint32_t row = group + 8 * (r / 2), column = quad * 2 + r % 2;
      float sum = in[lane]->c[r];
      for (uint32_t k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
      out[lane]->c[r] = sum;
    }
  }
}

template <typename T>
inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Fragments in;
  memcpy(in.a, a, sizeof a);
  memcpy(in.b, b, sizeof b);
  memcpy(in.c, c, sizeof c);
  Accumulator sum = emulate::collect<Fragments, Accumulator>("mma", 0xffffffffu, in, mma_compute<T>);
  memcpy(c, sum.c, sizeof c);
}

template <bool TRANSPOSED>
inline void ldmatrix(uint32_t (&to)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulate::fail("ldmatrix from %p", row);
  using In = const uint16_t*;
  Registers got = emulate::collect<In, Registers>(
      TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, static_cast<In>(row),
      [](uint32_t, const In* const* in, Registers* const* out) {
        for (uint32_t lane = 0; lane < emulate::LANES; lane++) {
          uint32_t group = lane / 4, quad = lane % 4;
          for (uint32_t matrix = 0; matrix < 4; matrix++) {
            uint32_t pair = 0;
            for (uint32_t i = 0; i < 2; i++) {
              uint32_t r = TRANSPOSED ? quad * 2 + i : group, c = TRANSPOSED ? group : quad * 2 + i;
              pair |= uint32_t((*in[matrix * 8 + r])[c]) << (16 * i);
            }
            out[lane]->r[matrix] = pair;
          }
        }
      });
  memcpy(to, got.r, sizeof to);
}
inline void ldmatrix_x4(uint32_t (&to)[4], const void* row) { ldmatrix<false>(to, row); }
inline void ldmatrix_x4_transposed(uint32_t (&to)[4], const void* row) { ldmatrix<true>(to, row); }

inline uint32_t transpose_8x8(uint32_t from) {
  return emulate::collect<uint32_t, uint32_t>(
      "movmatrix", 0xffffffffu, from, [](uint32_t, auto in, auto out) {
        for (uint32_t lane = 0; lane < emulate::LANES; lane++) {
          uint32_t group = lane / 4, quad = lane % 4, pair = 0;
          for (uint32_t i = 0; i < 2; i++) {
            // Element (row quad * 2 + i, column group) of the source.
            uint32_t source = (quad * 2 + i) * 4 + group / 2;
            pair |= (*in[source] >> (16 * (group % 2)) & 0xffff) << (16 * i);
          }
          *out[lane] = pair;
        }
      });
}
