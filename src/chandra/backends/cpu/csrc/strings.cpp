#include "strings.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>

namespace chandra {
namespace {

constexpr int64_t kStride = 16;

uint64_t load(const char* data, size_t bytes) {
  uint64_t value = 0;
  std::memcpy(&value, data, bytes);
  return value;
}

// Secret, so that nobody can make a file of strings that collide.
uint64_t hash_of(std::string_view s) {
  static const uint64_t seed = std::random_device{}() | uint64_t{std::random_device{}()} << 32;
  const auto mix = [](uint64_t x) { return x *= 0x9fb21c651e98df25, x ^ x >> 32; };
  uint64_t hash = seed ^ s.size();
  for (; s.size() > 8; s.remove_prefix(8)) hash = mix(hash ^ load(s.data(), 8));
  return mix(mix(hash ^ load(s.data(), s.size())));
}

}  // namespace

Strings::Strings(const char* text, size_t size, int64_t count) : text_(text), size_(size), count_(count) {
  if (count < 0 || count >= std::numeric_limits<int32_t>::max()) throw std::invalid_argument("too many strings");
  bits_ = std::bit_width(static_cast<uint64_t>(count));
  table_.resize(static_cast<size_t>(count + count / 2 + 1));
  places_.reserve(static_cast<size_t>(count / kStride + 1));
  size_t place = 0;
  for (int64_t index = 0; index < count; ++index) {
    if (index % kStride == 0) places_.push_back(place);
    if (size - place < 8 || size - place - 8 < load(text + place, 8))
      throw std::invalid_argument("the text ends before its strings do");
    const std::string_view string = next(place);
    const uint64_t hash = hash_of(string);
    const uint32_t entry = static_cast<uint32_t>(hash << bits_ | static_cast<uint64_t>(index + 1));
    size_t slot = (hash >> 32) * table_.size() >> 32;
    while (table_[slot] && (((table_[slot] ^ entry) >> bits_) || at((table_[slot] & ((1u << bits_) - 1)) - 1) != string))
      slot = slot + 1 == table_.size() ? 0 : slot + 1;
    if (!table_[slot]) table_[slot] = entry;
  }
}

std::string_view Strings::next(size_t& place) const {
  const size_t left = size_ - place;  // a mapped file may have been written to since the lengths were checked
  if (left < 8) return {};
  const std::string_view string(text_ + place + 8, std::min<size_t>(load(text_ + place, 8), left - 8));
  place += 8 + string.size();
  return string;
}

std::string_view Strings::at(int64_t index) const {
  size_t place = places_[static_cast<size_t>(index / kStride)];
  for (int64_t skipped = index % kStride; skipped; --skipped) next(place);
  return next(place);
}

int64_t Strings::find(std::string_view wanted) const {
  const uint64_t hash = hash_of(wanted);
  const uint32_t mark = static_cast<uint32_t>(hash << bits_);
  for (size_t slot = (hash >> 32) * table_.size() >> 32; table_[slot]; slot = slot + 1 == table_.size() ? 0 : slot + 1) {
    if ((table_[slot] ^ mark) >> bits_) continue;
    const int64_t index = (table_[slot] & ((1u << bits_) - 1)) - 1;
    if (at(index) == wanted) return index;
  }
  return -1;
}

std::vector<int64_t> Strings::holding(std::string_view part) const {
  std::vector<int64_t> found;
  size_t place = 0;
  for (int64_t index = 0; index < count_; ++index)
    if (next(place).find(part, 1) != std::string_view::npos) found.push_back(index);
  return found;
}

}  // namespace chandra
