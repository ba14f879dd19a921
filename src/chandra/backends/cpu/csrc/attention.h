// Paged causal attention over a ragged batch: head norms, rope, the write to the cache and the softmax.
//
// The keys of a sequence are cut into tiles of 128 positions and splits of 8 tiles, at absolute positions. A query's
// result is always a tile's softmax, folded in order over the tiles of a split, folded in order over the splits, and
// every sum within a tile has one order. Decode and prefill therefore give the same bits, whatever the batch, the
// chunks and the threads.
#pragma once

#include <cstdint>

namespace chandra {

enum class KvType { f32, f16, bf16, q8_0, q4_0 };

// Bytes of one head's row in the cache.
int64_t kv_row_bytes(KvType type, int head_dim);

constexpr int kTile = 128;
constexpr int kSplit = 1024;
constexpr int kFewRows = 16;  // (query, head) pairs of one kv head up to which keys and values are read in place

struct HeadNorm {
  const float* weight = nullptr;  // null: no norm
  const float* bias = nullptr;
  int width = 0;  // values normed together: head_dim, or all heads of a row
  float eps = 0;
  bool layer = false;  // layer norm, otherwise RMS norm
};

struct AttentionShape {
  int num_heads, num_kv_heads, head_dim;
  float scale;
  int64_t window = 0;  // 0: none
  float softcap = 0;   // 0: none
  int rotary_dim = 0;  // 0: no rope
  bool interleaved = false;
  HeadNorm q_norm, k_norm;
};

struct KvCache {
  uint8_t *k, *v;  // (num_blocks, num_kv_heads, block_size, row_bytes)
  KvType type;
  int64_t num_blocks, block_size, row_bytes;
};

struct Rows {  // float32 rows of a batch, `stride` floats apart
  float* data;
  int64_t stride;
};

struct AttentionCall {
  const AttentionShape* shape;
  KvCache cache;
  Rows q, k, v, out;
  const float *cos, *sin;  // (n, rotary_dim / 2)
  int64_t n, sequences, blocks_per_sequence;
  const int32_t *positions, *query_start, *context_lens, *block_table, *slots;

  int group() const { return shape->num_heads / shape->num_kv_heads; }
  int64_t first_key(int64_t position) const {
    return shape->window && position >= shape->window ? position - shape->window + 1 : 0;
  }
};

// What one instruction set provides.
struct AttentionKernels {
  int lanes;
  // Norm and rope of one row's heads, and its keys and values into the cache.
  void (*prepare)(const AttentionCall& call, int64_t row);
  // All queries of a sequence against the keys [begin, end), at most one split: one partial for each (query, head) of
  // the kv head. Reads the cache in place; needs head_dim and block_size to be multiples of `lanes`.
  void (*few)(const AttentionCall& call, int64_t sequence, int kv_head, int64_t begin, int64_t end, float* partials);
  // Queries [query, query + count) of a sequence, written to out. Converts each tile of the cache once for all of them.
  void (*many)(const AttentionCall& call, int64_t sequence, int kv_head, int64_t query, int64_t count);
  // Folds the partials of one sequence and kv head, `units` tiles or splits from the first key on, into out.
  void (*merge)(const AttentionCall& call, int64_t sequence, int kv_head, int64_t first_unit, int64_t units, int unit,
                const float* partials);
};

extern const AttentionKernels attention_portable, attention_avx2, attention_avx512;

// Floats of one partial: head_dim sums, the maximum and the normalizer.
inline int64_t partial_floats(int head_dim) { return (head_dim + 2 + 15) / 16 * 16; }

// Floats a thread needs for `few` and `many`, which computes so many rows at a time and may read as many too many.
constexpr int kManyRows = 6;
inline int64_t few_floats(int head_dim) { return kFewRows * (head_dim + kTile + partial_floats(head_dim)); }
inline int64_t many_floats(int64_t rows, int64_t padded) {
  return (rows + kManyRows) * (3 * padded + 4) + kManyRows * (padded + kTile) + (2 * kTile + 16) * padded;
}

// Most bytes that calls for up to `rows` tokens of up to `sequences` sequences of `context` tokens keep in memory: the
// threads' scratch, partials, and the cos and sin of one set of rope parameters.
int64_t attention_scratch_bytes(int num_heads, int num_kv_heads, int head_dim, int64_t rows, int64_t sequences,
                                int64_t context);

// Computes everything. Throws std::out_of_range for positions, blocks or slots outside the cache.
void attention(const AttentionCall& call);

}  // namespace chandra
