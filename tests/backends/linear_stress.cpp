// Computes with one weight from several threads while it is repacked; test_cpu_sanitizers.py builds it with sanitizers.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "isa.h"
#include "linear.h"
#include "pool.h"

namespace chandra {  // named by the code that chooses; this program has the portable ones
const Kernels avx2_kernels{}, avx2_vnni_kernels{}, avx512_kernels{};
}  // namespace chandra

using namespace chandra;

#define CHECK(condition) \
  if (!(condition)) std::printf("failed: %s (line %d)\n", #condition, __LINE__), std::exit(1)

struct File {
  explicit File(const std::vector<uint8_t>& bytes) : size(bytes.size()) {
    char name[] = "/tmp/chandra-stress-XXXXXX";
    const int file = mkstemp(name);
    CHECK(file >= 0 && write(file, bytes.data(), size) == static_cast<ssize_t>(size));
    data = static_cast<uint8_t*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0));
    CHECK(data != MAP_FAILED);
    close(file);
    unlink(name);
  }
  ~File() { munmap(data, size); }
  size_t size;
  uint8_t* data;
};

static std::vector<float> product(const Weight& weight, const std::vector<float>& x, int64_t n) {
  std::vector<float> out(static_cast<size_t>(n * weight.rows()));
  float* to = out.data();
  const Linear linear{&weight, nullptr};
  norm_linear(x.data(), n, nullptr, {&linear, 1}, &to);
  return out;
}

static void repack_while_computing(Layout layout, int64_t columns) {
  constexpr int64_t kRows = 16 * 9 + 5, kTokens = 11;
  std::mt19937 random(static_cast<unsigned>(layout));
  const int64_t block = stored_block_bytes(layout), bytes = kRows * columns / panel_size(layout).columns * block;
  std::vector<uint8_t> stored(static_cast<size_t>(bytes));
  for (uint8_t& byte : stored) byte = static_cast<uint8_t>(random() % 64);  // small scales, no NaN
  const File file(stored);
  std::vector<float> x(static_cast<size_t>(kTokens * columns));
  for (float& value : x) value = static_cast<float>(random() % 2001) / 1000 - 1;

  const Weight made(Source{.layout = layout, .rows = kRows, .columns = columns, .data = stored.data()}, 1, kRows,
                    Repack::now);
  const std::vector<float> right = product(made, x, kTokens);
  const Weight weight(Source{.layout = layout, .rows = kRows, .columns = columns, .data = file.data}, 1, kRows,
                      Repack::later);
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 6; ++i) {
        if (weight.due()) weight.repack();
        const std::vector<float> out = product(weight, x, kTokens);
        CHECK(!std::memcmp(out.data(), right.data(), out.size() * sizeof(float)));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(!weight.in_place());
  std::vector<float> row(static_cast<size_t>(columns));
  weight.unpack_row(kRows - 1, row.data());
}

int main() {
  set_isa("portable");
  Pool::shared().resize(3);
  for (Layout layout : {Layout::f32, Layout::f16, Layout::q4_0, Layout::q4_1, Layout::q5_0, Layout::q5_1, Layout::q8_0,
                        Layout::q2_k, Layout::q3_k, Layout::q4_k, Layout::q5_k, Layout::q6_k, Layout::iq4_nl,
                        Layout::iq4_xs, Layout::mxfp4})
    repack_while_computing(layout, panel_size(layout).columns == 256 ? 512 : 96);
}
