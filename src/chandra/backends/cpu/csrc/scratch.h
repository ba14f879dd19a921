// Memory the ops need for a moment. Every thread keeps what it has once needed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace chandra {

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
    }
    return static_cast<T*>(data_);
  }

 private:
  void release() {
    ::operator delete(data_, std::align_val_t{64});
    data_ = nullptr;
    size_ = 0;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace chandra
