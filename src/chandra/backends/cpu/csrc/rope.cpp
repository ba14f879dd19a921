#include "rope.h"

#include <algorithm>
#include <cmath>

#include "pool.h"

namespace chandra {

std::shared_ptr<const RopeTable> Rope::table(const int32_t* positions, int64_t n) {
  const std::lock_guard lock(mutex_);
  if (last_ && std::equal(last_->positions.begin(), last_->positions.end(), positions, positions + n)) return last_;
  auto table = std::make_shared<RopeTable>();
  const int64_t pairs = static_cast<int64_t>(inv_freq_.size());
  table->positions.assign(positions, positions + n);
  table->cos.resize(static_cast<size_t>(n * pairs));
  table->sin.resize(static_cast<size_t>(n * pairs));
  const auto fill = [&](int64_t row, int) {
    for (int64_t i = 0; i < pairs; ++i) {
      const double angle = static_cast<double>(positions[row]) * inv_freq_[static_cast<size_t>(i)];
      table->cos[static_cast<size_t>(row * pairs + i)] = static_cast<float>(std::cos(angle) * scale_);
      table->sin[static_cast<size_t>(row * pairs + i)] = static_cast<float>(std::sin(angle) * scale_);
    }
  };
  if (n < 16) {
    for (int64_t row = 0; row < n; ++row) fill(row, 0);
  } else {
    Pool::shared().run(n, fill);
  }
  last_ = table;
  return table;
}

}  // namespace chandra
