// One float vector type for the instruction set this file is compiled for: `vec`, of `W` lanes.
//
// Everything is in an anonymous namespace: the same source is compiled once per instruction set, and a function of one
// may not stand in for that of another at link time. For the same reason no library templates are used here.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace chandra {
namespace {

#define CHANDRA_INLINE inline __attribute__((always_inline))

CHANDRA_INLINE float f32_from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

CHANDRA_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

CHANDRA_INLINE float bf16_to_f32(uint16_t x) { return f32_from_bits(static_cast<uint32_t>(x) << 16); }

CHANDRA_INLINE uint16_t f32_to_bf16(float x) {  // to nearest even; NaN stays NaN
  const uint32_t bits = bits_of(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#if defined(__F16C__)
CHANDRA_INLINE float f16_to_f32(uint16_t x) { return _cvtsh_ss(x); }
CHANDRA_INLINE uint16_t f32_to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
#else
CHANDRA_INLINE float f16_to_f32(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, rest = x & 0x7fff;
  if (rest >= 0x7c00) return f32_from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // Read as a float with too small an exponent, then scaled by 2^112: exact for subnormals as well.
  return f32_from_bits(sign | bits_of(f32_from_bits(rest << 13) * 0x1p112f));
}

CHANDRA_INLINE uint16_t f32_to_f16(float x) {  // to nearest even
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, rest = bits_of(x) & 0x7fffffff;
  if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (rest >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);
  if (rest < 0x38800000) {  // subnormal: let the adder round at 2^-24
    return static_cast<uint16_t>(sign | (bits_of(f32_from_bits(rest) + 0.5f) - bits_of(0.5f)));
  }
  return static_cast<uint16_t>(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}
#endif

#if defined(__AVX512F__)

using vec = __m512;
constexpr int W = 16;

CHANDRA_INLINE vec zero() { return _mm512_setzero_ps(); }
CHANDRA_INLINE vec set1(float x) { return _mm512_set1_ps(x); }
CHANDRA_INLINE vec load(const float* p) { return _mm512_loadu_ps(p); }
CHANDRA_INLINE void store(float* p, vec x) { _mm512_storeu_ps(p, x); }
CHANDRA_INLINE vec add(vec a, vec b) { return _mm512_add_ps(a, b); }
CHANDRA_INLINE vec sub(vec a, vec b) { return _mm512_sub_ps(a, b); }
CHANDRA_INLINE vec mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
CHANDRA_INLINE vec div(vec a, vec b) { return _mm512_div_ps(a, b); }
CHANDRA_INLINE vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
CHANDRA_INLINE vec max(vec a, vec b) { return _mm512_max_ps(a, b); }
CHANDRA_INLINE vec min(vec a, vec b) { return _mm512_min_ps(a, b); }
CHANDRA_INLINE float max_lane(vec a) { return _mm512_reduce_max_ps(a); }
CHANDRA_INLINE vec load_f16(const void* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
CHANDRA_INLINE vec splat_f16(const void* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(half)));
}
CHANDRA_INLINE void store_f16(void* p, vec x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
CHANDRA_INLINE vec load_bf16(const void* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
CHANDRA_INLINE vec load_i8(const void* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p))));
}
CHANDRA_INLINE vec load_nibbles(const uint8_t* p, bool high) {  // of W bytes, less 8
  __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  wide = high ? _mm512_srli_epi32(wide, 4) : _mm512_and_si512(wide, _mm512_set1_epi32(15));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(wide, _mm512_set1_epi32(8)));
}
// x where begin <= lane < end, otherwise `other`
CHANDRA_INLINE vec keep(vec x, int begin, int end, float other) {
  const uint32_t below_end = end >= W ? 0xffffu : (1u << end) - 1;
  const uint32_t below_begin = begin <= 0 ? 0u : (1u << begin) - 1;
  return _mm512_mask_blend_ps(static_cast<__mmask16>(below_end & ~below_begin), set1(other), x);
}
CHANDRA_INLINE vec exp2(vec x) {  // x <= 0
  const vec f = _mm512_reduce_ps(x, 8);
  const vec n = _mm512_roundscale_ps(x, 8);
  vec p = set1(1.54035304e-4f);
  for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    p = fma(p, f, set1(c));
  return _mm512_scalef_ps(p, n);
}
// In groups of 2F lanes: x = [x.low, y.low], y = [x.high, y.high].
template <int F>
CHANDRA_INLINE void exchange(vec& x, vec& y) {
  const vec a = x, b = y;
  if constexpr (F == 8) {
    x = _mm512_shuffle_f32x4(a, b, 0x44), y = _mm512_shuffle_f32x4(a, b, 0xee);
  } else if constexpr (F == 4) {
    x = _mm512_mask_shuffle_f32x4(a, 0xf0f0, b, b, 0xa0), y = _mm512_mask_shuffle_f32x4(b, 0x0f0f, a, a, 0xf5);
  } else if constexpr (F == 2) {
    x = _mm512_shuffle_ps(a, b, 0x44), y = _mm512_shuffle_ps(a, b, 0xee);
  } else {
    x = _mm512_mask_moveldup_ps(a, 0xaaaa, b), y = _mm512_mask_movehdup_ps(b, 0x5555, a);
  }
}

#elif defined(__AVX2__)

using vec = __m256;
constexpr int W = 8;

CHANDRA_INLINE vec zero() { return _mm256_setzero_ps(); }
CHANDRA_INLINE vec set1(float x) { return _mm256_set1_ps(x); }
CHANDRA_INLINE vec load(const float* p) { return _mm256_loadu_ps(p); }
CHANDRA_INLINE void store(float* p, vec x) { _mm256_storeu_ps(p, x); }
CHANDRA_INLINE vec add(vec a, vec b) { return _mm256_add_ps(a, b); }
CHANDRA_INLINE vec sub(vec a, vec b) { return _mm256_sub_ps(a, b); }
CHANDRA_INLINE vec mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
CHANDRA_INLINE vec div(vec a, vec b) { return _mm256_div_ps(a, b); }
CHANDRA_INLINE vec fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
CHANDRA_INLINE vec max(vec a, vec b) { return _mm256_max_ps(a, b); }
CHANDRA_INLINE vec min(vec a, vec b) { return _mm256_min_ps(a, b); }
CHANDRA_INLINE float max_lane(vec a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
CHANDRA_INLINE vec load_f16(const void* p) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
CHANDRA_INLINE vec splat_f16(const void* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(half)));
}
CHANDRA_INLINE void store_f16(void* p, vec x) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
CHANDRA_INLINE vec load_bf16(const void* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
CHANDRA_INLINE vec load_i8(const void* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p))));
}
CHANDRA_INLINE vec load_nibbles(const uint8_t* p, bool high) {
  __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  wide = high ? _mm256_srli_epi32(wide, 4) : _mm256_and_si256(wide, _mm256_set1_epi32(15));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(wide, _mm256_set1_epi32(8)));
}
CHANDRA_INLINE vec keep(vec x, int begin, int end, float other) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i inside =
      _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lane),
                          _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lane));
  return _mm256_blendv_ps(set1(other), x, _mm256_castsi256_ps(inside));
}
CHANDRA_INLINE vec exp2(vec x) {
  x = max(x, set1(-126.0f));  // 2^-126 is as good as 0 in a softmax
  const vec n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vec f = sub(x, n);
  vec p = set1(1.54035304e-4f);
  for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
    p = fma(p, f, set1(c));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent));
}
template <int F>
CHANDRA_INLINE void exchange(vec& x, vec& y) {
  const vec a = x, b = y;
  if constexpr (F == 4) {
    x = _mm256_permute2f128_ps(a, b, 0x20), y = _mm256_permute2f128_ps(a, b, 0x31);
  } else if constexpr (F == 2) {
    x = _mm256_shuffle_ps(a, b, 0x44), y = _mm256_shuffle_ps(a, b, 0xee);
  } else {
    x = _mm256_blend_ps(a, _mm256_moveldup_ps(b), 0xaa), y = _mm256_blend_ps(_mm256_movehdup_ps(a), b, 0xaa);
  }
}

#else

constexpr int W = 8;
struct vec {
  float lane[W];
};

template <class F>
CHANDRA_INLINE vec each(F&& f) {
  vec x;
  for (int i = 0; i < W; ++i) x.lane[i] = f(i);
  return x;
}
CHANDRA_INLINE vec set1(float x) {
  return each([&](int) { return x; });
}
CHANDRA_INLINE vec zero() { return set1(0.0f); }
CHANDRA_INLINE vec load(const float* p) {
  return each([&](int i) { return p[i]; });
}
CHANDRA_INLINE void store(float* p, vec x) { std::memcpy(p, x.lane, sizeof x.lane); }
CHANDRA_INLINE vec add(vec a, vec b) {
  return each([&](int i) { return a.lane[i] + b.lane[i]; });
}
CHANDRA_INLINE vec sub(vec a, vec b) {
  return each([&](int i) { return a.lane[i] - b.lane[i]; });
}
CHANDRA_INLINE vec mul(vec a, vec b) {
  return each([&](int i) { return a.lane[i] * b.lane[i]; });
}
CHANDRA_INLINE vec div(vec a, vec b) {
  return each([&](int i) { return a.lane[i] / b.lane[i]; });
}
CHANDRA_INLINE vec fma(vec a, vec b, vec c) {
  return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
CHANDRA_INLINE vec max(vec a, vec b) {
  return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
CHANDRA_INLINE vec min(vec a, vec b) {
  return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
CHANDRA_INLINE float max_lane(vec a) {
  float m = a.lane[0];
  for (int i = 1; i < W; ++i) m = a.lane[i] > m ? a.lane[i] : m;
  return m;
}
CHANDRA_INLINE vec load_f16(const void* p) {
  return each([&](int i) { return f16_to_f32(static_cast<const uint16_t*>(p)[i]); });
}
CHANDRA_INLINE vec splat_f16(const void* p) {
  uint16_t half;
  std::memcpy(&half, p, 2);
  return set1(f16_to_f32(half));
}
CHANDRA_INLINE void store_f16(void* p, vec x) {
  for (int i = 0; i < W; ++i) {
    const uint16_t half = f32_to_f16(x.lane[i]);
    std::memcpy(static_cast<uint8_t*>(p) + i * 2, &half, 2);
  }
}
CHANDRA_INLINE vec load_bf16(const void* p) {
  return each([&](int i) { return bf16_to_f32(static_cast<const uint16_t*>(p)[i]); });
}
CHANDRA_INLINE vec load_i8(const void* p) {
  return each([&](int i) { return static_cast<float>(static_cast<const int8_t*>(p)[i]); });
}
CHANDRA_INLINE vec load_nibbles(const uint8_t* p, bool high) {
  return each([&](int i) { return static_cast<float>((high ? p[i] >> 4 : p[i] & 15) - 8); });
}
CHANDRA_INLINE vec keep(vec x, int begin, int end, float other) {
  return each([&](int i) { return i >= begin && i < end ? x.lane[i] : other; });
}
CHANDRA_INLINE vec exp2(vec x) {
  return each([&](int i) {
    const float y = x.lane[i] > -126.0f ? x.lane[i] : -126.0f;
    const int n = static_cast<int>(y - 0.5f);
    const float f = y - static_cast<float>(n);
    float p = 1.54035304e-4f;
    for (float c : {1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f, 2.40226507e-1f, 6.93147181e-1f, 1.0f})
      p = p * f + c;
    return f32_from_bits(bits_of(p) + (static_cast<uint32_t>(n) << 23));
  });
}
template <int F>
CHANDRA_INLINE void exchange(vec& x, vec& y) {
  for (int group = 0; group < W; group += 2 * F) {
    for (int i = group; i < group + F; ++i) {
      const float high = x.lane[i + F];
      x.lane[i + F] = y.lane[i];
      y.lane[i] = high;
    }
  }
}

#endif

// In groups of 2F lanes: [fold of x, fold of y], where folding adds the upper half to the lower.
template <int F>
CHANDRA_INLINE vec combine(vec x, vec y) {
  exchange<F>(x, y);
  return add(x, y);
}

// The sum of all lanes, in the order of `combine`.
CHANDRA_INLINE float sum_lanes(vec x) {
  if constexpr (W == 16) x = combine<W / 2>(x, x);
  x = combine<4>(x, x);
  x = combine<2>(x, x);
  x = combine<1>(x, x);
  float lanes[W];
  store(lanes, x);
  return lanes[0];
}

CHANDRA_INLINE float exp2(float x) {
  float lanes[W];
  store(lanes, exp2(set1(x)));
  return lanes[0];
}

}  // namespace
}  // namespace chandra
