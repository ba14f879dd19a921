#include "attention.h"

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "isa.h"
#include "pool.h"
#include "scratch.h"

namespace chandra {
namespace {

constexpr int64_t kInlineValues = 16384;  // below this, waking the pool for norms and rope costs more than it gains
constexpr int64_t kFewKeys = 4096;        // for several queries of one sequence: bounds the partials
constexpr int64_t kTasksPerThread = 4;    // wanted, so that threads finish together

// (query, head) pairs of a prefill task: what fits a core's cache together with a tile
int64_t query_rows(int head_dim) { return head_dim > 128 ? 64 : 128; }

const AttentionKernels& attention_kernels() {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::avx512: return attention_avx512;
    case Isa::avx2: return attention_avx2;
#endif
    default: return attention_portable;
  }
}

// A sequence with few queries, cut into units (tiles or splits) of keys.
struct Few {
  int64_t sequence, rows, first_key, last_key;
  int64_t first_unit, units;
  int64_t partials;  // where those of its first kv head are, in floats
};

struct Task {
  int64_t cost;
  int64_t sequence;
  int kv_head;
  int64_t begin, end;  // keys of a unit, or queries
  int64_t partials;    // -1: many queries
};

// The work of one call. Kept by the calling thread, so that a step does not allocate.
struct Work {
  std::vector<Few> few;
  std::vector<Task> tasks;
  std::unique_ptr<float[]> partials;
  int64_t partials_size = 0, partials_capacity = 0;
  int unit = kSplit;
};

void check(const AttentionCall& call) {
  const AttentionShape& shape = *call.shape;
  if (shape.num_kv_heads <= 0 || shape.num_heads % shape.num_kv_heads)
    throw std::invalid_argument("num_heads is not a multiple of num_kv_heads");
  if (call.query_start[0] != 0 || call.query_start[call.sequences] != call.n)
    throw std::invalid_argument("query_start does not cover the batch");
  for (int64_t i = 0; i < call.sequences; ++i) {
    const int64_t begin = call.query_start[i], end = call.query_start[i + 1];
    if (end < begin) throw std::invalid_argument("query_start does not ascend");
    for (int64_t row = begin; row < end; ++row) {
      if (call.positions[row] < 0 || call.positions[row] >= call.context_lens[i])
        throw std::out_of_range("a position is outside its sequence's context");
      if (row > begin && call.positions[row] <= call.positions[row - 1])
        throw std::invalid_argument("the positions of a sequence do not ascend");
    }
  }
}

void add_many(const AttentionCall& call, int64_t sequence, std::vector<Task>& tasks) {
  const int64_t start = call.query_start[sequence], queries = call.query_start[sequence + 1] - start;
  const int64_t step = std::max<int64_t>(1, query_rows(call.shape->head_dim) / call.group());
  for (int64_t begin = 0; begin < queries; begin += step) {
    const int64_t end = std::min(queries, begin + step);
    const int64_t keys = call.positions[start + end - 1] + 1 - call.first_key(call.positions[start + begin]);
    const int64_t cost = (end - begin) * call.group() * keys;
    for (int head = 0; head < call.shape->num_kv_heads; ++head)
      tasks.push_back({cost, sequence, head, begin, end, -1});
  }
}

void add_few(const AttentionCall& call, Few& few, Work& work) {
  const int unit = work.unit, heads = call.shape->num_kv_heads;
  few.first_unit = few.first_key / unit;
  few.units = (few.last_key - 1) / unit + 1 - few.first_unit;
  few.partials = work.partials_size;
  const int64_t floats = few.rows * partial_floats(call.shape->head_dim);
  for (int head = 0; head < heads; ++head) {
    for (int64_t u = 0; u < few.units; ++u, work.partials_size += floats) {
      const int64_t begin = std::max(few.first_key, (few.first_unit + u) * unit);
      const int64_t end = std::min(few.last_key, (few.first_unit + u + 1) * unit);
      work.tasks.push_back({few.rows * (end - begin), few.sequence, head, begin, end, work.partials_size});
    }
  }
}

void plan(const AttentionCall& call, int lanes, int threads, Work& work) {
  const int group = call.group(), heads = call.shape->num_kv_heads;
  const bool in_place = call.shape->head_dim % lanes == 0 && call.cache.block_size % lanes == 0;
  work.few.clear();
  work.tasks.clear();
  work.partials_size = 0;
  int64_t splits = 0;
  for (int64_t i = 0; i < call.sequences; ++i) {
    const int64_t start = call.query_start[i], rows = (call.query_start[i + 1] - start) * group;
    if (rows == 0) continue;
    const int64_t first = call.first_key(call.positions[start]);
    const int64_t last = call.positions[call.query_start[i + 1] - 1] + 1;
    if (!in_place || rows > kFewRows || (rows > group && last - first > kFewKeys)) {
      add_many(call, i, work.tasks);
      continue;
    }
    work.few.push_back({i, rows, first, last, 0, 0, 0});
    splits += ((last - 1) / kSplit + 1 - first / kSplit) * heads;
  }
  // Whole splits if they keep all threads busy, otherwise tiles. The result is the same.
  const int64_t all = splits + static_cast<int64_t>(work.tasks.size());
  work.unit = threads > 1 && all < kTasksPerThread * threads ? kTile : kSplit;
  for (Few& few : work.few) add_few(call, few, work);
  std::stable_sort(work.tasks.begin(), work.tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  if (work.partials_size > work.partials_capacity) {
    count_scratch(4 * (work.partials_size - work.partials_capacity));
    work.partials.reset(new float[static_cast<size_t>(work.partials_size)]);
    work.partials_capacity = work.partials_size;
  }
}

}  // namespace

int64_t kv_row_bytes(KvType type, int head_dim) {
  switch (type) {
    case KvType::f32: return head_dim * 4;
    case KvType::f16:
    case KvType::bf16: return head_dim * 2;
    default: break;
  }
  if (head_dim % 32) throw std::invalid_argument("a quantized cache needs a head_dim that is a multiple of 32");
  return head_dim / 32 * (type == KvType::q8_0 ? 34 : 18);
}

int64_t attention_scratch_bytes(int num_heads, int num_kv_heads, int head_dim, int64_t rows, int64_t sequences,
                                int64_t context) {
  const int64_t group = num_heads / num_kv_heads, threads = Pool::shared().size();
  const int64_t padded = (head_dim + 15) / 16 * 16;
  const int64_t own = std::max(few_floats(head_dim), many_floats(std::max(group, query_rows(head_dim)), padded));
  const auto splits = [&](int64_t keys) { return sequences * (keys / kSplit + 2) * num_kv_heads; };
  const int64_t rows_of_splits = std::max(splits(context) * std::min<int64_t>(group, kFewRows),
                                          splits(std::min(context, kFewKeys)) * kFewRows);
  const int64_t rows_of_tiles = kTasksPerThread * threads * (kSplit / kTile + 1) * kFewRows;
  const int64_t partials = std::max(rows_of_splits, rows_of_tiles) * partial_floats(head_dim);
  return 4 * (threads * own + partials + rows * head_dim);
}

void attention(const AttentionCall& call) {
  check(call);
  const AttentionKernels& use = attention_kernels();
  const AttentionShape& shape = *call.shape;
  Pool& pool = Pool::shared();
  if (call.n * (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim <= kInlineValues) {
    for (int64_t row = 0; row < call.n; ++row) use.prepare(call, row);
  } else {
    const int64_t step = std::max<int64_t>(1, call.n / (pool.size() * 8));
    pool.run((call.n + step - 1) / step, [&](int64_t task, int) {
      for (int64_t row = task * step; row < std::min(call.n, (task + 1) * step); ++row) use.prepare(call, row);
    });
  }
  static thread_local Work work;
  Work& mine = work;  // the workers see the caller's
  plan(call, use.lanes, pool.size(), mine);
  pool.run(static_cast<int64_t>(mine.tasks.size()), [&](int64_t index, int) {
    const Task& task = mine.tasks[static_cast<size_t>(index)];
    if (task.partials < 0) {
      use.many(call, task.sequence, task.kv_head, task.begin, task.end - task.begin);
    } else {
      use.few(call, task.sequence, task.kv_head, task.begin, task.end, mine.partials.get() + task.partials);
    }
  });
  const int64_t heads = shape.num_kv_heads;
  const auto merge = [&](int64_t index, int) {
    const Few& few = mine.few[static_cast<size_t>(index / heads)];
    const int64_t floats = few.units * few.rows * partial_floats(shape.head_dim);
    use.merge(call, few.sequence, static_cast<int>(index % heads), few.first_unit, few.units, mine.unit,
              mine.partials.get() + few.partials + index % heads * floats);
  };
  const int64_t merges = static_cast<int64_t>(mine.few.size()) * heads;
  if (mine.partials_size <= kInlineValues) {
    for (int64_t i = 0; i < merges; ++i) merge(i, 0);
  } else {
    pool.run(merges, merge);
  }
}

}  // namespace chandra
