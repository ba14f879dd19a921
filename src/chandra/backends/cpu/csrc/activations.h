// The input of an op as the kernels want it: normalized, cut into tiles of up to kMaxTile tokens, quantized or transposed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "linear_kernels.h"
#include "pool.h"
#include "scratch.h"
#include "weight.h"

namespace chandra {

struct Tile {
  int64_t first;  // of the tokens
  int count;
  int width;  // index into kTileWidth: the tokens are filled up with zeros
  int64_t offset;  // in tokens, of its data
};

class Activations {
 public:
  // n rows of x, `rows` of it if not null. Memory is that of the calling thread: one at a time, level 0 or 1.
  Activations(const float* x, const int32_t* rows, int64_t n, int64_t columns, const Norm* norm, bool quantized,
              bool floats, int level = 0);
  // The same in groups (of tokens for one expert each): tiles do not cross the ends of groups.
  Activations(const float* x, const int32_t* rows, const std::vector<int64_t>& group_ends, int64_t columns,
              const Norm* norm, bool quantized, bool floats, int level = 0);

  int64_t columns() const { return columns_; }
  std::span<const Tile> tiles() const { return *tiles_; }
  // Tiles of group g: [first_tile(g), first_tile(g + 1)).
  int64_t first_tile(int64_t group) const { return group_tiles_.empty() ? (group ? count() : 0) : group_tiles_[group]; }
  int64_t count() const { return static_cast<int64_t>(tiles_->size()); }
  int64_t tile_bytes() const { return kMaxTile * (quantized_ ? blocks_ * 64 : columns_ * 4); }

  // out[t * 16 + r] for the tokens of a tile and the rows of a panel.
  void multiply(const Weight& weight, const uint8_t* panel, const Tile& tile, float* out) const {
    const int layout = static_cast<int>(weight.layout());
    const void* data = is_float(weight.layout()) ? static_cast<const void*>(floats_ + tile.offset * columns_)
                                                 : static_cast<const void*>(quantized_ + tile.offset * blocks_);
    kernels_.tile[layout][tile.width](panel, weight.blocks(), data, out);
  }

  static int64_t bytes(int64_t n, int64_t columns, bool quantized, bool floats);

 private:
  void add_tiles(int64_t first, int64_t end);
  void fill(const float* x, const int32_t* rows, const Norm* norm, int level, bool quantized, bool floats);
  void fill_tile(const Tile& tile, const float* x, const int32_t* rows, const Norm* norm) const;

  const Kernels& kernels_;
  int64_t columns_, blocks_;
  int64_t tokens_ = 0;  // filled up
  std::vector<Tile>* tiles_;
  std::vector<int64_t> group_tiles_;
  ActBlock* quantized_ = nullptr;
  float* floats_ = nullptr;
};

// Calls f(panel, first_tile, end_tile) for all panels and tiles, in parallel, in pieces that are worth a task and whose
// activations stay in the second-level cache.
template <class Fn>
void for_panels(int64_t panels, int64_t panel_bytes, const Activations& x, Fn&& f) {
  constexpr int64_t kCache = 384 << 10, kWorthwhile = 16 << 10;
  Pool& pool = Pool::shared();
  const int64_t tiles = x.count();
  const int64_t group = std::clamp<int64_t>(kCache / std::max<int64_t>(1, x.tile_bytes()), 1, std::max<int64_t>(1, tiles));
  const int64_t groups = (tiles + group - 1) / group;
  int64_t chunk = panels / (int64_t{8} * pool.size());
  if (tiles == 1) chunk = std::max(chunk, kWorthwhile / panel_bytes);
  chunk = std::clamp<int64_t>(chunk, 1, std::max<int64_t>(1, (panels + pool.size() - 1) / pool.size()));
  const int64_t chunks = (panels + chunk - 1) / chunk;
  pool.run(groups * chunks, [&](int64_t task, int) {
    const int64_t g = task / chunks, first = task % chunks * chunk;
    for (int64_t p = first; p < std::min(panels, first + chunk); ++p) f(p, g * group, std::min(tiles, (g + 1) * group));
  });
}

}  // namespace chandra
