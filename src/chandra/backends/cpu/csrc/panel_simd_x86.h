// AVX2 and AVX-512 versions of panel_simd.h. To be included by the translation units compiled for them only.
#pragma once

#include <immintrin.h>

#include "panel_simd.h"

namespace chandra {
namespace {  // Avx2 is another class with AVX-VNNI than without

#if defined(__AVX512F__)

struct Avx512 : Simd<Avx512, 16> {
  static CHANDRA_INLINE B with_bits(B w, B v, uint8_t bits) {
    return (B)_mm512_ternarylogic_epi32((__m512i)w, (__m512i)v, (__m512i)mask(bits), 0xf8);
  }
  static CHANDRA_INLINE F max(F a, F b) { return (F)_mm512_max_ps((__m512)a, (__m512)b); }
  static CHANDRA_INLINE F min(F a, F b) { return (F)_mm512_min_ps((__m512)a, (__m512)b); }
  static CHANDRA_INLINE F fma(F a, F b, F c) { return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static CHANDRA_INLINE I load_u8(const uint8_t* p) { return (I)_mm512_cvtepu8_epi32(load<__m128i>(p)); }
  static CHANDRA_INLINE I load_i8(const uint8_t* p) { return (I)_mm512_cvtepi8_epi32(load<__m128i>(p)); }
  static CHANDRA_INLINE I load_u16(const uint8_t* p) { return (I)_mm512_cvtepu16_epi32(load<__m256i>(p)); }
  static CHANDRA_INLINE void store_i8(int8_t* p, I v) { store(p, _mm512_cvtepi32_epi8((__m512i)v)); }
  static CHANDRA_INLINE F load_f16(const uint8_t* p) {
    return (F)_mm512_cvtph_ps(load<__m256i>(p));
  }
  using Simd::lookup;
  static CHANDRA_INLINE B lookup(const uint8_t* levels, B nibbles) {
    const __m512i table = _mm512_broadcast_i32x4(load<__m128i>(levels));
    return (B)_mm512_shuffle_epi8(table, (__m512i)nibbles);
  }
  static CHANDRA_INLINE F lookup(const float* levels, U v, int shift) {
    // vpermps looks at the low four bits of an index only
    return (F)_mm512_permutexvar_ps((__m512i)(v >> static_cast<uint32_t>(shift)), _mm512_loadu_ps(levels));
  }
  static constexpr int at_once = 8;
  template <int kTop, int kTokens>
  static CHANDRA_INLINE void dot(I* acc, const B* w, const int8_t* x, int64_t stride, int n) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        int32_t four;
        std::memcpy(&four, x + t * stride + 4 * i, 4);
        acc[t] = (I)_mm512_dpbusd_epi32((__m512i)acc[t], (__m512i)w[i], _mm512_set1_epi32(four));
      }
    }
  }
};

#elif defined(__AVX2__)

struct Avx2 : Simd<Avx2, 8> {
  static CHANDRA_INLINE F max(F a, F b) { return (F)_mm256_max_ps((__m256)a, (__m256)b); }
  static CHANDRA_INLINE F min(F a, F b) { return (F)_mm256_min_ps((__m256)a, (__m256)b); }
  static CHANDRA_INLINE F fma(F a, F b, F c) { return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static CHANDRA_INLINE I load_u8(const uint8_t* p) { return (I)_mm256_cvtepu8_epi32(_mm_loadu_si64(p)); }
  static CHANDRA_INLINE I load_i8(const uint8_t* p) { return (I)_mm256_cvtepi8_epi32(_mm_loadu_si64(p)); }
  static CHANDRA_INLINE I load_u16(const uint8_t* p) { return (I)_mm256_cvtepu16_epi32(load<__m128i>(p)); }
  static CHANDRA_INLINE void store_i8(int8_t* p, I v) {
    const __m256i words = _mm256_packs_epi32((__m256i)v, (__m256i)v), bytes = _mm256_packs_epi16(words, words);
    const int32_t low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
    std::memcpy(p, &low, 4);
    std::memcpy(p + 4, &high, 4);
  }
  static CHANDRA_INLINE F load_f16(const uint8_t* p) {
    return (F)_mm256_cvtph_ps(load<__m128i>(p));
  }
  using Simd::lookup;
  static CHANDRA_INLINE B lookup(const uint8_t* levels, B nibbles) {
    const __m256i table = _mm256_broadcastsi128_si256(load<__m128i>(levels));
    return (B)_mm256_shuffle_epi8(table, (__m256i)nibbles);
  }
  static CHANDRA_INLINE F lookup(const float* levels, U v, int shift) {
    const __m256i index = (__m256i)(v >> static_cast<uint32_t>(shift));  // vpermps looks at the low three bits
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels), index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(levels + 8), index);
    return (F)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }

#if defined(__AVXVNNI__)
  static constexpr int at_once = 4;
  template <int kTop, int kTokens>
  static CHANDRA_INLINE void dot(I* acc, const B* w, const int8_t* x, int64_t stride, int n) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        acc[t] = (I)_mm256_dpbusd_avx_epi32((__m256i)acc[t], (__m256i)w[i], four(x + t * stride + 4 * i));
  }
#else
  // vpmaddubsw adds pairs in 16 bits: values up to kTop may be added kSafe times before they must become 32 bits. Of
  // values with 8 bits the top one goes apart, since not even one pair of products would fit.
  template <int kTop, int kTokens>
  static CHANDRA_INLINE void dot(I* acc, const B* w, const int8_t* x, int64_t stride, int n) {
    constexpr int kSafe = 32767 / (2 * 127 * (kTop < 128 ? kTop : 127));
    const __m256i ones = _mm256_set1_epi16(1);
    for (int t = 0; t < kTokens; ++t, x += stride) {
      __m256i sum = (__m256i)acc[t], narrow = _mm256_setzero_si256(), tops = _mm256_setzero_si256();
      for (int i = 0; i < n; ++i) {
        const __m256i xs = four(x + 4 * i);
        const __m256i low = (__m256i)(kTop < 128 ? w[i] : field(w[i], 0, 127));
        if constexpr (kTop >= 128) tops = _mm256_add_epi16(tops, _mm256_maddubs_epi16((__m256i)field(w[i], 7, 1), xs));
        narrow = _mm256_add_epi16(narrow, _mm256_maddubs_epi16(low, xs));
        if ((i + 1) % kSafe && i + 1 < n) continue;
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(narrow, ones));
        narrow = _mm256_setzero_si256();
      }
      if constexpr (kTop >= 128) sum = _mm256_add_epi32(sum, _mm256_madd_epi16(tops, _mm256_set1_epi16(128)));
      acc[t] = (I)sum;
    }
  }
#endif

 private:
  static CHANDRA_INLINE __m256i four(const int8_t* x) {
    int32_t bytes;
    std::memcpy(&bytes, x, 4);
    return _mm256_set1_epi32(bytes);
  }
};

#endif

}  // namespace
}  // namespace chandra
