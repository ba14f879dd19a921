#include "weight.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "pool.h"
#include "scratch.h"
#include "slab.h"

namespace chandra {
namespace {

thread_local Buffer panel_scratch;

void pack_panel(const Source& source, int64_t rows, int64_t expert, int64_t index, uint8_t* out) {
  const int64_t first = index * kPanelRows;
  pack_rows(source, expert * rows + first, std::min<int64_t>(kPanelRows, rows - first), 0, out);
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
  const int64_t bytes = panel_bytes(source.layout, source.columns), panels = (rows + kPanelRows - 1) / kPanelRows;
  const int64_t all = experts * panels, chunk = std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, bytes));
  Pool::shared().run((all + chunk - 1) / chunk, [&](int64_t task, int) {
    for (int64_t p = task * chunk; p < std::min(all, (task + 1) * chunk); ++p) {
      if (!zeroed) std::memset(out + p * bytes, 0, static_cast<size_t>(bytes));
      pack_panel(source, rows, p / panels, p % panels, out + p * bytes);
    }
  });
}

Weight::Weight(const Source& source, int64_t experts, int64_t rows, bool repack)
    : source_(source), experts_(experts), rows_(rows) {
  const PanelSize size = panel_size(layout());
  blocks_ = (columns() + size.columns - 1) / size.columns;
  panel_bytes_ = panel_bytes(layout(), columns());
  if (!repack || experts * rows == 0 || blocks_ == 0) return;
  panels_ = allocate_panels(static_cast<size_t>(repacked_bytes(layout(), experts, rows, columns())));
  pack(source, experts, rows, panels_.get(), true);
  source_ = Source{.layout = source.layout, .rows = source.rows, .columns = source.columns};
}

Weight::Weight(Layout layout, int64_t experts, int64_t rows, int64_t columns, uint8_t* panels)
    : Weight(Source{.layout = layout, .rows = experts * rows, .columns = columns}, experts, rows, false) {
  panels_ = std::shared_ptr<uint8_t>(panels, [](uint8_t*) {});
}

const uint8_t* Weight::panel(int64_t expert, int64_t index) const {
  if (panels_) return panels_.get() + (expert * panels() + index) * panel_bytes_;
  uint8_t* out = panel_scratch.reserve<uint8_t>(panel_bytes_);
  if ((index + 1) * kPanelRows > rows_) std::memset(out, 0, static_cast<size_t>(panel_bytes_));
  pack_panel(source_, rows_, expert, index, out);
  return out;
}

void Weight::unpack_row(int64_t row, float* out) const {
  const int within = static_cast<int>(row % rows_ % kPanelRows);
  const uint8_t* p;
  if (panels_) {
    p = panel(row / rows_, row % rows_ / kPanelRows);
  } else {
    uint8_t* scratch = panel_scratch.reserve<uint8_t>(panel_bytes_);
    pack_rows(source_, row, 1, within, scratch);
    p = scratch;
  }
  kernels().unpack[static_cast<int>(layout())](p, blocks_, within, out);
}

}  // namespace chandra
