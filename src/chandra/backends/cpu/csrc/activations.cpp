#include "activations.h"

#include <atomic>
#include <cstring>

namespace chandra {
namespace {

constexpr int kLevels = 2;  // inputs in use at once by one op
std::atomic<int64_t> held{0};

thread_local Buffer quantized_scratch[kLevels], float_scratch[kLevels];
thread_local std::vector<Tile> tile_scratch[kLevels];
thread_local Buffer row_scratch;

}  // namespace

void count_scratch(int64_t bytes) { held.fetch_add(bytes, std::memory_order_relaxed); }
int64_t scratch_held() { return held.load(std::memory_order_relaxed); }

Activations::Activations(const float* x, const int32_t* rows, int64_t n, int64_t columns, const Norm* norm,
                         bool quantized, bool floats, int level)
    : kernels_(kernels()), columns_(columns), blocks_((columns + kBlock - 1) / kBlock), tiles_(&tile_scratch[level]) {
  tiles_->clear();
  add_tiles(0, n);
  fill(x, rows, norm, level, quantized, floats);
}

Activations::Activations(const float* x, const int32_t* rows, const std::vector<int64_t>& group_ends, int64_t columns,
                         const Norm* norm, bool quantized, bool floats, int level)
    : kernels_(kernels()), columns_(columns), blocks_((columns + kBlock - 1) / kBlock), tiles_(&tile_scratch[level]) {
  tiles_->clear();
  group_tiles_.push_back(0);
  int64_t first = 0;
  for (int64_t end : group_ends) {
    add_tiles(first, end);
    group_tiles_.push_back(count());
    first = end;
  }
  fill(x, rows, norm, level, quantized, floats);
}

void Activations::add_tiles(int64_t first, int64_t end) {
  for (; first < end; first += kMaxTile) {
    const int count = static_cast<int>(std::min<int64_t>(kMaxTile, end - first));
    int width = 0;
    while (kTileWidth[width] < count) ++width;
    tiles_->push_back({first, count, width, tokens_});
    tokens_ += kTileWidth[width];
  }
}

void Activations::fill(const float* x, const int32_t* rows, const Norm* norm, int level, bool quantized, bool floats) {
  constexpr int64_t kWorthwhile = 1 << 13;  // values
  if (quantized) quantized_ = quantized_scratch[level].reserve<ActBlock>(tokens_ * blocks_);
  if (floats) floats_ = float_scratch[level].reserve<float>(tokens_ * columns_);
  const int64_t chunk = std::max<int64_t>(1, kWorthwhile / std::max<int64_t>(1, columns_ * kMaxTile));
  Pool::shared().run((count() + chunk - 1) / chunk, [&](int64_t task, int) {
    for (int64_t i = task * chunk; i < std::min(count(), (task + 1) * chunk); ++i)
      fill_tile((*tiles_)[static_cast<size_t>(i)], x, rows, norm);
  });
}

void Activations::fill_tile(const Tile& tile, const float* x, const int32_t* rows, const Norm* norm) const {
  const int width = kTileWidth[tile.width];
  float* normed = row_scratch.reserve<float>(columns_);
  ActBlock* blocks = quantized_ ? quantized_ + tile.offset * blocks_ : nullptr;
  float* floats = floats_ ? floats_ + tile.offset * columns_ : nullptr;
  for (int t = 0; t < width; ++t) {
    if (t >= tile.count) {
      for (int64_t b = 0; blocks && b < blocks_; ++b) std::memset(blocks + b * width + t, 0, sizeof(ActBlock));
      for (int64_t c = 0; floats && c < columns_; ++c) floats[c * width + t] = 0.0f;
      continue;
    }
    const float* row = x + (rows ? rows[tile.first + t] : tile.first + t) * columns_;
    if (norm) {
      kernels_.norm(*norm, row, columns_, normed);
      row = normed;
    }
    if (blocks) kernels_.quantize(row, columns_, blocks + t, width);
    for (int64_t c = 0; floats && c < columns_; ++c) floats[c * width + t] = row[c];
  }
}

int64_t Activations::bytes(int64_t n, int64_t columns, bool quantized, bool floats) {
  const int64_t blocks = (columns + kBlock - 1) / kBlock, tokens = n + 1;  // 5 take the room of 6, 7 of 8
  return tokens * ((quantized ? blocks * static_cast<int64_t>(sizeof(ActBlock)) : 0) + (floats ? columns * 4 : 0));
}

}  // namespace chandra
