// Rows of the embedding table.
//
// Grid: (rows). Block: any whole warps. Reads and writes `rows * hidden` elements.
#include "common.cuh"

// `token_ids` of a row whose token is `sampled[last_token_slot[row]]`.
constexpr uint32_t TOKEN_FROM_DEVICE = 0xffffffffu;
constexpr uint32_t THREADS_MAX = 256;

template <typename T>
struct Embed {
  // [vocab, hidden]
  const T* table;
  // [rows]
  const uint32_t* token_ids;
  const uint32_t* last_token_slot;
  // [slots]
  const uint32_t* sampled;
  // [rows, hidden]
  T* y;
  uint32_t vocab;
  // A multiple of 8.
  uint32_t hidden;
};

template <typename T>
__device__ void run(const Embed<T>& op) {
  uint32_t row = blockIdx.x;
  uint32_t id = op.token_ids[row];
  if (id == TOKEN_FROM_DEVICE) id = op.sampled[op.last_token_slot[row]];
  T* y = op.y + uint64_t(row) * op.hidden;
  // An id outside of the vocabulary must not read elsewhere, and must not pass for a token.
  bool known = id < op.vocab;
  const T* from = op.table + uint64_t(known ? id : 0) * op.hidden;
  Pack<T> nobody;
  for (uint32_t i = 0; i < PACK; i++) nobody.value[i] = from_float<T>(NAN);
  for (uint32_t at = threadIdx.x * PACK; at < op.hidden; at += blockDim.x * PACK) {
    store_pack(y + at, known ? load_pack(from + at) : nobody);
  }
}

ENTRY(embed_bf16, THREADS_MAX, Embed<bf16>)
ENTRY(embed_f16, THREADS_MAX, Embed<f16>)
