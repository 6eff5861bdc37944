// Causal attention of prefill chunks over the paged KV: a ragged batch, on tensor cores.
//
// Grid: (kv_heads, tiles), those of `query_tile.cuh`, of which a warp has 32 queries. Block: 128 threads.
// Dynamic shared memory: `(ROWS + SLOTS * KEYS) * DIM` elements, 80 KiB or 40.
//
// KV goes by in tiles of 64 tokens at absolute positions, so a row's result does not depend on where
// chunks begin or on what is beside it, bit for bit. Later tiles, which see more, are started first.
// Reads the KV that its rows see once for each tile, from the second-level cache if there are several.
#include "query_tile.cuh"

constexpr uint32_t WARPS = 4;
constexpr uint32_t THREADS = WARPS * WARP;
constexpr uint32_t WARP_ROWS = ROWS / WARPS;
// Tiles of K or V in shared memory: one in use, two under way.
constexpr uint32_t SLOTS = 3;
// Products of 16 rows that a warp has.
constexpr uint32_t PARTS = WARP_ROWS / 16;

template <typename T, uint32_t DIM>
struct AttentionPrefill {
  // [rows, q_stride]: a row begins with its heads * DIM elements of q.
  const T* q;
  // One layer of the cache, which has K and V of these rows.
  const T* cache;
  // [seqs + 1]: first row of each sequence; a sequence may have none. Rows in front of the first are
  // another launch's.
  const uint32_t* cu_seqlens_q;
  // [seqs]: tokens in the cache; the rows of a sequence are the last of them.
  const uint32_t* seq_lens;
  // [seqs, table_stride]
  const uint32_t* block_tables;
  // [rows, heads * DIM]
  T* y;
  // At least 1.
  uint32_t seqs;
  uint32_t q_stride;
  uint32_t table_stride;
  uint32_t kv_heads;
  // heads / kv_heads.
  uint32_t group;
  // Tokens that a row sees, itself included; 0: all.
  uint32_t window;
  // Of scores, above 0.
  float scale;
};

template <typename T, uint32_t DIM>
__device__ void fetch_q(const AttentionPrefill<T, DIM>& op, const Tile& tile, Pack<T>* to) {
  constexpr uint32_t PACKS = DIM / PACK;
#pragma unroll 2
  for (uint32_t i = threadIdx.x; i < ROWS * PACKS; i += THREADS) {
    uint32_t row = i / PACKS, pack = i % PACKS, query = tile.first + row;
    bool here = query < tile.queries;
    const T* from = op.q + query_at<DIM>(op, tile, here ? query : tile.first, op.q_stride) + pack * PACK;
    cp_async_16(to + swizzled<DIM>(row, pack), from, here);
  }
}

// K and V of the tokens from `begin` up to `end`, on their way into the ring.
template <typename T, uint32_t DIM>
struct Stream {
  static constexpr uint32_t PACKS = DIM / PACK;
  static constexpr uint32_t BLOCKS = KEYS / BLOCK_TOKENS;
  static constexpr uint32_t TILE = KEYS * PACKS;
  // Packs of a block for each thread. Their rows are whole multiples of 8 apart, which the swizzle
  // does not see, so that one place in shared memory says all.
  static constexpr uint32_t COPIES = BLOCK_TOKENS * PACKS / THREADS;
  static_assert(THREADS / PACKS % PACK == 0 && COPIES * THREADS == BLOCK_TOKENS * PACKS, "whole rows");
  const AttentionPrefill<T, DIM>& op;
  const Tile& tile;
  Pack<T>* ring;
  // The slot that is written next.
  uint32_t slot = 0;

  __device__ Stream(const AttentionPrefill<T, DIM>& op, const Tile& tile, Pack<T>* ring)
      : op(op), tile(tile), ring(ring + swizzled<DIM>(threadIdx.x / PACKS, threadIdx.x % PACKS)) {}
  __device__ uint32_t begin() const { return window_start(tile.from + 1, op.window); }
  __device__ uint32_t end() const { return tile.to + 1; }

  // Physical blocks of a tile, of those that are wanted.
  struct Ids {
    uint32_t id[BLOCKS];
  };
  __device__ Ids look_up(uint32_t first) const {
    Ids ids = {};
    const uint32_t* table = op.block_tables + uint64_t(tile.seq) * op.table_stride;
#pragma unroll
    for (uint32_t i = 0; i < BLOCKS; i++) {
      uint32_t at = first / BLOCK_TOKENS + i;
      if (at >= begin() / BLOCK_TOKENS && at * BLOCK_TOKENS < end()) ids.id[i] = table[at];
    }
    return ids;
  }

  // Tokens that none of the rows sees are zeros, as what lies there may be anything.
  template <bool IS_V>
  __device__ void fetch(uint32_t first, const Ids& ids) {
    if (first >= begin() && first + KEYS <= end()) {
      copy<IS_V>(ids, [](uint32_t) { return true; });
    } else if (first < end()) {
      copy<IS_V>(ids, [&](uint32_t row) {
        uint32_t position = first + threadIdx.x / PACKS + row;
        return position >= begin() && position < end();
      });
    }
    cp_async_commit();
    slot = slot + 1 == SLOTS ? 0 : slot + 1;
  }
  template <bool IS_V, typename Seen>
  __device__ void copy(const Ids& ids, Seen seen) {
    KvLayout<DIM> kv{op.kv_heads};
    Pack<T>* to = ring + slot * TILE;
#pragma unroll
    for (uint32_t i = 0; i < BLOCKS; i++) {
      const T* from = op.cache + threadIdx.x * PACK;
      from += IS_V ? kv.v(ids.id[i], blockIdx.x) : kv.k(ids.id[i], blockIdx.x);
#pragma unroll
      for (uint32_t j = 0; j < COPIES; j++) {
        uint32_t at = j * THREADS, row = i * BLOCK_TOKENS + j * (THREADS / PACKS);
        cp_async_16(to + i * BLOCK_TOKENS * PACKS + at, from + at * PACK, seen(row));
      }
    }
  }
};

// A warp's queries: 32 rows, of which a lane has `lane / 4`, that + 8, + 16 and + 24.
template <typename T, uint32_t DIM>
struct Attention {
  // [queries, DIM], unnormalised.
  float o[PARTS][DIM / 8][4] = {};
  float largest[PARTS][2];
  // Of this lane's tokens.
  float sum[PARTS][2] = {};
  // Past the position of the warp's last query; 0 where it has none.
  uint32_t end;
  float scale_log2;
  const AttentionPrefill<T, DIM>& op;
  const Tile& tile;

  __device__ Attention(const AttentionPrefill<T, DIM>& op, const Tile& tile)
      : scale_log2(op.scale * LOG2_E), op(op), tile(tile) {
#pragma unroll
    for (uint32_t i = 0; i < PARTS * 2; i++) largest[i / 2][i % 2] = NOTHING_SEEN;
    end = tile.first + warp() * WARP_ROWS < tile.queries ? position(WARP_ROWS - 1) + 1 : 0;
  }

  // Of a row of the warp; those past the end are as the last.
  __device__ uint32_t position(uint32_t row) const {
    return tile.start + min_of(tile.first + warp() * WARP_ROWS + row, tile.queries - 1) / op.group;
  }

  __device__ void score(const Pack<T>* q, const Pack<T>* k, float (&s)[PARTS][KEYS / 8][4]) const {
#pragma unroll
    for (uint32_t i = 0; i < DIM / 16; i++) {
      uint32_t a[PARTS][4];
#pragma unroll
      for (uint32_t part = 0; part < PARTS; part++) {
        uint32_t row = warp() * WARP_ROWS + part * 16 + lane() % 16;
        ldmatrix_x4(a[part], q + swizzled<DIM>(row, i * 2 + lane() / 16));
      }
#pragma unroll
      for (uint32_t j = 0; j < KEYS / 16; j++) {
        uint32_t b[4];
        ldmatrix_x4(b, k + swizzled<DIM>(j * 16 + lane() % 8 + lane() / 16 * 8, i * 2 + lane() / 8 % 2));
        uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (uint32_t part = 0; part < PARTS; part++) {
          mma_16x8x16<T>(s[part][2 * j], a[part], low);
          mma_16x8x16<T>(s[part][2 * j + 1], a[part], high);
        }
      }
    }
  }

  __device__ void mask(uint32_t first, float (&s)[PARTS][KEYS / 8][4]) const {
#pragma unroll
    for (uint32_t part = 0; part < PARTS; part++) {
#pragma unroll
      for (uint32_t half = 0; half < 2; half++) {
        uint32_t end = position(part * 16 + half * 8 + lane() / 4) + 1;
        uint32_t begin = window_start(end, op.window);
#pragma unroll
        for (uint32_t i = 0; i < KEYS / 4; i++) {
          uint32_t at = first + i / 2 * 8 + lane() % 4 * 2 + i % 2;
          if (at < begin || at >= end) s[part][i / 2][half * 2 + i % 2] = -INFINITY;
        }
      }
    }
  }

  // Scores become weights, and `o` is made to fit them.
  __device__ void weigh(float (&s)[PARTS][KEYS / 8][4]) {
    float by[PARTS][2];
    bool larger = false;
#pragma unroll
    for (uint32_t part = 0; part < PARTS; part++) {
#pragma unroll
      for (uint32_t half = 0; half < 2; half++) {
        float most = largest[part][half];
#pragma unroll
        for (uint32_t i = 0; i < KEYS / 4; i++) most = fmaxf(most, s[part][i / 2][half * 2 + i % 2]);
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
        larger |= most != largest[part][half];
        by[part][half] = shrink(largest[part][half], most, scale_log2);
        largest[part][half] = most;
        float all = sum[part][half] * by[part][half];
#pragma unroll
        for (uint32_t i = 0; i < KEYS / 4; i++) {
          float& weight = s[part][i / 2][half * 2 + i % 2];
          weight = weight_of<T>(weight, most, scale_log2);
          all += weight;
        }
        sum[part][half] = all;
      }
    }
    // After the first tiles hardly any do.
    if (__ballot_sync(ALL_LANES, larger) == 0) return;
#pragma unroll
    for (uint32_t part = 0; part < PARTS; part++) {
#pragma unroll
      for (uint32_t i = 0; i < DIM / 8; i++) {
#pragma unroll
        for (uint32_t j = 0; j < 4; j++) o[part][i][j] *= by[part][j / 2];
      }
    }
  }

  __device__ void add(const Pack<T>* v, const uint32_t (&weights)[PARTS][KEYS / 16][4]) {
#pragma unroll
    for (uint32_t i = 0; i < KEYS / 16; i++) {
#pragma unroll
      for (uint32_t j = 0; j < DIM / 16; j++) {
        uint32_t b[4];
        ldmatrix_x4_transposed(b, v + swizzled<DIM>(i * 16 + lane() % 16, j * 2 + lane() / 16));
        uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (uint32_t part = 0; part < PARTS; part++) {
          mma_16x8x16<T>(o[part][2 * j], weights[part][i], low);
          mma_16x8x16<T>(o[part][2 * j + 1], weights[part][i], high);
        }
      }
    }
  }

  // Rounds to shared memory, where this warp's q was, and from there to y, 16 bytes at a time.
  __device__ void store(Pack<T>* rows) {
    constexpr uint32_t PACKS = DIM / PACK;
    uint32_t first = warp() * WARP_ROWS;
    auto* pairs = reinterpret_cast<uint32_t*>(rows);
    __syncwarp();
#pragma unroll
    for (uint32_t part = 0; part < PARTS; part++) {
#pragma unroll
      for (uint32_t half = 0; half < 2; half++) {
        float by = 1.0f / warp_sum<4>(sum[part][half]);
        uint32_t row = first + part * 16 + half * 8 + lane() / 4;
#pragma unroll
        for (uint32_t i = 0; i < DIM / 8; i++) {
          const float* two = o[part][i] + half * 2;
          pairs[swizzled<DIM>(row, i) * 4 + lane() % 4] =
              uint32_t(from_float<T>(two[0] * by).bits) | uint32_t(from_float<T>(two[1] * by).bits) << 16;
        }
      }
    }
    __syncwarp();
#pragma unroll 2
    for (uint32_t i = lane(); i < WARP_ROWS * PACKS; i += WARP) {
      uint32_t row = first + i / PACKS, pack = i % PACKS, query = tile.first + row;
      if (query >= tile.queries) continue;
      uint64_t at = query_at<DIM>(op, tile, query, op.kv_heads * op.group * DIM);
      store_pack(op.y + at + pack * PACK, rows[swizzled<DIM>(row, pack)]);
    }
  }
};

// As A operands: what the lanes have of four products of 8 tokens is what they need of two of 16.
template <typename T>
__device__ void narrow_weights(const float (&s)[PARTS][KEYS / 8][4], uint32_t (&to)[PARTS][KEYS / 16][4]) {
#pragma unroll
  for (uint32_t part = 0; part < PARTS; part++) {
#pragma unroll
    for (uint32_t i = 0; i < KEYS / 16; i++) {
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) {
        const float* two = s[part][2 * i + j / 2] + j % 2 * 2;
        to[part][i][j] = narrow_pair<T>(two[0], two[1]);
      }
    }
  }
}

template <typename T, uint32_t DIM>
__device__ void run(const AttentionPrefill<T, DIM>& op) {
  DYNAMIC_SHARED(shared);
  SHARED(Tile, tiles, 1);
  const Tile& tile = tiles[0];
  if (threadIdx.x == 0) tiles[0] = find_tile(op, gridDim.y - 1 - blockIdx.y);
  __syncthreads();
  if (tile.is_empty()) return;
  auto* q = reinterpret_cast<Pack<T>*>(shared);
  Pack<T>* ring = q + ROWS * DIM / PACK;
  Stream<T, DIM> stream(op, tile, ring);
  uint32_t first = stream.begin() / KEYS * KEYS;
  fetch_q(op, tile, q);
  auto ids = stream.look_up(first);
  stream.template fetch<false>(first, ids);
  stream.template fetch<true>(first, ids);
  Attention<T, DIM> attention(op, tile);
  // What was fetched first of what is in the ring. The slot before it is free to be written, as the
  // whole block has come here since it used that.
  auto arrived = [&] {
    cp_async_wait<SLOTS - 2>();
    __syncthreads();
    return ring + (stream.slot + 1) % SLOTS * Stream<T, DIM>::TILE;
  };
  for (; first < stream.end(); first += KEYS) {
    bool sees = first < attention.end;
    uint32_t weights[PARTS][KEYS / 16][4];
    ids = stream.look_up(first + KEYS);
    const Pack<T>* k = arrived();
    stream.template fetch<false>(first + KEYS, ids);
    if (sees) {
      float s[PARTS][KEYS / 8][4] = {};
      attention.score(q, k, s);
      if (!tile.sees_all(first, op.window)) attention.mask(first, s);
      attention.weigh(s);
      narrow_weights<T>(s, weights);
    }
    // Looked up again rather than kept: registers are what this kernel has least of.
    ids = stream.look_up(first + KEYS);
    const Pack<T>* v = arrived();
    stream.template fetch<true>(first + KEYS, ids);
    if (sees) attention.add(v, weights);
  }
  cp_async_wait<0>();
  if (attention.end > 0) attention.store(q);
}

#define ATTENTION_PREFILL(TYPE, DIM) \
  ENTRY(attention_prefill_##TYPE##_##DIM, THREADS, AttentionPrefill<TYPE, DIM>)
ATTENTION_PREFILL(bf16, 64)
ATTENTION_PREFILL(bf16, 128)
ATTENTION_PREFILL(f16, 64)
ATTENTION_PREFILL(f16, 128)
