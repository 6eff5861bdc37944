// Attention of one query a sequence over its paged KV, in splits that `attention_combine` puts
// together. All heads of a group share one read of K and V.
//
// Grid: (kv_heads, rows, splits). Block: 128 threads. A warp takes blocks of 16 tokens, by itself: its
// copies run ahead in a ring of its own. Tokens are the rows of the matrix products and queries the
// columns, as 8 of them are what mma has: S' = K Q', O' = V' P', where movmatrix turns S' into P'.
//
// Reads the KV that the rows see once; a row of one busy split is finished here, and the others write
// `DIM + 2` floats for each head and split.
#include "splits.cuh"

constexpr uint32_t WARPS = 4;
constexpr uint32_t THREADS = WARPS * WARP;
// Query heads of a KV head, at most.
constexpr uint32_t GROUP_MAX = 8;

template <typename T, uint32_t DIM>
struct AttentionDecode {
  // [rows, q_stride]: a row begins with its heads * DIM elements of q.
  const T* q;
  // One layer of the cache.
  const T* cache;
  // [rows]: tokens in the cache. A row of none reads nothing, and its y is zeros.
  const uint32_t* seq_lens;
  // [rows, table_stride]
  const uint32_t* block_tables;
  // [rows, heads * DIM]
  T* y;
  // [rows, heads, splits, DIM]: sums of rows that have several busy splits.
  float* partial;
  // [rows, heads, splits, 2]: the largest score, and the sum of weights.
  float* stats;
  uint32_t q_stride;
  uint32_t table_stride;
  uint32_t kv_heads;
  // heads / kv_heads, up to GROUP_MAX.
  uint32_t group;
  // KV blocks that a split takes at a time, a multiple of WARPS.
  uint32_t chunk_blocks;
  // Tokens that a row sees, itself included; 0: all.
  uint32_t window;
  // Of scores, above 0.
  float scale;
};

// Packs of K, or of V, of a block and head.
template <uint32_t DIM>
constexpr uint32_t TILE = BLOCK_TOKENS * DIM / PACK;
// Tiles of a warp's ring: an odd number, so that while K is used K is fetched, and V likewise.
template <uint32_t DIM>
constexpr uint32_t SLOTS = DIM == 64 ? 5 : 3;

// The blocks that a warp takes: every fourth of its split's chunks.
struct Walk {
  uint32_t block, chunk_end;

  __device__ Walk(const Splits& splits, uint32_t split) {
    block = splits.first_block(split) + warp();
    chunk_end = splits.first_block(split) + splits.chunk;
    while (block < splits.begin) next(splits);
  }
  __device__ void next(const Splits& splits) {
    block += WARPS;
    if (block < chunk_end) return;
    block += (splits.count - 1) * splits.chunk;
    chunk_end += splits.count * splits.chunk;
  }
};

// K and V of a warp's blocks on their way into its ring.
template <typename T, uint32_t DIM>
struct Stream {
  const Splits& splits;
  Pack<T>* ring;
  const T* cache;
  const uint32_t* table;
  uint64_t v_offset, block_elements;
  Walk walk;
  // Physical block of the walk, read a tile before it is wanted.
  uint32_t id = 0, slot = 0;

  __device__ Stream(const AttentionDecode<T, DIM>& op, const Splits& splits, Pack<T>* ring)
      : splits(splits), ring(ring), walk(splits, blockIdx.z) {
    KvLayout<DIM> kv{op.kv_heads};
    cache = op.cache + kv.k(0, blockIdx.x);
    v_offset = kv.v(0, blockIdx.x) - kv.k(0, blockIdx.x);
    block_elements = kv.k(1, 0);
    table = op.block_tables + uint64_t(blockIdx.y) * op.table_stride;
    look_up();
  }
  __device__ void look_up() {
    if (walk.block < splits.end) id = table[walk.block];
  }
  // Tokens that the row does not see are zeros, as what lies there may be anything.
  __device__ void fetch(uint64_t offset) {
    if (walk.block < splits.end) {
      const T* from = cache + id * block_elements + offset;
#pragma unroll
      for (uint32_t i = 0; i < TILE<DIM> / WARP; i++) {
        uint32_t at = i * WARP + lane(), token = at / (DIM / PACK);
        uint32_t position = walk.block * BLOCK_TOKENS + token;
        bool seen = position >= splits.first_token && position < splits.len;
        Pack<T>* to = ring + slot * TILE<DIM> + swizzled<DIM>(token, at % (DIM / PACK));
        cp_async_16(to, from + at * PACK, seen);
      }
    }
    cp_async_commit();
    slot = slot + 1 == SLOTS<DIM> ? 0 : slot + 1;
  }
  __device__ void fetch_k() { fetch(0); }
  __device__ void fetch_v() {
    fetch(v_offset);
    walk.next(splits);
    look_up();
  }
};

// What a warp holds of the softmax over its blocks: a lane has queries `2 quad` and `2 quad + 1`.
template <typename T, uint32_t DIM>
struct Attention {
  // q as columns: [dims / 16] fragments.
  uint32_t q[DIM / 16][2];
  // [DIM, queries], unnormalised, 16 rows each.
  float o[DIM / 16][4] = {};
  float largest[2] = {NOTHING_SEEN, NOTHING_SEEN};
  // Of this lane's tokens.
  float sum[2] = {};

  __device__ explicit Attention(const AttentionDecode<T, DIM>& op) {
    uint32_t query = lane() / 4;
    const T* from = op.q + uint64_t(blockIdx.y) * op.q_stride + (blockIdx.x * op.group + query) * DIM;
#pragma unroll
    for (uint32_t i = 0; i < DIM / 16; i++) {
#pragma unroll
      for (uint32_t j = 0; j < 2; j++) {
        uint32_t at = i * 16 + j * 8 + lane() % 4 * 2;
        q[i][j] = query < op.group ? *reinterpret_cast<const uint32_t*>(from + at) : 0;
      }
    }
  }

  // The weights of 16 tokens from `position` on, as columns of queries; `o` is made to fit them.
  __device__ void score(const Pack<T>* k, uint32_t position, const Splits& seen, float scale_log2,
                        uint32_t (&weights)[2]) {
    float s[4] = {};
#pragma unroll
    for (uint32_t i = 0; i < DIM / 16; i++) {
      uint32_t a[4];
      ldmatrix_x4(a, k + swizzled<DIM>(lane() % 16, i * 2 + lane() / 16));
      mma_16x8x16<T>(s, a, q[i]);
    }
    float by[2];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
      uint32_t at = position + lane() / 4 + i / 2 * 8;
      if (at < seen.first_token || at >= seen.len) s[i] = -INFINITY;
    }
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
      float most = fmaxf(largest[i], fmaxf(s[i], s[i + 2]));
#pragma unroll
      for (uint32_t step = 4; step < WARP; step *= 2) {
        most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, step));
      }
      by[i] = shrink(largest[i], most, scale_log2);
      largest[i] = most;
      s[i] = weight_of<T>(s[i], most, scale_log2);
      s[i + 2] = weight_of<T>(s[i + 2], most, scale_log2);
      sum[i] = sum[i] * by[i] + s[i] + s[i + 2];
    }
#pragma unroll
    for (uint32_t i = 0; i < DIM / 16; i++) {
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) o[i][j] *= by[j % 2];
    }
    weights[0] = transpose_8x8(narrow_pair<T>(s[0], s[1]));
    weights[1] = transpose_8x8(narrow_pair<T>(s[2], s[3]));
  }

  __device__ void add(const Pack<T>* v, const uint32_t (&weights)[2]) {
#pragma unroll
    for (uint32_t i = 0; i < DIM / 16; i++) {
      uint32_t a[4];
      ldmatrix_x4_transposed(a, v + swizzled<DIM>(lane() % 8 + lane() / 16 * 8, i * 2 + lane() / 8 % 2));
      mma_16x8x16<T>(o[i], a, weights);
    }
  }
};

// What the warps of a block found, to be put together. Rows are set apart so that banks differ.
template <uint32_t DIM>
struct alignas(16) Found {
  float o[WARPS][GROUP_MAX][DIM + 4];
  float largest[WARPS][GROUP_MAX];
  float sum[WARPS][GROUP_MAX];

  template <typename T>
  __device__ void put(const Attention<T, DIM>& of) {
    uint32_t row = lane() / 4, query = lane() % 4 * 2;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
      float all = of.sum[i];
#pragma unroll
      for (uint32_t step = 4; step < WARP; step *= 2) all += __shfl_xor_sync(ALL_LANES, all, step);
      if (row == 0) largest[warp()][query + i] = of.largest[i], sum[warp()][query + i] = all;
    }
#pragma unroll
    for (uint32_t i = 0; i < DIM / 16; i++) {
#pragma unroll
      for (uint32_t j = 0; j < 4; j++) o[warp()][query + j % 2][i * 16 + row + j / 2 * 8] = of.o[i][j];
    }
  }

  // A pack of a query's sum over the warps, which shrinks as their largest scores differ.
  __device__ void take(uint32_t query, uint32_t at, float scale_log2, float (&to)[PACK], float& most,
                       float& total) const {
    most = largest[0][query], total = 0.0f;
#pragma unroll
    for (uint32_t i = 1; i < WARPS; i++) most = fmaxf(most, largest[i][query]);
#pragma unroll
    for (uint32_t i = 0; i < WARPS; i++) {
      float by = shrink(largest[i][query], most, scale_log2);
      total += by * sum[i][query];
#pragma unroll
      for (uint32_t j = 0; j < PACK; j++) to[j] += by * o[i][query][at + j];
    }
  }
};

template <typename T, uint32_t DIM>
__device__ void finish(const AttentionDecode<T, DIM>& op, const Splits& splits, const Found<DIM>& found,
                       float scale_log2) {
  uint32_t query = threadIdx.x / (DIM / PACK), at = threadIdx.x % (DIM / PACK) * PACK;
  if (query >= op.group) return;
  float o[PACK] = {}, largest, sum;
  found.take(query, at, scale_log2, o, largest, sum);
  uint64_t head = (uint64_t(blockIdx.y) * op.kv_heads + blockIdx.x) * op.group + query;
  if (splits.busy() == 1) {
#pragma unroll
    for (uint32_t i = 0; i < PACK; i++) o[i] *= 1.0f / sum;
    store_pack(op.y + head * DIM + at, narrow<T>(o));
    return;
  }
  uint64_t place = head * splits.count + blockIdx.z;
  Pack<float> part;
#pragma unroll
  for (uint32_t i = 0; i < PACK; i++) part.value[i] = o[i];
  store_pack(op.partial + place * DIM + at, part);
  if (at == 0) op.stats[place * 2] = largest, op.stats[place * 2 + 1] = sum;
}

template <typename T, uint32_t DIM>
__device__ void run(const AttentionDecode<T, DIM>& op) {
  constexpr uint32_t RINGS = WARPS * SLOTS<DIM> * TILE<DIM>;
  static_assert(sizeof(Found<DIM>) <= RINGS * sizeof(Pack<T>), "they share memory");
  SHARED(Pack<T>, rings, RINGS);
  Splits splits(op.seq_lens[blockIdx.y], op.window, op.chunk_blocks, gridDim.z);
  if (splits.len == 0 && blockIdx.z == 0) {
    uint64_t row = uint64_t(blockIdx.y) * op.kv_heads + blockIdx.x;
    Pack<T> zeros = {};
    for (uint32_t at = threadIdx.x * PACK; at < op.group * DIM; at += THREADS * PACK) {
      store_pack(op.y + row * op.group * DIM + at, zeros);
    }
  }
  if (blockIdx.z >= splits.busy()) return;
  float scale_log2 = op.scale * LOG2_E;
  Pack<T>* ring = rings + warp() * SLOTS<DIM> * TILE<DIM>;
  Walk walk(splits, blockIdx.z);
  Stream<T, DIM> stream(op, splits, ring);
  // All slots but one are under way, always: the one that was used last is the next to be written.
#pragma unroll
  for (uint32_t i = 0; i < SLOTS<DIM> / 2; i++) {
    stream.fetch_k();
    stream.fetch_v();
  }
  Attention<T, DIM> attention(op);
  uint32_t slot = 0;
  auto arrived = [&] {
    cp_async_wait<SLOTS<DIM> - 2>();
    __syncwarp();
    const Pack<T>* tile = ring + slot * TILE<DIM>;
    slot = slot + 1 == SLOTS<DIM> ? 0 : slot + 1;
    return tile;
  };
  for (; walk.block < splits.end; walk.next(splits)) {
    uint32_t weights[2];
    const Pack<T>* k = arrived();
    stream.fetch_k();
    attention.score(k, walk.block * BLOCK_TOKENS, splits, scale_log2, weights);
    const Pack<T>* v = arrived();
    stream.fetch_v();
    attention.add(v, weights);
  }
  cp_async_wait<0>();
  __syncthreads();
  auto& found = *reinterpret_cast<Found<DIM>*>(rings);
  found.put(attention);
  __syncthreads();
  finish(op, splits, found, scale_log2);
}

#define ATTENTION_DECODE(TYPE, DIM) \
  ENTRY(attention_decode_##TYPE##_##DIM, THREADS, AttentionDecode<TYPE, DIM>)
ATTENTION_DECODE(bf16, 64)
ATTENTION_DECODE(bf16, 128)
ATTENTION_DECODE(f16, 64)
ATTENTION_DECODE(f16, 128)
