// Writes the panels of panels.h from the stored formats. The layouts of those are documented in chandra.quant.
#include <array>
#include <cmath>
#include <cstring>

#include "panels.h"
#include "weight.h"

namespace chandra {
namespace {

constexpr int kVector = 4 * kPanelRows;

inline void put2(uint8_t* out, int row, const void* half) { std::memcpy(out + 2 * row, half, 2); }
inline void put4(uint8_t* out, int row, uint32_t four) { std::memcpy(out + 4 * row, &four, 4); }

// n bytes of a row, four by four into the vectors of the panel.
template <int n>
inline void put(uint8_t* out, int row, const uint8_t* bytes) {
  for (int i = 0; i < n / 4; ++i) std::memcpy(out + i * kVector + 4 * row, bytes + 4 * i, 4);
}

inline void put_bits(uint8_t* out, int row, const uint8_t* bits) {
  uint32_t four;
  std::memcpy(&four, bits, 4);
  put4(out, row, panels::spread(four));
}

// One block of one row, for every GGUF format.

void pack_q4_0(const uint8_t* b, int r, uint8_t* out) {  // and IQ4_NL
  put2(out, r, b);
  put<16>(out + 32, r, b + 2);
}
void pack_q4_1(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b);
  put2(out + 32, r, b + 2);
  put<16>(out + 64, r, b + 4);
}
void pack_q5_0(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b);
  put_bits(out + 32, r, b + 2);
  put<16>(out + 96, r, b + 6);
}
void pack_q5_1(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b);
  put2(out + 32, r, b + 2);
  put_bits(out + 64, r, b + 4);
  put<16>(out + 128, r, b + 8);
}
void put_biased(uint8_t* out, int r, const uint8_t* bytes) {
  for (int i = 0; i < 8; ++i) {
    uint32_t four;
    std::memcpy(&four, bytes + 4 * i, 4);
    put4(out + i * kVector, r, four ^ 0x80808080u);
  }
}
void pack_q8_0(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b);
  put_biased(out + 32, r, b + 2);
}
void put_k_scales(const uint8_t* packed, int r, uint8_t* out) {
  for (int j = 0; j < 4; ++j) {
    out[32 * j + r] = packed[j] & 63;
    out[32 * j + 16 + r] = packed[j + 4] & 63;
    out[32 * (j + 4) + r] = static_cast<uint8_t>((packed[j + 8] & 15) | packed[j] >> 6 << 4);
    out[32 * (j + 4) + 16 + r] = static_cast<uint8_t>(packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4);
  }
}
void pack_q4_k(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b);
  put2(out + 32, r, b + 2);
  put_k_scales(b + 4, r, out + 64);
  put<128>(out + 320, r, b + 16);
}
void pack_q5_k(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b);
  put2(out + 32, r, b + 2);
  put_k_scales(b + 4, r, out + 64);
  put<128>(out + 320, r, b + 48);
  put<32>(out + 320 + 2048, r, b + 16);
}
void pack_q6_k(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b + 208);
  for (int s = 0; s < 16; ++s) out[32 + 16 * s + r] = b[192 + s];
  for (int run = 0; run < 2; ++run) {
    put<64>(out + 288 + 1536 * run, r, b + 64 * run);
    put<32>(out + 288 + 1536 * run + 1024, r, b + 128 + 32 * run);
  }
}
void pack_q2_k(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b + 80);
  put2(out + 32, r, b + 82);
  for (int s = 0; s < 16; ++s) {
    out[64 + 32 * s + r] = b[s] & 15;
    out[80 + 32 * s + r] = b[s] >> 4;
  }
  put<64>(out + 576, r, b + 16);
}
void pack_q3_k(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b + 108);
  for (int s = 0; s < 16; ++s) {
    const int low = b[96 + s % 8] >> (s / 8 * 4) & 15, high = b[104 + s % 4] >> (s / 4 * 2) & 3;
    out[32 + 16 * s + r] = static_cast<uint8_t>((low | high << 4) - 32);
  }
  put<64>(out + 288, r, b + 32);
  put<32>(out + 288 + 1024, r, b);
}
void pack_iq4_xs(const uint8_t* b, int r, uint8_t* out) {
  put2(out, r, b);
  for (int j = 0; j < 8; ++j) {
    const int low = b[4 + j / 2] >> (j % 2 * 4) & 15, high = b[2 + j / 4] >> (j % 4 * 2) & 3;
    out[32 + 16 * j + r] = static_cast<uint8_t>((low | high << 4) - 32);
    put<16>(out + 160 + 256 * j, r, b + 8 + 16 * j);
  }
}
void pack_mxfp4(const uint8_t* b, int r, uint8_t* out) {
  out[r] = b[0];
  put<16>(out + 16, r, b + 1);
}
void pack_f32(const uint8_t* b, int r, uint8_t* out) { std::memcpy(out + 4 * r, b, 4); }
void pack_f16(const uint8_t* b, int r, uint8_t* out) { put2(out, r, b); }

// All rows of a block before the next block: what is written then stays in the first-level cache.
template <void (*kPack)(const uint8_t*, int, uint8_t*)>
void pack_blocks(const Source& s, int64_t first, int64_t count, int at, uint8_t* panel) {
  const PanelSize size = panel_size(s.layout);
  const int64_t blocks = s.columns / size.columns, bytes = stored_block_bytes(s.layout), row_bytes = blocks * bytes;
  const uint8_t* data = s.data + first * row_bytes;
  for (int64_t b = 0; b < blocks; ++b)
    for (int r = 0; r < count; ++r) kPack(data + r * row_bytes + b * bytes, at + r, panel + b * size.bytes);
}

void pack_int8(const Source& s, int64_t first, int64_t count, int at, uint8_t* panel) {
  const PanelSize size = panel_size(s.layout);
  for (int r = 0; r < count; ++r) {
    std::memcpy(panel + 4 * (at + r), static_cast<const float*>(s.scales) + first + r, 4);
    const uint8_t* row = s.data + (first + r) * s.columns;
    uint8_t* out = panel + size.header;
    for (int64_t c = 0; c < s.columns; c += kBlock, out += size.bytes) {
      uint8_t rest[kBlock] = {};
      const bool whole = c + kBlock <= s.columns;
      if (!whole) std::memcpy(rest, row + c, static_cast<size_t>(s.columns - c));
      put_biased(out, at + r, whole ? row + c : rest);
    }
  }
}

// Eight nibbles as the low halves of eight bytes, in order.
inline uint64_t widen(uint32_t nibbles) {
  uint64_t x = nibbles;
  x = (x | x << 16) & 0x0000ffff0000ffffu;
  x = (x | x << 8) & 0x00ff00ff00ff00ffu;
  return (x | x << 4) & 0x0f0f0f0f0f0f0f0fu;
}

void pack_int4(const Source& s, int64_t first, int64_t count, int at, uint8_t* panel) {
  const PanelSize size = panel_size(s.layout);
  const int64_t groups = s.columns / size.columns;
  const uint8_t* scales = static_cast<const uint8_t*>(s.scales);
  const uint8_t* zeros = static_cast<const uint8_t*>(s.zeros);
  for (int r = 0; r < count; ++r) {
    const uint8_t* row = s.data + (first + r) * (s.columns / 2);
    for (int64_t g = 0; g < groups; ++g) {
      uint8_t* out = panel + g * size.bytes;
      put2(out, at + r, scales + 2 * ((first + r) * groups + g));
      put2(out + 32, at + r, zeros + 2 * ((first + r) * groups + g));
      for (int j = 0; j < size.columns / kBlock; ++j, row += 16) {
        uint32_t in[4];
        std::memcpy(in, row, 16);
        const uint64_t bytes[2] = {widen(in[0]) | widen(in[2]) << 4, widen(in[1]) | widen(in[3]) << 4};
        put<16>(out + 64 + 256 * j, at + r, reinterpret_cast<const uint8_t*>(bytes));
      }
    }
  }
}

// The dynamic 8-bit type of chandra.quant.nf4.
const std::array<float, 256>& dynamic_map() {
  static const std::array<float, 256> map = [] {
    std::array<float, 256> levels{};
    int at = 0;
    for (int decade = 6; decade >= 0; --decade)
      for (int i = (1 << decade) - 1; i >= 0; --i) {
        const double middle = 0.1 + 0.9 * (i + 0.5) / (1 << decade);
        levels[static_cast<size_t>(at++)] = static_cast<float>(-middle * std::pow(10.0, decade - 6));
      }
    levels[static_cast<size_t>(at)] = 0.0f;
    for (int i = 0; i < at; ++i) levels[static_cast<size_t>(at + 1 + i)] = -levels[static_cast<size_t>(at - 1 - i)];
    levels[255] = 1.0f;
    return levels;
  }();
  return map;
}

float nf4_absmax(const Source& s, int64_t block) {
  if (!s.nested_absmax) return static_cast<const float*>(s.absmax)[block];
  const uint8_t q = static_cast<const uint8_t*>(s.absmax)[block];
  return dynamic_map()[q] * s.nested_absmax[block / 256] + *s.nested_offset;
}

void pack_nf4(const Source& s, int64_t first, int64_t count, int at, uint8_t* panel) {
  const PanelSize size = panel_size(s.layout);
  const int64_t blocks = s.columns / size.columns;
  for (int r = 0; r < count; ++r) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t block = (first + r) * blocks + b;
      uint8_t* out = panel + b * size.bytes;
      const float absmax = nf4_absmax(s, block);
      std::memcpy(out + 4 * (at + r), &absmax, 4);
      for (int i = 0; i < 8; ++i) {
        uint32_t x;
        std::memcpy(&x, s.data + block * 32 + 4 * i, 4);
        put4(out + 64 + i * kVector, at + r, (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4);
      }
    }
  }
}

void pack_unaligned_nf4(const Source& s, int64_t first, int64_t count, int at, uint8_t* panel) {
  for (int r = 0; r < count; ++r) {
    for (int64_t c = 0; c < s.columns; ++c) {
      const int64_t i = (first + r) * s.columns + c;
      const float value = panels::kNf4Levels[s.data[i / 2] >> (i % 2 ? 0 : 4) & 15] * nf4_absmax(s, i / 64);
      std::memcpy(panel + c * kVector + 4 * (at + r), &value, 4);
    }
  }
}

}  // namespace

PanelSize panel_size(Layout layout) { return panels::kSizes[static_cast<int>(layout)]; }

int stored_block_bytes(Layout layout) {
  switch (layout) {
    case Layout::f32: return 4;
    case Layout::f16:
    case Layout::bf16: return 2;
    case Layout::iq4_nl:
    case Layout::q4_0: return 18;
    case Layout::q4_1: return 20;
    case Layout::q5_0: return 22;
    case Layout::q5_1: return 24;
    case Layout::q8_0: return 34;
    case Layout::q2_k: return 84;
    case Layout::q3_k: return 110;
    case Layout::q4_k: return 144;
    case Layout::q5_k: return 176;
    case Layout::q6_k: return 210;
    case Layout::iq4_xs: return 136;
    case Layout::mxfp4: return 17;
    default: return 0;
  }
}

void pack_rows(const Source& s, int64_t first, int64_t count, int at, uint8_t* panel) {
  if (const PackKernel pack = kernels().pack[static_cast<int>(s.layout)]; pack && count == kPanelRows) {
    const int64_t row_bytes = s.columns / panel_size(s.layout).columns * stored_block_bytes(s.layout);
    return pack(s.data + first * row_bytes, row_bytes, panel);
  }
  if (s.unaligned_nf4) return pack_unaligned_nf4(s, first, count, at, panel);
  switch (s.layout) {
    case Layout::f32: return pack_blocks<pack_f32>(s, first, count, at, panel);
    case Layout::f16:
    case Layout::bf16: return pack_blocks<pack_f16>(s, first, count, at, panel);
    case Layout::nf4: return pack_nf4(s, first, count, at, panel);
    case Layout::iq4_nl:
    case Layout::q4_0: return pack_blocks<pack_q4_0>(s, first, count, at, panel);
    case Layout::q4_1: return pack_blocks<pack_q4_1>(s, first, count, at, panel);
    case Layout::q5_0: return pack_blocks<pack_q5_0>(s, first, count, at, panel);
    case Layout::q5_1: return pack_blocks<pack_q5_1>(s, first, count, at, panel);
    case Layout::q8_0: return pack_blocks<pack_q8_0>(s, first, count, at, panel);
    case Layout::q2_k: return pack_blocks<pack_q2_k>(s, first, count, at, panel);
    case Layout::q3_k: return pack_blocks<pack_q3_k>(s, first, count, at, panel);
    case Layout::q4_k: return pack_blocks<pack_q4_k>(s, first, count, at, panel);
    case Layout::q5_k: return pack_blocks<pack_q5_k>(s, first, count, at, panel);
    case Layout::q6_k: return pack_blocks<pack_q6_k>(s, first, count, at, panel);
    case Layout::iq4_xs: return pack_blocks<pack_iq4_xs>(s, first, count, at, panel);
    case Layout::mxfp4: return pack_blocks<pack_mxfp4>(s, first, count, at, panel);
    case Layout::int8: return pack_int8(s, first, count, at, panel);
    case Layout::int4_g32:
    case Layout::int4_g64:
    case Layout::int4_g128: return pack_int4(s, first, count, at, panel);
    case Layout::count: break;
  }
}

}  // namespace chandra
