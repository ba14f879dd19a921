#include "slab.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <new>

namespace chandra {
namespace {

constexpr size_t kHugePage = size_t{2} << 20, kSlab = size_t{64} << 20;

// Pages cost memory when they are first written, so a slab that is never filled costs nothing.
class Slab {
 public:
  explicit Slab(size_t bytes) : mapped_(bytes + kHugePage), size_(bytes) {
    base_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(base_);
    data_ = static_cast<uint8_t*>(base_) + (kHugePage - address % kHugePage) % kHugePage;
#if defined(MADV_HUGEPAGE)
    madvise(data_, size_ / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  ~Slab() { munmap(base_, mapped_); }
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;

  uint8_t* take(size_t bytes) {
    if (used_ + bytes > size_) return nullptr;
    used_ += bytes;
    return data_ + used_ - bytes;
  }

 private:
  void* base_;
  uint8_t* data_;
  size_t mapped_, size_, used_ = 0;
};

// The whole pages of a piece: its neighbours may live on for long.
void give_back(uint8_t* piece, size_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto start = (reinterpret_cast<uintptr_t>(piece) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(piece) + bytes) / page * page;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_DONTNEED);
}

std::mutex mutex;
std::weak_ptr<Slab> current;
int64_t expected = 0;

}  // namespace

std::shared_ptr<uint8_t> allocate_panels(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  const std::lock_guard lock(mutex);
  std::shared_ptr<Slab> slab = current.lock();
  uint8_t* data = slab ? slab->take(bytes) : nullptr;
  if (!data) {
    slab = std::make_shared<Slab>(std::max(bytes, expected > 0 ? static_cast<size_t>(expected) : kSlab));
    data = slab->take(bytes);
    current = slab;
  }
  return {data, [slab, bytes](uint8_t* piece) { give_back(piece, bytes); }};
}

void expect_panels(int64_t bytes) {
  const std::lock_guard lock(mutex);
  expected += bytes;
}

}  // namespace chandra
