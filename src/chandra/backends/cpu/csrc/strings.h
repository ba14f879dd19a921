// The strings of a vocabulary, where they lie: found by their bytes, and by their position.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace chandra {

// A text of strings one after another, each after its length in 8 bytes, as GGUF files have them. The text is the
// caller's and must stay; if it changes, what is found is wrong, but lies in it. 6.5 bytes for each string are kept: a
// table with open addressing whose entries hold a position and in the bits that are left some of the hash, and where
// every 16th string begins.
class Strings {
 public:
  // Throws std::invalid_argument if there are not so many in the text.
  Strings(const char* text, size_t size, int64_t count);

  int64_t count() const { return count_; }
  std::string_view at(int64_t index) const;
  // The first that is equal; -1 if there is none.
  int64_t find(std::string_view wanted) const;
  // Those that hold these bytes behind their first byte.
  std::vector<int64_t> holding(std::string_view part) const;

 private:
  // The string at a place of the text, which moves behind it.
  std::string_view next(size_t& place) const;

  const char* text_;
  size_t size_;
  int64_t count_;
  int bits_;  // of a position + 1
  std::vector<uint32_t> table_;  // 0: empty
  std::vector<size_t> places_;
};

}  // namespace chandra
