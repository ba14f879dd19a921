#include "weight.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <new>
#include <stdexcept>
#include <utility>

#include "pool.h"
#include "scratch.h"
#include "slab.h"

namespace chandra {
namespace {

constexpr int64_t kLookups = 128;  // rows whose pages stay: up to 64 KiB each
constexpr int64_t kPiece = 2 << 20;  // bytes of panels made before the pages they come from are dropped

thread_local Buffer panel_scratch;

void pack_panel(const Source& source, int64_t rows, int64_t expert, int64_t index, uint8_t* out) {
  const int64_t first = index * kPanelRows;
  pack_rows(source, expert * rows + first, std::min<int64_t>(kPanelRows, rows - first), 0, out);
}

// Panels [first, end), counted over all experts of so many rows, with all threads. `out` is where panel 0 begins.
void pack_panels(const Source& source, int64_t rows, int64_t first, int64_t end, uint8_t* out, bool zeroed) {
  const int64_t bytes = Weight::panel_bytes(source.layout, source.columns), panels = (rows + kPanelRows - 1) / kPanelRows;
  const int64_t chunk = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, bytes));
  Pool::shared().run((end - first + chunk - 1) / chunk, [&](int64_t task, int) {
    for (int64_t p = first + task * chunk; p < std::min(end, first + (task + 1) * chunk); ++p) {
      if (!zeroed) std::memset(out + p * bytes, 0, static_cast<size_t>(bytes));
      pack_panel(source, rows, p / panels, p % panels, out + p * bytes);
    }
  });
}

// Takes pages of a mapped file out of the process: those wholly between these addresses, or all that have bytes there.
// Returns where the rest begins.
const uint8_t* drop_pages(const uint8_t* begin, const uint8_t* end, bool edges) {
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t before = page - 1, at = reinterpret_cast<uintptr_t>(begin), stop = reinterpret_cast<uintptr_t>(end);
  const uintptr_t first = (edges ? at : at + before) / page * page, last = (edges ? stop + before : stop) / page * page;
  if (first >= last) return begin;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
  return reinterpret_cast<const uint8_t*>(last);
}

constexpr std::array<std::pair<std::string_view, Layout>, 22> kFormats{{
    {"F32", Layout::f32}, {"F16", Layout::f16}, {"BF16", Layout::bf16}, {"nf4", Layout::nf4},
    {"nf4-dq", Layout::nf4}, {"Q4_0", Layout::q4_0}, {"Q4_1", Layout::q4_1}, {"Q5_0", Layout::q5_0},
    {"Q5_1", Layout::q5_1}, {"Q8_0", Layout::q8_0}, {"Q2_K", Layout::q2_k}, {"Q3_K", Layout::q3_k},
    {"Q4_K", Layout::q4_k}, {"Q5_K", Layout::q5_k}, {"Q6_K", Layout::q6_k}, {"IQ4_NL", Layout::iq4_nl},
    {"IQ4_XS", Layout::iq4_xs}, {"MXFP4", Layout::mxfp4}, {"int8", Layout::int8}, {"int4-g32", Layout::int4_g32},
    {"int4-g64", Layout::int4_g64}, {"int4-g128", Layout::int4_g128},
}};

#if defined(__x86_64__)
bool has_avx_vnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && eax >> 4 & 1;
}
#endif

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  if (current_isa() == Isa::avx512) return avx512_kernels;
  static const Kernels& avx2 = has_avx_vnni() ? avx2_vnni_kernels : avx2_kernels;
  if (current_isa() == Isa::avx2) return avx2;
#endif
  return portable_kernels;
}

Layout Weight::layout_of(std::string_view format, int64_t columns) {
  for (const auto& [name, layout] : kFormats) {
    if (name != format) continue;
    if (layout == Layout::nf4 && columns % 64) return Layout::f32;
    if (layout != Layout::int8 && columns % panel_size(layout).columns)
      throw std::invalid_argument("the columns are not a multiple of the format's block");
    return layout;
  }
  throw std::invalid_argument("the CPU has no kernel for the format " + std::string(format));
}

int64_t Weight::panel_bytes(Layout layout, int64_t columns) {
  const PanelSize size = panel_size(layout);
  const int64_t bytes = size.header + (columns + size.columns - 1) / size.columns * size.bytes;
  return (bytes + 63) / 64 * 64;
}

int64_t Weight::repacked_bytes(Layout layout, int64_t experts, int64_t rows, int64_t columns) {
  return experts * ((rows + kPanelRows - 1) / kPanelRows) * panel_bytes(layout, columns);
}

void Weight::pack(const Source& source, int64_t experts, int64_t rows, uint8_t* out, bool zeroed) {
  pack_panels(source, rows, 0, experts * ((rows + kPanelRows - 1) / kPanelRows), out, zeroed);
}

Weight::Weight(const Source& source, int64_t experts, int64_t rows, Repack when)
    : source_(source), experts_(experts), rows_(rows), when_(when) {
  const PanelSize size = panel_size(layout());
  blocks_ = (columns() + size.columns - 1) / size.columns;
  panel_bytes_ = panel_bytes(layout(), columns());
  if (experts * rows == 0 || blocks_ == 0) when_ = Repack::never;
  if (when_ == Repack::later && !stored_block_bytes(layout())) when_ = Repack::now;
  if (when_ == Repack::lookup && !stored_block_bytes(layout())) when_ = Repack::never;
  if (when_ == Repack::later) expect_panels(repacked_bytes());
  if (when_ != Repack::now) return;
  memory_ = allocate_panels(static_cast<size_t>(repacked_bytes()));
  pack(source, experts, rows, memory_.get(), true);
  panels_ = memory_.get();
  source_ = Source{.layout = source.layout, .rows = source.rows, .columns = source.columns};
}

Weight::~Weight() {
  if (when_ == Repack::later && in_place()) expect_panels(-repacked_bytes());
}

void Weight::repack() const {
  const std::lock_guard lock(repacking_);
  if (!in_place()) {
    drop_pages(source_.data, source_.data + source_.rows * row_bytes(), true);
    return;
  }
  try {
    memory_ = allocate_panels(static_cast<size_t>(repacked_bytes()));
  } catch (const std::bad_alloc&) {
    return;
  }
  expect_panels(-repacked_bytes());
  const int64_t all = experts_ * panels(), piece = std::max<int64_t>(1, kPiece / panel_bytes_);
  const uint8_t* dropped = source_.data;
  for (int64_t first = 0; first < all; first += piece) {
    const int64_t end = std::min(all, first + piece);
    pack_panels(source_, rows_, first, end, memory_.get(), true);
    const int64_t rows = end / panels() * rows_ + end % panels() * kPanelRows;
    dropped = drop_pages(dropped, source_.data + rows * row_bytes(), false);
  }
  panels_.store(memory_.get(), std::memory_order_release);
}

Weight::Weight(Layout layout, int64_t experts, int64_t rows, int64_t columns, uint8_t* panels)
    : Weight(Source{.layout = layout, .rows = experts * rows, .columns = columns}, experts, rows, Repack::never) {
  panels_ = panels;
}

const uint8_t* Weight::panel(int64_t expert, int64_t index) const {
  if (const uint8_t* made = panels_.load(std::memory_order_acquire))
    return made + (expert * panels() + index) * panel_bytes_;
  uint8_t* out = panel_scratch.reserve<uint8_t>(panel_bytes_);
  if ((index + 1) * kPanelRows > rows_) std::memset(out, 0, static_cast<size_t>(panel_bytes_));
  pack_panel(source_, rows_, expert, index, out);
  return out;
}

int64_t Weight::row_bytes() const {
  return columns() / panel_size(layout()).columns * stored_block_bytes(layout());
}

void Weight::looked_up(int64_t rows) const {
  if (when_ != Repack::lookup || (looked_up_ += rows) < kLookups) return;
  looked_up_ = 0;
  drop_pages(source_.data, source_.data + source_.rows * row_bytes(), true);
}

void Weight::unpack_row(int64_t row, float* out) const {
  const int within = static_cast<int>(row % rows_ % kPanelRows);
  const uint8_t* p;
  if (!in_place()) {
    p = panel(row / rows_, row % rows_ / kPanelRows);
  } else {
    uint8_t* scratch = panel_scratch.reserve<uint8_t>(panel_bytes_);
    pack_rows(source_, row, 1, within, scratch);
    p = scratch;
  }
  kernels().unpack[static_cast<int>(layout())](p, blocks_, within, out);
}

}  // namespace chandra
