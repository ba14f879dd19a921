// The cos and sin of a batch's positions, computed once and used by every layer with the same parameters.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace chandra {

struct RopeTable {
  std::vector<int32_t> positions;
  std::vector<float> cos, sin;  // (positions, pairs)
};

class Rope {
 public:
  Rope(std::vector<float> inv_freq, float scale, bool interleaved)
      : inv_freq_(std::move(inv_freq)), scale_(scale), interleaved_(interleaved) {}

  int rotary_dim() const { return 2 * static_cast<int>(inv_freq_.size()); }
  bool interleaved() const { return interleaved_; }

  // Computes in double: exact to float32 for positions of a million and more.
  std::shared_ptr<const RopeTable> table(const int32_t* positions, int64_t n);

 private:
  const std::vector<float> inv_freq_;
  const float scale_;
  const bool interleaved_;
  std::mutex mutex_;
  std::shared_ptr<const RopeTable> last_;
};

}  // namespace chandra
