// Memory the ops need for a moment. Every thread keeps what it has once needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace chandra {

// All threads' scratch, counted: what the plan predicted is checked against it.
void count_scratch(int64_t bytes);
int64_t scratch_held();

// A growing buffer, aligned to cache lines. Its contents are lost when it grows.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  template <class T>
  T* reserve(int64_t n) {
    const size_t wanted = static_cast<size_t>(n) * sizeof(T);
    if (wanted > size_) {
      release();
      data_ = ::operator new(wanted, std::align_val_t{64});
      size_ = wanted;
      count_scratch(static_cast<int64_t>(size_));
    }
    return static_cast<T*>(data_);
  }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{64});
    count_scratch(-static_cast<int64_t>(size_));
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace chandra
