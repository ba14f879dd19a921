// The attention kernels of one instruction set; compiled once for each (CHANDRA_ISA).
#include "attention_rows.h"
#include "scratch.h"

#include <cstdlib>
#include <stdexcept>

namespace chandra {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr float kLowest = -__builtin_inff();

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// A buffer of this thread that only grows.
class Scratch {
 public:
  ~Scratch() { release(); }
  float* floats(int64_t n) {
    if (n > size_) {
      release();
      const int64_t wanted = (n + 15) / 16 * 16;
      data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(wanted) * sizeof(float)));
      if (!data_) throw std::runtime_error("out of memory for attention scratch");
      size_ = wanted;
      count_scratch(4 * size_);
    }
    return data_;
  }

 private:
  void release() {
    std::free(data_);
    count_scratch(-4 * size_);
    data_ = nullptr;
    size_ = 0;
  }

  float* data_ = nullptr;
  int64_t size_ = 0;
};

thread_local Scratch scratch;

// ---- what decode and prefill share

// One (query, head) pair.
struct Query {
  int64_t position, first;  // it sees the keys [first, position]
  const float* q;
  float* out;
};

Query query_of(const AttentionCall& call, int64_t sequence, int kv_head, int64_t index) {
  const AttentionShape& shape = *call.shape;
  const int group = call.group();
  const int64_t row = call.query_start[sequence] + index / group;
  const int64_t at = (static_cast<int64_t>(kv_head) * group + index % group) * shape.head_dim;
  const int64_t position = call.positions[row];
  return {position, call.first_key(position), call.q.data + row * call.q.stride + at,
          call.out.data + row * call.out.stride + at};
}

// q as the score kernels want it: scaled so that exp becomes 2^, padded to whole vectors.
void copy_query(const AttentionShape& shape, const float* q, int padded, float* to) {
  const float factor = shape.softcap ? shape.scale / shape.softcap : shape.scale * kLog2e;
  for (int i = 0; i < padded; ++i) to[i] = i < shape.head_dim ? q[i] * factor : 0.0f;
}

CHANDRA_INLINE vec cap(vec x, float softcap) {  // softcap * tanh(x), in units of log2
  const vec magnitude = max(x, sub(zero(), x));
  const vec t = exp2(mul(magnitude, set1(-2 * kLog2e)));
  const vec sign = div(x, max(magnitude, set1(1e-30f)));
  return mul(mul(sign, div(sub(set1(1.0f), t), add(set1(1.0f), t))), set1(softcap * kLog2e));
}

struct Stats {
  float max = kLowest, sum = 0;
};

// Turns the scores [begin, end) of a tile into 2^(score - max), all others into 0.
Stats softmax_tile(float* scores, int begin, int end, float softcap) {
  if (begin >= end) {
    std::memset(scores, 0, kTile * sizeof(float));
    return {};
  }
  const int first = begin / W * W, last = (end + W - 1) / W * W;
  const auto seen = [&](vec x, int i, float other) {  // only the vectors at the ends need a mask
    return i < begin || i + W > end ? keep(x, begin - i, end - i, other) : x;
  };
  vec top = set1(kLowest);
  for (int i = first; i < last; i += W) {
    vec x = load(scores + i);
    if (softcap) store(scores + i, x = cap(x, softcap));
    top = max(top, seen(x, i, kLowest));
  }
  Stats stats;
  stats.max = max_lane(top);
  vec sum = zero();
  for (int i = 0; i < first; i += W) store(scores + i, zero());
  for (int i = first; i < last; i += W) {
    const vec p = seen(exp2(seen(sub(load(scores + i), set1(stats.max)), i, kLowest)), i, 0.0f);
    store(scores + i, p);
    sum = add(sum, p);
  }
  for (int i = last; i < kTile; i += W) store(scores + i, zero());
  stats.sum = sum_lanes(sum);
  return stats;
}

// Folds (part, stats) into (total, into); n is a multiple of W.
void fold(float* total, Stats& into, const float* part, Stats stats, int n) {
  if (stats.max == kLowest) return;
  if (into.max == kLowest) {
    std::memcpy(total, part, static_cast<size_t>(n) * sizeof(float));
    into = stats;
    return;
  }
  const float top = into.max > stats.max ? into.max : stats.max;
  const float a = exp2(into.max - top), b = exp2(stats.max - top);
  for (int i = 0; i < n; i += W) store(total + i, fma(set1(a), load(total + i), mul(set1(b), load(part + i))));
  into = {top, a * into.sum + b * stats.sum};
}

void finish(const float* total, Stats stats, int n, float* out) {
  const float inverse = 1.0f / stats.sum;
  for (int i = 0; i < n; ++i) out[i] = total[i] * inverse;
}

// The scores of W keys are sums over lanes of products; both kernels add the lanes in the order l + l/2, l/4, …:
// `few` has one vector of partial sums for each key and folds them pairwise, `many` has one vector for each lane.

constexpr int kWide = W / 4;  // vectors of values at a time: what the registers hold for several rows

// ---- few queries: keys and values in place

// What comes from memory is asked for a phase before it is needed: a tile's values while its keys are multiplied, the
// next tile's keys while the values are added up.
CHANDRA_INLINE void fetch(const uint8_t* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// Products of R queries with one key, for each lane.
template <int R>
struct Sums {
  vec row[R];
};

template <KvType T, int R>
struct KeyBlock {
  static constexpr int N = together(T);
  const uint8_t* base;
  int64_t stride;
  const float* q;
  int padded;
  const uint8_t* values;  // of these keys

  // The scores of the W / STEP keys KEY, KEY + STEP, …, folded so far.
  template <int KEY, int STEP>
  CHANDRA_INLINE Sums<R> scores() const {
    Sums<R> x;
    if constexpr (STEP == W) {
      const uint8_t* row = base + KEY * stride;
      fetch(values + KEY * stride, stride);
      for (int r = 0; r < R; ++r) x.row[r] = zero();
      for (int unit = 0; unit * N < padded / W; ++unit) {
        vec k[N];
        load_kv<T>(row, unit, k);
        for (int i = 0; i < N; ++i)
          for (int r = 0; r < R; ++r) x.row[r] = fma(load(q + r * padded + (unit * N + i) * W), k[i], x.row[r]);
      }
    } else {
      x = scores<KEY, STEP * 2>();
      const Sums<R> y = scores<KEY + STEP, STEP * 2>();
      for (int r = 0; r < R; ++r) x.row[r] = combine<STEP>(x.row[r], y.row[r]);
    }
    return x;
  }
};

template <KvType T, int R>
void few_scores(const Pages& pages, int64_t begin, int64_t end, int64_t tile, const float* q, int padded,
                float* scores) {
  for (int64_t key = begin / W * W; key < end; key += W) {
    const int64_t offset = pages.offset(key);
    const KeyBlock<T, R> block{pages.cache.k + offset, pages.cache.row_bytes, q, padded, pages.cache.v + offset};
    const Sums<R> x = block.template scores<0, 1>();
    for (int r = 0; r < R; ++r) store(scores + r * kTile + (key - tile), x.row[r]);
  }
}

// out[r][..] = sum of weights[r][key] * value[key]; V vectors at a time. The keys of the next tile, up to `last`, are
// fetched a part with each.
template <KvType T, int R, int V>
CHANDRA_INLINE void few_values_at(const Pages& pages, int64_t begin, int64_t end, int64_t last, int64_t tile,
                                  const float* weights, int first, int padded, float* out, int64_t stride) {
  const int64_t row_bytes = pages.cache.row_bytes;
  const int64_t from = first * W * row_bytes / padded, part = V * W * row_bytes / padded;
  constexpr int N = together(T);
  vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) sum[r][i] = zero();
  for (int64_t key = begin; key < end;) {
    const int64_t stop = min_of(end, (key / pages.cache.block_size + 1) * pages.cache.block_size);
    const uint8_t* row = pages.cache.v + pages.offset(key);
    const uint8_t* next = key + kTile < last ? pages.cache.k + pages.offset(key + kTile) + from : nullptr;
    for (; key < stop; ++key, row += row_bytes) {
      if (next) fetch(next, part), next += row_bytes;
      vec value[V];
      for (int i = 0; i < V; i += N) load_kv<T>(row, (first + i) / N, value + i);
      for (int r = 0; r < R; ++r) {
        const vec weight = set1(weights[r * kTile + (key - tile)]);
        for (int i = 0; i < V; ++i) sum[r][i] = fma(weight, value[i], sum[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) store(out + r * stride + (first + i) * W, sum[r][i]);
}

template <KvType T, int R>
void few_values(const Pages& pages, int64_t begin, int64_t end, int64_t last, int64_t tile, const float* weights,
                int padded, float* out, int64_t stride) {
  int j = 0;
  for (; j + kWide <= padded / W; j += kWide)
    few_values_at<T, R, kWide>(pages, begin, end, last, tile, weights, j, padded, out, stride);
  for (constexpr int N = together(T); j < padded / W; j += N)
    few_values_at<T, R, N>(pages, begin, end, last, tile, weights, j, padded, out, stride);
}

template <KvType T>
void few(const AttentionCall& call, int64_t sequence, int kv_head, int64_t begin, int64_t end, float* partials) {
  const AttentionShape& shape = *call.shape;
  const Pages pages(call, sequence, kv_head);
  const int d = shape.head_dim, group = call.group();
  const int rows = static_cast<int>(call.query_start[sequence + 1] - call.query_start[sequence]) * group;
  const int64_t stride = partial_floats(d);
  float* q = scratch.floats(few_floats(d));
  float *scores = q + kFewRows * d, *sums = scores + kFewRows * kTile;
  Query query[kFewRows];
  Stats total[kFewRows];
  for (int r = 0; r < rows; ++r) {
    query[r] = query_of(call, sequence, kv_head, r);
    copy_query(shape, query[r].q, d, q + r * d);
  }
  const int64_t last = query[rows - 1].position + 1;
  for (int64_t tile = begin / kTile * kTile; tile < end; tile += kTile) {
    const int64_t stop = min_of(end, tile + kTile);
    for (int r0 = 0; r0 < rows;) {
      const int count = static_cast<int>(min_of(4, rows - r0));
      int64_t low = stop, high = tile;
      for (int r = r0; r < r0 + count; ++r) {
        low = min_of(low, max_of(query[r].first, tile));
        high = max_of(high, min_of(query[r].position + 1, stop));
      }
      const auto both = [&](auto constant) {
        constexpr int R = decltype(constant)::value;
        few_scores<T, R>(pages, low, high, tile, q + r0 * d, d, scores + r0 * kTile);
        Stats stats[R];
        for (int r = 0; r < R; ++r) {
          const Query& x = query[r0 + r];
          stats[r] = softmax_tile(scores + (r0 + r) * kTile, static_cast<int>(max_of(x.first - tile, 0)),
                                  static_cast<int>(min_of(x.position + 1, stop) - tile), shape.softcap);
        }
        few_values<T, R>(pages, low, high, last, tile, scores + r0 * kTile, d, sums + r0 * stride, stride);
        for (int r = r0; r < r0 + R; ++r) fold(partials + r * stride, total[r], sums + r * stride, stats[r - r0], d);
      };
      if (low < high) {
        if (count == 4) both(std::integral_constant<int, 4>());
        if (count == 3) both(std::integral_constant<int, 3>());
        if (count == 2) both(std::integral_constant<int, 2>());
        if (count == 1) both(std::integral_constant<int, 1>());
      }
      r0 += count;
    }
  }
  for (int r = 0; r < rows; ++r) {
    partials[r * stride + d] = total[r].max;
    partials[r * stride + d + 1] = total[r].sum;
  }
}

void merge(const AttentionCall& call, int64_t sequence, int kv_head, int64_t first_unit, int64_t units, int unit,
           const float* partials) {
  const int d = call.shape->head_dim;
  const int64_t rows = (call.query_start[sequence + 1] - call.query_start[sequence]) * call.group();
  const int64_t stride = partial_floats(d), per_split = kSplit / unit;
  float *split = scratch.floats(2 * stride), *total = split + stride;
  for (int64_t r = 0; r < rows; ++r) {
    Stats in_split, in_total;
    for (int64_t u = 0; u < units; ++u) {
      const float* part = partials + (u * rows + r) * stride;
      fold(split, in_split, part, {part[d], part[d + 1]}, d);
      if ((first_unit + u + 1) % per_split && u + 1 < units) continue;
      fold(total, in_total, split, in_split, d);
      in_split = {};
    }
    finish(total, in_total, d, query_of(call, sequence, kv_head, r).out);
  }
}

// ---- many queries: tiles of keys and values converted once

template <KvType T>
void unpack_row(const uint8_t* row, int d, int padded, float* to) {
  constexpr int N = together(T);
  int whole = 0;
  for (; whole + N * W <= d; whole += N * W) {
    vec x[N];
    load_kv<T>(row, whole / W / N, x);
    for (int i = 0; i < N; ++i) store(to + whole + i * W, x[i]);
  }
  for (int i = whole; i < padded; ++i) {  // only the float types come in rows of any length
    float x = 0;
    if (i < d) {
      if constexpr (T == KvType::f32) std::memcpy(&x, row + i * 4, 4);
      uint16_t half;
      std::memcpy(&half, row + i * 2, 2);
      if constexpr (T == KvType::f16) x = f16_to_f32(half);
      if constexpr (T == KvType::bf16) x = bf16_to_f32(half);
    }
    to[i] = x;
  }
}

template <int F>
CHANDRA_INLINE void transpose_stage(vec* x) {
  for (int i = 0; i < W; ++i)
    if (!(i & F)) exchange<F>(x[i], x[i + F]);
}

// (W, padded) -> (padded, W)
void transpose(const float* from, int padded, float* to) {
  for (int j = 0; j < padded; j += W) {
    vec x[W];
    for (int i = 0; i < W; ++i) x[i] = load(from + i * padded + j);
    if constexpr (W == 16) transpose_stage<W / 2>(x);
    transpose_stage<4>(x);
    transpose_stage<2>(x);
    transpose_stage<1>(x);
    for (int i = 0; i < W; ++i) store(to + (j + i) * W, x[i]);
  }
}

// Keys [begin, end) of a tile as (kTile / W, padded, W) and values as (kTile, padded), zero outside.
template <KvType T>
void unpack_tile(const Pages& pages, int64_t tile, int64_t begin, int64_t end, int d, int padded, float* keys,
                 float* values, float* staging) {
  for (int64_t key = tile / W * W; key < tile + kTile; key += W) {
    const int64_t at = key - tile;
    if (key + W <= begin || key >= end) continue;  // never looked at
    for (int i = 0; i < W; ++i) {
      float* value = values + (at + i) * padded;
      if (key + i < begin || key + i >= end) {
        std::memset(staging + i * padded, 0, static_cast<size_t>(padded) * sizeof(float));
        std::memset(value, 0, static_cast<size_t>(padded) * sizeof(float));
        continue;
      }
      const int64_t offset = pages.offset(key + i);
      unpack_row<T>(pages.cache.k + offset, d, padded, staging + i * padded);
      unpack_row<T>(pages.cache.v + offset, d, padded, value);
    }
    transpose(staging, padded, keys + at * padded);
  }
}

template <int R>
struct TransposedKeys {
  const float* keys;  // (padded, W)
  const float* q;
  int padded;

  // Lane sums LANE, LANE + STEP, … of the scores of W keys, added up.
  template <int LANE, int STEP>
  CHANDRA_INLINE Sums<R> scores() const {
    Sums<R> x;
    if constexpr (STEP == W) {
      for (int r = 0; r < R; ++r) x.row[r] = zero();
      for (int j = LANE; j < padded; j += W) {
        const vec k = load(keys + j * W);
        for (int r = 0; r < R; ++r) x.row[r] = fma(set1(q[r * padded + j]), k, x.row[r]);
      }
    } else {
      x = scores<LANE, STEP * 2>();
      const Sums<R> y = scores<LANE + STEP, STEP * 2>();
      for (int r = 0; r < R; ++r) x.row[r] = add(x.row[r], y.row[r]);
    }
    return x;
  }
};

template <int R>
void many_scores(const float* keys, int begin, int end, const float* q, int padded, float* scores) {
  for (int key = begin / W * W; key < end; key += W) {
    const TransposedKeys<R> block{keys + key * padded, q, padded};
    const Sums<R> x = block.template scores<0, 1>();
    for (int r = 0; r < R; ++r) store(scores + r * kTile + key, x.row[r]);
  }
}

template <int R, int V>
CHANDRA_INLINE void many_values_at(const float* values, int begin, int end, const float* weights, int padded,
                                   float* out) {
  vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) sum[r][i] = zero();
  for (int key = begin; key < end; ++key) {
    vec value[V];
    for (int i = 0; i < V; ++i) value[i] = load(values + key * padded + i * W);
    for (int r = 0; r < R; ++r) {
      const vec weight = set1(weights[r * kTile + key]);
      for (int i = 0; i < V; ++i) sum[r][i] = fma(weight, value[i], sum[r][i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < V; ++i) store(out + r * padded + i * W, sum[r][i]);
}

template <int R>
void many_values(const float* values, int begin, int end, const float* weights, int padded, float* out) {
  int j = 0;
  for (; j + kWide <= padded / W; j += kWide)
    many_values_at<R, kWide>(values + j * W, begin, end, weights, padded, out + j * W);
  for (; j < padded / W; ++j) many_values_at<R, 1>(values + j * W, begin, end, weights, padded, out + j * W);
}

template <KvType T>
void many(const AttentionCall& call, int64_t sequence, int kv_head, int64_t query, int64_t count) {
  const AttentionShape& shape = *call.shape;
  const Pages pages(call, sequence, kv_head);
  const int d = shape.head_dim, padded = (d + W - 1) / W * W, group = call.group();
  const int rows = static_cast<int>(count) * group, room = rows + kManyRows;
  float* q = scratch.floats(many_floats(rows, padded));
  float *split = q + room * padded, *total = split + room * padded;
  float *scores = total + room * padded, *sums = scores + kManyRows * kTile;
  float *keys = sums + kManyRows * padded, *values = keys + kTile * padded, *staging = values + kTile * padded;
  Stats *in_split = reinterpret_cast<Stats*>(staging + W * padded), *in_total = in_split + room;

  int64_t low = INT64_MAX, high = 0;
  for (int r = 0; r < rows; ++r) {
    const Query x = query_of(call, sequence, kv_head, query * group + r);
    copy_query(shape, x.q, padded, q + r * padded);
    low = min_of(low, x.first);
    high = max_of(high, x.position + 1);
    in_split[r] = in_total[r] = {};
  }
  std::memset(q + rows * padded, 0, static_cast<size_t>(kManyRows * padded) * sizeof(float));
  std::memset(scores, 0, kManyRows * kTile * sizeof(float));
  for (int64_t tile = low / kTile * kTile; tile < high; tile += kTile) {
    unpack_tile<T>(pages, tile, max_of(low, tile), min_of(high, tile + kTile), d, padded, keys, values, staging);
    const bool split_ends = (tile + kTile) % kSplit == 0 || tile + kTile >= high;
    for (int r0 = 0; r0 < rows; r0 += kManyRows) {
      const int r1 = static_cast<int>(min_of(r0 + kManyRows, rows));
      int from = kTile, to = 0;  // what these rows see of the tile
      int first[kManyRows], end[kManyRows];
      for (int r = r0; r < r1; ++r) {
        const Query x = query_of(call, sequence, kv_head, query * group + r);
        first[r - r0] = static_cast<int>(min_of(max_of(x.first - tile, 0), kTile));
        end[r - r0] = static_cast<int>(max_of(min_of(x.position + 1 - tile, kTile), 0));
        from = static_cast<int>(min_of(from, first[r - r0]));
        to = static_cast<int>(max_of(to, end[r - r0]));
      }
      Stats in_tile[kManyRows];
      if (from < to) {
        many_scores<kManyRows>(keys, from, to, q + r0 * padded, padded, scores);
        for (int r = r0; r < r1; ++r)
          in_tile[r - r0] = softmax_tile(scores + (r - r0) * kTile, first[r - r0], end[r - r0], shape.softcap);
        many_values<kManyRows>(values, from, to, scores, padded, sums);
      }
      for (int r = r0; r < r1; ++r) {
        fold(split + r * padded, in_split[r], sums + (r - r0) * padded, in_tile[r - r0], padded);
        if (!split_ends) continue;
        fold(total + r * padded, in_total[r], split + r * padded, in_split[r], padded);
        in_split[r] = {};
      }
    }
  }
  for (int r = 0; r < rows; ++r)
    finish(total + r * padded, in_total[r], d, query_of(call, sequence, kv_head, query * group + r).out);
}

// ---- by cache type

template <class F>
CHANDRA_INLINE void with_type(KvType type, F&& f) {
  switch (type) {
    case KvType::f32: return f(std::integral_constant<KvType, KvType::f32>());
    case KvType::f16: return f(std::integral_constant<KvType, KvType::f16>());
    case KvType::bf16: return f(std::integral_constant<KvType, KvType::bf16>());
    case KvType::q8_0: return f(std::integral_constant<KvType, KvType::q8_0>());
    case KvType::q4_0: return f(std::integral_constant<KvType, KvType::q4_0>());
  }
}

void any_few(const AttentionCall& call, int64_t sequence, int kv_head, int64_t begin, int64_t end, float* partials) {
  with_type(call.cache.type, [&](auto type) {
    few<decltype(type)::value>(call, sequence, kv_head, begin, end, partials);
  });
}

void any_many(const AttentionCall& call, int64_t sequence, int kv_head, int64_t query, int64_t count) {
  with_type(call.cache.type,
            [&](auto type) { many<decltype(type)::value>(call, sequence, kv_head, query, count); });
}

}  // namespace

#define CHANDRA_CONCAT_(a, b) a##b
#define CHANDRA_CONCAT(a, b) CHANDRA_CONCAT_(a, b)
const AttentionKernels CHANDRA_CONCAT(attention_, CHANDRA_ISA) = {W, prepare, any_few, any_many, merge};

}  // namespace chandra
