// How each format's panels are laid out and decoded: 32 columns of a panel become 8 vectors of bytes (vector i holds
// columns 4i to 4i + 3 of every row), scales and minimums. pack.cpp writes these layouts.
//
// "n bytes a row" below means 16 n bytes, 4 of each row in turn; "f16 a row" 16 values. The bytes of most formats come
// in the order of the GGUF blocks, only transposed.
#pragma once

#include "linear_kernels.h"
#include "panel_simd.h"

namespace chandra::panels {

constexpr int kVector = 4 * kPanelRows;  // bytes: four columns of a panel

// value = scale[g] * (w - 2^kOffset) + shift[g], g = 0, or 0 and 1 for the two halves of the 32 columns.
template <class S>
struct Decoded {
  typename S::B w[8];
  typename S::F scale[2], shift[2];
};

template <int kColumns, int kBytes, int kTopValue, int kOffsetBits, bool kMinimums, int kSteps = 1, int kGroups = 1,
          int kHeader = 0>
struct Quantized {
  static constexpr PanelSize size{kHeader, kColumns, kBytes};
  static constexpr int top = kTopValue;
  static constexpr int offset_bits = kOffsetBits;  // -1: no offset
  static constexpr bool minimums = kMinimums;
  static constexpr int steps = kSteps;  // times 32 columns that share their bytes: a run
  static constexpr int groups = kGroups;  // scales for 32 columns
};

// `part` selects the rows of a panel that S has lanes for.
template <class S>
CHANDRA_INLINE typename S::B bytes(const uint8_t* p, int i, int part) {
  return S::template load<typename S::B>(p + i * kVector + part * 4 * S::lanes);
}
template <class S>
CHANDRA_INLINE typename S::F half(const uint8_t* p, int part) {
  return S::load_f16(p + 2 * S::lanes * part);
}
template <class S>
CHANDRA_INLINE typename S::F f32(const uint8_t* p, int part) {
  return S::template load<typename S::F>(p + 4 * S::lanes * part);
}

// An f16 a row times a byte a row.
template <class S>
CHANDRA_INLINE typename S::F scaled(const uint8_t* d, const uint8_t* scales, int part) {
  return half<S>(d, part) * S::to_float(S::load_u8(scales + S::lanes * part));
}
template <class S>
CHANDRA_INLINE typename S::F scaled_signed(const uint8_t* d, const uint8_t* scales, int part) {
  return half<S>(d, part) * S::to_float(S::load_i8(scales + S::lanes * part));
}

// Columns 0 to 15 in the low nibbles, 16 to 31 in the high ones.
template <class S>
CHANDRA_INLINE void nibbles(const uint8_t* p, int part, typename S::B* w) {
  for (int i = 0; i < 4; ++i) {
    const auto v = bytes<S>(p, i, part);
    w[i] = S::field(v, 0, 15);
    w[i + 4] = S::field(v, 4, 15);
  }
}
// Bit 8 n + 4 h + j of a row's 32 becomes bit 4 h + n of byte j: two pairs of the bits of its index change places.
template <class T>
CHANDRA_INLINE T spread(T bits) {
  T moved = ((bits >> 14u) ^ bits) & 0x0000ccccu;
  bits ^= moved ^ moved << 14u;
  moved = ((bits >> 7u) ^ bits) & 0x00aa00aau;
  return bits ^ moved ^ moved << 7u;
}
// Bit i / 2 of every byte is the fifth bit of vector i for even i, bit 4 + i / 2 for odd i.
template <class S>
CHANDRA_INLINE void fifth_bits(const uint8_t* p, int part, typename S::B* w) {
  const auto v = bytes<S>(p, 0, part);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    w[i] = S::with_bits(w[i], i % 2 ? v >> static_cast<uint16_t>(i / 2) : v << static_cast<uint16_t>(4 - i / 2), 16);
}
// A field of 8 vectors, shifted up into place.
template <class S>
CHANDRA_INLINE void fields(const uint8_t* p, int part, int shift, uint8_t mask, typename S::B* w) {
  for (int i = 0; i < 8; ++i) w[i] = S::field(bytes<S>(p, i, part), shift, mask);
}

// f16 d a row | 16 bytes of nibbles a row
struct Q4_0 : Quantized<32, 16 * 18, 15, 3, false> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int, int part, Decoded<S>& out) {
    out.scale[0] = half<S>(p, part);
    nibbles<S>(p + 32, part, out.w);
  }
};
// f16 d a row | f16 m a row | 16 bytes of nibbles a row
struct Q4_1 : Quantized<32, 16 * 20, 15, -1, true> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int, int part, Decoded<S>& out) {
    out.scale[0] = half<S>(p, part);
    out.shift[0] = half<S>(p + 32, part);
    nibbles<S>(p + 64, part, out.w);
  }
};
// f16 d a row | 4 bytes of fifth bits a row | 16 bytes of nibbles a row
struct Q5_0 : Quantized<32, 16 * 22, 31, 4, false> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int, int part, Decoded<S>& out) {
    out.scale[0] = half<S>(p, part);
    nibbles<S>(p + 96, part, out.w);
    fifth_bits<S>(p + 32, part, out.w);
  }
};
// f16 d a row | f16 m a row | 4 bytes of fifth bits a row | 16 bytes of nibbles a row
struct Q5_1 : Quantized<32, 16 * 24, 31, -1, true> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int, int part, Decoded<S>& out) {
    out.scale[0] = half<S>(p, part);
    out.shift[0] = half<S>(p + 32, part);
    nibbles<S>(p + 128, part, out.w);
    fifth_bits<S>(p + 64, part, out.w);
  }
};
// f16 d a row | 32 bytes a row, 128 added
struct Q8_0 : Quantized<32, 16 * 34, 255, 7, false> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int, int part, Decoded<S>& out) {
    out.scale[0] = half<S>(p, part);
    for (int i = 0; i < 8; ++i) out.w[i] = bytes<S>(p + 32, i, part);
  }
};
// Header: f32 scale a row. 32 bytes a row, 128 added
struct Int8 : Quantized<32, 16 * 32, 255, 7, false, 1, 1, 64> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t* header, const uint8_t* p, int, int part, Decoded<S>& out) {
    out.scale[0] = f32<S>(header, part);
    for (int i = 0; i < 8; ++i) out.w[i] = bytes<S>(p, i, part);
  }
};
// f16 scale a row | f16 zero a row | for every 32 columns 16 bytes of nibbles a row
template <int kGroup>
struct Int4 : Quantized<kGroup, 16 * (4 + kGroup / 2), 15, -1, true> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int run, int part, Decoded<S>& out) {
    out.scale[0] = half<S>(p, part);
    out.shift[0] = -half<S>(p + 32, part) * out.scale[0];
    nibbles<S>(p + 64 + 256 * run, part, out.w);
  }
};

alignas(16) constexpr uint8_t kIq4Levels[16] = {  // 128 added
    1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kMxfp4Levels[16] = {  // doubled, 16 added
    16, 17, 18, 19, 20, 22, 24, 28, 16, 15, 14, 13, 12, 10, 8, 4};

template <class S>
CHANDRA_INLINE void levels(const uint8_t* table, typename S::B* w) {
  for (int i = 0; i < 8; ++i) w[i] = S::lookup(table, w[i]);
}
// As Q4_0
struct Iq4Nl : Quantized<32, 16 * 18, 255, 7, false> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int, int part, Decoded<S>& out) {
    out.scale[0] = half<S>(p, part);
    nibbles<S>(p + 32, part, out.w);
    levels<S>(kIq4Levels, out.w);
  }
};
// f16 d a row | for every 32 columns: i8 scale a row | then 16 bytes of nibbles a row
struct Iq4Xs : Quantized<256, 16 * (2 + 8 + 128), 255, 7, false> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int run, int part, Decoded<S>& out) {
    out.scale[0] = scaled_signed<S>(p, p + 32 + 16 * run, part);
    nibbles<S>(p + 160 + 256 * run, part, out.w);
    levels<S>(kIq4Levels, out.w);
  }
};
// e8 a row | 16 bytes of nibbles a row
struct Mxfp4 : Quantized<32, 16 * 17, 31, 4, false> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int, int part, Decoded<S>& out) {
    const auto e = S::load_u8(p + S::lanes * part);
    out.scale[0] = (typename S::F)(e << 23) * 0.5f;  // 2^(e - 128); an e of 0 is so small that 0 will do
    nibbles<S>(p + 16, part, out.w);
    levels<S>(kMxfp4Levels, out.w);
  }
};

// d, dmin | u8 scale, u8 minimum for every 32 columns | 128 bytes a row, as in the GGUF block
struct Q4_K : Quantized<256, 16 * (4 + 16 + 128), 15, -1, true, 2> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int run, int part, Decoded<S>& out) {
    const uint8_t* scales = p + 64 + 32 * (2 * run + step);
    out.scale[0] = scaled<S>(p, scales, part);
    out.shift[0] = -scaled<S>(p + 32, scales + 16, part);
    fields<S>(p + 320 + 512 * run, part, 4 * step, 15, out.w);
  }
};
// As Q4_K, then 32 bytes of fifth bits a row
struct Q5_K : Quantized<256, 16 * (4 + 16 + 128 + 32), 31, -1, true, 2> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t* header, const uint8_t* p, int run, int part, Decoded<S>& out) {
    Q4_K::decode<S, step>(header, p, run, part, out);
    for (int i = 0; i < 8; ++i) {
      const auto v = bytes<S>(p + Q4_K::size.bytes, i, part) >> static_cast<uint16_t>(2 * run);
      out.w[i] = S::with_bits(out.w[i], v << static_cast<uint16_t>(4 - step), 16);
    }
  }
};
// d | i8 scales of 16 columns | for every 128 columns: 64 bytes of nibbles and 32 of upper bit pairs a row
struct Q6_K : Quantized<256, 16 * (2 + 16 + 192), 63, 5, false, 4, 2> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int run, int part, Decoded<S>& out) {
    for (int g = 0; g < 2; ++g) out.scale[g] = scaled_signed<S>(p, p + 32 + 128 * run + 32 * step + 16 * g, part);
    const uint8_t* low = p + 288 + 1536 * run;
    fields<S>(low + 512 * (step % 2), part, 4 * (step / 2), 15, out.w);
    for (int i = 0; i < 8; ++i) {
      const auto v = bytes<S>(low + 1024, i, part);
      const auto moved = step < 3 ? v << static_cast<uint16_t>(4 - 2 * step % 6) : v >> static_cast<uint16_t>(2);
      out.w[i] = S::with_bits(out.w[i], moved, 0x30);
    }
  }
};
// d, dmin | u8 scale of 16 columns, u8 minimum, twice for every 32 | 64 bytes a row
struct Q2_K : Quantized<256, 16 * (4 + 32 + 64), 3, -1, true, 4, 2> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int run, int part, Decoded<S>& out) {
    for (int g = 0; g < 2; ++g) {
      const uint8_t* scales = p + 64 + 256 * run + 64 * step + 32 * g;
      out.scale[g] = scaled<S>(p, scales, part);
      out.shift[g] = -scaled<S>(p + 32, scales + 16, part);
    }
    fields<S>(p + 576 + 512 * run, part, 2 * step, 3, out.w);
  }
};
// d | i8 scales of 16 columns | 64 bytes of bit pairs a row | 32 bytes of third bits a row
struct Q3_K : Quantized<256, 16 * (2 + 16 + 64 + 32), 7, 2, false, 4, 2> {
  template <class S, int step>
  static CHANDRA_INLINE void decode(const uint8_t*, const uint8_t* p, int run, int part, Decoded<S>& out) {
    for (int g = 0; g < 2; ++g) out.scale[g] = scaled_signed<S>(p, p + 32 + 128 * run + 32 * step + 16 * g, part);
    fields<S>(p + 288 + 512 * run, part, 2 * step, 3, out.w);
    for (int i = 0; i < 8; ++i) {
      const auto v = bytes<S>(p + 288 + 1024, i, part) >> static_cast<uint16_t>(4 * run);
      const auto moved = step < 3 ? v << static_cast<uint16_t>(2 - step % 3) : v >> static_cast<uint16_t>(1);
      out.w[i] = S::with_bits(out.w[i], moved, 4);
    }
  }
};

// Float formats: weight(p, j, part) is column j of a block of size.columns, as floats.

struct F32 {
  static constexpr PanelSize size{0, 1, 64};
  template <class S>
  static CHANDRA_INLINE typename S::F weight(const uint8_t* p, int, int part) {
    return f32<S>(p, part);
  }
};
struct F16 {
  static constexpr PanelSize size{0, 1, 32};
  template <class S>
  static CHANDRA_INLINE typename S::F weight(const uint8_t* p, int, int part) {
    return half<S>(p, part);
  }
};
struct Bf16 {
  static constexpr PanelSize size{0, 1, 32};
  template <class S>
  static CHANDRA_INLINE typename S::F weight(const uint8_t* p, int, int part) {
    return S::load_bf16(p + 2 * S::lanes * part);
  }
};

alignas(64) constexpr float kNf4Levels[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

// f32 absmax a row | 32 bytes a row: column j of eight is nibble j of the 4 bytes
struct Nf4 {
  static constexpr PanelSize size{0, 64, 16 * 36};
  template <class S>
  static CHANDRA_INLINE typename S::F weight(const uint8_t* p, int j, int part) {
    const auto v = (typename S::U)bytes<S>(p + 64, j / 8, part);
    return S::lookup(kNf4Levels, v, 4 * (j % 8)) * f32<S>(p, part);
  }
};

constexpr PanelSize kSizes[kLayouts] = {
    F32::size,  F16::size,  Bf16::size,  Nf4::size,   Q4_0::size,  Q4_1::size, Q5_0::size,
    Q5_1::size, Q8_0::size, Q2_K::size,  Q3_K::size,  Q4_K::size,  Q5_K::size, Q6_K::size,
    Iq4Nl::size, Iq4Xs::size, Mxfp4::size, Int8::size, Int4<32>::size, Int4<64>::size, Int4<128>::size,
};

}  // namespace chandra::panels
