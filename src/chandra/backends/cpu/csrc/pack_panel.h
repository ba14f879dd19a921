// Panels of 16 stored rows at once: several times as fast as row by row (pack.cpp, which documents the formats), so that
// weights can be read where they are.
#pragma once

#include "linear_kernels.h"
#include "panel_simd_x86.h"
#include "panels.h"

namespace chandra {
namespace {
namespace rows {

#if defined(__AVX512F__)
constexpr int kGroups = 4;  // of four rows, in one vector of words
#elif defined(__AVX2__)
constexpr int kGroups = 2;
#else
constexpr int kGroups = 1;
#endif
constexpr int kParts = 4 / kGroups;  // of a panel

typedef uint32_t Quad __attribute__((vector_size(16)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
#if defined(__AVX512F__)
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
#elif defined(__AVX2__)
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
#else
typedef Quad Words;
typedef uint16_t Halves __attribute__((vector_size(8)));
#endif

template <class V>
CHANDRA_INLINE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
CHANDRA_INLINE void store(uint8_t* p, V v) {
  std::memcpy(p, &v, sizeof v);
}

// 16 bytes of one row of each group.
CHANDRA_INLINE Words gather(const uint8_t* in, [[maybe_unused]] int64_t stride) {
#if defined(__AVX512F__)
  __m512i v = _mm512_castsi128_si512(load<__m128i>(in));
  v = _mm512_mask_broadcast_i32x4(v, 0x00f0, load<__m128i>(in + 4 * stride));
  v = _mm512_mask_broadcast_i32x4(v, 0x0f00, load<__m128i>(in + 8 * stride));
  return (Words)_mm512_mask_broadcast_i32x4(v, 0xf000, load<__m128i>(in + 12 * stride));
#elif defined(__AVX2__)
  return (Words)_mm256_inserti128_si256(_mm256_castsi128_si256(load<__m128i>(in)), load<__m128i>(in + 4 * stride), 1);
#else
  return load<Words>(in);
#endif
}

template <int kFirst, int... i>  // words kFirst and kFirst + 1 of a group of a, each followed by that of b
CHANDRA_INLINE Words mix(Words a, Words b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 4 * 4 + kFirst + i % 4 / 2 + i % 2 * 4 * kGroups)...);
}
template <int kFirst, int... i>  // the first or last two words of a group of a, then those of b
CHANDRA_INLINE Words join(Words a, Words b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i / 4 * 4 + kFirst + i % 2 + i % 4 / 2 * 4 * kGroups)...);
}

// words[c]: word c of 16 bytes, of all rows of a part.
CHANDRA_INLINE void transpose(const uint8_t* in, int64_t stride, int part, Words* words) {
  constexpr auto lanes = std::make_integer_sequence<int, 4 * kGroups>{};
  in += 4 * kGroups * part * stride;
  const Words a = gather(in, stride), b = gather(in + stride, stride), c = gather(in + 2 * stride, stride),
              d = gather(in + 3 * stride, stride);
  const Words ab = mix<0>(a, b, lanes), cd = mix<0>(c, d, lanes), ef = mix<2>(a, b, lanes), gh = mix<2>(c, d, lanes);
  words[0] = join<0>(ab, cd, lanes), words[1] = join<2>(ab, cd, lanes);
  words[2] = join<0>(ef, gh, lanes), words[3] = join<2>(ef, gh, lanes);
}

CHANDRA_INLINE void put_words(Words words, int part, uint8_t* out) { store(out + 16 * kGroups * part, words); }
CHANDRA_INLINE void put_halves(Words words, int part, uint8_t* out) {
  store(out + 8 * kGroups * part, __builtin_convertvector(words, Halves));
}

// n bytes of every row, four by four into the vectors of the panel; `flip` changes bits of them.
template <int n>
CHANDRA_INLINE void put(const uint8_t* in, int64_t stride, uint8_t* out, uint32_t flip = 0) {
#pragma GCC unroll 8
  for (int i = 0; i < n / 16; ++i) {
    for (int part = 0; part < kParts; ++part) {
      Words words[4];
      transpose(in + 16 * i, stride, part, words);
      for (int c = 0; c < 4; ++c) put_words(words[c] ^ flip, part, out + panels::kVector * (4 * i + c));
    }
  }
}
template <int n>
CHANDRA_INLINE void put_small(const uint8_t* in, int64_t stride, uint8_t* out) {
#pragma GCC unroll 16
  for (int r = 0; r < kPanelRows; ++r) std::memcpy(out + n * r, in + r * stride, n);
}

// x[j] becomes byte j of all rows, when the vectors held n bytes of each of 16 rows, row after row.
template <int n>
CHANDRA_INLINE void split(Bytes* x) {
  for (int round = 0; round < 4; ++round) {  // each turns the bits of the bytes' places by one
    Bytes y[n];
    for (int i = 0; i < n / 2; ++i) {
      const Bytes a = x[i], b = x[i + n / 2];
      y[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      y[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::memcpy(x, y, sizeof y);
  }
}
// The same of 16 bytes of every row.
CHANDRA_INLINE void split_rows(const uint8_t* in, int64_t stride, Bytes* x) {
  for (int r = 0; r < kPanelRows; ++r) x[r] = load<Bytes>(in + r * stride);
  split<16>(x);
}

// The formats: one block of all rows.

struct Q4_0 {  // and IQ4_NL
  static constexpr int bytes = 18, panel = panels::Q4_0::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    put_small<2>(b, stride, out);
    put<16>(b + 2, stride, out + 32);
  }
};
struct Q4_1 {
  static constexpr int bytes = 20, panel = panels::Q4_1::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    for (int part = 0; part < kParts; ++part) {
      Words head[4];
      transpose(b, stride, part, head);
      put_halves(head[0], part, out);
      put_halves(head[0] >> 16u, part, out + 32);
    }
    put<16>(b + 4, stride, out + 64);
  }
};
struct Q5_0 {
  static constexpr int bytes = 22, panel = panels::Q5_0::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    for (int part = 0; part < kParts; ++part) {
      Words head[4];
      transpose(b, stride, part, head);
      put_halves(head[0], part, out);
      put_words(panels::spread(head[0] >> 16u | head[1] << 16u), part, out + 32);
    }
    put<16>(b + 6, stride, out + 96);
  }
};
struct Q5_1 {
  static constexpr int bytes = 24, panel = panels::Q5_1::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    for (int part = 0; part < kParts; ++part) {
      Words head[4];
      transpose(b, stride, part, head);
      put_halves(head[0], part, out);
      put_halves(head[0] >> 16u, part, out + 32);
      put_words(panels::spread(head[1]), part, out + 64);
    }
    put<16>(b + 8, stride, out + 128);
  }
};
struct Q8_0 {
  static constexpr int bytes = 34, panel = panels::Q8_0::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    put_small<2>(b, stride, out);
    put<32>(b + 2, stride, out + 32, 0x80808080u);
  }
};
struct Mxfp4 {
  static constexpr int bytes = 17, panel = panels::Mxfp4::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    put_small<1>(b, stride, out);
    put<16>(b + 1, stride, out + 16);
  }
};

// d, dmin and the packed scales and minimums, the first 16 bytes.
CHANDRA_INLINE void put_k_scales(const uint8_t* b, int64_t stride, uint8_t* out) {
  Bytes x[16];
  split_rows(b, stride, x);
  for (int j = 0; j < 4; ++j) {
    const Bytes scale = x[4 + j], minimum = x[8 + j], rest = x[12 + j];
    store(out + 64 + 32 * j, scale & 63);
    store(out + 64 + 32 * j + 16, minimum & 63);
    store(out + 64 + 32 * (j + 4), (rest & 15) | scale >> 6 << 4);
    store(out + 64 + 32 * (j + 4) + 16, rest >> 4 | minimum >> 6 << 4);
  }
  put_small<2>(b, stride, out);
  put_small<2>(b + 2, stride, out + 32);
}
struct Q4_K {
  static constexpr int bytes = 144, panel = panels::Q4_K::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    put_k_scales(b, stride, out);
    put<128>(b + 16, stride, out + 320);
  }
};
struct Q5_K {
  static constexpr int bytes = 176, panel = panels::Q5_K::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    put_k_scales(b, stride, out);
    put<128>(b + 48, stride, out + 320);
    put<32>(b + 16, stride, out + Q4_K::panel);
  }
};
struct Q6_K {
  static constexpr int bytes = 210, panel = panels::Q6_K::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    put_small<2>(b + 208, stride, out);
    Bytes scales[16];
    split_rows(b + 192, stride, scales);
    std::memcpy(out + 32, scales, sizeof scales);
    for (int run = 0; run < 2; ++run) {
      put<64>(b + 64 * run, stride, out + 288 + 1536 * run);
      put<32>(b + 128 + 32 * run, stride, out + 288 + 1536 * run + 1024);
    }
  }
};
struct Q2_K {
  static constexpr int bytes = 84, panel = panels::Q2_K::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    put_small<2>(b + 80, stride, out);
    put_small<2>(b + 82, stride, out + 32);
    Bytes scales[16];
    split_rows(b, stride, scales);
    for (int s = 0; s < 16; ++s) {
      store(out + 64 + 32 * s, scales[s] & 15);
      store(out + 80 + 32 * s, scales[s] >> 4);
    }
    put<64>(b + 16, stride, out + 576);
  }
};
struct Q3_K {
  static constexpr int bytes = 110, panel = panels::Q3_K::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    put_small<2>(b + 108, stride, out);
    Bytes x[16];
    split_rows(b + 94, stride, x);  // two bytes of values, twelve of scales, d
    for (int s = 0; s < 16; ++s) {
      const Bytes low = x[2 + s % 8] >> (s / 8 * 4) & 15, high = x[10 + s % 4] >> (s / 4 * 2) & 3;
      store(out + 32 + 16 * s, (low | high << 4) - 32);
    }
    put<64>(b + 32, stride, out + 288);
    put<32>(b, stride, out + 288 + 1024);
  }
};
struct Iq4Xs {
  static constexpr int bytes = 136, panel = panels::Iq4Xs::size.bytes;
  static CHANDRA_INLINE void pack(const uint8_t* b, int64_t stride, uint8_t* out) {
    put_small<2>(b, stride, out);
    Bytes x[16];
    split_rows(b, stride, x);
    for (int j = 0; j < 8; ++j) {
      const Bytes low = x[4 + j / 2] >> (j % 2 * 4) & 15, high = x[2 + j / 4] >> (j % 4 * 2) & 3;
      store(out + 32 + 16 * j, (low | high << 4) - 32);
    }
    put<128>(b + 8, stride, out + 160);
  }
};

}  // namespace rows

// All rows of a block before the next block: what is written then stays in the first-level cache.
template <class R>
void pack_panel(const uint8_t* data, int64_t row_bytes, uint8_t* panel) {
  const uint8_t* next = data + kPanelRows * row_bytes;  // the panel that most likely comes next
  for (int64_t at = 0; at < row_bytes; at += R::bytes, panel += R::panel, next += kPanelRows * R::bytes) {
#pragma GCC unroll 4
    for (int i = 0; i < kPanelRows * R::bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
    R::pack(data + at, row_bytes, panel);
  }
}

}  // namespace
}  // namespace chandra
